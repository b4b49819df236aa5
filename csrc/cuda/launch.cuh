// The host side: devices, launches and the choice of template arguments.
#pragma once

#include "papo/launch.h"
#include "row_call.cuh"

namespace papo {
namespace cuda {

struct LaunchShape {
  int64_t blocks;
  int threads;
  int cluster;  // blocks of a cluster; `blocks` is a multiple of it
  int shared_bytes;
};

}  // namespace cuda
}  // namespace papo

#if defined(PAPO_EMULATED)

#include "emulated_launch.h"

#else

#include <mutex>
#include <vector>

namespace papo {
namespace cuda {

inline Status status_of(cudaError_t error) {
  if (error == cudaSuccess) return Status::success();
  cudaGetLastError();  // clears it: the next launch would report it again
  return {cudaGetErrorString(error)};
}

// Makes a device current for the launches of this scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    changed_ = error_ == cudaSuccess && before_ != device;
    if (changed_) error_ = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  Status status() const { return status_of(error_); }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

// What a device says of itself. A process asks once, and again if that failed.
struct Device {
  DeviceLimits limits;
  const char* error;
};

inline Device query_device(int device) {
  Device d = {};
  int major = 0, clusters = 0;
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
    if (error != cudaSuccess) d.error = status_of(error).message;
  };
  get(d.limits.multiprocessors, cudaDevAttrMultiProcessorCount);
  get(d.limits.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(d.limits.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  get(major, cudaDevAttrComputeCapabilityMajor);
  get(clusters, cudaDevAttrClusterLaunch);
  d.limits.max_cluster = major >= 9 && clusters != 0 ? kMaxCluster : 0;
  return d;
}

inline Device device_of(int device) {
  constexpr int kMost = 64;
  static std::mutex mutex;
  static bool known[kMost];
  static Device devices[kMost];
  if (device < 0 || device >= kMost) return {{}, "papo_kernels: no such CUDA device"};
  const std::lock_guard<std::mutex> lock(mutex);
  if (!known[device]) {
    devices[device] = query_device(device);
    known[device] = devices[device].error == nullptr;
  }
  return devices[device];
}

inline cudaLaunchConfig_t launch_config(const LaunchShape& shape, void* stream,
                                        cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  if (shape.cluster > 1) {
    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    attribute->val.clusterDim.y = 1;
    attribute->val.clusterDim.z = 1;
    config.attrs = attribute;
    config.numAttrs = 1;
  }
  return config;
}

// How many clusters of a kernel a device runs at a time, or blocks where shape.cluster is 1. 0
// means that it cannot run them or that the query failed. A process asks once per kernel, device
// and shape, and again if that failed, as it may for lack of memory. The kernel is also allowed all
// of the shared memory.
template <typename... Args>
int resident_clusters(void (*kernel)(Args...), const LaunchShape& shape, int device,
                      int needed_ptx) {
  struct Known {
    const void* kernel;
    int device, threads, cluster, shared_bytes, clusters;
  };
  static std::mutex mutex;
  static std::vector<Known> all;
  const void* id = reinterpret_cast<const void*>(kernel);
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Known& k : all) {
    if (k.kernel == id && k.device == device && k.threads == shape.threads &&
        k.cluster == shape.cluster && k.shared_bytes == shape.shared_bytes) {
      return k.clusters;
    }
  }
  int clusters = 0;
  cudaFuncAttributes attributes = {};
  bool ok = cudaFuncGetAttributes(&attributes, id) == cudaSuccess;
  // Code for an older architecture lacks what the kernel needs, whatever the device offers.
  const bool built =
      ok && attributes.ptxVersion >= needed_ptx && attributes.binaryVersion >= needed_ptx;
  if (built && shape.shared_bytes > 48 * 1024) {
    // All of it: a later shape of the same kernel must not take it away from an earlier one.
    ok = cudaFuncSetAttribute(id, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              device_of(device).limits.shared_per_block) == cudaSuccess &&
         cudaFuncSetAttribute(id, cudaFuncAttributePreferredSharedMemoryCarveout,
                              cudaSharedmemCarveoutMaxShared) == cudaSuccess;
  }
  if (built && ok && shape.cluster > 8) {
    ok = cudaFuncSetAttribute(id, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
  }
  if (built && ok && shape.cluster > 1) {
    cudaLaunchAttribute attribute = {};
    LaunchShape one = shape;
    one.blocks = shape.cluster;
    const cudaLaunchConfig_t config = launch_config(one, nullptr, &attribute);
    ok = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess;
  } else if (built && ok) {
    int blocks = 0;
    ok = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
             &blocks, kernel, shape.threads, static_cast<size_t>(shape.shared_bytes)) ==
         cudaSuccess;
    clusters = blocks * device_of(device).limits.multiprocessors;
  }
  if (!ok) {
    cudaGetLastError();  // clears it: the next launch would report it
    return 0;
  }
  all.push_back({id, device, shape.threads, shape.cluster, shape.shared_bytes, clusters});
  return clusters;
}

template <typename... Params, typename... Args>
Status launch_kernel(void (*kernel)(Params...), const LaunchShape& shape, void* stream,
                     const Args&... args) {
  cudaLaunchAttribute attribute = {};
  const cudaLaunchConfig_t config = launch_config(shape, stream, &attribute);
  return status_of(cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace cuda
}  // namespace papo

#endif  // PAPO_EMULATED

namespace papo {
namespace cuda {

// The oldest architectures whose code has a kernel: one that uses clusters, and any other.
constexpr int kClusterPtx = 90;
constexpr int kAnyPtx = 80;

// Launches a persistent grid of `work` clusters, or of as many as the device runs at a time.
template <typename... Params, typename... Args>
Status launch_persistent(void (*kernel)(Params...), LaunchShape shape, int64_t work,
                         const Launch& launch, const Args&... args) {
  const int clusters = resident_clusters(kernel, shape, launch.device, kAnyPtx);
  if (clusters == 0) return {"papo_kernels: a kernel does not fit this CUDA device"};
  shape.blocks = smaller(work, clusters) * shape.cluster;
  return launch_kernel(kernel, shape, launch.stream, args...);
}

// Calls fn(In{}, Out{}) with the stored types of a call. float32 logits may have a half-width
// gradient.
template <typename Fn>
Status with_types(const Matrix& logits, const Matrix& dlogits, const Fn& fn) {
  const DType out = dlogits.data == nullptr ? logits.dtype : dlogits.dtype;
  if (logits.dtype == DType::kBFloat16 && out == DType::kBFloat16) return fn(BF16{}, BF16{});
  if (logits.dtype == DType::kFloat16 && out == DType::kFloat16) return fn(F16{}, F16{});
  if (logits.dtype == DType::kFloat32 && out == DType::kFloat32) return fn(F32{}, F32{});
  if (logits.dtype == DType::kFloat32 && out == DType::kBFloat16) return fn(F32{}, BF16{});
  if (logits.dtype == DType::kFloat32 && out == DType::kFloat16) return fn(F32{}, F16{});
  return {"papo_kernels: logits of this dtype, or with a gradient of that one, are not supported"};
}

// Sets `clusters` to how many of the call's tile the device runs at a time.
Status count_clusters(const RowsCall& call, const DeviceLimits& limits, const Launch& launch,
                      int* clusters);

// The ways to run a call, given its tiles. launch_stats needs enough rows, and `ran` says whether
// there were.
Status launch_resident(const RowsCall& call, const DeviceLimits& limits, const Launch& launch,
                       int clusters);
Status launch_stats(const RowsCall& call, const DeviceLimits& limits, const Launch& launch,
                    bool* ran);
Status launch_streamed(const RowsCall& call, const Launch& launch);
Status launch_from_state(const RowsCall& call, const Launch& launch);

}  // namespace cuda
}  // namespace papo
