// Attention over the INT8 cache: choice of the kernel, launch, and the merge of split sequences.
#include "launch.h"
#include "paged_attention_mma.cuh"
#include "paged_attention_plain.cuh"

namespace int8kv {
namespace {

// Merges the splits of the rows that have more than one: a block per (sequence, head), query after
// query, a thread per dim. The weight of a split is computed anew by every thread, so that no load
// of an output waits for anything but the largest score.
__global__ void __launch_bounds__(kAttentionThreads)
    combine_splits_kernel(const __grid_constant__ PagedAttentionParams p, int rows_per_tile,
                          const __grid_constant__ Workspace workspace) {
  wait_for_previous_grid();
  const int head_size = p.cache.head_size;
  const int lane = threadIdx.x % 32;
  const auto seq = static_cast<int32_t>(blockIdx.x / p.num_heads);
  const auto head = static_cast<int32_t>(blockIdx.x % p.num_heads);
  const int32_t query_begin = p.query_start_loc[seq];
  const int32_t query_len = p.query_start_loc[seq + 1] - query_begin;
  const SequencePlan plan =
      plan_sequence(p, query_len, p.seq_lens[seq], rows_per_tile, workspace.max_partials);
  if (plan.num_splits == 1) return;

  for (int32_t query = 0; query < query_len; ++query) {
    const int64_t first =
        partial_index(p, workspace.max_partials, seq, query, plan.num_splits, 0, head);
    const auto state_of = [&](int32_t split) {
      return workspace.states[first + int64_t{split} * p.num_heads];
    };
    // Every warp for itself: the state over all splits, lane by lane, then over the lanes.
    float max = kMinusInfinity;
    for (int32_t split = lane; split < plan.num_splits; split += 32) {
      max = fmaxf(max, state_of(split).max);
    }
    max = warp_max(max);
    const float origin = max == kMinusInfinity ? 0.0f : max;
    float sum = 0.0f;
    for (int32_t split = lane; split < plan.num_splits; split += 32) {
      const SoftmaxState state = state_of(split);
      sum += expf(state.max - origin) * state.sum;
    }
    const SoftmaxState total{max, warp_sum(sum)};

    const int64_t token = int64_t{query_begin} + query;
    const float factor = finish_row(p, total, token, head, threadIdx.x == 0);
    for (int dim = threadIdx.x; dim < head_size; dim += kAttentionThreads) {
      float out = 0.0f;
#pragma unroll 16
      for (int32_t split = 0; split < plan.num_splits; ++split) {
        const int64_t partial = first + int64_t{split} * p.num_heads;
        const float weight = expf(workspace.states[partial].max - origin);
        out += weight * workspace.out[partial * head_size + dim];
      }
      store_out(p, token, head, dim, out * factor);
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
  const auto rows = static_cast<unsigned>(int64_t{params.num_seqs} * params.num_heads);
  return launch_dependent_kernel<combine_splits_kernel>(dim3(rows), kAttentionThreads, stream,
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
