// What an operator needs of PyTorch to run its kernels: the threads of the CPU and the stream of a
// GPU.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/kernels.h"
#include "ops/checks.h"

#if defined(INT8KV_WITH_CUDA)
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace int8kv {

// PyTorch's own threads, so that the thread settings of the caller hold.
inline cpu::ParallelFor torch_threads() {
  const auto run = [](int64_t size, const void* context, cpu::ParallelFor::Body body) {
    torch::stable::parallel_for(0, size, 1,
                                [=](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return {run, static_cast<int32_t>(torch::stable::get_num_threads())};
}

#if defined(INT8KV_WITH_CUDA)
using torch::stable::accelerator::DeviceGuard;

// Exported by libtorch_cuda, which a CUDA tensor in hand proves to be loaded. Python loads it into
// a scope of its own, and this library must also load where there is none, so that the linker
// cannot find it: a weak reference stays null.
using GetCurrentStream = AOTITorchError (*)(int32_t device_index, void** ret_stream);

inline GetCurrentStream find_get_current_stream() {
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  void* libtorch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = libtorch_cuda == nullptr ? nullptr : dlsym(libtorch_cuda, kName);
  INT8KV_CHECK(found != nullptr, kName, " is not in the loaded PyTorch: needs 2.11 or later");
  return reinterpret_cast<GetCurrentStream>(found);
}

inline cudaStream_t current_stream(const Tensor& t) {
  static const GetCurrentStream get_current_stream = find_get_current_stream();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_current_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline Tensor workspace_beside(const Tensor& t, size_t bytes) {
  return torch::stable::new_empty(t, {static_cast<int64_t>(bytes)}, ScalarType::Char);
}
#endif

}  // namespace int8kv
