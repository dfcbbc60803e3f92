// The operators as PyTorch sees them: schemas and dispatch. The only file with Torch, and only its
// stable ABI, so that one build serves PyTorch 2.11 and later.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <utility>

#include "ops/checks.h"
#include "cpu/kernels.h"
#include "ladder/quantize_per_channel.h"
#include "ops/ladder_checks.h"

#if defined(INT8KV_WITH_CUDA)
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/launch.h"
#endif

namespace {

using namespace int8kv;  // NOLINT: this file is the library's border

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

void gather_cache_cpu(Tensor key, Tensor value, Tensor kv_cache, Tensor block_table,
                      Tensor cu_seq_lens, Tensor seq_starts, bool rotate_keys,
                      std::optional<Tensor> key_equalizer) {
  const GatherCacheParams p = gather_params(key, value, kv_cache, block_table, cu_seq_lens,
                                            seq_starts, rotate_keys, key_equalizer);
  check_batch(p, block_table.size(1));
  cpu::gather_cache(p, torch_threads());
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
// Exported by libtorch_cuda, which a CUDA tensor in hand proves to be loaded. Python loads it into
// a scope of its own, and this library must also load where there is none, so that the linker
// cannot find it: a weak reference stays null.
using GetCurrentStream = AOTITorchError (*)(int32_t device_index, void** ret_stream);

GetCurrentStream find_get_current_stream() {
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  void* libtorch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = libtorch_cuda == nullptr ? nullptr : dlsym(libtorch_cuda, kName);
  INT8KV_CHECK(found != nullptr, kName, " is not in the loaded PyTorch: needs 2.11 or later");
  return reinterpret_cast<GetCurrentStream>(found);
}

cudaStream_t current_stream(const Tensor& t) {
  static const GetCurrentStream get_current_stream = find_get_current_stream();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_current_stream(t.get_device_index(), &stream));
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

void gather_cache_cuda(Tensor key, Tensor value, Tensor kv_cache, Tensor block_table,
                       Tensor cu_seq_lens, Tensor seq_starts, bool rotate_keys,
                       std::optional<Tensor> key_equalizer) {
  const GatherCacheParams p = gather_params(key, value, kv_cache, block_table, cu_seq_lens,
                                            seq_starts, rotate_keys, key_equalizer);
  const torch::stable::accelerator::DeviceGuard guard(kv_cache.get_device_index());
  check_launch(launch_gather_cache(p, current_stream(kv_cache)), "gather_cache", p.cache,
               p.num_rows);
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
  size_t bytes = 0;
  check_launch(paged_attention_workspace_bytes(p, &bytes), "paged_attention", p.cache,
               p.num_tokens);
  const Tensor workspace =
      torch::stable::new_empty(kv_cache, {static_cast<int64_t>(bytes)}, ScalarType::Char);
  check_launch(
      launch_paged_attention(p, workspace.mutable_data_ptr(), bytes, current_stream(kv_cache)),
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
      "gather_cache(Tensor(a!) key, Tensor(b!) value, Tensor kv_cache, Tensor block_table, "
      "Tensor cu_seq_lens, Tensor seq_starts, bool rotate_keys, Tensor? key_equalizer) -> ()");
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
  m.impl("gather_cache", TORCH_BOX(&gather_cache_cpu));
  m.impl("paged_attention", TORCH_BOX(&paged_attention_cpu));
  m.impl("quantize_per_channel", TORCH_BOX(&quantize_per_channel_cpu));
  m.impl("dequantize_per_channel", TORCH_BOX(&dequantize_per_channel_cpu));
}

#if defined(INT8KV_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(int8kv, CUDA, m) {
  m.impl("reshape_and_cache", TORCH_BOX(&reshape_and_cache_cuda));
  m.impl("gather_cache", TORCH_BOX(&gather_cache_cuda));
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
