// The operators on the cache: each checks its arguments, fills in the parameters of its kernel and
// runs it on the device of the cache.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "ops/cache_checks.h"
#include "ops/devices.h"

#if defined(INT8KV_WITH_CUDA)
#include "cuda/launch.h"
#endif

namespace {

using namespace int8kv;  // NOLINT: this file is the library's border

#if defined(INT8KV_WITH_CUDA)
void check_launch(cudaError_t error, const char* name, const KVCache& cache, int64_t num_tokens) {
  INT8KV_CHECK(error == cudaSuccess, name, " of ", num_tokens, " tokens, ", cache.num_kv_heads,
               " KV heads, head_size ", cache.head_size, ", block_size ", cache.block_size, ": ",
               cudaGetErrorString(error));
}
#endif

#if defined(INT8KV_WITH_CUDA)
// With INT8KV_CHECK_BOUNDS=1 in the environment.
bool checks_bounds() {
  static const char* value = std::getenv("INT8KV_CHECK_BOUNDS");
  return value != nullptr && std::strcmp(value, "1") == 0;
}
#endif

// The instruction set of one call by its name, "" being that of the process.
const char* check_isa(const std::string& cpu_isa) {
  if (cpu_isa.empty()) return nullptr;
  INT8KV_CHECK(cpu::has_isa(cpu_isa.c_str()), "cpu_isa '", cpu_isa,
               "' is not available on this CPU; available: ", cpu::available_isas());
  return cpu_isa.c_str();
}

void reshape_and_cache(Tensor key, Tensor value, Tensor kv_cache, Tensor slot_mapping,
                       std::string cache_format, bool rotate_keys,
                       std::optional<Tensor> key_equalizer, std::string cpu_isa) {
  ReshapeAndCacheParams p{};
  check_heads(key, "key");
  p.cache = view_cache(kv_cache, cache_format, key.size(2), "key");
  check_no_overlap(kv_cache, "kv_cache");
  set_rows(p, key, value, kv_cache);
  check_dim(slot_mapping, "slot_mapping", 1, "[num_tokens]");
  check_type(slot_mapping, "slot_mapping", ScalarType::Long);
  INT8KV_CHECK(slot_mapping.size(0) <= key.size(0), "slot_mapping has ", slot_mapping.size(0),
               " entries but key has ", key.size(0), " tokens");
  INT8KV_CHECK(slot_mapping.is_contiguous(), "slot_mapping must be contiguous");
  check_on_device_of_cache(slot_mapping, "slot_mapping", kv_cache);
  p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();
  p.slot_mapping = static_cast<const int64_t*>(slot_mapping.const_data_ptr());
  p.key_transform = key_transform(rotate_keys, key_equalizer, kv_cache, p.cache);
  p.num_tokens = slot_mapping.size(0);
#if defined(INT8KV_WITH_CUDA)
  if (kv_cache.is_cuda()) {
    const DeviceGuard guard(kv_cache.get_device_index());
    if (checks_bounds()) {
      check_launch(launch_check_bounds(p, current_stream(kv_cache)), "reshape_and_cache", p.cache,
                   p.num_tokens);
    }
    check_launch(launch_reshape_and_cache(p, current_stream(kv_cache)), "reshape_and_cache",
                 p.cache, p.num_tokens);
    return;
  }
#endif
  check_slots(p);
  cpu::reshape_and_cache(p, torch_threads(), check_isa(cpu_isa));
}

void gather_cache(Tensor key, Tensor value, Tensor kv_cache, Tensor block_table, Tensor cu_seq_lens,
                  Tensor seq_starts, std::string cache_format, bool rotate_keys,
                  std::optional<Tensor> key_equalizer) {
  GatherCacheParams p{};
  check_heads(key, "key");
  p.cache = view_cache(kv_cache, cache_format, key.size(2), "key");
  set_rows(p, key, value, kv_cache);
  check_no_overlap(key, "key");
  check_no_overlap(value, "value");
  const Sequences sequences =
      view_sequences(seq_starts, "seq_starts", cu_seq_lens, "cu_seq_lens", block_table, kv_cache);
  p.key = key.mutable_data_ptr();
  p.value = value.mutable_data_ptr();
  p.block_table = sequences.block_table;
  p.block_table_stride = sequences.block_table_stride;
  p.cu_seq_lens = sequences.bounds;
  p.seq_starts = sequences.each;
  p.num_seqs = sequences.num_seqs;
  p.key_transform = key_transform(rotate_keys, key_equalizer, kv_cache, p.cache);
  p.num_rows = key.size(0);
#if defined(INT8KV_WITH_CUDA)
  if (kv_cache.is_cuda()) {
    const DeviceGuard guard(kv_cache.get_device_index());
    if (checks_bounds()) {
      check_launch(launch_check_bounds(p, block_table.size(1), current_stream(kv_cache)),
                   "gather_cache", p.cache, p.num_rows);
    }
    check_launch(launch_gather_cache(p, current_stream(kv_cache)), "gather_cache", p.cache,
                 p.num_rows);
    return;
  }
#endif
  check_batch(p, block_table.size(1));
  cpu::gather_cache(p, torch_threads());
}

void set_queries(PagedAttentionParams& p, const Tensor& query, const Tensor& out,
                 const Tensor& kv_cache) {
  check_heads(out, "out");
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
  check_on_device_of_cache(query, "query", kv_cache);
  check_on_device_of_cache(out, "out", kv_cache);
  p.query = query.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.query_token_stride = query.stride(0);
  p.query_head_stride = query.stride(1);
  p.out_token_stride = out.stride(0);
  p.out_head_stride = out.stride(1);
}

float* optional_lse(const std::optional<Tensor>& lse, const PagedAttentionParams& p,
                    const Tensor& kv_cache) {
  if (!lse) return nullptr;
  check_type(*lse, "lse", ScalarType::Float);
  check_on_device_of_cache(*lse, "lse", kv_cache);
  INT8KV_CHECK(lse->dim() == 2 && lse->size(0) == p.num_heads && lse->size(1) == p.num_tokens &&
                   lse->is_contiguous(),
               "lse must be contiguous [", p.num_heads, ", ", p.num_tokens, "], got ",
               shape_of(*lse));
  return static_cast<float*>(lse->mutable_data_ptr());
}

void set_scores(PagedAttentionParams& p, double softmax_scale, double softcap,
                int64_t sliding_window) {
  p.softmax_scale = static_cast<float>(softmax_scale);
  p.softcap = static_cast<float>(softcap);
  INT8KV_CHECK(std::isfinite(p.softmax_scale), "softmax_scale must be finite in fp32, got ",
               softmax_scale);
  INT8KV_CHECK(std::isfinite(p.softcap) && softcap >= 0 && (p.softcap > 0 || softcap == 0),
               "softcap must be 0 (none) or positive in fp32, got ", softcap);
  INT8KV_CHECK(sliding_window >= 0 && sliding_window <= INT32_MAX,
               "sliding_window must be 0 (none) or positive, got ", sliding_window);
  p.sliding_window = static_cast<int32_t>(sliding_window);
}

void paged_attention(Tensor out, Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens,
                     Tensor query_start_loc, std::optional<Tensor> lse,
                     std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks,
                     std::string cache_format, bool rotate_keys,
                     std::optional<Tensor> key_equalizer, double softmax_scale, bool causal,
                     int64_t sliding_window, double softcap, std::string cpu_isa,
                     std::optional<Tensor> arrivals) {
  PagedAttentionParams p{};
  check_heads(query, "query");
  p.cache = view_cache(kv_cache, cache_format, query.size(2), "query");
  set_queries(p, query, out, kv_cache);
  const Sequences sequences = view_sequences(seq_lens, "seq_lens", query_start_loc,
                                             "query_start_loc", block_table, kv_cache);
  p.block_table = sequences.block_table;
  p.block_table_stride = sequences.block_table_stride;
  p.seq_lens = sequences.each;
  p.query_start_loc = sequences.bounds;
  p.num_seqs = sequences.num_seqs;
  p.lse = optional_lse(lse, p, kv_cache);
  set_scores(p, softmax_scale, softcap, sliding_window);
  p.alibi_slopes = optional_floats(alibi_slopes, "alibi_slopes", kv_cache, {p.num_heads});
  p.sinks = optional_floats(sinks, "sinks", kv_cache, {p.num_heads});
  p.key_transform = key_transform(rotate_keys, key_equalizer, kv_cache, p.cache);
  p.causal = causal;
#if defined(INT8KV_WITH_CUDA)
  if (kv_cache.is_cuda()) {
    const DeviceGuard guard(kv_cache.get_device_index());
    if (checks_bounds()) {
      check_launch(launch_check_bounds(p, block_table.size(1), current_stream(kv_cache)),
                   "paged_attention", p.cache, p.num_tokens);
    }
    size_t bytes = 0;
    check_launch(paged_attention_workspace_bytes(p, &bytes), "paged_attention", p.cache,
                 p.num_tokens);
    const Tensor workspace = workspace_beside(kv_cache, bytes);
    uint32_t* counters = nullptr;
    int64_t num_counters = 0;
    if (arrivals) {
      check_type(*arrivals, "arrivals", ScalarType::Int);
      check_on_device_of_cache(*arrivals, "arrivals", kv_cache);
      INT8KV_CHECK(arrivals->is_contiguous(), "arrivals must be contiguous");
      counters = static_cast<uint32_t*>(arrivals->mutable_data_ptr());
      num_counters = arrivals->numel();
    }
    check_launch(launch_paged_attention(p, workspace.mutable_data_ptr(), bytes, counters,
                                        num_counters, current_stream(kv_cache)),
                 "paged_attention", p.cache, p.num_tokens);
    return;
  }
#endif
  INT8KV_CHECK(!arrivals, "arrivals are for GPUs, the cache is on the CPU");
  check_batch(p, block_table.size(1));
  cpu::paged_attention(p, torch_threads(), check_isa(cpu_isa));
}

// Loads what paged_attention() may run for such a query and cache, and returns how many arrivals it
// needs; 0 on a CPU.
int64_t prepare_attention(Tensor query, Tensor kv_cache, std::string cache_format) {
  PagedAttentionParams p{};
  check_heads(query, "query");
  p.cache = view_cache(kv_cache, cache_format, query.size(2), "query");
  p.dtype = float_type(query, "query");
  check_on_device_of_cache(query, "query", kv_cache);
  int64_t num_arrivals = 0;
#if defined(INT8KV_WITH_CUDA)
  if (kv_cache.is_cuda()) {
    const DeviceGuard guard(kv_cache.get_device_index());
    check_launch(prepare_paged_attention(p, &num_arrivals), "prepare_paged_attention", p.cache, 0);
  }
#endif
  return num_arrivals;
}

std::string cache_formats() {
  std::string names;
  for (const auto& [name, format] : kCacheFormats) {
    if (!names.empty()) names += ',';
    names += name;
  }
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(int8kv, m) {
  m.def(
      "reshape_and_cache(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping, "
      "str cache_format, bool rotate_keys, Tensor? key_equalizer, str cpu_isa=\"\") -> ()");
  m.def(
      "gather_cache(Tensor(a!) key, Tensor(b!) value, Tensor kv_cache, Tensor block_table, "
      "Tensor cu_seq_lens, Tensor seq_starts, str cache_format, bool rotate_keys, "
      "Tensor? key_equalizer) -> ()");
  m.def(
      "paged_attention(Tensor(a!) out, Tensor query, Tensor kv_cache, Tensor block_table, "
      "Tensor seq_lens, Tensor query_start_loc, Tensor(b!)? lse, Tensor? alibi_slopes, "
      "Tensor? sinks, str cache_format, bool rotate_keys, Tensor? key_equalizer, "
      "float softmax_scale, bool causal, int sliding_window, float softcap, str cpu_isa=\"\", "
      "Tensor(c!)? arrivals=None) -> ()");
  m.def("prepare_paged_attention(Tensor query, Tensor kv_cache, str cache_format) -> int");
  m.def("cache_formats() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(int8kv, CPU, m) {
  m.impl("reshape_and_cache", TORCH_BOX(&reshape_and_cache));
  m.impl("gather_cache", TORCH_BOX(&gather_cache));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("prepare_paged_attention", TORCH_BOX(&prepare_attention));
}

#if defined(INT8KV_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(int8kv, CUDA, m) {
  m.impl("reshape_and_cache", TORCH_BOX(&reshape_and_cache));
  m.impl("gather_cache", TORCH_BOX(&gather_cache));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("prepare_paged_attention", TORCH_BOX(&prepare_attention));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(int8kv, CompositeExplicitAutograd, m) {
  m.impl("cache_formats", TORCH_BOX(&cache_formats));
}
