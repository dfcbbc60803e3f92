// What the launchers ask of the CUDA runtime: to start a kernel, to zero memory, and how much the
// current device holds. Like ptx.cuh, a host program can replace this file by defining its guard.
#ifndef INT8KV_CUDA_DEVICE_CUH
#define INT8KV_CUDA_DEVICE_CUH

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace int8kv {

template <typename... Params>
cudaError_t launch_kernel(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
                          cudaStream_t stream, std::common_type_t<Params>... args) {
  void* pointers[] = {&args...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), pointers,
                          shared_bytes, stream);
}

inline cudaError_t zero_async(void* to, size_t bytes, cudaStream_t stream) {
  return cudaMemsetAsync(to, 0, bytes, stream);
}

// Size of the L2 cache of the current device.
inline cudaError_t l2_bytes(int64_t* bytes) {
  int device = 0, size = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&size, cudaDevAttrL2CacheSize, device);
  *bytes = size;
  return error;
}

// Shared memory that a thread block of the current device may have, static and dynamic, if a
// multiprocessor is to hold two of them.
inline cudaError_t half_shared_bytes(int* bytes) {
  int device = 0, all = 0, reserved = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto get = [&](int* value, cudaDeviceAttr name) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, name, device);
  };
  get(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  get(&reserved, cudaDevAttrReservedSharedMemoryPerBlock);
  get(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  *bytes = all / 2 - reserved < most ? all / 2 - reserved : most;
  return error;
}

// Thread blocks of kKernel that the current device holds at once. Asked for once per device, since
// the answer takes longer than a launch.
template <auto kKernel>
cudaError_t resident_blocks(int threads, size_t shared_bytes, int* blocks) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];
  int device = 0, multiprocessors = 0, per_multiprocessor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  *blocks = device < kMaxDevices ? known[device].load() : 0;
  if (*blocks > 0) return cudaSuccess;
  const auto* kernel = reinterpret_cast<const void*>(kKernel);
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads,
                                                          shared_bytes);
  }
  if (error != cudaSuccess) return error;
  *blocks = multiprocessors * per_multiprocessor;
  if (*blocks == 0) return cudaErrorInvalidConfiguration;
  if (device < kMaxDevices) known[device].store(*blocks);
  return cudaSuccess;
}

}  // namespace int8kv

#endif  // INT8KV_CUDA_DEVICE_CUH
