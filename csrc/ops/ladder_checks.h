// The same as checks.h for the quantization ladder.
#pragma once

#include "ops/checks.h"

namespace int8kv {

// Checks codes and scales of a [num_tokens, num_channels] matrix on the device of x.
inline void check_per_channel(const Tensor& x, const Tensor& codes, const Tensor& scales) {
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
  for (const auto& [tensor, name] : {std::pair{&codes, "codes"}, std::pair{&scales, "scales"}}) {
    INT8KV_CHECK(
        tensor->is_cuda() == x.is_cuda() && tensor->get_device_index() == x.get_device_index(),
        name, " must be on the device of x");
  }
}

inline QuantizePerChannelParams quantize_params(const Tensor& x, const Tensor& codes,
                                                const Tensor& scales, bool compute_scales) {
  QuantizePerChannelParams p{};
  check_per_channel(x, codes, scales);
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
  return p;
}

inline DequantizePerChannelParams dequantize_params(const Tensor& x, const Tensor& codes,
                                                    const Tensor& scales) {
  DequantizePerChannelParams p{};
  check_per_channel(x, codes, scales);
  p.dtype = float_type(x, "x");
  INT8KV_CHECK(x.is_contiguous(), "x must be contiguous, got strides ", x.stride(0), ", ",
               x.stride(1));
  p.codes = static_cast<const int8_t*>(codes.const_data_ptr());
  p.scales = static_cast<const float*>(scales.const_data_ptr());
  p.x = x.mutable_data_ptr();
  p.num_tokens = x.size(0);
  p.num_channels = x.size(1);
  return p;
}

// On a GPU the caller vouches for the values, which the host cannot see without waiting.
inline void check_scales(const float* scales, int64_t num_channels) {
  for (int64_t c = 0; c < num_channels; ++c) {
    INT8KV_CHECK(std::isnormal(scales[c]) && scales[c] > 0, "scales[", c,
                 "] must be positive, finite and not subnormal, got ", scales[c]);
  }
}

}  // namespace int8kv
