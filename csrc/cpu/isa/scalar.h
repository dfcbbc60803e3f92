// SSE2, which every x86-64 CPU has.
#pragma once

#include "cpu/isa/common.h"

namespace int8kv::cpu::INT8KV_ISA {

typedef __m128 Register;
typedef __m128i IntRegister;

INT8KV_INLINE Register reg_max(Register a, Register b) { return _mm_max_ps(a, b); }
INT8KV_INLINE Register reg_min(Register a, Register b) { return _mm_min_ps(a, b); }
INT8KV_INLINE Register reg_to_floats(IntRegister x) { return _mm_cvtepi32_ps(x); }
INT8KV_INLINE IntRegister reg_to_ints(Register x) { return _mm_cvttps_epi32(x); }

}  // namespace int8kv::cpu::INT8KV_ISA

#include "cpu/isa/lanes_array.h"

namespace int8kv::cpu::INT8KV_ISA {

constexpr bool kHasFma = false;
INT8KV_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return a * b + c; }

INT8KV_INLINE u32x16 widen(u16x16 x) {
  __m128i half[2];
  std::memcpy(half, &x, sizeof(half));
  const __m128i zero = _mm_setzero_si128();
  const __m128i wide[4] = {_mm_unpacklo_epi16(half[0], zero), _mm_unpackhi_epi16(half[0], zero),
                           _mm_unpacklo_epi16(half[1], zero), _mm_unpackhi_epi16(half[1], zero)};
  return load<u32x16>(wide);
}

INT8KV_INLINE i16x16 narrow_to_16(i32x16 values) {
  const __m128i halves[2] = {
      _mm_packs_epi32(get<__m128i>(values, 0), get<__m128i>(values, 1)),
      _mm_packs_epi32(get<__m128i>(values, 2), get<__m128i>(values, 3)),
  };
  return load<i16x16>(halves);
}
INT8KV_INLINE i8x16 narrow_to_8(i32x16 values) { return narrow_words_to_8(narrow_to_16(values)); }
// The integers whose rounding sums these are. Packing saturates, so the sum's own bits must go.
INT8KV_INLINE i16x16 narrow_rounding_sum(f32x16 sum) {
  return narrow_to_16(as<i32x16>(sum) - kRoundingSumBits);
}

constexpr bool kHasDot = false;
constexpr int kBlockRows = 4;
constexpr int groups_per_pass(int, bool) { return 1; }
constexpr int pairs_per_pass(int, bool) { return 1; }
constexpr int max_unpacking_rows(bool) { return kBlockRows; }

// Register i of a line's codes as 16-bit integers.
INT8KV_INLINE IntRegister load_pairs(Codes<8>, const int8_t* line, int i) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(line + 8 * i));
  return _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
}
// Register i of a line's bytes as 16-bit integers.
INT8KV_INLINE IntRegister widen_bytes(const int8_t* line, int i) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(line + 8 * i));
  return _mm_unpacklo_epi8(bytes, _mm_setzero_si128());
}
INT8KV_INLINE IntRegister broadcast_pair(int32_t pair) { return _mm_set1_epi32(pair); }
INT8KV_INLINE IntRegister add(IntRegister a, IntRegister b) { return _mm_add_epi32(a, b); }
INT8KV_INLINE IntRegister add_products(IntRegister sum, IntRegister a, IntRegister b) {
  return add(sum, _mm_madd_epi16(a, b));
}

}  // namespace int8kv::cpu::INT8KV_ISA
