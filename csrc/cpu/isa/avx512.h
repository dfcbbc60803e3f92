// AVX-512 (F, BW, DQ, VL): a vector is one register, of the compiler's own vector types.
// avx512_vnni.h adds the dot product of AVX-512 VNNI.
#pragma once

#include "cpu/isa/common.h"

namespace int8kv::cpu::INT8KV_ISA {

typedef __m512 Register;
typedef __m512i IntRegister;
constexpr int kRegisterLanes = 16;
constexpr int kNumRegisters = 1;
typedef int32_t RegisterIndex __attribute__((vector_size(64)));

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef __mmask16 Mask;
constexpr Mask kAllLanes = 0xffff;  // without a mask, GCC 12 warns of some instructions

// Calls f(i) for every register of a vector.
template <typename F>
INT8KV_INLINE void for_each_register(const F& f) {
  f(std::integral_constant<int, 0>{});
}

template <typename V>
INT8KV_INLINE V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}
template <typename V>
INT8KV_INLINE void store(void* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

// 64 bytes past the caches.
INT8KV_INLINE void stream_line(void* to, const void* line) {
  _mm512_stream_si512(static_cast<__m512i*>(to), load<__m512i>(line));
}

template <typename To, typename From>
INT8KV_INLINE To as(const From& x) {
  return reinterpret_cast<To>(x);
}
template <typename R = Register, typename V>
INT8KV_INLINE R get(const V& x, [[maybe_unused]] int i) {
  return reinterpret_cast<R>(x);
}
template <typename V, typename R>
INT8KV_INLINE void set(V& x, [[maybe_unused]] int i, R r) {
  x = reinterpret_cast<V>(r);
}

INT8KV_INLINE f32x16 max(f32x16 a, f32x16 b) {
  return as<f32x16>(_mm512_maskz_max_ps(kAllLanes, get(a, 0), get(b, 0)));
}
INT8KV_INLINE f32x16 min(f32x16 a, f32x16 b) {
  return as<f32x16>(_mm512_maskz_min_ps(kAllLanes, get(a, 0), get(b, 0)));
}
INT8KV_INLINE Mask less(f32x16 a, f32x16 b) {
  return _mm512_cmp_ps_mask(get(a, 0), get(b, 0), _CMP_LT_OQ);
}
INT8KV_INLINE Mask is_nan(f32x16 x) {
  return _mm512_cmp_ps_mask(get(x, 0), get(x, 0), _CMP_UNORD_Q);
}
template <typename V>
INT8KV_INLINE V select(Mask mask, V a, V b) {
  return as<V>(_mm512_mask_blend_epi32(mask, get<__m512i>(b, 0), get<__m512i>(a, 0)));
}

constexpr bool kHasFma = true;
INT8KV_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return as<f32x16>(_mm512_fmadd_ps(get(a, 0), get(b, 0), get(c, 0)));
}

INT8KV_INLINE f32x16 to_floats(i32x16 x) { return __builtin_convertvector(x, f32x16); }
INT8KV_INLINE f32x16 to_floats(i8x16 codes) {
  const auto bytes = reinterpret_cast<__m128i>(codes);
  return to_floats(as<i32x16>(_mm512_maskz_cvtepi8_epi32(kAllLanes, bytes)));
}
INT8KV_INLINE i32x16 to_ints(f32x16 x) { return __builtin_convertvector(x, i32x16); }
INT8KV_INLINE u32x16 widen(u16x16 x) { return __builtin_convertvector(x, u32x16); }
INT8KV_INLINE i16x16 narrow_to_16(i32x16 values) { return __builtin_convertvector(values, i16x16); }
INT8KV_INLINE i8x16 narrow_to_8(i32x16 values) {
  return reinterpret_cast<i8x16>(_mm512_maskz_cvtepi32_epi8(kAllLanes, get<__m512i>(values, 0)));
}
// The integers whose rounding sums these are: the sum's low 16 bits, which narrowing keeps.
INT8KV_INLINE i16x16 narrow_rounding_sum(f32x16 sum) { return narrow_to_16(as<i32x16>(sum)); }

// exp_negative() is 0 from here down.
constexpr float kZeroExponent = -150.0f;

// y * 2^n for whole n <= 0 and y near 1; below the normal range 0 or subnormal.
INT8KV_INLINE f32x16 times_power_of_two(f32x16 y, f32x16 n, [[maybe_unused]] f32x16 rounding_sum) {
  return as<f32x16>(_mm512_maskz_scalef_ps(kAllLanes, get(y, 0), get(n, 0)));
}

// Lane i of the result is lane i ^ kDistance.
template <int kDistance>
INT8KV_INLINE f32x16 exchange(f32x16 v) {
  i32x16 from;
  for (int i = 0; i < kLanes; ++i) from[i] = i ^ kDistance;
  return __builtin_shuffle(v, from);
}

#if defined(INT8KV_AVX512_VNNI)
constexpr bool kHasDot = true;  // its sum waits five cycles for the one before, an addition one
#else
constexpr bool kHasDot = false;
#endif
constexpr int kBlockRows = 8;
// The broadcasts of more than four rows cost more than reading in order gains.
constexpr bool reads_in_order(int rows, bool streams) { return streams && rows <= 4; }
constexpr int groups_per_pass(int rows, bool streams) {
  return reads_in_order(rows, streams) ? 1 : rows <= 2 ? 8 : rows <= 6 ? 4 : 2;
}
constexpr int pairs_per_pass(int rows, bool streams) {
  return !reads_in_order(rows, streams) ? 1 : rows <= 1 ? 8 : rows <= 2 ? 4 : 2;
}
constexpr int max_unpacking_rows(bool) { return kBlockRows; }

// Register i of a line's codes as 16-bit integers.
INT8KV_INLINE IntRegister load_pairs(Codes<8>, const int8_t* line, int) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(line)));
}
// A line's bytes as 16-bit integers.
INT8KV_INLINE IntRegister widen_bytes(const int8_t* line, int) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(line)));
}
INT8KV_INLINE IntRegister broadcast_pair(int32_t pair) { return _mm512_set1_epi32(pair); }
INT8KV_INLINE IntRegister add(IntRegister a, IntRegister b) { return _mm512_add_epi32(a, b); }
INT8KV_INLINE IntRegister add_products(IntRegister sum, IntRegister a, IntRegister b) {
#if defined(INT8KV_AVX512_VNNI)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return add(sum, _mm512_madd_epi16(a, b));
#endif
}

}  // namespace int8kv::cpu::INT8KV_ISA
