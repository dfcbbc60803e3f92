// Which keys of its sequence a query token sees. Host and device.
#pragma once

#include "format/params.h"

namespace int8kv {

// Positions in the sequence, [begin, end).
struct KeyRange {
  int32_t begin;
  int32_t end;
};

// In 32 bits: a position is less than seq_len and at most the number of queries before it.
INT8KV_HD KeyRange visible_keys(const PagedAttentionParams& p, int32_t position, int32_t seq_len) {
  const int32_t window = p.sliding_window;
  const int32_t begin = window > 0 && window <= position ? position - window + 1 : 0;
  int32_t end = p.causal || (window > 0 && window < seq_len - position)
                    ? position + (p.causal ? 1 : window)
                    : seq_len;
  if (end > seq_len) end = seq_len;
  return {begin, end > 0 ? end : 0};
}

}  // namespace int8kv
