// Which keys of its sequence a query token sees. Host and device.
#pragma once

#include "format/params.h"

namespace int8kv {

// Positions in the sequence, [begin, end).
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

}  // namespace int8kv
