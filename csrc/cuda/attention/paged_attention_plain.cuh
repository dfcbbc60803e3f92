// Attention in fp32 without tensor cores: for fp32 queries and the largest head size.
//
// A warp owns one query row. Its lanes take a slot each for the scores (no sum crosses lanes) and a
// dim each for the output, over tiles of 32 slots.
#pragma once

#include "cuda/attention/work.cuh"

namespace int8kv {

constexpr int kPlainSlots = 32;
constexpr int kMaxPairs = kMaxHeadSize / 64;

INT8KV_DEVICE float warp_max(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

INT8KV_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

__global__ void __launch_bounds__(kAttentionThreads, 2)
    paged_attention_plain_kernel(const __grid_constant__ PagedAttentionParams p,
                                 const __grid_constant__ Workspace workspace) {
  __shared__ float queries[kAttentionWarps][kMaxHeadSize];
  const KVCache& cache = p.cache;
  const int head_size = cache.head_size;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  float* q = queries[warp];

  for_each_work_item(p, kAttentionWarps, workspace, [&](const WorkItem& item) {
    const QueryRow row = query_row(p, item, kAttentionWarps, warp);
    if (!row.exists) return;
    const int64_t token = int64_t{item.query_begin} + row.query;
    const int32_t* block_table = p.block_table + item.seq * p.block_table_stride;
    const int32_t position = item.seq_len - item.query_len + row.query;
    const KeyRange visible = visible_keys(p, position, item.seq_len);
    const KeyRange piece = piece_keys(p, item, kAttentionWarps);
    const int32_t begin = max(visible.begin, piece.begin);
    const int32_t end = min(visible.end, piece.end);

    // Load the query.
    Row<kMaxPairs> query = load_query<kMaxPairs>(p, token, row.head, item.kv_head, lane);
    for_each_pair(query, head_size, lane, [&](int pair, float (&x)[2]) {
      q[2 * pair] = x[0];
      q[2 * pair + 1] = x[1];
    });
    __syncwarp();

    // Loop over the keys.
    SoftmaxState state;
    float out[kMaxHeadSize / 32] = {};
    const int32_t first_tile = begin < end ? begin / kPlainSlots * kPlainSlots : end;
    for (int32_t tile = first_tile; tile < end; tile += kPlainSlots) {
      const int32_t key = tile + lane;
      const bool is_visible = key >= begin && key < end;
      const int32_t clamped = max(begin, min(key, end - 1));
      const int8_t* chunk = chunk_at(p, block_table, clamped, item.kv_head);
      const int slot = clamped % cache.block_size;
      const auto* codes = reinterpret_cast<const uint16_t*>(chunk + cache.k_code(slot, 0));
      // Sixteen sums, since one long one loses bits where large terms cancel.
      float sums[16] = {};
      for (int dim = 0; dim < head_size; dim += 16) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const uint16_t two = codes[(dim / 2 + i) * kSlotGroup];
          sums[2 * i] = fmaf(q[dim + 2 * i], low_code(two), sums[2 * i]);
          sums[2 * i + 1] = fmaf(q[dim + 2 * i + 1], high_code(two), sums[2 * i + 1]);
        }
      }
#pragma unroll
      for (int i = 1; i < 16; i *= 2) {
#pragma unroll
        for (int j = 0; j < 16; j += 2 * i) sums[j] += sums[j + i];
      }
      float score = sums[0];
      const auto* k_scales = reinterpret_cast<const uint16_t*>(chunk + cache.k_scales());
      const auto* v_scales = reinterpret_cast<const uint16_t*>(chunk + cache.v_scales());
      score *= bf16_bits_to_float(k_scales[slot]) * p.softmax_scale;
      if (p.softcap > 0.0f) score = p.softcap * tanhf(score / p.softcap);
      if (p.alibi_slopes != nullptr) {
        score += p.alibi_slopes[row.head] * static_cast<float>(key - position);
      }
      score = is_visible ? score : kMinusInfinity;

      const float max_score = fmaxf(state.max, warp_max(score));
      const float decay = expf(state.max - max_score);
      float weight = is_visible ? expf(score - max_score) : 0.0f;
      state = {max_score, state.sum * decay + warp_sum(weight)};
      weight = is_visible ? weight * bf16_bits_to_float(v_scales[slot]) : 0.0f;

      float tile_out[kMaxHeadSize / 32] = {};  // short sums lose fewer bits than one over all keys
      for (int group = 0; group < kPlainSlots / kSlotGroup; ++group) {
        const int32_t group_key = max(begin, min(tile + group * kSlotGroup, end - 1));
        const int8_t* v_chunk = chunk_at(p, block_table, group_key, item.kv_head);
        const int first = group_key % cache.block_size / kSlotGroup * kSlotGroup;
#pragma unroll 1
        for (int two = 0; two < kSlotGroup; two += 2) {
          const float w0 = shuffle(weight, group * kSlotGroup + two);
          const float w1 = shuffle(weight, group * kSlotGroup + two + 1);
#pragma unroll
          for (int i = 0; i < kMaxHeadSize / 32; ++i) {
            const int dim = lane + 32 * i;
            if (dim >= head_size) continue;
            const uint16_t both =
                *reinterpret_cast<const uint16_t*>(v_chunk + cache.v_code(first + two, dim));
            tile_out[i] = fmaf(w1, high_code(both), fmaf(w0, low_code(both), tile_out[i]));
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kMaxHeadSize / 32; ++i) out[i] = fmaf(out[i], decay, tile_out[i]);
    }
    __syncwarp();

    // Store.
    if (item.is_whole()) {
      const float factor = finish_row(p, state, token, row.head, lane == 0);
#pragma unroll
      for (int i = 0; i < kMaxHeadSize / 32; ++i) {
        const int dim = lane + 32 * i;
        if (dim < head_size) store_out(p, token, row.head, dim, out[i] * factor);
      }
      return;
    }
    const int64_t partial = item.partial(kAttentionWarps) + warp;
    if (lane == 0) workspace.states[partial] = state;
#pragma unroll
    for (int i = 0; i < kMaxHeadSize / 32; ++i) {
      const int dim = lane + 32 * i;
      if (dim < head_size) workspace.out[partial * head_size + dim] = out[i];
    }
  });
}

}  // namespace int8kv
