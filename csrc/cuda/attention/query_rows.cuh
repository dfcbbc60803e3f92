// Query rows: which token and head a row of an item's tile is, what it sees, how it is loaded, and
// what becomes of it when its keys are done.
#pragma once

#include "cuda/attention/work_shares.h"
#include "cuda/key_transform.cuh"
#include "format/softmax_state.h"

namespace int8kv {

// One row of a work item's tile.
struct QueryRow {
  int32_t query;  // token within the sequence
  int32_t head;
  bool exists;  // the last tile of a sequence may be partly empty
};

INT8KV_DEVICE QueryRow query_row(const AttentionParams& p, const WorkItem& item, int rows_per_tile,
                                 int row) {
  const int32_t index = item.row_tile * rows_per_tile + row;
  const int32_t query = p.queries_per_kv.divide(index);
  const int32_t first_head = item.kv_head * p.queries_per_kv.value;
  return {query, first_head + index - query * p.queries_per_kv.value, query < item.query_len};
}

// What the first and the last row of an item's tile see. From row to row both ends of the range
// stay or move forward.
struct TileRanges {
  KeyRange first;
  KeyRange last;
};

INT8KV_DEVICE TileRanges tile_ranges(const AttentionParams& p, const WorkItem& item,
                                     int rows_per_tile) {
  const QueryRow first = query_row(p, item, rows_per_tile, 0);
  const QueryRow last = query_row(p, item, rows_per_tile, rows_per_tile - 1);
  const int32_t before = item.seq_len - item.query_len;
  const int32_t last_query = min(last.query, item.query_len - 1);
  return {visible_keys(p, before + first.query, item.seq_len),
          visible_keys(p, before + last_query, item.seq_len)};
}

// The keys of a split that at least one row of its tile sees.
INT8KV_DEVICE KeyRange split_keys(const AttentionParams& p, const WorkItem& item,
                                  int rows_per_tile) {
  const TileRanges ranges = tile_ranges(p, item, rows_per_tile);
  KeyRange keys{ranges.first.begin, ranges.last.end};
  keys.begin = max(keys.begin, item.tile_begin * kTileSlots);
  // The end of the last tile may be 2^31.
  const uint32_t end = static_cast<uint32_t>(item.tile_end) * kTileSlots;
  if (static_cast<uint32_t>(keys.end) > end) keys.end = static_cast<int32_t>(end);
  return keys;
}

// The keys that all rows of an item's tile see.
INT8KV_DEVICE KeyRange keys_all_see(const AttentionParams& p, const WorkItem& item,
                                    int rows_per_tile) {
  const TileRanges ranges = tile_ranges(p, item, rows_per_tile);
  return {ranges.last.begin, ranges.first.end};
}

// A query row as the scores use it: equalized and rotated, fp32.
template <int kPairs>
__device__ HeadVector<kPairs> load_query(const AttentionParams& p, int64_t token, int head,
                                         int kv_head, int head_size, int lane) {
  const int64_t offset = token * p.query_token_stride + head * p.query_head_stride;
  HeadVector<kPairs> query = load_head<kPairs>(p.query, offset, p.dtype, head_size, lane);
  transform_query(query, p.key_transform, kv_head, head_size, lane);
  return query;
}

INT8KV_DEVICE void store_out(const AttentionParams& p, int64_t token, int head, int dim, float x) {
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
INT8KV_DEVICE float finish_row(const AttentionParams& p, SoftmaxState state, int64_t token,
                               int head, bool writes_lse) {
  float factor = 1.0f;
  const float poison = 0.0f * state.sum;  // NaN if a score was, which a sink must not hide
  if (p.sinks != nullptr) factor = merge_sink(state, p.sinks[head]);
  state.sum += poison;
  if (p.lse != nullptr && writes_lse) p.lse[head * p.num_tokens + token] = log_sum_exp(state);
  return state.max == kMinusInfinity ? 0.0f : factor / state.sum;
}

}  // namespace int8kv
