// AVX2 with FMA; avx2_vnni.h adds the dot product of AVX-VNNI.
#pragma once

#include "cpu/isa/common.h"

namespace int8kv::cpu::INT8KV_ISA {

typedef __m256 Register;
typedef __m256i IntRegister;

INT8KV_INLINE Register reg_max(Register a, Register b) { return _mm256_max_ps(a, b); }
INT8KV_INLINE Register reg_min(Register a, Register b) { return _mm256_min_ps(a, b); }
INT8KV_INLINE Register reg_to_floats(IntRegister x) { return _mm256_cvtepi32_ps(x); }
INT8KV_INLINE IntRegister reg_to_ints(Register x) { return _mm256_cvttps_epi32(x); }

}  // namespace int8kv::cpu::INT8KV_ISA

#include "cpu/isa/lanes_array.h"

namespace int8kv::cpu::INT8KV_ISA {

constexpr bool kHasFma = true;
INT8KV_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  for_each_register([&](auto i) { set(c, i, _mm256_fmadd_ps(get(a, i), get(b, i), get(c, i))); });
  return c;
}

INT8KV_INLINE u32x16 widen(u16x16 x) {
  __m128i half[2];
  std::memcpy(half, &x, sizeof(half));
  const __m256i wide[2] = {_mm256_cvtepu16_epi32(half[0]), _mm256_cvtepu16_epi32(half[1])};
  return load<u32x16>(wide);
}

INT8KV_INLINE i16x16 narrow_to_16(i32x16 values) {
  const __m256i packed =
      _mm256_packs_epi32(get<__m256i>(values, 0), get<__m256i>(values, 1));  // 128 bits in turn
  return reinterpret_cast<i16x16>(_mm256_permute4x64_epi64(packed, 0b11011000));
}
INT8KV_INLINE i8x16 narrow_to_8(i32x16 values) { return narrow_words_to_8(narrow_to_16(values)); }
// The integers whose rounding sums these are. Packing saturates, so the sum's own bits must go.
INT8KV_INLINE i16x16 narrow_rounding_sum(f32x16 sum) {
  return narrow_to_16(as<i32x16>(sum) - kRoundingSumBits);
}

#if defined(INT8KV_AVX2_VNNI)
constexpr bool kHasDot = true;  // its sum waits five cycles for the one before, an addition one
#else
constexpr bool kHasDot = false;
#endif
constexpr int kBlockRows = 4;
constexpr int groups_per_pass(int rows, bool streams) {
  return streams ? 1 : rows <= 1 ? 4 : rows <= 2 ? 2 : 1;
}
constexpr int pairs_per_pass(int rows, bool streams) {
  return !streams || !kHasDot ? 1 : rows <= 1 ? 4 : rows <= 2 ? 2 : 1;
}
// Masks and shifts cost as much as load_pairs(), two planes together half as much as a pass.
constexpr int max_unpacking_rows(bool has_high) { return (has_high ? 2 : 8) * kBlockRows; }

// Register i of a line's codes as 16-bit integers.
INT8KV_INLINE IntRegister load_pairs(Codes<8>, const int8_t* line, int i) {
  return _mm256_cvtepi8_epi16(load<__m128i>(line + 16 * i));
}
// Register i of a line's bytes as 16-bit integers.
INT8KV_INLINE IntRegister widen_bytes(const int8_t* line, int i) {
  return _mm256_cvtepu8_epi16(load<__m128i>(line + 16 * i));
}
// Half of the bytes of a register as 16-bit integers: the lower (0) or upper (1) eight of
// either 16.
INT8KV_INLINE IntRegister interleave_zeros(IntRegister bytes, int half) {
  const IntRegister zero = _mm256_setzero_si256();
  return half == 0 ? _mm256_unpacklo_epi8(bytes, zero) : _mm256_unpackhi_epi8(bytes, zero);
}
// Register i, in the order of the line, of sums of the two.
INT8KV_INLINE IntRegister order_halves(IntRegister lower, IntRegister upper, int i) {
  return i == 0 ? _mm256_permute2x128_si256(lower, upper, 0x20)
                : _mm256_permute2x128_si256(lower, upper, 0x31);
}
INT8KV_INLINE IntRegister broadcast_pair(int32_t pair) { return _mm256_set1_epi32(pair); }
INT8KV_INLINE IntRegister add(IntRegister a, IntRegister b) { return _mm256_add_epi32(a, b); }
INT8KV_INLINE IntRegister add_products(IntRegister sum, IntRegister a, IntRegister b) {
#if defined(INT8KV_AVX2_VNNI)
  return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
  return add(sum, _mm256_madd_epi16(a, b));
#endif
}

}  // namespace int8kv::cpu::INT8KV_ISA
