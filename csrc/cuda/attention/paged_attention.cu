// Attention over the quantized cache: launch of the format's kernel (format_kernels.cu).
#include <algorithm>

#include "cuda/alignment.h"
#include "cuda/attention/kernel_choice.h"
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace int8kv {

#define INT8KV_DECLARE(k, v)                                                             \
  extern template cudaError_t choose_kernel<FormatOf<k, v>>(const PagedAttentionParams&, \
                                                            KernelChoice*);
INT8KV_FOR_EACH_FORMAT(INT8KV_DECLARE)
#undef INT8KV_DECLARE

namespace {

bool is_empty(const PagedAttentionParams& params) {
  return params.num_tokens == 0 || params.num_seqs == 0 || params.num_heads == 0;
}

// What is launched for a batch, and the parts of its workspace in bytes.
struct LaunchPlan {
  KernelChoice choice;
  size_t out_bytes, state_bytes, arrival_bytes;

  size_t workspace_bytes() const { return out_bytes + state_bytes + arrival_bytes; }
  int64_t num_arrivals() const { return int64_t{Workspace::kArrivals} * choice.num_blocks; }
  // With `arrivals` of the caller, or null for those in `memory`, which are to be zeroed.
  Workspace workspace(void* memory, uint32_t* arrivals) const {
    auto* bytes = static_cast<unsigned char*>(memory);
    auto* own = reinterpret_cast<uint32_t*>(bytes + out_bytes + state_bytes);
    return {reinterpret_cast<float*>(bytes), reinterpret_cast<SoftmaxState*>(bytes + out_bytes),
            arrivals != nullptr ? arrivals : own};
  }
};

cudaError_t make_plan(const PagedAttentionParams& params, LaunchPlan* plan) {
  KernelChoice choice{};
  const cudaError_t error = with_format(
      params.cache.format, [&]<typename F>() { return choose_kernel<F>(params, &choice); });
  const auto blocks = static_cast<size_t>(choice.num_blocks);
  const size_t split_rows = 2 * blocks * static_cast<size_t>(choice.rows_per_tile);
  *plan = {choice, split_rows * static_cast<size_t>(params.cache.head_size) * sizeof(float),
           split_rows * sizeof(SoftmaxState), Workspace::kArrivals * blocks * sizeof(uint32_t)};
  return error;
}

}  // namespace

cudaError_t paged_attention_workspace_bytes(const PagedAttentionParams& params, size_t* bytes) {
  *bytes = 0;
  if (is_empty(params)) return cudaSuccess;
  LaunchPlan plan{};
  const cudaError_t error = make_plan(params, &plan);
  *bytes = plan.workspace_bytes();
  return error;
}

cudaError_t prepare_paged_attention(const PagedAttentionParams& params, int64_t* num_arrivals) {
  PagedAttentionParams p = params;
  p.cache.num_kv_heads = p.num_seqs = 1;
  *num_arrivals = 0;
  for (const float softcap : {0.0f, 1.0f}) {
    for (const int32_t num_rows : {8, 16, 32}) {
      p.softcap = softcap;
      p.num_heads = num_rows;
      p.num_tokens = 1;
      LaunchPlan plan{};
      const cudaError_t error = make_plan(p, &plan);
      if (error != cudaSuccess) return error;
      *num_arrivals = std::max(*num_arrivals, plan.num_arrivals());
    }
  }
  return cudaSuccess;
}

cudaError_t launch_paged_attention(const PagedAttentionParams& params, void* workspace,
                                   size_t workspace_bytes, uint32_t* arrivals, int64_t num_arrivals,
                                   cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  if (params.num_heads % params.cache.num_kv_heads != 0 || params.cache.head_size > kMaxHeadSize) {
    return cudaErrorInvalidValue;
  }
  if (!is_vector_aligned(params.cache) ||
      reinterpret_cast<uintptr_t>(workspace) % kVectorBytes != 0) {
    return cudaErrorMisalignedAddress;
  }
  LaunchPlan plan{};
  cudaError_t error = make_plan(params, &plan);
  if (error != cudaSuccess) return error;
  if (workspace_bytes < plan.workspace_bytes() ||
      (arrivals != nullptr && num_arrivals < plan.num_arrivals())) {
    return cudaErrorInvalidValue;
  }
  const KernelChoice& choice = plan.choice;
  const AttentionParams p{params, Divisor::of(params.num_queries_per_kv()),
                          Divisor::of(params.cache.block_size), Divisor::of(choice.num_blocks),
                          plan.workspace(workspace, arrivals)};
  if (arrivals == nullptr) {
    error = zero_async(p.workspace.arrivals, plan.arrival_bytes, stream);
    if (error != cudaSuccess) return error;
  }
  return launch_kernel(choice.kernel, dim3(static_cast<unsigned>(choice.num_blocks)),
                       kAttentionThreads, static_cast<size_t>(choice.shared_bytes), stream, p);
}

}  // namespace int8kv
