// The query rows of an item on tensor cores: into shared memory before the keys, and out of it
// after them. All of a block's threads call both.
#pragma once

#include "cuda/attention/mma/shared_memory.cuh"

namespace int8kv {

// Equalizes and rotates the rows of an item and leaves them as operands of two fp16 terms in
// `query`, and what else is to be known of them in `rows`.
template <int kSpans, int kRowTiles>
__device__ void load_queries(const PagedAttentionParams& p, const WorkItem& item, uint32_t* query,
                             TileRows<8 * kRowTiles>& rows) {
  constexpr int kRows = 8 * kRowTiles;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) rows.seen_by_all = keys_all_see(p, item, kRows);
  for (int r = warp; r < kRows; r += kAttentionWarps) {
    const QueryRow row = query_row(p, item, kRows, r);
    HeadVector<kSpans> values = {};
    float to_half = 1.0f;
    if (row.exists) {
      values = load_query<kSpans>(p, int64_t{item.query_begin} + row.query, row.head, item.kv_head,
                                  lane);
      // Scale the largest element to [2^8, 2^9): the second term is then normal where it matters.
      const int exponent = static_cast<int>(float_bits(warp_amax(values)) >> 23);
      to_half = power_of_two(min(max(127 + 8 + 127 - exponent, 1), 254));
    }
    for_each_pair(values, p.cache.head_size, lane, [&](int pair, float (&x)[2]) {
      const float x0 = x[0] * to_half, x1 = x[1] * to_half;
      const uint32_t high = pack_half2(x0, x1);
      query[query_word(kRowTiles, r, pair, 0)] = high;
      query[query_word(kRowTiles, r, pair, 1)] =
          pack_half2(x0 - half_bits_to_float(static_cast<uint16_t>(high & 0xffffu)),
                     x1 - half_bits_to_float(static_cast<uint16_t>(high >> 16)));
    });
    if (lane == 0) {
      const int32_t position = item.seq_len - item.query_len + row.query;
      const float scale = p.softmax_scale / to_half;
      rows.score_factor[r] = p.softcap > 0.0f ? scale / p.softcap : scale * kLog2e;
      rows.alibi_slope[r] =
          p.alibi_slopes != nullptr && row.exists ? p.alibi_slopes[row.head] * kLog2e : 0.0f;
      rows.position[r] = position;
      rows.visible[r] = row.exists ? visible_keys(p, position, item.seq_len) : KeyRange{0, 0};
    }
  }
}

// Merges the warps' states and outputs, which lie in their rings, in their order, and writes the
// rows of `item`: to `out` if it is whole, else to the workspace.
template <typename Layout>
__device__ void store_rows(const PagedAttentionParams& p, const WorkItem& item,
                           const Workspace& workspace, const WarpStates<Layout::kRows>& states) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int head_size = p.cache.head_size;
  for (int r = warp; r < Layout::kRows; r += kAttentionWarps) {
    const QueryRow row = query_row(p, item, Layout::kRows, r);
    if (!row.exists) continue;
    SoftmaxState state;
    float max2 = kMinusInfinity;
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) max2 = fmaxf(max2, states.max[w][r]);
    float factors[kAttentionWarps];
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      const float weight =
          states.max[w][r] == kMinusInfinity ? 0.0f : exp2_fast(states.max[w][r] - max2);
      state.sum += weight * states.sum[w][r];
      factors[w] = weight * states.out_scale[w];
    }
    if (max2 != kMinusInfinity) state.max = max2 * kLn2;

    const int64_t token = int64_t{item.query_begin} + row.query;
    const bool is_whole = item.is_whole();
    const int64_t partial = item.first_row(Layout::kRows) + r;
    const float final_factor = is_whole ? finish_row(p, state, token, row.head, lane == 0) : 1.0f;
    if (!is_whole && lane == 0) workspace.states[partial] = state;
    const float* outs = reinterpret_cast<const float*>(dynamic_shared()) + r * Layout::kDims;
    for (int dim = lane; dim < head_size; dim += 32) {
      float x = 0.0f;
#pragma unroll
      for (int w = 0; w < kAttentionWarps; ++w) {
        x += factors[w] * outs[w * (Layout::kRingBytes / 4) + dim];
      }
      if (is_whole) {
        store_out(p, token, row.head, dim, x * final_factor);
      } else {
        workspace.out[partial * head_size + dim] = x;
      }
    }
  }
}

}  // namespace int8kv
