// Attention over the quantized cache: choice of the kernel, launch, and the merge of shared items.
#include "cuda/alignment.h"
#include "cuda/attention/combine_splits.cuh"
#include "cuda/attention/mma/paged_attention_mma.cuh"
#include "cuda/attention/paged_attention_plain.cuh"
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace int8kv {
namespace {

template <typename F, int kSpans, int kRowTiles, bool kSimple, typename Use>
cudaError_t with_mma_kernel(Use&& use) {
  using Layout = MmaLayout<F, kSpans, kRowTiles>;
  return use.template operator()<paged_attention_decode_kernel<F, kSpans, kRowTiles, kSimple>>(
      Layout::kRows, Layout::kBytes);
}

template <typename F, int kSpans, int kRowTiles, typename Use>
cudaError_t with_mma_kernel(const PagedAttentionParams& params, Use&& use) {
  const bool is_simple = params.cache.head_size == kSpans * kSpanDims && params.softcap == 0.0f &&
                         params.alibi_slopes == nullptr;
  return is_simple ? with_mma_kernel<F, kSpans, kRowTiles, true>(use)
                   : with_mma_kernel<F, kSpans, kRowTiles, false>(use);
}

// As many row tiles as the query tokens of a sequence and the query heads per KV head need on
// average, and as the device has shared memory for. A matter of speed alone: every kernel computes
// every batch.
template <typename F, int kSpans, typename Use>
cudaError_t with_mma_kernel(const PagedAttentionParams& params, Use&& use) {
  const int64_t query_len = (params.num_tokens + params.num_seqs - 1) / params.num_seqs;
  const int64_t num_rows = query_len * params.num_queries_per_kv();
  if (num_rows <= 8) return with_mma_kernel<F, kSpans, 1>(params, use);
  if (num_rows > 16) {
    int most_bytes = 0;
    const cudaError_t error = max_shared_bytes(&most_bytes);
    if (error != cudaSuccess) return error;
    // Never the variant for simple models, which spills registers with so many rows.
    if (MmaLayout<F, kSpans, 4>::kBytes <= most_bytes) {
      return with_mma_kernel<F, kSpans, 4, false>(use);
    }
  }
  return with_mma_kernel<F, kSpans, 2>(params, use);
}

// Calls use<kernel>(rows_per_tile, shared_bytes) with the kernel for a batch.
template <typename F, typename Use>
cudaError_t with_kernel(const PagedAttentionParams& params, Use&& use) {
  const int head_size = params.cache.head_size;
  if (params.dtype == DType::kFloat32 || head_size > 256) {
    return use.template operator()<paged_attention_plain_kernel<F>>(kAttentionWarps, 0);
  }
  if (head_size <= 64) return with_mma_kernel<F, 1>(params, use);
  if (head_size <= 128) return with_mma_kernel<F, 2>(params, use);
  return with_mma_kernel<F, 4, 1>(params, use);
}

template <typename Use>
cudaError_t with_kernel(const PagedAttentionParams& params, Use&& use) {
  return with_cuda_format(params.cache.format,
                          [&]<typename F>() { return with_kernel<F>(params, use); });
}

bool is_empty(const PagedAttentionParams& params) {
  return params.num_tokens == 0 || params.num_seqs == 0 || params.num_heads == 0;
}

// What is launched for a batch, and the parts of its workspace in bytes.
struct LaunchPlan {
  int num_blocks;
  int rows_per_tile;
  size_t out_bytes, state_bytes, shared_item_bytes;

  size_t workspace_bytes() const { return out_bytes + state_bytes + shared_item_bytes; }
  Workspace workspace(void* memory) const {
    auto* bytes = static_cast<unsigned char*>(memory);
    return {reinterpret_cast<float*>(bytes), reinterpret_cast<SoftmaxState*>(bytes + out_bytes),
            reinterpret_cast<SharedItem*>(bytes + out_bytes + state_bytes)};
  }
};

template <auto kKernel>
cudaError_t make_plan(const PagedAttentionParams& params, int rows_per_tile, int shared_bytes,
                      LaunchPlan* plan) {
  int blocks = 0;
  const cudaError_t error = resident_blocks<kKernel>(kAttentionThreads, shared_bytes, &blocks);
  const auto split_rows = size_t{2} * static_cast<size_t>(blocks * rows_per_tile);
  *plan = {blocks, rows_per_tile,
           split_rows * static_cast<size_t>(params.cache.head_size) * sizeof(float),
           split_rows * sizeof(SoftmaxState), static_cast<size_t>(blocks) * sizeof(SharedItem)};
  return error;
}

}  // namespace

cudaError_t paged_attention_workspace_bytes(const PagedAttentionParams& params, size_t* bytes) {
  *bytes = 0;
  if (is_empty(params)) return cudaSuccess;
  LaunchPlan plan{};
  const cudaError_t error =
      with_kernel(params, [&]<auto kKernel>(int rows_per_tile, int shared_bytes) {
        return make_plan<kKernel>(params, rows_per_tile, shared_bytes, &plan);
      });
  *bytes = plan.workspace_bytes();
  return error;
}

cudaError_t launch_paged_attention(const PagedAttentionParams& params, void* workspace,
                                   size_t workspace_bytes, cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  if (params.num_heads % params.cache.num_kv_heads != 0 || params.cache.head_size > kMaxHeadSize) {
    return cudaErrorInvalidValue;
  }
  if (!is_vector_aligned(params.cache) ||
      reinterpret_cast<uintptr_t>(workspace) % kVectorBytes != 0) {
    return cudaErrorMisalignedAddress;
  }
  return with_kernel(params, [&]<auto kKernel>(int rows_per_tile, int shared_bytes) {
    LaunchPlan plan{};
    cudaError_t error = make_plan<kKernel>(params, rows_per_tile, shared_bytes, &plan);
    if (error != cudaSuccess) return error;
    if (workspace_bytes < plan.workspace_bytes()) return cudaErrorInvalidValue;
    const auto blocks = static_cast<unsigned>(plan.num_blocks);
    error =
        launch_kernel(kKernel, dim3(blocks), kAttentionThreads, static_cast<size_t>(shared_bytes),
                      stream, params, plan.workspace(workspace));
    if (error != cudaSuccess) return error;
    return launch_kernel(combine_splits_kernel, dim3(blocks), kAttentionThreads, 0, stream, params,
                         rows_per_tile, plan.workspace(workspace));
  });
}

}  // namespace int8kv
