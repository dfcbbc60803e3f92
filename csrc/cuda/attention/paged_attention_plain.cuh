// Attention in fp32 without tensor cores: for fp32 queries and the largest head size.
//
// A warp owns one query row. Its lanes take a slot each for the scores (no sum crosses lanes) and
// every 32nd dim for the output, over tiles of 32 slots.
#pragma once

#include "cuda/attention/query_rows.cuh"
#include "cuda/plane_codes.cuh"

namespace int8kv {

constexpr int kPlainSlots = 32;
constexpr int kPlainDims = kMaxHeadSize / 32;  // of a lane: lane, lane + 32, ...

// One warp's query row and what it has seen of its keys.
template <typename F>
struct PlainRow {
  const PagedAttentionParams& p;
  const int32_t* block_table;  // of the sequence
  int32_t kv_head;
  int32_t head;
  int32_t position;  // of the query in the sequence
  KeyRange keys;     // of the split, as far as the row sees them
  const float* q;    // [head_size], equalized and rotated
  int lane;
  SoftmaxState state = {};
  float out[kPlainDims] = {};

  // The chunk of a key, which must be one that the row sees: other entries of the block table may
  // name blocks that do not exist.
  INT8KV_DEVICE const int8_t* chunk_of(int32_t key) const {
    return p.cache.chunk(block_table[key / p.cache.block_size], kv_head);
  }
  INT8KV_DEVICE int32_t nearest_key(int32_t key) const {
    return max(keys.begin, min(key, keys.end - 1));
  }

  // q . k of a slot, without its scale. Sixteen sums, since one long one loses bits where large
  // terms cancel.
  INT8KV_DEVICE float multiply_key(const int8_t* chunk, int slot) const {
    using K = typename F::K;
    const int head_size = p.cache.head_size;
    const int8_t* codes = chunk + p.cache.k_code<F>(slot, 0);
    float sums[16] = {};
    for (int dim = 0; dim < head_size; dim += 16) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float2 two = PlaneCodes<K>::k_dims(codes + K::k_byte(head_size, 0, dim + 2 * i));
        sums[2 * i] = fmaf(q[dim + 2 * i], two.x, sums[2 * i]);
        sums[2 * i + 1] = fmaf(q[dim + 2 * i + 1], two.y, sums[2 * i + 1]);
      }
    }
#pragma unroll
    for (int i = 1; i < 16; i *= 2) {
#pragma unroll
      for (int j = 0; j < 16; j += 2 * i) sums[j] += sums[j + i];
    }
    return sums[0];
  }

  INT8KV_DEVICE float finish_score(float score, float k_scale, int32_t key) const {
    score *= k_scale * p.softmax_scale;
    if (p.softcap > 0.0f) score = p.softcap * tanhf(score / p.softcap);
    if (p.alibi_slopes != nullptr) {
      score += p.alibi_slopes[head] * static_cast<float>(key - position);
    }
    return score;
  }

  // out = out * decay + the tile's values, weighed; `weight` is that of this lane's key. Short sums
  // lose fewer bits than one over all keys.
  INT8KV_DEVICE void add_values(int32_t tile, float weight, float decay) {
    float tile_out[kPlainDims] = {};
    for (int group = 0; group < kPlainSlots / kSlotGroup; ++group) {
      const int32_t key = nearest_key(tile + group * kSlotGroup);
      const int8_t* chunk = chunk_of(key);
      const int first = key % p.cache.block_size / kSlotGroup * kSlotGroup;
#pragma unroll 1
      for (int two = 0; two < kSlotGroup; two += 2) {
        const float w0 = shuffle(weight, group * kSlotGroup + two);
        const float w1 = shuffle(weight, group * kSlotGroup + two + 1);
#pragma unroll
        for (int i = 0; i < kPlainDims; ++i) {
          const int dim = lane + 32 * i;
          if (dim >= p.cache.head_size) continue;
          const float2 codes =
              PlaneCodes<typename F::V>::v_slots(chunk + p.cache.v_code<F>(first + two, dim));
          tile_out[i] = fmaf(w1, codes.y, fmaf(w0, codes.x, tile_out[i]));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPlainDims; ++i) out[i] = fmaf(out[i], decay, tile_out[i]);
  }

  // Attends the keys of a tile, one per lane.
  INT8KV_DEVICE void attend(int32_t tile) {
    const int32_t key = tile + lane;
    const bool is_visible = key >= keys.begin && key < keys.end;
    const int32_t nearest = nearest_key(key);
    const int8_t* chunk = chunk_of(nearest);
    const int slot = nearest % p.cache.block_size;
    const float k_scale = PlaneCodes<typename F::K>::scale(chunk + p.cache.k_scale<F>(slot));
    const float v_scale = PlaneCodes<typename F::V>::scale(chunk + p.cache.v_scale<F>(slot));
    float score = finish_score(multiply_key(chunk, slot), k_scale, key);
    score = is_visible ? score : kMinusInfinity;

    const float max_score = fmaxf(state.max, warp_max(score));
    const float decay = expf(state.max - max_score);
    const float weight = is_visible ? expf(score - max_score) : 0.0f;
    state = {max_score, state.sum * decay + warp_sum(weight)};
    add_values(tile, is_visible ? weight * v_scale : 0.0f, decay);
  }
};

// Writes the row to `out` if its item is whole, else to the workspace.
template <typename F>
INT8KV_DEVICE void store_row(const PlainRow<F>& row, const WorkItem& item, int64_t token, int warp,
                             const Workspace& workspace) {
  const PagedAttentionParams& p = row.p;
  const int head_size = p.cache.head_size;
  if (item.is_whole()) {
    const float factor = finish_row(p, row.state, token, row.head, row.lane == 0);
#pragma unroll
    for (int i = 0; i < kPlainDims; ++i) {
      const int dim = row.lane + 32 * i;
      if (dim < head_size) store_out(p, token, row.head, dim, row.out[i] * factor);
    }
    return;
  }
  const int64_t partial = item.first_row(kAttentionWarps) + warp;
  if (row.lane == 0) workspace.states[partial] = row.state;
#pragma unroll
  for (int i = 0; i < kPlainDims; ++i) {
    const int dim = row.lane + 32 * i;
    if (dim < head_size) workspace.out[partial * head_size + dim] = row.out[i];
  }
}

template <typename F>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    paged_attention_plain_kernel(const __grid_constant__ PagedAttentionParams p,
                                 const __grid_constant__ Workspace workspace) {
  constexpr int kMaxPairs = kMaxHeadSize / 64;
  __shared__ float queries[kAttentionWarps][kMaxHeadSize];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  float* q = queries[warp];

  for_each_work_item(p, kAttentionWarps, workspace, [&](const WorkItem& item) {
    const QueryRow query_of = query_row(p, item, kAttentionWarps, warp);
    if (!query_of.exists) return;
    const int64_t token = int64_t{item.query_begin} + query_of.query;
    const int32_t position = item.seq_len - item.query_len + query_of.query;
    const KeyRange visible = visible_keys(p, position, item.seq_len);
    const KeyRange split = split_keys(p, item, kAttentionWarps);
    const KeyRange keys{max(visible.begin, split.begin), min(visible.end, split.end)};

    // Load the query.
    HeadVector<kMaxPairs> query =
        load_query<kMaxPairs>(p, token, query_of.head, item.kv_head, lane);
    for_each_pair(query, p.cache.head_size, lane, [&](int pair, float (&x)[2]) {
      q[2 * pair] = x[0];
      q[2 * pair + 1] = x[1];
    });
    __syncwarp();

    // Loop over the keys.
    PlainRow<F> row{p,
                    p.block_table + item.seq * p.block_table_stride,
                    item.kv_head,
                    query_of.head,
                    position,
                    keys,
                    q,
                    lane};
    const int32_t first_tile =
        keys.begin < keys.end ? keys.begin / kPlainSlots * kPlainSlots : keys.end;
    for (int32_t tile = first_tile; tile < keys.end; tile += kPlainSlots) row.attend(tile);
    __syncwarp();

    store_row(row, item, token, warp, workspace);
  });
}

}  // namespace int8kv
