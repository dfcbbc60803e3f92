// The operators as PyTorch sees them: schemas, argument checks, dispatch. The only file with Torch,
// and only its stable ABI, so that one build serves PyTorch 2.11 and later.
//
// Every check names the argument, what was expected and what came; nothing behind them reads or
// writes outside the tensors they let through.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/quantize_per_channel.h"
#include "params.h"

#if defined(INT8KV_WITH_CUDA)
#include <torch/csrc/stable/accelerator.h>

#include "cuda/launch.h"

// Exported by a CUDA build of PyTorch only, and called only with a CUDA tensor in hand.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace {

using namespace int8kv;  // NOLINT: this file is the library's border
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

bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == b.size(i);
  return same;
}

std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

const char* name_of(ScalarType type) { return torch::headeronly::toString(type); }

void check_dim(const Tensor& t, const char* name, int64_t dim, const char* shape) {
  INT8KV_CHECK(t.dim() == dim, name, " must be ", shape, ", got ", shape_of(t));
}

void check_type(const Tensor& t, const char* name, ScalarType type) {
  INT8KV_CHECK(t.scalar_type() == type, name, " must be ", name_of(type), ", got ",
               name_of(t.scalar_type()));
}

// Rows of a tensor that is written must not share memory.
void check_no_overlap(const Tensor& t, const char* name) {
  for (int64_t dim = 0; dim < t.dim(); ++dim) {
    INT8KV_CHECK(t.size(dim) <= 1 || t.stride(dim) != 0, name,
                 " is written and must not be expanded, got stride 0 in dimension ", dim);
  }
}

void check_device(const Tensor& t, const char* name, const Tensor& cache) {
  INT8KV_CHECK(t.is_cuda() == cache.is_cuda() && t.get_device_index() == cache.get_device_index(),
               name, " must be on the device of kv_cache");
}

DType float_type(const Tensor& t, const char* name) {
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

KVCache view_cache(const Tensor& t) {
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
void check_heads(const Tensor& t, const char* name, const KVCache& cache) {
  check_dim(t, name, 3, "[num_tokens, num_heads, head_size]");
  INT8KV_CHECK(t.size(2) == cache.head_size, name, " has head_size ", t.size(2),
               " but kv_cache has ", cache.head_size);
  INT8KV_CHECK(t.stride(2) == 1, name, " must be contiguous along head_size, got stride ",
               t.stride(2));
}

const float* optional_floats(const std::optional<Tensor>& t, const char* name, const Tensor& cache,
                             std::initializer_list<int64_t> shape) {
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

ReshapeAndCacheParams cache_params(const Tensor& key, const Tensor& value, const Tensor& kv_cache,
                                   const Tensor& slot_mapping, bool rotate_keys,
                                   const std::optional<Tensor>& key_equalizer) {
  ReshapeAndCacheParams p{};
  p.cache = view_cache(kv_cache);
  check_no_overlap(kv_cache, "kv_cache");
  check_heads(key, "key", p.cache);
  check_heads(value, "value", p.cache);
  INT8KV_CHECK(key.size(1) == p.cache.num_kv_heads, "key has ", key.size(1),
               " KV heads but kv_cache has ", p.cache.num_kv_heads);
  INT8KV_CHECK(same_shape(value, key), "value must have the shape of key, ", shape_of(key),
               ", got ", shape_of(value));
  p.dtype = float_type(key, "key");
  check_type(value, "value", key.scalar_type());
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

PagedAttentionParams attention_params(
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
  check_dim(seq_lens, "seq_lens", 1, "[num_seqs]");
  check_dim(query_start_loc, "query_start_loc", 1, "[num_seqs + 1]");
  check_dim(block_table, "block_table", 2, "[num_seqs, max_blocks_per_seq]");
  for (const auto& [tensor, name] :
       {std::pair{&seq_lens, "seq_lens"}, std::pair{&query_start_loc, "query_start_loc"},
        std::pair{&block_table, "block_table"}}) {
    check_type(*tensor, name, ScalarType::Int);
    INT8KV_CHECK(tensor->numel() == 0 || tensor->stride(tensor->dim() - 1) == 1, name,
                 " must be contiguous along its last dimension");
    check_device(*tensor, name, kv_cache);
  }
  const int64_t num_seqs = seq_lens.size(0);
  p.num_seqs = static_cast<int32_t>(num_seqs);
  INT8KV_CHECK(query_start_loc.size(0) == num_seqs + 1,
               "query_start_loc must have num_seqs + 1 = ", num_seqs + 1, " entries, got ",
               query_start_loc.size(0));
  INT8KV_CHECK(block_table.size(0) == num_seqs, "block_table must have num_seqs = ", num_seqs,
               " rows, got ", block_table.size(0));
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

template <typename Variant, size_t kCount>
Variant variant_named(const std::string& name,
                      const std::pair<const char*, Variant> (&known)[kCount], const char* device) {
  std::string names;
  for (const auto& [known_name, variant] : known) {
    if (name == known_name) return variant;
    names += (names.empty() ? "" : ", ") + std::string(known_name);
  }
  fail("variant '", name, "' does not exist on ", device, "; supported: ", names);
}

constexpr std::pair<const char*, CpuVariant> kCpuVariants[] = {
    {"column_strided", CpuVariant::kColumnStrided},
    {"row_major", CpuVariant::kRowMajor},
    {"tiled", CpuVariant::kTiled},
    {"simd", CpuVariant::kSimd},
    {"vectorized", CpuVariant::kVectorized}};

// Checks codes and scales of a [num_tokens, num_channels] matrix on the device of x.
void check_per_channel(const Tensor& x, const Tensor& codes, const Tensor& scales) {
  check_dim(x, "x", 2, "[num_tokens, num_channels]");
  check_type(codes, "codes", ScalarType::Char);
  check_type(scales, "scales", ScalarType::Float);
  INT8KV_CHECK(same_shape(codes, x), "codes must have the shape of x, ", shape_of(x), ", got ",
               shape_of(codes));
  INT8KV_CHECK(codes.is_contiguous(), "codes must be contiguous, got strides ", codes.stride(0),
               ", ", codes.stride(1));
  INT8KV_CHECK(scales.dim() == 1 && scales.size(0) == x.size(1) && scales.is_contiguous(),
               "scales must be contiguous [num_channels] = [", x.size(1), "], got ",
               shape_of(scales));
  for (const auto& [tensor, name] : {std::pair{&codes, "codes"}, std::pair{&scales, "scales"}}) {
    INT8KV_CHECK(
        tensor->is_cuda() == x.is_cuda() && tensor->get_device_index() == x.get_device_index(),
        name, " must be on the device of x");
  }
}

QuantizePerChannelParams quantize_params(const Tensor& x, const Tensor& codes, const Tensor& scales,
                                         bool compute_scales) {
  QuantizePerChannelParams p{};
  check_per_channel(x, codes, scales);
  p.dtype = float_type(x, "x");
  INT8KV_CHECK(x.size(1) <= 1 || x.stride(1) == 1,
               "x must be contiguous along num_channels, got stride ", x.stride(1));
  p.x = x.const_data_ptr();
  p.x_token_stride = x.stride(0);
  p.codes = static_cast<int8_t*>(codes.mutable_data_ptr());
  p.scales = static_cast<float*>(scales.mutable_data_ptr());
  p.num_tokens = x.size(0);
  p.num_channels = x.size(1);
  p.compute_scales = compute_scales;
  return p;
}

DequantizePerChannelParams dequantize_params(const Tensor& x, const Tensor& codes,
                                             const Tensor& scales) {
  DequantizePerChannelParams p{};
  check_per_channel(x, codes, scales);
  p.dtype = float_type(x, "x");
  INT8KV_CHECK(x.is_contiguous(), "x must be contiguous, got strides ", x.stride(0), ", ",
               x.stride(1));
  p.codes = static_cast<const int8_t*>(codes.const_data_ptr());
  p.scales = static_cast<const float*>(scales.const_data_ptr());
  p.x = x.mutable_data_ptr();
  p.num_tokens = x.size(0);
  p.num_channels = x.size(1);
  return p;
}

// PyTorch's own threads, so that the thread settings of the caller hold.
cpu::ParallelFor torch_threads() {
  const auto run = [](int64_t size, const void* context, cpu::ParallelFor::Body body) {
    torch::stable::parallel_for(0, size, 1,
                                [=](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return {run, static_cast<int32_t>(torch::stable::get_num_threads())};
}

void reshape_and_cache_cpu(Tensor key, Tensor value, Tensor kv_cache, Tensor slot_mapping,
                           bool rotate_keys, std::optional<Tensor> key_equalizer) {
  const ReshapeAndCacheParams p =
      cache_params(key, value, kv_cache, slot_mapping, rotate_keys, key_equalizer);
  const int64_t num_slots = p.cache.num_blocks * p.cache.block_size;
  for (int64_t i = 0; i < p.num_tokens; ++i) {
    INT8KV_CHECK(p.slot_mapping[i] < num_slots, "slot_mapping[", i, "] is ", p.slot_mapping[i],
                 " but kv_cache has ", num_slots, " slots");
  }
  cpu::reshape_and_cache(p, torch_threads());
}

// What a kernel would read outside the tensors for; on a GPU the caller vouches for it.
void check_batch(const PagedAttentionParams& p, int64_t max_blocks_per_seq) {
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
    for (int64_t i = 0; i < num_blocks; ++i) {
      const int64_t block = p.block_table[seq * p.block_table_stride + i];
      INT8KV_CHECK(block >= 0 && block < p.cache.num_blocks, "block_table[", seq, ", ", i, "] is ",
                   block, " but kv_cache has ", p.cache.num_blocks, " blocks");
    }
  }
}

void paged_attention_cpu(Tensor out, Tensor query, Tensor kv_cache, Tensor block_table,
                         Tensor seq_lens, Tensor query_start_loc, std::optional<Tensor> lse,
                         std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks,
                         std::optional<Tensor> key_equalizer, double softmax_scale, bool causal,
                         int64_t sliding_window, double softcap, bool rotate_keys) {
  const PagedAttentionParams p = attention_params(
      out, query, kv_cache, block_table, seq_lens, query_start_loc, lse, alibi_slopes, sinks,
      key_equalizer, softmax_scale, causal, sliding_window, softcap, rotate_keys);
  check_batch(p, block_table.size(1));
  cpu::paged_attention(p, torch_threads());
}

// On a GPU the caller vouches for the values, which the host cannot see without waiting.
void check_scales(const float* scales, int64_t num_channels) {
  for (int64_t c = 0; c < num_channels; ++c) {
    INT8KV_CHECK(std::isnormal(scales[c]) && scales[c] > 0, "scales[", c,
                 "] must be positive, finite and not subnormal, got ", scales[c]);
  }
}

void quantize_per_channel_cpu(Tensor x, Tensor codes, Tensor scales, bool compute_scales,
                              std::string variant) {
  const QuantizePerChannelParams p = quantize_params(x, codes, scales, compute_scales);
  if (!compute_scales) check_scales(p.scales, p.num_channels);
  cpu::quantize_per_channel(p, variant_named(variant, kCpuVariants, "CPU"), torch_threads());
}

void dequantize_per_channel_cpu(Tensor x, Tensor codes, Tensor scales, std::string variant) {
  const DequantizePerChannelParams p = dequantize_params(x, codes, scales);
  check_scales(p.scales, p.num_channels);
  cpu::dequantize_per_channel(p, variant_named(variant, kCpuVariants, "CPU"), torch_threads());
}

#if defined(INT8KV_WITH_CUDA)
cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error, const char* name, const KVCache& cache, int64_t num_tokens) {
  INT8KV_CHECK(error == cudaSuccess, name, " of ", num_tokens, " tokens, ", cache.num_kv_heads,
               " KV heads, head_size ", cache.head_size, ", block_size ", cache.block_size, ": ",
               cudaGetErrorString(error));
}

void reshape_and_cache_cuda(Tensor key, Tensor value, Tensor kv_cache, Tensor slot_mapping,
                            bool rotate_keys, std::optional<Tensor> key_equalizer) {
  const ReshapeAndCacheParams p =
      cache_params(key, value, kv_cache, slot_mapping, rotate_keys, key_equalizer);
  const torch::stable::accelerator::DeviceGuard guard(kv_cache.get_device_index());
  check_launch(launch_reshape_and_cache(p, current_stream(kv_cache)), "reshape_and_cache", p.cache,
               p.num_tokens);
}

void paged_attention_cuda(Tensor out, Tensor query, Tensor kv_cache, Tensor block_table,
                          Tensor seq_lens, Tensor query_start_loc, std::optional<Tensor> lse,
                          std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks,
                          std::optional<Tensor> key_equalizer, double softmax_scale, bool causal,
                          int64_t sliding_window, double softcap, bool rotate_keys) {
  const PagedAttentionParams p = attention_params(
      out, query, kv_cache, block_table, seq_lens, query_start_loc, lse, alibi_slopes, sinks,
      key_equalizer, softmax_scale, causal, sliding_window, softcap, rotate_keys);
  const torch::stable::accelerator::DeviceGuard guard(kv_cache.get_device_index());
  const size_t bytes = paged_attention_workspace_bytes(p, kDefaultMaxPartials);
  const Tensor workspace =
      torch::stable::new_empty(kv_cache, {static_cast<int64_t>(bytes)}, ScalarType::Char);
  check_launch(launch_paged_attention(p, kDefaultMaxPartials, workspace.mutable_data_ptr(), bytes,
                                      current_stream(kv_cache)),
               "paged_attention", p.cache, p.num_tokens);
}

constexpr std::pair<const char*, CudaVariant> kCudaVariants[] = {
    {"naive", CudaVariant::kNaive},
    {"tiled", CudaVariant::kTiled},
    {"coarsened", CudaVariant::kCoarsened},
    {"vectorized", CudaVariant::kVectorized},
    {"fused", CudaVariant::kFused}};

void check_launch(cudaError_t error, const char* name, const std::string& variant,
                  const Tensor& x) {
  INT8KV_CHECK(error == cudaSuccess, name, " of ", shape_of(x), ", variant ", variant, ": ",
               cudaGetErrorString(error));
}

void quantize_per_channel_cuda(Tensor x, Tensor codes, Tensor scales, bool compute_scales,
                               std::string variant) {
  const QuantizePerChannelParams p = quantize_params(x, codes, scales, compute_scales);
  const CudaVariant known = variant_named(variant, kCudaVariants, "CUDA");
  INT8KV_CHECK(compute_scales || known != CudaVariant::kFused,
               "variant 'fused' computes the scales and takes none; use 'vectorized'");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const size_t bytes = quantize_per_channel_workspace_bytes(p);
  const Tensor workspace =
      torch::stable::new_empty(x, {static_cast<int64_t>(bytes)}, ScalarType::Char);
  check_launch(
      launch_quantize_per_channel(p, known, workspace.mutable_data_ptr(), bytes, current_stream(x)),
      "quantize_per_channel", variant, x);
}

void dequantize_per_channel_cuda(Tensor x, Tensor codes, Tensor scales, std::string variant) {
  const DequantizePerChannelParams p = dequantize_params(x, codes, scales);
  const CudaVariant known = variant_named(variant, kCudaVariants, "CUDA");
  INT8KV_CHECK(known != CudaVariant::kFused,
               "variant 'fused' computes scales, dequantization has none to compute; use "
               "'vectorized'");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(launch_dequantize_per_channel(p, known, current_stream(x)), "dequantize_per_channel",
               variant, x);
}
#endif

std::string cpu_isas() { return cpu::available_isas(); }
std::string cpu_isa() { return cpu::current_isa(); }

void set_cpu_isa(std::string isa) {
  INT8KV_CHECK(cpu::set_isa(isa.c_str()), "isa '", isa,
               "' is not available on this CPU; available: ", cpu::available_isas());
}

bool has_cuda_kernels() {
#if defined(INT8KV_WITH_CUDA)
  return true;
#else
  return false;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY(int8kv, m) {
  m.def(
      "reshape_and_cache(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping, "
      "bool rotate_keys, Tensor? key_equalizer) -> ()");
  m.def(
      "paged_attention(Tensor(a!) out, Tensor query, Tensor kv_cache, Tensor block_table, "
      "Tensor seq_lens, Tensor query_start_loc, Tensor(b!)? lse, Tensor? alibi_slopes, "
      "Tensor? sinks, Tensor? key_equalizer, float softmax_scale, bool causal, "
      "int sliding_window, float softcap, bool rotate_keys) -> ()");
  m.def(
      "quantize_per_channel(Tensor x, Tensor(a!) codes, Tensor(b!) scales, bool compute_scales, "
      "str variant) -> ()");
  m.def("dequantize_per_channel(Tensor(a!) x, Tensor codes, Tensor scales, str variant) -> ()");
  m.def("cpu_isas() -> str");
  m.def("cpu_isa() -> str");
  m.def("set_cpu_isa(str isa) -> ()");
  m.def("has_cuda_kernels() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(int8kv, CPU, m) {
  m.impl("reshape_and_cache", TORCH_BOX(&reshape_and_cache_cpu));
  m.impl("paged_attention", TORCH_BOX(&paged_attention_cpu));
  m.impl("quantize_per_channel", TORCH_BOX(&quantize_per_channel_cpu));
  m.impl("dequantize_per_channel", TORCH_BOX(&dequantize_per_channel_cpu));
}

#if defined(INT8KV_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(int8kv, CUDA, m) {
  m.impl("reshape_and_cache", TORCH_BOX(&reshape_and_cache_cuda));
  m.impl("paged_attention", TORCH_BOX(&paged_attention_cuda));
  m.impl("quantize_per_channel", TORCH_BOX(&quantize_per_channel_cuda));
  m.impl("dequantize_per_channel", TORCH_BOX(&dequantize_per_channel_cuda));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(int8kv, CompositeExplicitAutograd, m) {
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
  m.impl("has_cuda_kernels", TORCH_BOX(&has_cuda_kernels));
}
