// Asks the launchers of csrc/cuda what they would launch, without a GPU: the CUDA runtime is
// replaced by functions that answer as the device in question would, and the launch is printed.
//
//   capture REGISTERS TASK DTYPE OUT ROWS COLUMNS
//
// REGISTERS: a file of "symbol registers" lines. TASK: stats | loss | entropy | inplace | state.
// Pointers of the call are addresses in a made-up memory, in the order of `Array`.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <string>

#include "papo/launch.h"

namespace {

constexpr int kMultiprocessors = 132;
// How many clusters of 1, 2, 4, 8 and 16 blocks run at a time, with one block on a multiprocessor and
// with two: measured on an H200.
constexpr int kClusters[2][5] = {{132, 66, 30, 15, 7}, {264, 132, 62, 30, 14}};
constexpr int kSharedPerBlock = 232448;
constexpr int kSharedPerMultiprocessor = 233472;
constexpr int kRegistersPerMultiprocessor = 65536;
constexpr int kWarpsPerMultiprocessor = 64;

std::map<std::string, int>& registers() {
  static std::map<std::string, int> all;
  return all;
}
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
  return all;
}

int blocks_per_multiprocessor(const void* kernel, int threads, size_t shared) {
  const int warps = (threads + 31) / 32;
  const int by_registers =
      kRegistersPerMultiprocessor / ((registers()[names()[kernel]] + 7) / 8 * 8 * 32 * warps);
  const int by_shared = kSharedPerMultiprocessor / (static_cast<int>(shared) + 1024);
  const int by_warps = kWarpsPerMultiprocessor / warps;
  return std::min(by_registers, std::min(by_shared, by_warps));
}

int cluster_of(const cudaLaunchConfig_t* config) {
  int cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      cluster = static_cast<int>(config->attrs[i].val.clusterDim.x);
    }
  }
  return cluster;
}

uint64_t address(int array) { return 0x100000000000ull * static_cast<uint64_t>(array + 1); }
template <typename T>
T* at(int array) {
  return reinterpret_cast<T*>(address(array));
}

// The arrays of a call; ARRAYS in issue_model/model.py has the same order.
enum Array {
  kLogits, kDlogits, kTargets, kState, kLogp, kEntropy, kPolarity, kLse, kStateOut, kAdvantages,
  kTokenWeight, kOldLogp, kTokenLoss, kWeight, kRatio, kClipSide
};

papo::DType dtype_of(const char* name) {
  if (std::strcmp(name, "bf16") == 0) return papo::DType::kBFloat16;
  return std::strcmp(name, "fp16") == 0 ? papo::DType::kFloat16 : papo::DType::kFloat32;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  names()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, struct CUstream_st*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "the stand-in for the CUDA runtime"; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = kMultiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = kSharedPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = kSharedPerMultiprocessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrClusterLaunch: *value = 1; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* kernel) {
  *a = {};
  a->ptxVersion = a->binaryVersion = 90;
  a->numRegs = registers()[names()[kernel]];
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                          int threads, size_t shared) {
  *blocks = blocks_per_multiprocessor(kernel, threads, shared);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* kernel,
                                                                   int threads, size_t shared,
                                                                   unsigned) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared);
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                           const cudaLaunchConfig_t* config) {
  const int each = blocks_per_multiprocessor(kernel, static_cast<int>(config->blockDim.x),
                                             config->dynamicSmemBytes);
  int log_cluster = 0;
  while (1 << log_cluster < cluster_of(config)) ++log_cluster;
  *clusters = each < 3 ? kClusters[each - 1][log_cluster]
                       : kClusters[1][log_cluster] * each / 2;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** arguments) {
  const int each = blocks_per_multiprocessor(kernel, static_cast<int>(config->blockDim.x),
                                             config->dynamicSmemBytes);
  std::printf("%s %u %u %d %zu %d", names()[kernel].c_str(), config->gridDim.x,
              config->blockDim.x, cluster_of(config), config->dynamicSmemBytes, each);
  // The kernels take one struct; what lies behind it on the stack is not read by them.
  const unsigned char* bytes = static_cast<const unsigned char*>(arguments[0]);
  std::printf(" ");
  for (int i = 0; i < 1024; ++i) std::printf("%02x", bytes[i]);
  std::printf("\n");
  return cudaSuccess;
}

}  // extern "C"

int main(int, char** argv) {
  std::ifstream file(argv[1]);
  std::string symbol;
  int count;
  while (file >> symbol >> count) registers()[symbol] = count;
  const std::string task = argv[2];
  const int64_t rows = std::atoll(argv[5]), cols = std::atoll(argv[6]);
  const papo::Matrix logits = {at<void>(kLogits), rows, cols, cols, dtype_of(argv[3])};
  papo::Matrix dlogits = {at<void>(task == "inplace" ? kLogits : kDlogits), rows, cols, cols,
                          dtype_of(argv[4])};
  const papo::RowParams row = {1.0, 0.0, cols, false};
  const papo::Launch launch = {1, 0, nullptr};
  papo::Status status = papo::Status::success();
  if (task == "stats") {
    const papo::TokenStatsOut out = {at<void>(kLogp), at<void>(kEntropy), nullptr, nullptr,
                                     nullptr};
    status = papo::cuda::launch_token_stats_fwd(logits, at<int64_t>(kTargets), nullptr, row, out,
                                                launch);
  } else if (task == "state") {
    const papo::TokenStatsGrads grads = {at<void>(kLogp), nullptr, nullptr, nullptr};
    status = papo::cuda::launch_token_stats_bwd(logits, at<int64_t>(kTargets), at<double>(kState),
                                                grads, row, dlogits, launch);
  } else {
    const papo::TokenInputs tokens = {at<int64_t>(kTargets), at<void>(kAdvantages),
                                      at<void>(kTokenWeight), at<void>(kOldLogp)};
    papo::Objective objective = {};
    objective.kl_estimator = papo::KlEstimator::kK3;
    objective.clip_low = objective.clip_high = 0.2;
    objective.negative_low = objective.negative_high = 0.2;
    objective.dual_clip = objective.log_ratio_limit = HUGE_VAL;
    objective.ratio_cap = objective.kl_limit = HUGE_VAL;
    objective.entropy_coef = task == "entropy" ? 0.01 : 0.0;
    const papo::Weighting weighting = {papo::WeightShape::kNone, 0.0, 0.0, nullptr, nullptr,
                                       nullptr};
    const papo::PolicyLossOut out = {at<void>(kTokenLoss), at<void>(kLogp),  at<void>(kEntropy),
                                     nullptr,              nullptr,          nullptr,
                                     at<void>(kRatio),     at<uint8_t>(kClipSide)};
    status = papo::cuda::launch_policy_loss(logits, tokens, objective, weighting, row, out, dlogits,
                                            launch);
  }
  if (!status.ok()) {
    std::fprintf(stderr, "%s\n", status.message);
    return 1;
  }
}
