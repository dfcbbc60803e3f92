// What the operators on the cache ask of their arguments, and the parts of their parameters that
// they make of them.
//
// Nothing behind these checks reads or writes outside the tensors they let through. On a GPU the
// caller vouches for values that the host cannot see without waiting.
#pragma once

#include "ops/checks.h"

namespace int8kv {

// Verifies that a tensor is a cache of that format and head size; the bytes alone do not tell.
inline KVCache view_cache(const Tensor& t, const std::string& cache_format, int64_t head_size,
                          const char* head_size_of) {
  check_type(t, "kv_cache", ScalarType::Char);
  check_dim(t, "kv_cache", 4, "[num_blocks, num_kv_heads, block_size, content_bytes]");
  INT8KV_CHECK(is_supported_head_size(head_size), head_size_of, " has head_size ", head_size,
               ", which is not supported; supported: ", kSupportedHeadSizes);
  const CacheFormat format = named(cache_format, kCacheFormats, "cache_format", "");
  const int64_t block_size = t.size(2), content = t.size(3);
  const int64_t expected = content_bytes(format, static_cast<int32_t>(head_size));
  INT8KV_CHECK(content == expected, "kv_cache holds ", content, " bytes per slot, but ",
               cache_format, " of ", head_size_of, "'s head_size ", head_size, " takes ", expected);
  INT8KV_CHECK(!t.is_cuda() || head_size <= max_cuda_head_size(format), "cache_format '",
               cache_format, "' has CUDA kernels for head sizes up to ", max_cuda_head_size(format),
               ", but ", head_size_of, " has head_size ", head_size, "; on a GPU use 'k8v8'");
  INT8KV_CHECK(block_size > 0 && block_size % kSlotGroup == 0,
               "kv_cache must have a block_size that is a positive multiple of ", kSlotGroup,
               ", got ", block_size);
  INT8KV_CHECK(block_size * content <= INT32_MAX, "kv_cache has a block_size of ", block_size,
               " slots of ", content, " bytes; a block of one KV head must stay below 2 GiB");
  INT8KV_CHECK(t.size(0) == 0 || (t.stride(3) == 1 && t.stride(2) == content),
               "kv_cache must hold the bytes of a (block, KV head) pair contiguously, got strides ",
               t.stride(2), ", ", t.stride(3), " for slots and bytes; expected ", content, ", 1");
  // The CUDA kernels copy 16 bytes at a time; the CPU kernels take any address.
  constexpr int64_t kAlignment = 16;
  INT8KV_CHECK(!t.is_cuda() || (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kAlignment == 0 &&
                                t.stride(0) % kAlignment == 0 && t.stride(1) % kAlignment == 0),
               "kv_cache must start at a multiple of ", kAlignment,
               " bytes, every block and every KV head too");
  KVCache cache{};
  cache.data = static_cast<int8_t*>(t.mutable_data_ptr());
  cache.block_stride = t.stride(0);
  cache.head_stride = t.stride(1);
  cache.num_blocks = t.size(0);
  cache.num_kv_heads = static_cast<int32_t>(t.size(1));
  cache.block_size = static_cast<int32_t>(block_size);
  cache.head_size = static_cast<int32_t>(head_size);
  cache.format = format;
  return cache;
}

// A tensor of a row per token: [num_tokens, num_heads, head_size], the last dimension contiguous.
inline void check_heads(const Tensor& t, const char* name) {
  check_dim(t, name, 3, "[num_tokens, num_heads, head_size]");
  INT8KV_CHECK(t.stride(2) == 1, name, " must be contiguous along head_size, got stride ",
               t.stride(2));
}

inline void check_on_device_of_cache(const Tensor& t, const char* name, const Tensor& kv_cache) {
  check_device(t, name, kv_cache, "kv_cache");
}

inline const float* optional_floats(const std::optional<Tensor>& t, const char* name,
                                    const Tensor& kv_cache, std::initializer_list<int64_t> shape) {
  if (!t) return nullptr;
  check_type(*t, name, ScalarType::Float);
  check_on_device_of_cache(*t, name, kv_cache);
  bool same = t->dim() == static_cast<int64_t>(shape.size()) && t->is_contiguous();
  int64_t i = 0;
  for (const int64_t size : shape) same = same && t->size(i++) == size;
  if (!same) {
    std::ostringstream expected;
    for (const int64_t* size = shape.begin(); size != shape.end(); ++size) {
      expected << (size == shape.begin() ? "" : ", ") << *size;
    }
    fail(name, " must be contiguous [", expected.str(), "], got ", shape_of(*t));
  }
  return static_cast<const float*>(t->const_data_ptr());
}

inline KeyTransform key_transform(bool rotate, const std::optional<Tensor>& equalizer,
                                  const Tensor& kv_cache, const KVCache& cache) {
  return {
      optional_floats(equalizer, "key_equalizer", kv_cache, {cache.num_kv_heads, cache.head_size}),
      rotate};
}

// Checks keys and values, one row per token, and fills in what all parameter structs with them
// have.
template <typename Params>
void set_rows(Params& p, const Tensor& key, const Tensor& value, const Tensor& kv_cache) {
  check_heads(value, "value");
  INT8KV_CHECK(key.size(1) == p.cache.num_kv_heads, "key has ", key.size(1),
               " KV heads but kv_cache has ", p.cache.num_kv_heads);
  INT8KV_CHECK(same_shape(value, key), "value must have the shape of key, ", shape_of(key),
               ", got ", shape_of(value));
  p.dtype = float_type(key, "key");
  check_type(value, "value", key.scalar_type());
  check_on_device_of_cache(key, "key", kv_cache);
  check_on_device_of_cache(value, "value", kv_cache);
  p.key_token_stride = key.stride(0);
  p.key_head_stride = key.stride(1);
  p.value_token_stride = value.stride(0);
  p.value_head_stride = value.stride(1);
}

inline const int32_t* ints(const Tensor& t, const char* name, const Tensor& kv_cache) {
  check_type(t, name, ScalarType::Int);
  INT8KV_CHECK(t.numel() == 0 || t.stride(t.dim() - 1) == 1, name,
               " must be contiguous along its last dimension");
  check_on_device_of_cache(t, name, kv_cache);
  return static_cast<const int32_t*>(t.const_data_ptr());
}

// Integers that say where sequences lie.
struct Sequences {
  const int32_t* each;    // [num_seqs]
  const int32_t* bounds;  // [num_seqs + 1], a prefix sum
  const int32_t* block_table;
  int64_t block_table_stride;
  int32_t num_seqs;
};

inline Sequences view_sequences(const Tensor& each, const char* each_name, const Tensor& bounds,
                                const char* bounds_name, const Tensor& block_table,
                                const Tensor& kv_cache) {
  check_dim(each, each_name, 1, "[num_seqs]");
  check_dim(bounds, bounds_name, 1, "[num_seqs + 1]");
  check_dim(block_table, "block_table", 2, "[num_seqs, max_blocks_per_seq]");
  const int64_t num_seqs = each.size(0);
  const Sequences found{ints(each, each_name, kv_cache), ints(bounds, bounds_name, kv_cache),
                        ints(block_table, "block_table", kv_cache), block_table.stride(0),
                        static_cast<int32_t>(num_seqs)};
  INT8KV_CHECK(bounds.size(0) == num_seqs + 1, bounds_name,
               " must have num_seqs + 1 = ", num_seqs + 1, " entries, got ", bounds.size(0));
  INT8KV_CHECK(block_table.size(0) == num_seqs, "block_table must have num_seqs = ", num_seqs,
               " rows, got ", block_table.size(0));
  return found;
}

// --- values, which the host sees on CPU ----------------------------------------------------------

inline void check_slots(const ReshapeAndCacheParams& p) {
  const int64_t num_slots = p.cache.num_blocks * p.cache.block_size;
  for (int64_t i = 0; i < p.num_tokens; ++i) {
    INT8KV_CHECK(p.slot_mapping[i] < num_slots, "slot_mapping[", i, "] is ", p.slot_mapping[i],
                 " but kv_cache has ", num_slots, " slots");
  }
}

// Blocks [begin, end) of a sequence.
inline void check_blocks(const KVCache& cache, const int32_t* blocks, int64_t begin, int64_t end,
                         int64_t seq) {
  for (int64_t i = begin; i < end; ++i) {
    INT8KV_CHECK(blocks[i] >= 0 && blocks[i] < cache.num_blocks, "block_table[", seq, ", ", i,
                 "] is ", blocks[i], " but kv_cache has ", cache.num_blocks, " blocks");
  }
}

inline void check_batch(const PagedAttentionParams& p, int64_t max_blocks_per_seq) {
  INT8KV_CHECK(p.query_start_loc[0] == 0, "query_start_loc must start at 0, got ",
               p.query_start_loc[0]);
  for (int32_t seq = 0; seq < p.num_seqs; ++seq) {
    const int64_t begin = p.query_start_loc[seq], end = p.query_start_loc[seq + 1];
    const int64_t seq_len = p.seq_lens[seq];
    INT8KV_CHECK(begin <= end && end <= p.num_tokens,
                 "query_start_loc must not decrease or exceed the ", p.num_tokens,
                 " tokens of query, got ", begin, ", ", end, " for sequence ", seq);
    INT8KV_CHECK(seq_len >= 0, "seq_lens[", seq, "] must not be negative, got ", seq_len);
    INT8KV_CHECK(!p.causal || end - begin <= seq_len, "sequence ", seq, " has ", end - begin,
                 " query tokens but seq_lens says ", seq_len);
    const int64_t num_blocks = (seq_len + p.cache.block_size - 1) / p.cache.block_size;
    INT8KV_CHECK(num_blocks <= max_blocks_per_seq, "seq_lens[", seq, "] is ", seq_len,
                 ", which takes ", num_blocks, " blocks, but block_table has ", max_blocks_per_seq,
                 " columns");
    if (begin == end) continue;
    check_blocks(p.cache, p.block_table + seq * p.block_table_stride, 0, num_blocks, seq);
  }
}

inline void check_batch(const GatherCacheParams& p, int64_t max_blocks_per_seq) {
  INT8KV_CHECK(p.cu_seq_lens[0] == 0, "cu_seq_lens must start at 0, got ", p.cu_seq_lens[0]);
  for (int32_t seq = 0; seq < p.num_seqs; ++seq) {
    const int64_t begin = p.cu_seq_lens[seq], end = p.cu_seq_lens[seq + 1];
    INT8KV_CHECK(begin <= end && end <= p.num_rows, "cu_seq_lens must not decrease or exceed the ",
                 p.num_rows, " rows of key, got ", begin, ", ", end, " for sequence ", seq);
    const int64_t first = p.seq_starts[seq], num_slots = first + end - begin;
    INT8KV_CHECK(first >= 0, "seq_starts[", seq, "] must not be negative, got ", first);
    if (begin == end) continue;
    const int64_t first_block = first / p.cache.block_size;
    const int64_t num_blocks = (num_slots + p.cache.block_size - 1) / p.cache.block_size;
    INT8KV_CHECK(num_blocks <= max_blocks_per_seq, "sequence ", seq, " is gathered up to slot ",
                 num_slots, ", which takes ", num_blocks, " blocks, but block_table has ",
                 max_blocks_per_seq, " columns");
    check_blocks(p.cache, p.block_table + seq * p.block_table_stride, first_block, num_blocks, seq);
  }
}

}  // namespace int8kv
