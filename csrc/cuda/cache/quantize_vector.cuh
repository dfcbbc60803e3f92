// The quantizer of quantizer.h on a vector in the registers of a warp, by the trait of its codes.
#pragma once

#include "cuda/head_vector.cuh"

namespace int8kv {

// quantize_value(x, scale) with reciprocal = 1 / scale, correctly rounded: two corrections make the
// quotient so too (Markstein, "Computation of elementary functions on the IBM RISC System/6000
// processor", 1990). Division does the same, and tests for what sanitized values never are.
INT8KV_DEVICE int8_t quantize_by(float x, float scale, float reciprocal) {
  float steps = x * reciprocal;
  steps = fmaf(fmaf(-steps, scale, x), reciprocal, steps);
  steps = fmaf(fmaf(-steps, scale, x), reciprocal, steps);
  return static_cast<int8_t>(rintf(steps));
}

// x / scale, correctly rounded, for a bf16 number in [1, 2) and its reciprocal, correctly rounded:
// with so few bits of the scale one correction does.
INT8KV_DEVICE float divide_by_bf16(float x, float scale, float reciprocal) {
  const float quotient = x * reciprocal;
  return fmaf(fmaf(-quotient, scale, x), reciprocal, quotient);
}

// 1 / x of a power of two, by its bits, which have no sign.
INT8KV_DEVICE float inverse_of_power(uint32_t bits) { return bits_to_float((254u << 23) - bits); }

// The ends of a vector.
struct VectorRange {
  float low, high;
};

template <int kPairs>
INT8KV_DEVICE VectorRange warp_range(HeadVector<kPairs>& vector, int head_size, int lane) {
  float low = __builtin_huge_valf(), high = -low;
  for_each_pair(vector, head_size, lane, [&](int, float (&x)[2]) {
    low = fminf(low, fminf(x[0], x[1]));
    high = fmaxf(high, fmaxf(x[0], x[1]));
  });
  return {-warp_max(-low), warp_max(high)};
}

// The quantizer of one vector, for codes below 8 bits.
//
// x - middle is divided as the CPU kernels do (Quotient in cpu/simd/reshape_and_cache.cpp): by the
// product with the reciprocal and one correction, after the scale was brought into [1, 2), which
// gives the correctly rounded quotient for every scale that is a bf16 number.
template <typename C>
struct VectorQuantizer {
  uint16_t scale_bits, middle_bits;
  float middle, to_steps, scale, reciprocal;  // to_steps: a power of two

  INT8KV_DEVICE explicit VectorQuantizer(const VectorRange& range) {
    middle_bits = float_to_bf16_bits((range.low + range.high) * 0.5f + 0.0f);
    middle = bf16_bits_to_float(middle_bits);
    const float half = fmaxf(range.high - middle, middle - range.low);
    const float step = divide(half + half, static_cast<float>(C::kLevels));
    scale_bits = half < kMinMagnitude ? uint16_t{0} : float_to_bf16_bits(step);
    const uint32_t exponent = (static_cast<uint32_t>(scale_bits) << 16) & 0x7f800000u;
    to_steps = inverse_of_power(exponent);
    scale = scale_bits == 0 ? 1.0f : bf16_bits_to_float(scale_bits) * to_steps;
    reciprocal = divide(1.0f, scale);
  }

  INT8KV_DEVICE int32_t code(float x) const {
    float steps = divide_by_bf16((x - middle) * to_steps, scale, reciprocal);
    steps = rintf(steps + C::kLevels * 0.5f);
    steps = fmaxf(0.0f, fminf(static_cast<float>(C::kLevels), steps));
    return scale_bits == 0 ? 0 : static_cast<int32_t>(steps);
  }
};

template <>
struct VectorQuantizer<Codes<8>> {
  uint16_t scale_bits;
  float scale, reciprocal;

  INT8KV_DEVICE explicit VectorQuantizer(const VectorRange& range) {
    scale_bits = scale_bits_from_amax<Codes<8>>(fmaxf(range.high, -range.low));
    scale = bf16_bits_to_float(scale_bits);
    reciprocal = divide(1.0f, scale);
  }
  INT8KV_DEVICE int32_t code(float x) const { return quantize_by(x, scale, reciprocal); }
};

}  // namespace int8kv
