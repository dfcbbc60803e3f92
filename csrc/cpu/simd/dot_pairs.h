// The one multiplication of the attention kernel, for scores and for outputs alike:
//
//   c[r][16 g + l] (+)= sum_p sum_{j < 2} a[r][2 p + j] * b[g][p][l][j]      int16 * int8 -> int32
//
//   scores   a = queries,       b = K codes of 16-slot groups, p over pairs of dims
//   outputs  a = probabilities, b = V codes of 16-dim groups,  p over pairs of slots
//
// A 32-byte line b[g][p] becomes one 512-bit (or two 256-bit) operand of a 16-bit multiply-add, and
// the pair a[r][2 p .. 2 p + 1] is broadcast: no shuffles and no horizontal sums. An int32 holds
// the sum of 512 products of 32767 * 127, so c is exact.
#pragma once

#include "cpu/simd/vectors.h"

namespace int8kv::cpu::INT8KV_ISA {

struct DotPairs {
  const int16_t* a;        // [num_rows][a_stride]
  int64_t a_stride;        // elements
  const int8_t* b;         // [num_groups][num_pairs][16][2], group stride below
  int64_t group_stride;    // bytes
  int64_t prefetch_ahead;  // bytes from a line of b to the one that will be needed later; 0: none
  int32_t* c;              // [num_rows][c_stride]
  int64_t c_stride;        // elements
  int32_t num_rows;
  int32_t num_groups;
  int32_t num_pairs;
  bool accumulate;
};

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kHasDot = true;  // its sum waits five cycles for the one before, an addition one
#else
constexpr bool kHasDot = false;
#endif

// How many rows, groups of b and pairs a pass holds sums of.
//
// Where b is in the L1 cache the sums belong to several groups, which then share a broadcast,
// enough of them to hide the latency of the multiply-add. Where b comes from memory it is read
// front to back, one group after the other, and the sums belong to several pairs: only then do the
// hardware's prefetchers help ours (8 x 4096 tokens on one thread: 24 GB/s instead of 21 at GQA 4
// with AVX-512; 1.1 to 1.3 times as fast at GQA 1 and 2 with AVX2). With AVX-512, the broadcasts of
// more than four rows cost more than that gains.
#if defined(__AVX512BW__)
constexpr int kBlockRows = 8;
constexpr bool reads_in_order(int rows, bool streams) { return streams && rows <= 4; }
constexpr int groups_per_pass(int rows, bool streams) {
  return reads_in_order(rows, streams) ? 1 : rows <= 2 ? 8 : rows <= 6 ? 4 : 2;
}
constexpr int pairs_per_pass(int rows, bool streams) {
  return !reads_in_order(rows, streams) ? 1 : rows <= 1 ? 8 : rows <= 2 ? 4 : 2;
}
#elif defined(__AVX2__)
constexpr int kBlockRows = 4;
constexpr int groups_per_pass(int rows, bool streams) {
  return streams ? 1 : rows <= 1 ? 4 : rows <= 2 ? 2 : 1;
}
constexpr int pairs_per_pass(int rows, bool streams) {
  return !streams || !kHasDot ? 1 : rows <= 1 ? 4 : rows <= 2 ? 2 : 1;
}
#else
constexpr int kBlockRows = 4;
constexpr int groups_per_pass(int, bool) { return 1; }
constexpr int pairs_per_pass(int, bool) { return 1; }
#endif

// The codes of kRegisterLanes pairs as 16-bit integers.
INT8KV_INLINE IntRegister load_pairs(const int8_t* codes) {
#if defined(__AVX512BW__)
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
#elif defined(__AVX2__)
  return _mm256_cvtepi8_epi16(load<__m128i>(codes));
#else
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  return _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
#endif
}

// sum + the products of a's and b's pairs.
INT8KV_INLINE IntRegister add_products(IntRegister sum, IntRegister a, IntRegister b) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, a, b);
#elif defined(__AVXVNNI__)
  return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
  return INT8KV_MM(add_epi32)(sum, INT8KV_MM(madd_epi16)(a, b));
#endif
}

template <int kRows, int kGroups, bool kStreams>
INT8KV_INLINE void dot_pairs_block(const DotPairs& d, int32_t row, int32_t group) {
  constexpr int kPairs = pairs_per_pass(kRows, kStreams);
  constexpr int kParts = kNumRegisters * kGroups;
  const int16_t* a = d.a + row * d.a_stride;
  const int8_t* b = d.b + group * d.group_stride;
  int32_t* c = d.c + row * d.c_stride + group * kLanes;
  IntRegister sum[kPairs][kRows][kParts];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kParts; ++i) {
      const int32_t* from = c + r * d.c_stride + i * kRegisterLanes;
      sum[0][r][i] = d.accumulate ? load<IntRegister>(from) : IntRegister{};
      for (int p = 1; p < kPairs; ++p) sum[p][r][i] = IntRegister{};
    }
  }
  const auto add_pair = [&](int32_t pair, auto& sums) __attribute__((always_inline)) {
    IntRegister codes[kParts];
    for (int i = 0; i < kParts; ++i) {
      const int8_t* line = b + i / kNumRegisters * d.group_stride + pair * (2 * kLanes);
      codes[i] = load_pairs(line + i % kNumRegisters * 2 * kRegisterLanes);
      // Half a cache line. With shorter registers fetching it twice costs less than a branch.
      if (kStreams && i % kNumRegisters == 0 && (kNumRegisters > 1 || pair % 2 == 0)) {
        _mm_prefetch(reinterpret_cast<const char*>(line) + d.prefetch_ahead, _MM_HINT_T0);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const IntRegister broadcast =
          INT8KV_MM(set1_epi32)(load<int32_t>(a + r * d.a_stride + 2 * pair));
      for (int i = 0; i < kParts; ++i) sums[r][i] = add_products(sums[r][i], codes[i], broadcast);
    }
  };
  int32_t pair = 0;
  for (; pair + kPairs <= d.num_pairs; pair += kPairs) {
    for (int p = 0; p < kPairs; ++p) add_pair(pair + p, sum[p]);
  }
  for (; kPairs > 1 && pair < d.num_pairs; ++pair) add_pair(pair, sum[0]);
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kParts; ++i) {
      for (int p = 1; p < kPairs; ++p) {
        sum[0][r][i] = INT8KV_MM(add_epi32)(sum[0][r][i], sum[p][r][i]);
      }
      store(c + r * d.c_stride + i * kRegisterLanes, sum[0][r][i]);
    }
  }
}

template <int kRows, int kGroups, bool kStreams>
INT8KV_INLINE void dot_pairs_rows(const DotPairs& d, int32_t row, int32_t group) {
  for (; group + kGroups <= d.num_groups; group += kGroups) {
    dot_pairs_block<kRows, kGroups, kStreams>(d, row, group);
  }
  if constexpr (kGroups > 1) dot_pairs_rows<kRows, kGroups / 2, kStreams>(d, row, group);
}

template <int kRows>
__attribute__((noinline)) static void dot_pairs_rows(const DotPairs& shared, int32_t row) {
  const DotPairs d = shared;  // a copy that no store of a sum can change stays in registers
  if (d.prefetch_ahead != 0) {
    dot_pairs_rows<kRows, groups_per_pass(kRows, true), true>(d, row, 0);
  } else {
    dot_pairs_rows<kRows, groups_per_pass(kRows, false), false>(d, row, 0);
  }
}

static void dot_pairs(const DotPairs& all) {
  const int32_t num_blocks = (all.num_rows + kBlockRows - 1) / kBlockRows;
  DotPairs d = all;
  for (int32_t block = 0, row = 0; block < num_blocks; ++block) {
    const int32_t rows = (all.num_rows - row + num_blocks - block - 1) / (num_blocks - block);
    switch (rows) {
      case 1:
        dot_pairs_rows<1>(d, row);
        break;
      case 2:
        dot_pairs_rows<2>(d, row);
        break;
      case 3:
        dot_pairs_rows<3>(d, row);
        break;
      case 4:
        dot_pairs_rows<4>(d, row);
        break;
#if defined(__AVX512BW__)
      case 5:
        dot_pairs_rows<5>(d, row);
        break;
      case 6:
        dot_pairs_rows<6>(d, row);
        break;
      case 7:
        dot_pairs_rows<7>(d, row);
        break;
      case 8:
        dot_pairs_rows<8>(d, row);
        break;
#endif
    }
    row += rows;
    d.prefetch_ahead = 0;  // once is enough
  }
}

}  // namespace int8kv::cpu::INT8KV_ISA
