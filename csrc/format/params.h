// What the operators on the cache are called with: one struct per kernel, raw pointers only. No
// Torch below this line.
#pragma once

#include <cstdint>

#include "format/cache_format.h"

namespace int8kv {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// What is done to keys before they are quantized, and to queries so that q . k stays the same: K is
// divided by the equalizer, then rotated (rotation.h); Q is multiplied by it, then rotated.
struct KeyTransform {
  const float* equalizer;  // [num_kv_heads, head_size] or null
  bool rotate;

  // The factors of one KV head, or null.
  INT8KV_HD const float* factors(int64_t kv_head, int32_t head_size) const {
    return equalizer == nullptr ? nullptr : equalizer + kv_head * head_size;
  }
};

struct ReshapeAndCacheParams {
  KVCache cache;
  const void* key;    // [num_tokens, num_kv_heads, head_size], strides below, last one 1
  const void* value;  // same shape and dtype as key
  int64_t key_token_stride, key_head_stride;      // elements
  int64_t value_token_stride, value_head_stride;  // elements
  const int64_t* slot_mapping;  // [num_tokens]; negative: the token is padding and is skipped
  KeyTransform key_transform;   // applied to K
  int64_t num_tokens;
  DType dtype;
};

// Keys and values of stretches of sequences, as floats.
struct GatherCacheParams {
  KVCache cache;
  void* key;    // [num_rows, num_kv_heads, head_size], strides below, last one 1
  void* value;  // same shape and dtype as key
  int64_t key_token_stride, key_head_stride;      // elements
  int64_t value_token_stride, value_head_stride;  // elements
  const int32_t* block_table;  // [num_seqs, max_blocks_per_seq], row stride below
  int64_t block_table_stride;  // elements
  const int32_t* cu_seq_lens;  // [num_seqs + 1], the rows of a sequence; later rows are left alone
  const int32_t* seq_starts;   // [num_seqs], position of a sequence's first row
  KeyTransform key_transform;  // undone on K
  int64_t num_rows;
  int32_t num_seqs;
  DType dtype;

  // The last sequence for which first_of(seq), which does not decrease, is at most x; or the first.
  template <typename F>
  INT8KV_HD int32_t last_seq(int64_t x, F&& first_of) const {
    int32_t low = 0, high = num_seqs - 1;
    while (low < high) {
      const int32_t middle = (low + high + 1) / 2;
      if (first_of(middle) <= x) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
  // The sequence of a row below cu_seq_lens[num_seqs].
  INT8KV_HD int32_t seq_of(int64_t row) const {
    return last_seq(row, [&](int32_t seq) { return cu_seq_lens[seq]; });
  }
};

struct PagedAttentionParams {
  KVCache cache;
  const void* query;  // [num_tokens, num_heads, head_size], strides below, last one 1
  void* out;          // same shape and dtype as query
  int64_t query_token_stride, query_head_stride;  // elements
  int64_t out_token_stride, out_head_stride;      // elements
  float* lse;                                     // [num_heads, num_tokens] natural log, or null
  const int32_t* block_table;      // [num_seqs, max_blocks_per_seq], row stride below
  int64_t block_table_stride;      // elements
  const int32_t* seq_lens;         // [num_seqs], tokens in the cache including this step's
  const int32_t* query_start_loc;  // [num_seqs + 1], prefix sum of the query lengths
  const float* alibi_slopes;       // [num_heads] or null
  const float* sinks;              // [num_heads] or null; a score that attends to nothing
  KeyTransform key_transform;      // applied to Q
  int64_t num_tokens;
  int32_t num_seqs;
  int32_t num_heads;
  float softmax_scale;
  float softcap;           // 0: none
  int32_t sliding_window;  // keys with |query position - key position| < window; 0: all
  DType dtype;
  bool causal;

  INT8KV_HD int32_t num_queries_per_kv() const { return num_heads / cache.num_kv_heads; }
};

}  // namespace int8kv
