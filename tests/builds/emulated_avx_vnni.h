// AVX-VNNI without AVX-VNNI, as emulated_avx512.h does it for AVX-512.
#pragma once

#include <immintrin.h>

// Both wrap where a sum overflows.
static inline __attribute__((always_inline)) __m256i emulated_dpwssd_avx_epi32(__m256i sum,
                                                                               __m256i a,
                                                                               __m256i b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}

#define _mm256_dpwssd_avx_epi32 emulated_dpwssd_avx_epi32
