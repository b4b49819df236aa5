// Chooses the instruction set once per process.
#include <cstdlib>
#include <cstring>

#include "papo/launch.h"
#include "row_kernels.h"

namespace papo {
namespace cpu {
namespace {

bool has_avx2() {
#if defined(PAPO_X86)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(PAPO_X86)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

// PAPO_CPU_ISA lowers the choice; a set that the machine lacks, or an unknown name, is refused by
// _native.py, and falls back here.
const RowKernels* choose() {
  const char* wanted = std::getenv("PAPO_CPU_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  const auto allows = [&](const char* name) { return any || std::strcmp(wanted, name) == 0; };
#if defined(PAPO_X86)
  if (allows("avx512") && has_avx512()) return &kAvx512Kernels;
  if ((allows("avx2") || allows("avx512")) && has_avx2()) return &kAvx2Kernels;
#endif
  return &kPortableKernels;
}

}  // namespace

const RowKernels& row_kernels() {
  static const RowKernels* const chosen = choose();
  return *chosen;
}

const char* isa_name() { return row_kernels().isa; }

}  // namespace cpu
}  // namespace papo
