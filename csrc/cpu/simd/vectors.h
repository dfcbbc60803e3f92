// Arithmetic on sixteen floats at a time, and blocks of sixteen vectors side by side.
#pragma once

#include "format/params.h"
#include "format/quantizer.h"
#include "format/rotation.h"
#include INT8KV_ISA_HEADER
#include "cpu/simd/transpose.h"

namespace int8kv::cpu::INT8KV_ISA {

INT8KV_INLINE f32x16 splat(float x) { return f32x16{} + x; }

INT8KV_INLINE i32x16 iota() {
  constexpr int32_t kIndex[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load<i32x16>(kIndex);
}

// The lower 16 bits of each lane.
INT8KV_INLINE u16x16 low_16(u32x16 bits) {
  // Sign extension makes them fit.
  return reinterpret_cast<u16x16>(narrow_to_16(as<i32x16>(bits << 16) >> 16));
}

INT8KV_INLINE f32x16 abs(f32x16 x) { return as<f32x16>(as<u32x16>(x) & 0x7fffffffu); }

INT8KV_INLINE float reduce_max(f32x16 v) {
  v = max(v, exchange<8>(v));
  v = max(v, exchange<4>(v));
  v = max(v, exchange<2>(v));
  return max(v, exchange<1>(v))[0];
}

INT8KV_INLINE float reduce_add(f32x16 v) {
  v += exchange<8>(v);
  v += exchange<4>(v);
  v += exchange<2>(v);
  return (v + exchange<1>(v))[0];
}

// Round half to even for |x| < 2^22.
INT8KV_INLINE f32x16 round_even(f32x16 x) { return (x + kRoundingSum) - kRoundingSum; }

// The same for |x| < 2^15, as integers.
INT8KV_INLINE i16x16 round_to_16(f32x16 x) { return narrow_rounding_sum(x + kRoundingSum); }

// exp(x) for x <= 0, within 2 units in the last place; 0 from kZeroExponent down, which is where
// the result leaves the normal range, with AVX-512 where it leaves the subnormal one.
INT8KV_INLINE f32x16 exp_negative(f32x16 x) {
  constexpr float kLog2e = 1.44269504089f;
  const f32x16 clamped = max(x, splat(kZeroExponent));  // exp(-inf) is 0, -inf + inf is not
  const f32x16 rounding_sum = clamped * kLog2e + kRoundingSum;
  const f32x16 n = rounding_sum - kRoundingSum;
  const f32x16 f = clamped * kLog2e - n;
  // 2^f for |f| <= 1/2, relative error 1.1e-7: minimax of degree 5 with p(0) = 1.
  f32x16 y = splat(1.326472731e-3f);
  y = y * f + 9.671512991e-3f;
  y = y * f + 5.550733581e-2f;
  y = y * f + 2.402224243e-1f;
  y = y * f + 6.931470037e-1f;
  y = y * f + 1.0f;
  return times_power_of_two(y, n, rounding_sum);
}

// tanh within 4 units in the last place: its series near 0, where (1 - e) / (1 + e) would cancel.
INT8KV_INLINE f32x16 tanh(f32x16 x) {
  const f32x16 magnitude = abs(x);
  const f32x16 e = exp_negative(magnitude * -2.0f);
  const f32x16 far = (1.0f - e) / (1.0f + e);
  const f32x16 x2 = x * x;
  f32x16 y = x2 * 2.18694885e-2f - 5.39682540e-2f;  // 62/2835, -17/315
  y = y * x2 + 1.33333333e-1f;
  y = y * x2 - 3.33333333e-1f;
  const f32x16 near = x + x * x2 * y;
  return select(less(magnitude, splat(0.3f)), near, select(less(x, f32x16{}), -far, far));
}

// 2^112 moves the exponent's bias from 15 to 127 and makes subnormals normal.
INT8KV_INLINE f32x16 half_to_float(u16x16 half) {
  const u32x16 bits = widen(half);
  const u32x16 sign = (bits & 0x8000u) << 16;
  const u32x16 rest = bits & 0x7fffu;
  const f32x16 magnitude = as<f32x16>(rest << 13) * 5.192296858534828e33f;
  const u32x16 finite = as<u32x16>(magnitude) | sign;
  const u32x16 special = sign | 0x7f800000u | (rest & 0x3ffu) << 13;
  return as<f32x16>(select(less(magnitude, splat(65536.0f)), finite, special));
}

INT8KV_INLINE f32x16 bf16_to_floats(u16x16 bits) { return as<f32x16>(widen(bits) << 16); }

// Elements [i, i + 16) of a vector of `dtype`.
INT8KV_INLINE f32x16 load_floats(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return load<f32x16>(static_cast<const float*>(data) + i);
  const u16x16 half = load<u16x16>(static_cast<const uint16_t*>(data) + i);
  if (dtype == DType::kFloat16) return half_to_float(half);
  return bf16_to_floats(half);
}

INT8KV_INLINE u16x16 float_to_half(f32x16 x) {
  const u32x16 bits = as<u32x16>(x);
  const u32x16 sign = (bits & 0x80000000u) >> 16;
  const f32x16 magnitude = abs(x);
  const u32x16 abs_bits = bits & 0x7fffffffu;
  // Normal: rebias, round half to even on the 13 dropped bits; an overflow carries into infinity.
  const u32x16 normal = (abs_bits - (112u << 23) + 0xfffu + ((abs_bits >> 13) & 1u)) >> 13;
  // Subnormal: adding 0.5 leaves the result, rounded, in the low bits.
  const u32x16 tiny = as<u32x16>(magnitude + 0.5f) - 0x3f000000u;
  u32x16 half = select(less(magnitude, splat(6.103515625e-05f)), tiny, normal);
  half = select(less(magnitude, splat(65520.0f)), half, u32x16{} + 0x7c00u);
  half = select(is_nan(x), u32x16{} + 0x7e00u, half);
  return low_16(half | sign);
}

INT8KV_INLINE u16x16 float_to_bf16(f32x16 x) {
  const u32x16 bits = as<u32x16>(x);
  const u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return low_16(select(is_nan(x), u32x16{} + 0x7fc0u, rounded));
}

INT8KV_INLINE void store_floats(void* data, DType dtype, int64_t i, f32x16 x) {
  if (dtype == DType::kFloat32) {
    store(static_cast<float*>(data) + i, x);
  } else {
    store(static_cast<uint16_t*>(data) + i,
          dtype == DType::kFloat16 ? float_to_half(x) : float_to_bf16(x));
  }
}

INT8KV_INLINE int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

INT8KV_INLINE f32x16 saturate(f32x16 x) {
  return max(splat(-kMaxMagnitude), min(splat(kMaxMagnitude), x));
}

INT8KV_INLINE f32x16 sanitize(f32x16 x) { return saturate(select(is_nan(x), f32x16{}, x)); }

// Sixteen vectors of head_size elements side by side: x[dim * kLanes + lane].
struct LaneBlock {
  alignas(64) float x[kMaxHeadSize * kLanes];
};

// Loads `count` vectors of head_size elements into the lanes; the others become 0. `transform(x,
// lane, dim)` is applied to 16 elements of a vector at a time.
template <typename Transform>
INT8KV_INLINE void load_lanes(LaneBlock& block, const void* const* vectors, int32_t count,
                              DType dtype, int32_t head_size, const Transform& transform) {
  for (int32_t dim = 0; dim < head_size; dim += kLanes) {
    f32x16 rows[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      rows[lane] =
          lane < count ? transform(load_floats(vectors[lane], dtype, dim), lane, dim) : f32x16{};
    }
    transpose(rows);
    for (int i = 0; i < kLanes; ++i) store(block.x + (dim + i) * kLanes, rows[i]);
  }
}

INT8KV_INLINE void butterfly(f32x16& a, f32x16& b) {
  const f32x16 difference = a - b;
  a += b;
  b = difference;
}

// The steps of rotation.h that add and subtract kParts vectors of each other.
template <int kParts>
INT8KV_INLINE void hadamard_vectors(f32x16 (&v)[kParts]) {
  for (int distance = 1; distance < kParts; distance *= 2) {
    for (int k = 0; k < kParts; ++k) {
      if (!(k & distance)) butterfly(v[k], v[k + distance]);
    }
  }
}

// The step of rotation.h that adds and subtracts lanes kDistance apart.
template <int kDistance>
INT8KV_INLINE f32x16 hadamard_lanes(f32x16 v) {
  constexpr auto sign = [](int lane) { return lane & kDistance ? -1.0f : 1.0f; };
  constexpr float kSigns[kLanes] = {sign(0),  sign(1),  sign(2),  sign(3), sign(4),  sign(5),
                                    sign(6),  sign(7),  sign(8),  sign(9), sign(10), sign(11),
                                    sign(12), sign(13), sign(14), sign(15)};
  const f32x16 signs = load<f32x16>(kSigns), others = exchange<kDistance>(v);
  if constexpr (kHasFma) {
    return fma(v, signs, others);
  } else {
    return others + v * signs;
  }
}

// The rotation of rotation.h of one vector of kParts * kLanes elements, which is a whole block.
template <int kParts>
INT8KV_INLINE void hadamard_rotate(f32x16 (&v)[kParts]) {
  const float norm = rotation_norm(kParts * kLanes);
  for (int k = 0; k < kParts; ++k) {
    v[k] = hadamard_lanes<8>(hadamard_lanes<4>(hadamard_lanes<2>(hadamard_lanes<1>(v[k]))));
  }
  hadamard_vectors(v);
  for (int k = 0; k < kParts; ++k) v[k] = v[k] * norm;
}

// Calls f with the parts of a block of the rotation as a constant.
template <typename F>
INT8KV_INLINE auto with_rotation_parts(int32_t head_size, const F& f) {
  switch (rotation_block(head_size)) {
    case 16:
      return f(std::integral_constant<int, 1>{});
    case 32:
      return f(std::integral_constant<int, 2>{});
    case 64:
      return f(std::integral_constant<int, 4>{});
    case 128:
      return f(std::integral_constant<int, 8>{});
    default:
      return f(std::integral_constant<int, 16>{});
  }
}

// The steps of rotation.h from `half` on, kSteps at once, so that the block passes through memory
// once for all of them; the last ones also multiply by the norm.
template <int kSteps>
INT8KV_INLINE void hadamard_steps(LaneBlock& block, int32_t head_size, int32_t half, bool is_last,
                                  float norm) {
  constexpr int kParts = 1 << kSteps;
  for (int32_t i = 0; i < head_size; i += kParts * half) {
    for (int32_t j = i; j < i + half; ++j) {
      float* x = block.x + j * kLanes;
      f32x16 v[kParts];
      for (int k = 0; k < kParts; ++k) v[k] = load<f32x16>(x + k * half * kLanes);
      hadamard_vectors(v);
      for (int k = 0; k < kParts; ++k) {
        store(x + k * half * kLanes, is_last ? v[k] * norm : v[k]);
      }
    }
  }
}

// The rotation of rotation.h on all lanes.
INT8KV_INLINE void hadamard_rotate(LaneBlock& block, int32_t head_size) {
  const int32_t width = rotation_block(head_size);
  const float norm = rotation_norm(width);
  int32_t half = 1;
  for (; 4 * half <= width; half *= 4) {
    hadamard_steps<2>(block, head_size, half, 4 * half == width, norm);
  }
  if (half < width) hadamard_steps<1>(block, head_size, half, true, norm);
}

}  // namespace int8kv::cpu::INT8KV_ISA
