// What the operators ask of their arguments, and the parameters they make of them. Included by
// ops.cpp, the only file with Torch.
//
// Every check names the argument, what was expected and what came; nothing behind them reads or
// writes outside the tensors they let through. On a GPU the caller vouches for values that the host
// cannot see without waiting.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "format/params.h"

namespace int8kv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// A macro, so that a text is put together only when it is needed: the checks run on every call.
#define INT8KV_CHECK(condition, ...)     \
  do {                                   \
    if (!(condition)) fail(__VA_ARGS__); \
  } while (false)

inline bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == b.size(i);
  return same;
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

inline const char* name_of(ScalarType type) { return torch::headeronly::toString(type); }

inline void check_dim(const Tensor& t, const char* name, int64_t dim, const char* shape) {
  INT8KV_CHECK(t.dim() == dim, name, " must be ", shape, ", got ", shape_of(t));
}

inline void check_type(const Tensor& t, const char* name, ScalarType type) {
  INT8KV_CHECK(t.scalar_type() == type, name, " must be ", name_of(type), ", got ",
               name_of(t.scalar_type()));
}

// Rows of a tensor that is written must not share memory.
inline void check_no_overlap(const Tensor& t, const char* name) {
  for (int64_t dim = 0; dim < t.dim(); ++dim) {
    INT8KV_CHECK(t.size(dim) <= 1 || t.stride(dim) != 0, name,
                 " is written and must not be expanded, got stride 0 in dimension ", dim);
  }
}

inline void check_device(const Tensor& t, const char* name, const Tensor& cache) {
  INT8KV_CHECK(t.is_cuda() == cache.is_cuda() && t.get_device_index() == cache.get_device_index(),
               name, " must be on the device of kv_cache");
}

inline DType float_type(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      fail(name, " must be Float, Half or BFloat16, got ", name_of(t.scalar_type()));
  }
}

inline KVCache view_cache(const Tensor& t) {
  check_type(t, "kv_cache", ScalarType::Char);
  check_dim(t, "kv_cache", 4, "[num_blocks, num_kv_heads, block_size, content_bytes]");
  const int64_t block_size = t.size(2), content = t.size(3), head_size = (content - 4) / 2;
  const bool is_head_size = content % 2 == 0 && head_size % kDimGroup == 0 &&
                            ((head_size >= 32 && head_size <= 256) || head_size == 512);
  INT8KV_CHECK(is_head_size, "kv_cache holds ", content,
               " bytes per slot, which is 2 * head_size + 4 for no",
               " supported head_size; supported: 32 to 256 in steps of 16, and 512");
  INT8KV_CHECK(block_size > 0 && block_size % kSlotGroup == 0,
               "kv_cache must have a block_size that is a positive multiple of ", kSlotGroup,
               ", got ", block_size);
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
  return cache;
}

// Checks [num_tokens, heads, head_size] with a contiguous last dimension.
inline void check_heads(const Tensor& t, const char* name, const KVCache& cache) {
  check_dim(t, name, 3, "[num_tokens, num_heads, head_size]");
  INT8KV_CHECK(t.size(2) == cache.head_size, name, " has head_size ", t.size(2),
               " but kv_cache has ", cache.head_size);
  INT8KV_CHECK(t.stride(2) == 1, name, " must be contiguous along head_size, got stride ",
               t.stride(2));
}

inline const float* optional_floats(const std::optional<Tensor>& t, const char* name,
                                    const Tensor& cache, std::initializer_list<int64_t> shape) {
  if (!t) return nullptr;
  check_type(*t, name, ScalarType::Float);
  check_device(*t, name, cache);
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

// Checks keys and values, one row per token.
inline void check_rows(const Tensor& key, const Tensor& value, const KVCache& cache) {
  check_heads(key, "key", cache);
  check_heads(value, "value", cache);
  INT8KV_CHECK(key.size(1) == cache.num_kv_heads, "key has ", key.size(1),
               " KV heads but kv_cache has ", cache.num_kv_heads);
  INT8KV_CHECK(same_shape(value, key), "value must have the shape of key, ", shape_of(key),
               ", got ", shape_of(value));
  float_type(key, "key");
  check_type(value, "value", key.scalar_type());
}

inline void check_ints(const Tensor& t, const char* name, const Tensor& kv_cache) {
  check_type(t, name, ScalarType::Int);
  INT8KV_CHECK(t.numel() == 0 || t.stride(t.dim() - 1) == 1, name,
               " must be contiguous along its last dimension");
  check_device(t, name, kv_cache);
}

// Checks the integers that say where sequences lie: `each` has one per sequence, `bounds` is a
// prefix sum. Returns num_seqs.
inline int32_t check_sequences(const Tensor& each, const char* each_name, const Tensor& bounds,
                               const char* bounds_name, const Tensor& block_table,
                               const Tensor& kv_cache) {
  check_dim(each, each_name, 1, "[num_seqs]");
  check_dim(bounds, bounds_name, 1, "[num_seqs + 1]");
  check_dim(block_table, "block_table", 2, "[num_seqs, max_blocks_per_seq]");
  check_ints(each, each_name, kv_cache);
  check_ints(bounds, bounds_name, kv_cache);
  check_ints(block_table, "block_table", kv_cache);
  const int64_t num_seqs = each.size(0);
  INT8KV_CHECK(bounds.size(0) == num_seqs + 1, bounds_name,
               " must have num_seqs + 1 = ", num_seqs + 1, " entries, got ", bounds.size(0));
  INT8KV_CHECK(block_table.size(0) == num_seqs, "block_table must have num_seqs = ", num_seqs,
               " rows, got ", block_table.size(0));
  return static_cast<int32_t>(num_seqs);
}

inline ReshapeAndCacheParams cache_params(const Tensor& key, const Tensor& value,
                                          const Tensor& kv_cache, const Tensor& slot_mapping,
                                          bool rotate_keys,
                                          const std::optional<Tensor>& key_equalizer) {
  ReshapeAndCacheParams p{};
  p.cache = view_cache(kv_cache);
  check_no_overlap(kv_cache, "kv_cache");
  check_rows(key, value, p.cache);
  p.dtype = float_type(key, "key");
  check_dim(slot_mapping, "slot_mapping", 1, "[num_tokens]");
  check_type(slot_mapping, "slot_mapping", ScalarType::Long);
  INT8KV_CHECK(slot_mapping.size(0) <= key.size(0), "slot_mapping has ", slot_mapping.size(0),
               " entries but key has ", key.size(0), " tokens");
  INT8KV_CHECK(slot_mapping.is_contiguous(), "slot_mapping must be contiguous");
  check_device(key, "key", kv_cache);
  check_device(value, "value", kv_cache);
  check_device(slot_mapping, "slot_mapping", kv_cache);
  p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();
  p.key_token_stride = key.stride(0);
  p.key_head_stride = key.stride(1);
  p.value_token_stride = value.stride(0);
  p.value_head_stride = value.stride(1);
  p.slot_mapping = static_cast<const int64_t*>(slot_mapping.const_data_ptr());
  p.key_equalizer = optional_floats(key_equalizer, "key_equalizer", kv_cache,
                                    {p.cache.num_kv_heads, p.cache.head_size});
  p.num_tokens = slot_mapping.size(0);
  p.rotate_keys = rotate_keys;
  return p;
}

inline GatherCacheParams gather_params(const Tensor& key, const Tensor& value,
                                       const Tensor& kv_cache, const Tensor& block_table,
                                       const Tensor& cu_seq_lens, const Tensor& seq_starts,
                                       bool rotate_keys,
                                       const std::optional<Tensor>& key_equalizer) {
  GatherCacheParams p{};
  p.cache = view_cache(kv_cache);
  check_rows(key, value, p.cache);
  check_no_overlap(key, "key");
  check_no_overlap(value, "value");
  p.dtype = float_type(key, "key");
  p.num_seqs =
      check_sequences(seq_starts, "seq_starts", cu_seq_lens, "cu_seq_lens", block_table, kv_cache);
  check_device(key, "key", kv_cache);
  check_device(value, "value", kv_cache);
  p.key = key.mutable_data_ptr();
  p.value = value.mutable_data_ptr();
  p.key_token_stride = key.stride(0);
  p.key_head_stride = key.stride(1);
  p.value_token_stride = value.stride(0);
  p.value_head_stride = value.stride(1);
  p.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
  p.block_table_stride = block_table.stride(0);
  p.cu_seq_lens = static_cast<const int32_t*>(cu_seq_lens.const_data_ptr());
  p.seq_starts = static_cast<const int32_t*>(seq_starts.const_data_ptr());
  p.key_equalizer = optional_floats(key_equalizer, "key_equalizer", kv_cache,
                                    {p.cache.num_kv_heads, p.cache.head_size});
  p.num_rows = key.size(0);
  p.rotate_keys = rotate_keys;
  return p;
}

inline PagedAttentionParams attention_params(
    const Tensor& out, const Tensor& query, const Tensor& kv_cache, const Tensor& block_table,
    const Tensor& seq_lens, const Tensor& query_start_loc, const std::optional<Tensor>& lse,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& key_equalizer, double softmax_scale, bool causal,
    int64_t sliding_window, double softcap, bool rotate_keys) {
  PagedAttentionParams p{};
  p.cache = view_cache(kv_cache);
  check_heads(query, "query", p.cache);
  check_heads(out, "out", p.cache);
  check_no_overlap(out, "out");
  p.dtype = float_type(query, "query");
  check_type(out, "out", query.scalar_type());
  INT8KV_CHECK(same_shape(out, query), "out must have the shape of query, ", shape_of(query),
               ", got ", shape_of(out));
  p.num_tokens = query.size(0);
  p.num_heads = static_cast<int32_t>(query.size(1));
  INT8KV_CHECK(
      p.num_heads > 0 && p.cache.num_kv_heads > 0 && p.num_heads % p.cache.num_kv_heads == 0,
      "query has ", p.num_heads, " heads, which is no multiple of the ", p.cache.num_kv_heads,
      " KV heads of kv_cache");
  p.num_seqs = check_sequences(seq_lens, "seq_lens", query_start_loc, "query_start_loc",
                               block_table, kv_cache);
  check_device(query, "query", kv_cache);
  check_device(out, "out", kv_cache);
  if (lse) {
    check_type(*lse, "lse", ScalarType::Float);
    check_device(*lse, "lse", kv_cache);
    INT8KV_CHECK(lse->dim() == 2 && lse->size(0) == p.num_heads && lse->size(1) == p.num_tokens &&
                     lse->is_contiguous(),
                 "lse must be contiguous [", p.num_heads, ", ", p.num_tokens, "], got ",
                 shape_of(*lse));
    p.lse = static_cast<float*>(lse->mutable_data_ptr());
  }
  p.softmax_scale = static_cast<float>(softmax_scale);
  p.softcap = static_cast<float>(softcap);
  INT8KV_CHECK(std::isfinite(p.softmax_scale), "softmax_scale must be finite in fp32, got ",
               softmax_scale);
  INT8KV_CHECK(std::isfinite(p.softcap) && softcap >= 0 && (p.softcap > 0 || softcap == 0),
               "softcap must be 0 (none) or positive in fp32, got ", softcap);
  INT8KV_CHECK(sliding_window >= 0 && sliding_window <= INT32_MAX,
               "sliding_window must be 0 (none) or positive, got ", sliding_window);
  p.query = query.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.query_token_stride = query.stride(0);
  p.query_head_stride = query.stride(1);
  p.out_token_stride = out.stride(0);
  p.out_head_stride = out.stride(1);
  p.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
  p.block_table_stride = block_table.stride(0);
  p.seq_lens = static_cast<const int32_t*>(seq_lens.const_data_ptr());
  p.query_start_loc = static_cast<const int32_t*>(query_start_loc.const_data_ptr());
  p.alibi_slopes = optional_floats(alibi_slopes, "alibi_slopes", kv_cache, {p.num_heads});
  p.sinks = optional_floats(sinks, "sinks", kv_cache, {p.num_heads});
  p.key_equalizer = optional_floats(key_equalizer, "key_equalizer", kv_cache,
                                    {p.cache.num_kv_heads, p.cache.head_size});
  p.sliding_window = static_cast<int32_t>(sliding_window);
  p.causal = causal;
  p.rotate_keys = rotate_keys;
  return p;
}

// Checks blocks [begin, end) of a sequence.
inline void check_blocks(const KVCache& cache, const int32_t* blocks, int64_t begin, int64_t end,
                         int64_t seq) {
  for (int64_t i = begin; i < end; ++i) {
    INT8KV_CHECK(blocks[i] >= 0 && blocks[i] < cache.num_blocks, "block_table[", seq, ", ", i,
                 "] is ", blocks[i], " but kv_cache has ", cache.num_blocks, " blocks");
  }
}

// What a kernel would read outside the tensors for; on a GPU the caller vouches for it.
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

// The same for what is gathered.
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
