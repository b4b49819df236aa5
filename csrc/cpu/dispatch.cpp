// Chooses the instruction set once per process.
#include <cstdlib>
#include <cstring>

#include "papo/launch.h"
#include "row_kernels.h"

namespace papo {
namespace cpu {
namespace {

struct Choice {
  const RowKernels* kernels;
  bool available;
};

// PAPO_CPU_ISA is an upper limit: the best set that the machine has, from the named one down. A
// name that is unknown, or that the machine lacks, is refused by backends/extension.py.
const RowKernels* choose() {
  const char* wanted = std::getenv("PAPO_CPU_ISA");
  bool allowed = wanted == nullptr || *wanted == '\0';
#if defined(PAPO_X86)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Choice best_first[] = {
      {&kAvx512Bf16Kernels, avx512 && __builtin_cpu_supports("avx512bf16")},
      {&kAvx512Kernels, avx512},
      {&kAvx2Kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
  };
  for (const Choice& choice : best_first) {
    allowed = allowed || std::strcmp(wanted, choice.kernels->isa) == 0;
    if (allowed && choice.available) return choice.kernels;
  }
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
