// The one multiplication of the attention kernel, for scores and for outputs alike:
//
//   c[r][16 g + l] (+)= sum_p sum_{j < 2} a[r][2 p + j] * b[g][p][l][j]      int16 * int8 -> int32
//
//   scores   a = queries,       b = K codes of 16-slot groups, p over pairs of dims
//   outputs  a = probabilities, b = V codes of 16-dim groups,  p over pairs of slots
//
// A line b[g][p] of the plane's codes becomes one 512-bit (or two 256-bit) operand of a 16-bit
// multiply-add, and the pair a[r][2 p .. 2 p + 1] is broadcast: no shuffles and no horizontal sums.
// An int32 holds the sum of 512 products of 32767 * 127, so c is exact.
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

// The sums of one pass belong to kRows rows of a, to groups_per_pass() groups of b and to
// pairs_per_pass() pairs; both are functions of the instruction set (cpu/isa).
//
// Where b is in the L1 cache the sums belong to several groups, which then share a broadcast,
// enough of them to hide the latency of the multiply-add. Where b comes from memory it is read
// front to back, one group after the other, and the sums belong to several pairs: only then do the
// hardware's prefetchers help ours (8 x 4096 tokens on one thread: 24 GB/s instead of 21 at four
// query heads per KV head with AVX-512; 1.1 to 1.3 times as fast at one and two with AVX2).
template <typename C, int kRows, int kGroups, bool kStreams>
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
      const int8_t* line = b + i / kNumRegisters * d.group_stride + pair * C::kLineBytes;
      codes[i] = load_pairs(C{}, line, i % kNumRegisters);
      // A line is half a cache line. With shorter registers fetching it twice costs less than a
      // branch.
      if (kStreams && i % kNumRegisters == 0 && (kNumRegisters > 1 || pair % 2 == 0)) {
        _mm_prefetch(reinterpret_cast<const char*>(line) + d.prefetch_ahead, _MM_HINT_T0);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const IntRegister broadcast = broadcast_pair(load<int32_t>(a + r * d.a_stride + 2 * pair));
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
      for (int p = 1; p < kPairs; ++p) sum[0][r][i] = add(sum[0][r][i], sum[p][r][i]);
      store(c + r * d.c_stride + i * kRegisterLanes, sum[0][r][i]);
    }
  }
}

template <typename C, int kRows, int kGroups, bool kStreams>
INT8KV_INLINE void dot_pairs_groups(const DotPairs& d, int32_t row, int32_t group) {
  for (; group + kGroups <= d.num_groups; group += kGroups) {
    dot_pairs_block<C, kRows, kGroups, kStreams>(d, row, group);
  }
  if constexpr (kGroups > 1) dot_pairs_groups<C, kRows, kGroups / 2, kStreams>(d, row, group);
}

template <typename C, int kRows>
__attribute__((noinline)) static void dot_pairs_rows(const DotPairs& shared, int32_t row) {
  const DotPairs d = shared;  // a copy that no store of a sum can change stays in registers
  if (d.prefetch_ahead != 0) {
    dot_pairs_groups<C, kRows, groups_per_pass(kRows, true), true>(d, row, 0);
  } else {
    dot_pairs_groups<C, kRows, groups_per_pass(kRows, false), false>(d, row, 0);
  }
}

// The template for a number of rows from 1 to kBlockRows.
template <typename C, int kRows = 1>
INT8KV_INLINE void dot_pairs_rows_of(int32_t rows, const DotPairs& d, int32_t row) {
  if (rows == kRows) {
    dot_pairs_rows<C, kRows>(d, row);
  } else if constexpr (kRows < kBlockRows) {
    dot_pairs_rows_of<C, kRows + 1>(rows, d, row);
  }
}

// Calls f(row, rows) for blocks of at most kBlockRows rows, as even as can be.
template <typename F>
INT8KV_INLINE void for_each_row_block(int32_t num_rows, const F& f) {
  const int32_t num_blocks = (num_rows + kBlockRows - 1) / kBlockRows;
  for (int32_t block = 0, row = 0; block < num_blocks; ++block) {
    const int32_t rows = (num_rows - row + num_blocks - block - 1) / (num_blocks - block);
    f(row, rows);
    row += rows;
  }
}

// `C` is the trait of the plane that b is a part of.
template <typename C>
static void dot_pairs(const DotPairs& all) {
  DotPairs d = all;
  for_each_row_block(all.num_rows, [&](int32_t row, int32_t rows) {
    dot_pairs_rows_of<C>(rows, d, row);
    d.prefetch_ahead = 0;  // once is enough
  });
}

}  // namespace int8kv::cpu::INT8KV_ISA
