// What the attention kernels share: the scheduler, the preparation of a query row, and what becomes
// of a row when its keys are done.
//
// The scheduler needs no plan from the host. Every block walks over the sequences, 128 at a time,
// turns their lengths into a prefix sum of work items, and takes every gridDim.x-th item. The
// launch shape is therefore the number of blocks the chip holds, for any batch.
#pragma once

#include "../softmax_state.h"
#include "attention_plan.h"
#include "index_maps.h"
#include "row.cuh"

namespace int8kv {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * 32;

// Partial results of sequences with more than one split; `partial` below is
// (seq * max_partials + query * num_splits + split) * num_heads + head.
struct Workspace {
  float* out;            // [num_seqs * max_partials * num_heads, head_size], not normalized
  SoftmaxState* states;  // [num_seqs * max_partials * num_heads]
  int32_t max_partials;
};

struct WorkItem {
  int32_t seq;
  int32_t query_begin;  // row of the sequence's first token in `query`
  int32_t query_len;
  int32_t seq_len;
  int32_t row_tile;
  int32_t kv_head;
  int32_t split;  // counted from plan.first_split
  SequencePlan plan;
};

// One row of a work item's tile: a token and a head.
struct QueryRow {
  int32_t query;  // token within the sequence
  int32_t head;
  bool exists;  // the last tile of a sequence may be partly empty
};

INT8KV_DEVICE QueryRow query_row(const PagedAttentionParams& p, const WorkItem& item,
                                 int rows_per_tile, int row) {
  const int group = p.num_heads / p.cache.num_kv_heads;
  const int index = item.row_tile * rows_per_tile + row;
  return {index / group, item.kv_head * group + index % group, index < item.query_len * group};
}

// Calls body(item) for every item of this block, by all threads together.
template <typename Body>
__device__ void for_each_work_item(const PagedAttentionParams& p, int rows_per_tile,
                                   int max_partials, Body&& body) {
  __shared__ int32_t item_end[kAttentionThreads];  // inclusive prefix sum over 128 sequences
  __shared__ int32_t warp_total[kAttentionWarps];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const auto plan_of = [&](int32_t seq, int32_t query_len) {
    return plan_sequence(p, query_len, p.seq_lens[seq], rows_per_tile, max_partials);
  };
  int64_t next = blockIdx.x;
  int64_t base = 0;  // items of the sequences before `first`
  for (int32_t first = 0; first < p.num_seqs; first += kAttentionThreads) {
    const int32_t own = first + threadIdx.x;
    int32_t sum = 0;
    if (own < p.num_seqs) {
      sum = plan_of(own, p.query_start_loc[own + 1] - p.query_start_loc[own])
                .items(p.cache.num_kv_heads);
    }
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int32_t before = shuffle_up(sum, delta);
      if (lane >= delta) sum += before;
    }
    if (lane == 31) warp_total[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; ++w) sum += warp_total[w];
    item_end[threadIdx.x] = sum;
    __syncthreads();

    const int32_t total = item_end[kAttentionThreads - 1];
    for (; next < base + total; next += gridDim.x) {
      const auto local = static_cast<int32_t>(next - base);
      int low = 0, high = kAttentionThreads - 1;  // the first sequence that ends after `local`
      while (low < high) {
        const int middle = (low + high) / 2;
        if (item_end[middle] > local) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      WorkItem item;
      item.seq = first + low;
      item.query_begin = p.query_start_loc[item.seq];
      item.query_len = p.query_start_loc[item.seq + 1] - item.query_begin;
      item.seq_len = p.seq_lens[item.seq];
      item.plan = plan_of(item.seq, item.query_len);
      int32_t index = local - (low == 0 ? 0 : item_end[low - 1]);
      item.row_tile = index % item.plan.row_tiles;  // neighbours read the same keys
      index /= item.plan.row_tiles;
      item.kv_head = index % p.cache.num_kv_heads;
      item.split = index / p.cache.num_kv_heads;
      body(item);
    }
    base += total;
    __syncthreads();
  }
}

// The keys of an item that at least one row of its tile sees.
INT8KV_DEVICE KeyRange item_keys(const PagedAttentionParams& p, const WorkItem& item,
                                 int rows_per_tile) {
  const int last_row = rows_per_tile - 1;
  const QueryRow first = query_row(p, item, rows_per_tile, 0);
  const QueryRow last = query_row(p, item, rows_per_tile, last_row);
  const int32_t before = item.seq_len - item.query_len;
  const int32_t last_query = last.exists ? last.query : item.query_len - 1;
  const int64_t split_begin = (item.plan.first_split + item.split) * item.plan.split_size;
  const int64_t split_end = split_begin + item.plan.split_size;
  KeyRange keys{visible_keys(p, before + first.query, item.seq_len).begin,
                visible_keys(p, before + last_query, item.seq_len).end};
  if (keys.begin < split_begin) keys.begin = static_cast<int32_t>(split_begin);
  if (keys.end > split_end) keys.end = static_cast<int32_t>(split_end);
  return keys;
}

// The chunk that holds slot `position`, which the caller has clamped to keys that a row sees.
INT8KV_DEVICE const int8_t* chunk_at(const PagedAttentionParams& p, const int32_t* block_table,
                                     int32_t position, int32_t kv_head) {
  return p.cache.chunk(block_table[position / p.cache.block_size], kv_head);
}

// A query row as the scores use it: equalized and rotated, fp32.
template <int kPairs>
__device__ Row<kPairs> load_query(const PagedAttentionParams& p, int64_t token, int head,
                                  int kv_head, int lane) {
  const int head_size = p.cache.head_size;
  const int64_t offset = token * p.query_token_stride + head * p.query_head_stride;
  Row<kPairs> row = load_row<kPairs>(p.query, offset, p.dtype, head_size, lane);
  if (p.key_equalizer != nullptr) {
    const float* equalizer = p.key_equalizer + int64_t{kv_head} * head_size;
    for_each_pair(row, head_size, lane, [&](int pair, float (&x)[2]) {
      x[0] *= equalizer[2 * pair];
      x[1] *= equalizer[2 * pair + 1];
    });
  }
  if (p.rotate_keys) warp_hadamard_rotate(row, head_size, lane);
  return row;
}

INT8KV_DEVICE void store_out(const PagedAttentionParams& p, int64_t token, int head, int dim,
                             float x) {
  const int64_t index = token * p.out_token_stride + head * p.out_head_stride + dim;
  if (p.dtype == DType::kFloat32) {
    static_cast<float*>(p.out)[index] = x;
  } else if (p.dtype == DType::kFloat16) {
    static_cast<uint16_t*>(p.out)[index] = float_to_half_bits(x);
  } else {
    static_cast<uint16_t*>(p.out)[index] = x == x ? float_to_bf16_bits(x) : uint16_t{0x7fc0};
  }
}

// Adds the head's sink, writes the row's lse (by the one thread that `writes_lse`) and returns what
// the unnormalized output is multiplied by.
INT8KV_DEVICE float finish_row(const PagedAttentionParams& p, SoftmaxState state, int64_t token,
                               int head, bool writes_lse) {
  float factor = 1.0f;
  if (p.sinks != nullptr) factor = merge_sink(state, p.sinks[head]);
  if (p.lse != nullptr && writes_lse) p.lse[head * p.num_tokens + token] = log_sum_exp(state);
  return state.max == kMinusInfinity ? 0.0f : factor / state.sum;
}

INT8KV_DEVICE int64_t partial_index(const PagedAttentionParams& p, int max_partials, int seq,
                                    int query, int num_splits, int split, int head) {
  return (int64_t{seq} * max_partials + query * num_splits + split) * p.num_heads + head;
}

}  // namespace int8kv
