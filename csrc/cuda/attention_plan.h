// How one sequence is cut into work items, and which keys a query sees. Host and device.
//
// A work item is (tile of query rows, KV head, split of the keys). Query rows are (token, head of
// the GQA group) pairs, so that one pass over the keys serves them all. Splits sit at multiples of
// split_size from the sequence's first key and depend on nothing but the sequence itself and
// max_partials: the bits of a row are the same in every batch.
#pragma once

#include "../params.h"

namespace int8kv {

constexpr int kMinSplitSize = 256;  // a multiple of kTileSlots times the warps of a block

struct SequencePlan {
  int32_t row_tiles;
  int32_t num_splits;
  int32_t first_split;
  int64_t split_size;  // slots

  INT8KV_HD int32_t items(int32_t num_kv_heads) const {
    return row_tiles * num_splits * num_kv_heads;
  }
};

// Keys that a query sees: [begin, end).
struct KeyRange {
  int32_t begin;
  int32_t end;
};

INT8KV_HD KeyRange visible_keys(const PagedAttentionParams& p, int32_t position, int32_t seq_len) {
  const int64_t window = p.sliding_window > 0 ? p.sliding_window : int64_t{1} << 32;
  const int64_t first = position - window + 1;
  int64_t end = p.causal ? int64_t{position} + 1 : position + window;
  if (end > seq_len) end = seq_len;
  return {first > 0 ? static_cast<int32_t>(first) : 0, end > 0 ? static_cast<int32_t>(end) : 0};
}

INT8KV_HD SequencePlan plan_sequence(const PagedAttentionParams& p, int32_t query_len,
                                     int32_t seq_len, int32_t rows_per_tile, int32_t max_partials) {
  const int32_t rows = query_len > 0 ? query_len * (p.num_heads / p.cache.num_kv_heads) : 0;
  SequencePlan plan{(rows + rows_per_tile - 1) / rows_per_tile, 1, 0, int64_t{1} << 32};
  if (rows == 0 || seq_len <= 0 || 2 * int64_t{query_len} > max_partials) return plan;
  const int32_t first_key = visible_keys(p, seq_len - query_len, seq_len).begin;
  const int64_t limit = max_partials / query_len;
  plan.split_size = kMinSplitSize;
  while ((seq_len - 1) / plan.split_size - first_key / plan.split_size + 1 > limit) {
    plan.split_size *= 2;
  }
  plan.first_split = static_cast<int32_t>(first_key / plan.split_size);
  plan.num_splits = static_cast<int32_t>((seq_len - 1) / plan.split_size) - plan.first_split + 1;
  return plan;
}

}  // namespace int8kv
