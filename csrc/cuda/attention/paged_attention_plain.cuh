// Attention in fp32 without tensor cores: for fp32 queries and the largest head size.
//
// Below 8 bits codes are taken less half the levels, and a midpoint costs one multiplication: by
// the sum of the query for a key, by the key's probability for a value.
//
// A warp owns one query row. Its lanes take a slot each for the scores (no sum crosses lanes) and
// every 32nd dim for the output, over tiles of 32 slots.
#pragma once

#include "cuda/attention/work_items.cuh"
#include "cuda/plane_codes.cuh"

namespace int8kv {

constexpr int kPlainSlots = 32;
// What a row needs of midpoints, if its format has some.
template <bool kExist>
struct PlainMidpoints {
  float query_sum = 0.0f;  // the elements of the query
  float sum = 0.0f;        // probabilities times midpoints of values
};
template <>
struct PlainMidpoints<false> {};

// One warp's query row and what it has seen of its keys.
template <typename F>
struct PlainRow {
  using K = typename F::K;
  using V = typename F::V;
  using Midpoints = PlainMidpoints<K::kHasMidpoint || V::kHasMidpoint>;
  static constexpr int kDims = F::kMaxCudaHeadSize / 32;  // of a lane: lane, lane + 32, ...

  const AttentionParams& p;
  const int32_t* block_table;  // of the sequence
  int32_t kv_head;
  int32_t head;
  int32_t position;  // of the query in the sequence
  KeyRange keys;     // of the split, as far as the row sees them
  const float* q;    // [head_size], equalized and rotated
  int lane;
  SoftmaxState state = {};
  float out[kDims] = {};

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
    const int head_size = p.cache.head_size;
    const int8_t* codes = chunk + p.cache.k_code<F>(slot, 0);
    float sums[16] = {};
    for (int dim = 0; dim < head_size; dim += 16) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float2 two;
        if constexpr (K::kHasMidpoint) {
          two = PlaneCodes<K>::k_dims(codes, chunk, p.cache, slot, dim + 2 * i);
        } else {
          two = PlaneCodes<K>::k_dims(codes + K::k_byte(head_size, 0, dim + 2 * i));
        }
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

  // `middle` is the midpoint times the sum of the query.
  INT8KV_DEVICE float finish_score(float score, float k_scale, float middle, int32_t key) const {
    if constexpr (F::K::kHasMidpoint) {
      score = fmaf(score, k_scale, middle) * p.softmax_scale;
    } else {
      score *= k_scale * p.softmax_scale;
    }
    if (p.softcap > 0.0f) score = p.softcap * tanhf(score / p.softcap);
    if (p.alibi_slopes != nullptr) {
      score += p.alibi_slopes[head] * static_cast<float>(key - position);
    }
    return score;
  }

  // out = out * decay + the tile's values, weighed; `weight` is that of this lane's key. Short sums
  // lose fewer bits than one over all keys.
  INT8KV_DEVICE void add_values(int32_t tile, float weight, float decay) {
    float tile_out[kDims] = {};
    for (int group = 0; group < kPlainSlots / kSlotGroup; ++group) {
      const int32_t key = nearest_key(tile + group * kSlotGroup);
      const int8_t* chunk = chunk_of(key);
      const int first = key % p.cache.block_size / kSlotGroup * kSlotGroup;
#pragma unroll 1
      for (int two = 0; two < kSlotGroup; two += 2) {
        const float w0 = shuffle(weight, group * kSlotGroup + two);
        const float w1 = shuffle(weight, group * kSlotGroup + two + 1);
#pragma unroll
        for (int i = 0; i < kDims; ++i) {
          const int dim = lane + 32 * i;
          if (dim >= p.cache.head_size) continue;
          const float2 codes =
              PlaneCodes<V>::v_slots(chunk, p.cache.v_codes<F>(), p.cache, first + two, dim);
          tile_out[i] = fmaf(w1, codes.y, fmaf(w0, codes.x, tile_out[i]));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kDims; ++i) out[i] = fmaf(out[i], decay, tile_out[i]);
  }

  // Attends the keys of a tile, one per lane.
  INT8KV_DEVICE void attend(int32_t tile, [[maybe_unused]] Midpoints& midpoints) {
    const int32_t key = tile + lane;
    const bool is_visible = key >= keys.begin && key < keys.end;
    const int32_t nearest = nearest_key(key);
    const int8_t* chunk = chunk_of(nearest);
    const int slot = nearest % p.cache.block_size;
    const float k_scale = PlaneCodes<K>::scale(chunk + p.cache.k_scale<F>(slot));
    const float v_scale = PlaneCodes<V>::scale(chunk + p.cache.v_scale<F>(slot));
    [[maybe_unused]] const int32_t to_midpoint = p.cache.midpoint_offset();
    float k_middle = 0.0f, v_middle = 0.0f;
    if constexpr (K::kHasMidpoint) {
      k_middle = PlaneCodes<K>::scale(chunk + (p.cache.k_scale<F>(slot) + to_midpoint)) *
                 midpoints.query_sum;
    }
    if constexpr (V::kHasMidpoint) {
      v_middle = PlaneCodes<V>::scale(chunk + (p.cache.v_scale<F>(slot) + to_midpoint));
    }
    float score = finish_score(multiply_key(chunk, slot), k_scale, k_middle, key);
    score = is_visible ? score : kMinusInfinity;

    const float max_score = fmaxf(state.max, warp_max(score));
    const float decay = expf(state.max - max_score);
    const float weight = is_visible ? expf(score - max_score) : 0.0f;
    state = {max_score, state.sum * decay + warp_sum(weight)};
    if constexpr (F::V::kHasMidpoint) {
      midpoints.sum = midpoints.sum * decay + warp_sum(is_visible ? weight * v_middle : 0.0f);
    }
    add_values(tile, is_visible ? weight * v_scale : 0.0f, decay);
  }
};

// Adds the sum of midpoints to a row and rotates it back; `own` is the warp's [head_size] of
// shared memory.
template <typename F>
INT8KV_DEVICE void restore_out(PlainRow<F>& row, float middle, float* own) {
  const int head_size = row.p.cache.head_size;
#pragma unroll
  for (int i = 0; i < PlainRow<F>::kDims; ++i) {
    const int dim = row.lane + 32 * i;
    if (dim < head_size) own[dim] = row.out[i] + middle;
  }
  __syncwarp();
  HeadVector<F::kMaxCudaHeadSize / 64> out = {};
  for_each_pair(out, head_size, row.lane, [&](int pair, float (&x)[2]) {
    x[0] = own[2 * pair];
    x[1] = own[2 * pair + 1];
  });
  warp_hadamard_rotate(out, head_size, row.lane);
  for_each_pair(out, head_size, row.lane, [&](int pair, float (&x)[2]) {
    own[2 * pair] = x[0];
    own[2 * pair + 1] = x[1];
  });
  __syncwarp();
#pragma unroll
  for (int i = 0; i < PlainRow<F>::kDims; ++i) {
    const int dim = row.lane + 32 * i;
    if (dim < head_size) row.out[i] = own[dim];
  }
  __syncwarp();
}

// Writes the row to `out` if its item is whole, else to the workspace.
template <typename F>
INT8KV_DEVICE void store_row(const PlainRow<F>& row, const WorkItem& item, int64_t token,
                             int warp) {
  const AttentionParams& p = row.p;
  const int head_size = p.cache.head_size;
  if (item.is_whole()) {
    const float factor = finish_row(p, row.state, token, row.head, row.lane == 0);
#pragma unroll
    for (int i = 0; i < PlainRow<F>::kDims; ++i) {
      const int dim = row.lane + 32 * i;
      if (dim < head_size) store_out(p, token, row.head, dim, row.out[i] * factor);
    }
    return;
  }
  const int64_t partial = Workspace::first_row(blockIdx.x, item.is_first, kAttentionWarps) + warp;
  if (row.lane == 0) p.workspace.states[partial] = row.state;
#pragma unroll
  for (int i = 0; i < PlainRow<F>::kDims; ++i) {
    const int dim = row.lane + 32 * i;
    if (dim < head_size) p.workspace.out[partial * head_size + dim] = row.out[i];
  }
}

template <typename F>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    paged_attention_plain_kernel(const __grid_constant__ AttentionParams p) {
  constexpr int kMaxPairs = F::kMaxCudaHeadSize / 64;
  __shared__ float queries[kAttentionWarps][F::kMaxCudaHeadSize];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  float* q = queries[warp];

  for_each_work_item(p, kAttentionWarps, [&](const WorkItem& item, const WorkItem&) {
    const QueryRow query_of = query_row(p, item, kAttentionWarps, warp);
    if (!query_of.exists) return;
    const int64_t token = int64_t{item.query_begin} + query_of.query;
    const int32_t position = item.seq_len - item.query_len + query_of.query;
    const KeyRange visible = visible_keys(p, position, item.seq_len);
    const KeyRange split = split_keys(p, item, kAttentionWarps);
    const KeyRange keys{max(visible.begin, split.begin), min(visible.end, split.end)};

    // Load the query.
    HeadVector<kMaxPairs> query =
        load_query<kMaxPairs>(p, token, query_of.head, item.kv_head, p.cache.head_size, lane);
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
    typename PlainRow<F>::Midpoints midpoints;
    if constexpr (F::K::kHasMidpoint) {
      float sum = 0.0f;
      for_each_pair(query, p.cache.head_size, lane,
                    [&](int, float (&x)[2]) { sum += x[0] + x[1]; });
      midpoints.query_sum = warp_sum(sum);
    }
    const int32_t first_tile =
        keys.begin < keys.end ? keys.begin / kPlainSlots * kPlainSlots : keys.end;
    for (int32_t tile = first_tile; tile < keys.end; tile += kPlainSlots) {
      row.attend(tile, midpoints);
    }
    __syncwarp();

    if constexpr (F::kRotatesValues) restore_out(row, midpoints.sum, q);
    store_row(row, item, token, warp);
  });
}

}  // namespace int8kv
