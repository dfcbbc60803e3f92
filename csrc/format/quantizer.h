// Quantization of one K or V vector, shared by the CUDA and CPU kernels.
//
// Eight bits, symmetric:
//
//   scale = bf16(max_d |x[d]| / 127)     one per (slot, KV head)
//   q[d]  = round_half_even(x[d] / scale), in [-127, 127]
//   x[d] ~= scale * q[d]                 |error| <= scale / 2
//
// Fewer bits, with levels = 2^bits - 1 steps between the ends of the vector:
//
//   middle = bf16((min_d x[d] + max_d x[d]) * 0.5 + 0)
//   half   = max(max_d x[d] - middle, middle - min_d x[d])
//   scale  = bf16(2 * half / levels), or 0 if half < 1e-30
//   q[d]   = clamp(round_half_even((x[d] - middle) / scale + levels / 2), 0, levels), or 0
//   x[d]  ~= (q[d] - levels / 2) * scale + middle
//
// There |error| <= scale * (1/2 + levels / 1024): the ends may lie half a unit of bf16 outside. The
// 0 that is added makes 0 of -0: which of two zeros is the smaller, devices do not agree on.
//
// The codes are taken from the scale as stored, so rounding it to bf16 adds no error of its own: it
// only makes a step up to 0.4 % larger or smaller, and 127.5 is never reached. bf16 keeps the range
// of fp32, which fp16 scales would not.
//
// A cache written on one device reads back the same on another. That holds while every operation
// here rounds the same way on both: IEEE addition, multiplication and division and rintf, no
// contraction into FMA, never __fdividef or --use_fast_math.
#pragma once

#include <cstdint>
#include <cstring>

#include "format/cache_format.h"

#if !defined(__CUDA_ARCH__)
#include <cmath>
#endif

namespace int8kv {

// NaN counts as 0 and magnitudes saturate here, so that a rotation of up to 512 finite values stays
// finite and no code can wrap.
constexpr float kMaxMagnitude = 1e30f;

// A vector whose largest magnitude is below this is stored as zeros with scale 1. It keeps the
// scale clear of subnormals, which some CPU modes flush.
constexpr float kMinMagnitude = 1e-30f;

INT8KV_HD float sanitize(float x) {
  x = x != x ? 0.0f : x;
  x = x > kMaxMagnitude ? kMaxMagnitude : x;
  return x < -kMaxMagnitude ? -kMaxMagnitude : x;
}

INT8KV_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}

INT8KV_HD float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

// Round half to even; only for finite values.
INT8KV_HD uint16_t float_to_bf16_bits(float x) {
  const uint32_t bits = float_bits(x);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

INT8KV_HD float bf16_bits_to_float(uint16_t bits) {
  return bits_to_float(static_cast<uint32_t>(bits) << 16);
}

// The scale of values whose largest magnitude is `amax`, for codes of the trait C;
// quantize_per_channel keeps it in fp32.
template <typename C>
INT8KV_HD float scale_from_amax(float amax) {
  return amax >= kMinMagnitude ? amax / C::kMax : 1.0f;
}

// The stored scale of a vector whose largest magnitude is `amax`.
template <typename C>
INT8KV_HD uint16_t scale_bits_from_amax(float amax) {
  return float_to_bf16_bits(scale_from_amax<C>(amax));
}

// The value of a code of the trait C; `middle` is not looked at where the trait has no midpoint.
// Two roundings, on every device.
template <typename C>
INT8KV_HD float dequantize(int32_t code, float scale, [[maybe_unused]] float middle) {
  if constexpr (!C::kHasMidpoint) {
    return static_cast<float>(code) * scale;
  } else {
    return (static_cast<float>(code) - C::kLevels * 0.5f) * scale + middle;
  }
}

INT8KV_HD float divide(float x, float scale) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(x, scale);
#else
  return x / scale;
#endif
}

INT8KV_HD int8_t quantize_value(float x, float scale) {
  return static_cast<int8_t>(::rintf(divide(x, scale)));
}

// For a scale that need not be that of these values: NaN becomes 0, magnitudes saturate at 127.
// Under a scale taken from sanitized values it gives what quantize_value(sanitize(x), scale) does.
INT8KV_HD int8_t quantize_saturated(float x, float scale) {
  float steps = divide(x, scale);
  steps = steps != steps ? 0.0f : steps;
  steps = steps > Codes<8>::kMax ? Codes<8>::kMax : steps;
  steps = steps < -Codes<8>::kMax ? -Codes<8>::kMax : steps;
  return static_cast<int8_t>(::rintf(steps));
}

}  // namespace int8kv
