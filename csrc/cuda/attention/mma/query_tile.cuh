// The query rows of an item on tensor cores: into shared memory before the keys, and out of it
// after them. All of a block's threads call both.
#pragma once

#include "cuda/attention/mma/shared_memory.cuh"

namespace int8kv {

// Equalizes and rotates the rows of an item and leaves them as operands of two fp16 terms in
// `query`, and what else is to be known of them in `rows`; where keys have midpoints, twice the sum
// of their elements in `sums`.
template <typename F, int kSpans, int kRowTiles>
__device__ void load_queries(const AttentionParams& p, const WorkItem& item, int head_size,
                             uint32_t* query, TileRows<8 * kRowTiles>& rows,
                             [[maybe_unused]] float* sums) {
  constexpr int kRows = 8 * kRowTiles;
  // Opaque, so that the addresses that follow from it are computed here, behind the first copies,
  // and not ahead of the first item and held from then on: up to 12 instructions and 11 registers.
  const unsigned thread = opaque(threadIdx.x);
  const int lane = thread % 32, warp = thread / 32;
  if (threadIdx.x == 0) rows.seen_by_all = keys_all_see(p, item, kRows);
  for (int r = warp; r < kRows; r += kAttentionWarps) {
    const QueryRow row = query_row(p, item, kRows, r);
    HeadVector<kSpans> values = {};
    float to_half = 1.0f;
    if (row.exists) {
      values = load_query<kSpans>(p, int64_t{item.query_begin} + row.query, row.head, item.kv_head,
                                  head_size, lane);
      // Scale the largest element to [2^8, 2^9): the second term is then normal where it matters.
      const int exponent = static_cast<int>(float_bits(warp_amax(values)) >> 23);
      to_half = power_of_two(min(max(127 + 8 + 127 - exponent, 1), 254));
    }
    [[maybe_unused]] float sum = 0.0f;
    for_each_pair(values, head_size, lane, [&](int pair, float (&x)[2]) {
      const float x0 = x[0] * to_half, x1 = x[1] * to_half;
      const uint32_t high = pack_half2(x0, x1);
      query[query_word(kRowTiles, r, pair, 0)] = high;
      query[query_word(kRowTiles, r, pair, 1)] =
          pack_half2(x0 - half_bits_to_float(static_cast<uint16_t>(high & 0xffffu)),
                     x1 - half_bits_to_float(static_cast<uint16_t>(high >> 16)));
      if constexpr (F::K::kHasMidpoint) sum += x0 + x1;
    });
    if constexpr (F::K::kHasMidpoint) {
      sum = warp_sum(sum);
      if (lane == 0) sums[r] = 2.0f * sum;
    }
    if (lane == 0) {
      const int32_t position = item.seq_len - item.query_len + row.query;
      // The codes of keys with midpoints are doubled (DoubledCodes).
      const float scale = p.softmax_scale / (F::K::kHasMidpoint ? 2.0f * to_half : to_half);
      rows.score_factor[r] = p.softcap > 0.0f ? scale / p.softcap : scale * kLog2e;
      rows.alibi_slope[r] =
          p.alibi_slopes != nullptr && row.exists ? p.alibi_slopes[row.head] * kLog2e : 0.0f;
      rows.position[r] = position;
      rows.visible[r] = row.exists ? visible_keys(p, position, item.seq_len) : KeyRange{0, 0};
    }
  }
}

// Merges the warps' states and outputs, which lie in their rings, in their order, and writes the
// rows of `item`: to `out` if it is whole, else to the workspace. Where values are rotated, rows
// are rotated back, those of a split too: the merge is a sum, to which the rotation does not
// matter.
template <typename Layout>
__device__ void store_rows(const AttentionParams& p, const WorkItem& item, int head_size,
                           const WarpStates<Layout::kRows>& states) {
  using Format = typename Layout::Format;
  const unsigned thread = opaque(threadIdx.x);  // as in load_queries()
  const int lane = thread % 32, warp = thread / 32;
  for (int r = warp; r < Layout::kRows; r += kAttentionWarps) {
    const QueryRow row = query_row(p, item, Layout::kRows, r);
    if (!row.exists) continue;
    SoftmaxState state;
    float max2 = kMinusInfinity;
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) max2 = fmaxf(max2, states.max[w][r]);
    float factors[kAttentionWarps];
    [[maybe_unused]] float middle = 0.0f;  // of all dims
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      const float weight =
          states.max[w][r] == kMinusInfinity ? 0.0f : exp2_fast(states.max[w][r] - max2);
      state.sum += weight * states.sum[w][r];
      factors[w] = weight * states.out_scale[w];
      if constexpr (Format::V::kHasMidpoint) {
        const float* middles = reinterpret_cast<const float*>(dynamic_shared() + Layout::kMiddles);
        middle += weight * middles[w * Layout::kRows + r];
      }
    }
    if (max2 != kMinusInfinity) state.max = max2 * kLn2;

    const int64_t token = int64_t{item.query_begin} + row.query;
    const bool is_whole = item.is_whole();
    const int64_t partial = Workspace::first_row(blockIdx.x, item.is_first, Layout::kRows) + r;
    const float final_factor = is_whole ? finish_row(p, state, token, row.head, lane == 0) : 1.0f;
    if (!is_whole && lane == 0) p.workspace.states[partial] = state;
    const float* outs = reinterpret_cast<const float*>(dynamic_shared()) + r * Layout::kDims;
    const auto merged = [&](int dim) {
      float x = 0.0f;
#pragma unroll
      for (int w = 0; w < kAttentionWarps; ++w) {
        x += factors[w] * outs[w * (Layout::kRingBytes / 4) + dim];
      }
      return x;
    };
    const auto store = [&](int dim, float x) {
      if (is_whole) {
        store_out(p, token, row.head, dim, x * final_factor);
      } else {
        p.workspace.out[partial * head_size + dim] = x;
      }
    };
    if constexpr (!Format::kRotatesValues) {
      for (int dim = lane; dim < head_size; dim += 32) store(dim, merged(dim));
    } else {
      HeadVector<Layout::kDims / kSpanDims> out = {};
      for_each_pair(out, head_size, lane, [&](int pair, float (&x)[2]) {
        x[0] = merged(2 * pair) + middle;
        x[1] = merged(2 * pair + 1) + middle;
      });
      warp_hadamard_rotate(out, head_size, lane);
      for_each_pair(out, head_size, lane, [&](int pair, float (&x)[2]) {
        store(2 * pair, x[0]);
        store(2 * pair + 1, x[1]);
      });
    }
  }
}

}  // namespace int8kv
