// Attention over the INT8 cache: choice of the kernel, launch, and the merge of split sequences.
#include "launch.h"
#include "paged_attention_mma.cuh"
#include "paged_attention_plain.cuh"

namespace int8kv {
namespace {

// Merges the splits of the rows that have more than one: a warp per (sequence, head), query after
// query.
__global__ void __launch_bounds__(kAttentionThreads)
    combine_splits_kernel(const __grid_constant__ PagedAttentionParams p, int rows_per_tile,
                          const __grid_constant__ Workspace workspace) {
  const int head_size = p.cache.head_size;
  const int lane = threadIdx.x % 32;
  const int64_t task = int64_t{blockIdx.x} * kAttentionWarps + threadIdx.x / 32;
  const auto seq = static_cast<int32_t>(task / p.num_heads);
  const auto head = static_cast<int32_t>(task % p.num_heads);
  if (seq >= p.num_seqs) return;
  const int32_t query_begin = p.query_start_loc[seq];
  const int32_t query_len = p.query_start_loc[seq + 1] - query_begin;
  const SequencePlan plan =
      plan_sequence(p, query_len, p.seq_lens[seq], rows_per_tile, workspace.max_partials);
  if (plan.num_splits == 1) return;

  for (int32_t query = 0; query < query_len; ++query) {
    const int64_t first =
        partial_index(p, workspace.max_partials, seq, query, plan.num_splits, 0, head);
    SoftmaxState total;
    float out[kMaxHeadSize / 32] = {};
    for (int32_t split = 0; split < plan.num_splits; ++split) {
      const int64_t partial = first + int64_t{split} * p.num_heads;
      const MergeFactors factors = merge(total, workspace.states[partial]);
      const float* partial_out = workspace.out + partial * head_size;
#pragma unroll
      for (int i = 0; i < kMaxHeadSize / 32; ++i) {
        const int dim = lane + 32 * i;
        if (dim < head_size) out[i] = factors.left * out[i] + factors.right * partial_out[dim];
      }
    }
    const int64_t token = int64_t{query_begin} + query;
    const float factor = finish_row(p, total, token, head, lane == 0);
#pragma unroll
    for (int i = 0; i < kMaxHeadSize / 32; ++i) {
      const int dim = lane + 32 * i;
      if (dim < head_size) store_out(p, token, head, dim, out[i] * factor);
    }
  }
}

template <auto kKernel>
cudaError_t launch(int rows_per_tile, int shared_bytes, const PagedAttentionParams& params,
                   const Workspace& workspace, cudaStream_t stream) {
  int blocks = 0;
  cudaError_t error = resident_blocks<kKernel>(kAttentionThreads, shared_bytes, &blocks);
  if (error != cudaSuccess) return error;
  error = launch_kernel(kKernel, dim3(blocks), kAttentionThreads, shared_bytes, stream, params,
                        workspace);
  if (error != cudaSuccess || workspace.max_partials < 2) return error;
  const int64_t tasks = int64_t{params.num_seqs} * params.num_heads;
  const auto combine_blocks =
      static_cast<unsigned>((tasks + kAttentionWarps - 1) / kAttentionWarps);
  return launch_kernel(combine_splits_kernel, dim3(combine_blocks), kAttentionThreads, 0, stream,
                       params, rows_per_tile, workspace);
}

template <int kSpans, int kRowTiles>
cudaError_t launch_mma(const PagedAttentionParams& params, const Workspace& workspace,
                       cudaStream_t stream) {
  using Layout = MmaLayout<kSpans, kRowTiles>;
  return launch<paged_attention_decode_kernel<kSpans, kRowTiles>>(Layout::kRows, Layout::kBytes,
                                                                  params, workspace, stream);
}

// Two row tiles unless every sequence has one query token and a small group; a hint, both are right
// for every batch and give equal bits.
template <int kSpans>
cudaError_t launch_mma(const PagedAttentionParams& params, const Workspace& workspace,
                       cudaStream_t stream) {
  const int group = params.num_heads / params.cache.num_kv_heads;
  const bool is_small = params.num_tokens <= params.num_seqs && group <= 8;
  return is_small ? launch_mma<kSpans, 1>(params, workspace, stream)
                  : launch_mma<kSpans, 2>(params, workspace, stream);
}

}  // namespace

size_t paged_attention_workspace_bytes(const PagedAttentionParams& params, int32_t max_partials) {
  const auto partials = static_cast<size_t>(params.num_seqs) *
                        static_cast<size_t>(params.num_heads) * static_cast<size_t>(max_partials);
  return partials * (params.cache.head_size * sizeof(float) + sizeof(SoftmaxState));
}

cudaError_t launch_paged_attention(const PagedAttentionParams& params, int32_t max_partials,
                                   void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  if (params.num_tokens == 0 || params.num_seqs == 0 || params.num_heads == 0) return cudaSuccess;
  if (max_partials < 1 || params.num_heads % params.cache.num_kv_heads != 0 ||
      params.cache.head_size > kMaxHeadSize ||
      workspace_bytes < paged_attention_workspace_bytes(params, max_partials)) {
    return cudaErrorInvalidValue;
  }
  if (!is_vector_aligned(params.cache) || reinterpret_cast<uintptr_t>(workspace) % 16 != 0) {
    return cudaErrorMisalignedAddress;
  }
  const int64_t partials = int64_t{params.num_seqs} * params.num_heads * max_partials;
  const int head_size = params.cache.head_size;
  float* out = static_cast<float*>(workspace);
  const Workspace parts{out, reinterpret_cast<SoftmaxState*>(out + partials * head_size),
                        max_partials};
  if (params.dtype == DType::kFloat32 || head_size > 256) {
    return launch<paged_attention_plain_kernel>(kAttentionWarps, 0, params, parts, stream);
  }
  if (head_size <= 64) return launch_mma<1>(params, parts, stream);
  if (head_size <= 128) return launch_mma<2>(params, parts, stream);
  return launch_mma<4, 1>(params, parts, stream);
}

}  // namespace int8kv
