// The operators of the per-channel ladder: checks of their arguments, and dispatch by variant.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <utility>

#include "ladder/quantize_per_channel.h"
#include "ops/checks.h"
#include "ops/devices.h"

#if defined(INT8KV_WITH_CUDA)
#include "ladder/launch.h"
#endif

namespace {

using namespace int8kv;  // NOLINT: this file is the library's border

constexpr std::pair<const char*, CpuVariant> kCpuVariants[] = {
    {"column_strided", CpuVariant::kColumnStrided},
    {"row_major", CpuVariant::kRowMajor},
    {"tiled", CpuVariant::kTiled},
    {"simd", CpuVariant::kSimd},
    {"vectorized", CpuVariant::kVectorized}};

CpuVariant cpu_variant(const std::string& name) {
  return named(name, kCpuVariants, "variant", " on CPU");
}

// Checks codes and scales of a [num_tokens, num_channels] matrix on the device of x.
void check_matrix(const Tensor& x, const Tensor& codes, const Tensor& scales) {
  check_dim(x, "x", 2, "[num_tokens, num_channels]");
  check_type(codes, "codes", ScalarType::Char);
  check_type(scales, "scales", ScalarType::Float);
  INT8KV_CHECK(same_shape(codes, x), "codes must have the shape of x, ", shape_of(x), ", got ",
               shape_of(codes));
  INT8KV_CHECK(codes.is_contiguous(), "codes must be contiguous, got strides ", codes.stride(0),
               ", ", codes.stride(1));
  INT8KV_CHECK(scales.dim() == 1 && scales.size(0) == x.size(1) && scales.is_contiguous(),
               "scales must be contiguous [num_channels] = [", x.size(1), "], got ",
               shape_of(scales));
  check_device(codes, "codes", x, "x");
  check_device(scales, "scales", x, "x");
}

// On a GPU the caller vouches for the values, which the host cannot see without waiting.
void check_scales(const float* scales, int64_t num_channels) {
  for (int64_t c = 0; c < num_channels; ++c) {
    INT8KV_CHECK(std::isnormal(scales[c]) && scales[c] > 0, "scales[", c,
                 "] must be positive, finite and not subnormal, got ", scales[c]);
  }
}

#if defined(INT8KV_WITH_CUDA)
constexpr std::pair<const char*, CudaVariant> kCudaVariants[] = {
    {"naive", CudaVariant::kNaive},
    {"tiled", CudaVariant::kTiled},
    {"coarsened", CudaVariant::kCoarsened},
    {"vectorized", CudaVariant::kVectorized},
    {"fused", CudaVariant::kFused}};

CudaVariant cuda_variant(const std::string& name) {
  return named(name, kCudaVariants, "variant", " on CUDA");
}

void check_launch(cudaError_t error, const char* name, const std::string& variant,
                  const Tensor& x) {
  INT8KV_CHECK(error == cudaSuccess, name, " of ", shape_of(x), ", variant ", variant, ": ",
               cudaGetErrorString(error));
}
#endif

void quantize_per_channel(Tensor x, Tensor codes, Tensor scales, bool compute_scales,
                          std::string variant) {
  QuantizePerChannelParams p{};
  check_matrix(x, codes, scales);
  p.dtype = float_type(x, "x");
  INT8KV_CHECK(x.size(1) <= 1 || x.stride(1) == 1,
               "x must be contiguous along num_channels, got stride ", x.stride(1));
  p.x = x.const_data_ptr();
  p.x_token_stride = x.stride(0);
  p.codes = static_cast<int8_t*>(codes.mutable_data_ptr());
  p.scales = static_cast<float*>(scales.mutable_data_ptr());
  p.num_tokens = x.size(0);
  p.num_channels = x.size(1);
  p.compute_scales = compute_scales;
#if defined(INT8KV_WITH_CUDA)
  if (x.is_cuda()) {
    const CudaVariant known = cuda_variant(variant);
    INT8KV_CHECK(compute_scales || known != CudaVariant::kFused,
                 "variant 'fused' computes the scales and takes none; use 'vectorized'");
    const DeviceGuard guard(x.get_device_index());
    const size_t bytes = quantize_per_channel_workspace_bytes(p);
    const Tensor workspace = workspace_beside(x, bytes);
    check_launch(launch_quantize_per_channel(p, known, workspace.mutable_data_ptr(), bytes,
                                             current_stream(x)),
                 "quantize_per_channel", variant, x);
    return;
  }
#endif
  if (!compute_scales) check_scales(p.scales, p.num_channels);
  cpu::quantize_per_channel(p, cpu_variant(variant), torch_threads());
}

void dequantize_per_channel(Tensor x, Tensor codes, Tensor scales, std::string variant) {
  DequantizePerChannelParams p{};
  check_matrix(x, codes, scales);
  p.dtype = float_type(x, "x");
  INT8KV_CHECK(x.is_contiguous(), "x must be contiguous, got strides ", x.stride(0), ", ",
               x.stride(1));
  p.codes = static_cast<const int8_t*>(codes.const_data_ptr());
  p.scales = static_cast<const float*>(scales.const_data_ptr());
  p.x = x.mutable_data_ptr();
  p.num_tokens = x.size(0);
  p.num_channels = x.size(1);
#if defined(INT8KV_WITH_CUDA)
  if (x.is_cuda()) {
    const CudaVariant known = cuda_variant(variant);
    INT8KV_CHECK(known != CudaVariant::kFused,
                 "variant 'fused' computes scales, dequantization has none to compute; use "
                 "'vectorized'");
    const DeviceGuard guard(x.get_device_index());
    check_launch(launch_dequantize_per_channel(p, known, current_stream(x)),
                 "dequantize_per_channel", variant, x);
    return;
  }
#endif
  check_scales(p.scales, p.num_channels);
  cpu::dequantize_per_channel(p, cpu_variant(variant), torch_threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(int8kv, m) {
  m.def(
      "quantize_per_channel(Tensor x, Tensor(a!) codes, Tensor(b!) scales, bool compute_scales, "
      "str variant) -> ()");
  m.def("dequantize_per_channel(Tensor(a!) x, Tensor codes, Tensor scales, str variant) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(int8kv, CPU, m) {
  m.impl("quantize_per_channel", TORCH_BOX(&quantize_per_channel));
  m.impl("dequantize_per_channel", TORCH_BOX(&dequantize_per_channel));
}

#if defined(INT8KV_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(int8kv, CUDA, m) {
  m.impl("quantize_per_channel", TORCH_BOX(&quantize_per_channel));
  m.impl("dequantize_per_channel", TORCH_BOX(&dequantize_per_channel));
}
#endif
