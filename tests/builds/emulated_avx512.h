// AVX-512 without AVX-512: included before the sources of csrc/cpu/simd and csrc/ladder/simd that
// are compiled for it (INT8KV_EMULATED_ISAS), it replaces the intrinsics they use by loops over
// lanes, each after the operation in Intel's Intrinsics Guide. A further one does not compile until
// it has its loop here
// ("target specific option mismatch").
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>

#define INT8KV_EMULATED static inline __attribute__((always_inline))

namespace int8kv::emulated_avx512 {

typedef int8_t I8x16 __attribute__((vector_size(16)));
typedef int8_t I8x32 __attribute__((vector_size(32)));
typedef uint8_t U8x32 __attribute__((vector_size(32)));
typedef int16_t I16x32 __attribute__((vector_size(64)));
typedef int32_t I32x16 __attribute__((vector_size(64)));
typedef uint32_t U32x16 __attribute__((vector_size(64)));

// f(i) in lane i.
template <typename V, typename F>
INT8KV_EMULATED V lanes(const F& f) {
  V v;
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) v[i] = f(i);
  return v;
}

INT8KV_EMULATED __m512i set1_epi32(int x) { return (__m512i)(I32x16{} + x); }
INT8KV_EMULATED void stream_si512(__m512i* to, __m512i v) {
  *to = v;
}  // aligned, as the instruction wants it

INT8KV_EMULATED __m512i add_epi32(__m512i a, __m512i b) { return (__m512i)((U32x16)a + (U32x16)b); }
INT8KV_EMULATED __m512i madd_epi16(__m512i a, __m512i b) {
  const I16x32 x = (I16x32)a, y = (I16x32)b;
  return (__m512i)lanes<U32x16>([&](int i) {
    const uint32_t low = x[2 * i] * y[2 * i], high = x[2 * i + 1] * y[2 * i + 1];
    return low + high;
  });
}
INT8KV_EMULATED __m512i dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {
  return add_epi32(sum, madd_epi16(a, b));
}

INT8KV_EMULATED __m512i cvtepi8_epi16(__m256i a) {
  return (__m512i) __builtin_convertvector((I8x32)a, I16x32);
}
INT8KV_EMULATED __m512i cvtepu8_epi16(__m256i a) {
  return (__m512i) __builtin_convertvector((U8x32)a, I16x32);
}
INT8KV_EMULATED __m512i maskz_cvtepi8_epi32(__mmask16 mask, __m128i a) {
  const I8x16 x = (I8x16)a;
  return (__m512i)lanes<I32x16>([&](int i) { return mask >> i & 1 ? x[i] : 0; });
}
INT8KV_EMULATED __m128i maskz_cvtepi32_epi8(__mmask16 mask, __m512i a) {
  const I32x16 x = (I32x16)a;
  return (__m128i)lanes<I8x16>(
      [&](int i) { return static_cast<int8_t>(mask >> i & 1 ? x[i] : 0); });
}

INT8KV_EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return lanes<__m512>([&](int i) { return std::fma(a[i], b[i], c[i]); });
}
// The second operand if one is NaN or both are zero.
INT8KV_EMULATED __m512 maskz_max_ps(__mmask16 mask, __m512 a, __m512 b) {
  return lanes<__m512>([&](int i) { return !(mask >> i & 1) ? 0.0f : a[i] > b[i] ? a[i] : b[i]; });
}
INT8KV_EMULATED __m512 maskz_min_ps(__mmask16 mask, __m512 a, __m512 b) {
  return lanes<__m512>([&](int i) { return !(mask >> i & 1) ? 0.0f : a[i] < b[i] ? a[i] : b[i]; });
}
// a * 2^floor(b), rounded once.
INT8KV_EMULATED __m512 maskz_scalef_ps(__mmask16 mask, __m512 a, __m512 b) {
  return lanes<__m512>([&](int i) {
    return mask >> i & 1 ? std::scalbn(a[i], static_cast<int>(std::floor(b[i]))) : 0.0f;
  });
}
INT8KV_EMULATED __m512i mask_blend_epi32(__mmask16 mask, __m512i a, __m512i b) {
  const I32x16 x = (I32x16)a, y = (I32x16)b;
  return (__m512i)lanes<I32x16>([&](int i) { return mask >> i & 1 ? y[i] : x[i]; });
}
INT8KV_EMULATED __mmask16 cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  __mmask16 mask = 0;
  for (int i = 0; i < 16; ++i) {
    const bool is_unordered = std::isnan(a[i]) || std::isnan(b[i]);
    mask |= (predicate == _CMP_UNORD_Q ? is_unordered : predicate == _CMP_LT_OQ && a[i] < b[i])
            << i;
  }
  return mask;
}

}  // namespace int8kv::emulated_avx512

#define _mm512_set1_epi32 int8kv::emulated_avx512::set1_epi32
#define _mm512_stream_si512 int8kv::emulated_avx512::stream_si512
#define _mm512_add_epi32 int8kv::emulated_avx512::add_epi32
#define _mm512_madd_epi16 int8kv::emulated_avx512::madd_epi16
#define _mm512_dpwssd_epi32 int8kv::emulated_avx512::dpwssd_epi32
#define _mm512_cvtepi8_epi16 int8kv::emulated_avx512::cvtepi8_epi16
#define _mm512_cvtepu8_epi16 int8kv::emulated_avx512::cvtepu8_epi16
#define _mm512_maskz_cvtepi8_epi32 int8kv::emulated_avx512::maskz_cvtepi8_epi32
#define _mm512_maskz_cvtepi32_epi8 int8kv::emulated_avx512::maskz_cvtepi32_epi8
#define _mm512_fmadd_ps int8kv::emulated_avx512::fmadd_ps
#define _mm512_maskz_max_ps int8kv::emulated_avx512::maskz_max_ps
#define _mm512_maskz_min_ps int8kv::emulated_avx512::maskz_min_ps
#define _mm512_maskz_scalef_ps int8kv::emulated_avx512::maskz_scalef_ps
#define _mm512_mask_blend_epi32 int8kv::emulated_avx512::mask_blend_epi32
#define _mm512_cmp_ps_mask int8kv::emulated_avx512::cmp_ps_mask
