// Attention over the INT8 cache: choice of the kernel, launch, and the merge of shared items.
#include "cuda/launch.h"
#include "cuda/attention/paged_attention_mma.cuh"
#include "cuda/attention/paged_attention_plain.cuh"

namespace int8kv {
namespace {

// Merges the pieces of the items that several blocks share: a block per joint, a warp per row, four
// dims per lane. Every lane weighs the pieces itself, so that the loads of outputs wait for
// nothing.
__global__ void __launch_bounds__(kAttentionThreads)
    combine_pieces_kernel(const __grid_constant__ PagedAttentionParams p, int rows_per_tile,
                          const __grid_constant__ Workspace workspace) {
  constexpr int kBatch = 16;  // loads in flight
  constexpr int kLaneDims = 4;
  const auto block = static_cast<int32_t>(blockIdx.x);
  const Joint joint = workspace.joints[block];
  if (joint.last_block < 0) return;
  WorkItem item{};
  item.query_len = joint.query_len;
  item.kv_head = joint.kv_head;
  item.row_tile = joint.row_tile;
  const int head_size = p.cache.head_size;
  const int lane = threadIdx.x % 32;
  const int32_t num_pieces = joint.last_block - block + 1;

  for (int r = threadIdx.x / 32; r < rows_per_tile; r += kAttentionWarps) {
    const QueryRow row = query_row(p, item, rows_per_tile, r);
    if (!row.exists) continue;
    const auto partial_of = [&](int32_t piece) {
      const int64_t slot = 2 * (int64_t{block} + piece) + (piece == 0);
      return slot * rows_per_tile + r;
    };
    float4 outs[kBatch];
    const auto load_outs = [&](int32_t first, int dim) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i >= num_pieces || dim >= head_size) break;
        const float* out = workspace.out + partial_of(first + i) * head_size + dim;
        outs[i] = *reinterpret_cast<const float4*>(out);
      }
    };
    load_outs(0, kLaneDims * lane);

    // The state over all pieces, lane by lane, then over the lanes.
    float max = kMinusInfinity;
    for (int32_t piece = lane; piece < num_pieces; piece += 32) {
      max = fmaxf(max, workspace.states[partial_of(piece)].max);
    }
    max = warp_max(max);
    const float origin = max == kMinusInfinity ? 0.0f : max;
    float sum = 0.0f;
    for (int32_t piece = lane; piece < num_pieces; piece += 32) {
      const SoftmaxState state = workspace.states[partial_of(piece)];
      sum += expf(state.max - origin) * state.sum;
    }
    const SoftmaxState total{max, warp_sum(sum)};

    const int64_t token = int64_t{joint.query_begin} + row.query;
    const float factor = finish_row(p, total, token, row.head, lane == 0);
    for (int dim = kLaneDims * lane; dim < head_size; dim += kLaneDims * 32) {
      if (dim >= kLaneDims * 32) load_outs(0, dim);
      float x[kLaneDims] = {};
      for (int32_t first = 0; first < num_pieces; first += kBatch) {
        if (first > 0) load_outs(first, dim);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (first + i >= num_pieces) break;
          const float weight = expf(workspace.states[partial_of(first + i)].max - origin);
          x[0] += weight * outs[i].x;
          x[1] += weight * outs[i].y;
          x[2] += weight * outs[i].z;
          x[3] += weight * outs[i].w;
        }
      }
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) {
        store_out(p, token, row.head, dim + i, x[i] * factor);
      }
    }
  }
}

template <int kSpans, int kRowTiles, bool kPlain, typename F>
cudaError_t with_mma_kernel(F&& f) {
  using Layout = MmaLayout<kSpans, kRowTiles>;
  return f.template operator()<paged_attention_decode_kernel<kSpans, kRowTiles, kPlain>>(
      Layout::kRows, Layout::kBytes);
}

template <int kSpans, int kRowTiles, typename F>
cudaError_t with_mma_kernel(const PagedAttentionParams& params, F&& f) {
  const bool is_plain = params.cache.head_size == kSpans * kSpanDims && params.softcap == 0.0f &&
                        params.alibi_slopes == nullptr;
  return is_plain ? with_mma_kernel<kSpans, kRowTiles, true>(f)
                  : with_mma_kernel<kSpans, kRowTiles, false>(f);
}

// As many row tiles as the query tokens of a sequence and the heads of a group need, and as the
// device has shared memory for; a hint, all are right for every batch.
template <int kSpans, typename F>
cudaError_t with_mma_kernel(const PagedAttentionParams& params, F&& f) {
  const int group = params.num_heads / params.cache.num_kv_heads;
  const int64_t query_len = (params.num_tokens + params.num_seqs - 1) / params.num_seqs;
  if (query_len * group <= 8) return with_mma_kernel<kSpans, 1>(params, f);
  if (query_len * group > 16) {
    int most_bytes = 0;
    const cudaError_t error = max_shared_bytes(&most_bytes);
    if (error != cudaSuccess) return error;
    // The plain kernel spills with so many rows.
    if (MmaLayout<kSpans, 4>::kBytes <= most_bytes) return with_mma_kernel<kSpans, 4, false>(f);
  }
  return with_mma_kernel<kSpans, 2>(params, f);
}

// Calls f<kernel>(rows_per_tile, shared_bytes) with the kernel for a batch.
template <typename F>
cudaError_t with_kernel(const PagedAttentionParams& params, F&& f) {
  const int head_size = params.cache.head_size;
  if (params.dtype == DType::kFloat32 || head_size > 256) {
    return f.template operator()<paged_attention_plain_kernel>(kAttentionWarps, 0);
  }
  if (head_size <= 64) return with_mma_kernel<1>(params, f);
  if (head_size <= 128) return with_mma_kernel<2>(params, f);
  return with_mma_kernel<4, 1>(params, f);
}

bool is_empty(const PagedAttentionParams& params) {
  return params.num_tokens == 0 || params.num_seqs == 0 || params.num_heads == 0;
}

// What is launched for a batch, and the parts of its workspace in bytes.
struct Plan {
  int num_blocks;
  int rows_per_tile;
  size_t out_bytes, state_bytes, joint_bytes;

  size_t workspace_bytes() const { return out_bytes + state_bytes + joint_bytes; }
};

template <auto kKernel>
cudaError_t make_plan(const PagedAttentionParams& params, int rows_per_tile, int shared_bytes,
                      Plan* plan) {
  int blocks = 0;
  const cudaError_t error = resident_blocks<kKernel>(kAttentionThreads, shared_bytes, &blocks);
  const auto partials = size_t{2} * static_cast<size_t>(blocks * rows_per_tile);
  *plan = {blocks, rows_per_tile,
           partials * static_cast<size_t>(params.cache.head_size) * sizeof(float),
           partials * sizeof(SoftmaxState), static_cast<size_t>(blocks) * sizeof(Joint)};
  return error;
}

}  // namespace

cudaError_t paged_attention_workspace_bytes(const PagedAttentionParams& params, size_t* bytes) {
  *bytes = 0;
  if (is_empty(params)) return cudaSuccess;
  Plan plan{};
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
  if (!is_vector_aligned(params.cache) || reinterpret_cast<uintptr_t>(workspace) % 16 != 0) {
    return cudaErrorMisalignedAddress;
  }
  return with_kernel(params, [&]<auto kKernel>(int rows_per_tile, int shared_bytes) {
    Plan plan{};
    cudaError_t error = make_plan<kKernel>(params, rows_per_tile, shared_bytes, &plan);
    if (error != cudaSuccess) return error;
    if (workspace_bytes < plan.workspace_bytes()) return cudaErrorInvalidValue;
    auto* bytes = static_cast<unsigned char*>(workspace);
    const Workspace parts{reinterpret_cast<float*>(bytes),
                          reinterpret_cast<SoftmaxState*>(bytes + plan.out_bytes),
                          reinterpret_cast<Joint*>(bytes + plan.out_bytes + plan.state_bytes)};
    const auto blocks = static_cast<unsigned>(plan.num_blocks);
    error = launch_kernel(kKernel, dim3(blocks), kAttentionThreads,
                          static_cast<size_t>(shared_bytes), stream, params, parts);
    if (error != cudaSuccess) return error;
    return launch_kernel(combine_pieces_kernel, dim3(blocks), kAttentionThreads, 0, stream, params,
                         rows_per_tile, parts);
  });
}

}  // namespace int8kv
