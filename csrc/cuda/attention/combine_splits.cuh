// The merge of the splits of an item, after the attention kernel.
#pragma once

#include "cuda/attention/query_rows.cuh"
#include "cuda/warp_reduce.cuh"

namespace int8kv {

// A block per shared item, a warp per row, four dims per lane. Every lane weighs the splits itself,
// so that the loads of outputs wait for nothing.
__global__ void __launch_bounds__(kAttentionThreads)
    combine_splits_kernel(const __grid_constant__ PagedAttentionParams p, int rows_per_tile,
                          const __grid_constant__ Workspace workspace) {
  constexpr int kBatch = 16;  // loads in flight
  constexpr int kLaneDims = 4;
  const auto block = static_cast<int32_t>(blockIdx.x);
  const SharedItem shared = workspace.shared_items[block];
  if (shared.last_block < 0) return;
  WorkItem item{};
  item.query_len = shared.query_len;
  item.kv_head = shared.kv_head;
  item.row_tile = shared.row_tile;
  const int head_size = p.cache.head_size;
  const int lane = threadIdx.x % 32;
  const int32_t num_splits = shared.last_block - block + 1;

  for (int r = threadIdx.x / 32; r < rows_per_tile; r += kAttentionWarps) {
    const QueryRow row = query_row(p, item, rows_per_tile, r);
    if (!row.exists) continue;
    const auto row_of = [&](int32_t split_idx) {
      const bool is_first = split_idx == 0;
      return Workspace::first_row(int64_t{block} + split_idx, is_first, rows_per_tile) + r;
    };
    float4 outs[kBatch];
    const auto load_outs = [&](int32_t first, int dim) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i >= num_splits || dim >= head_size) break;
        const float* out = workspace.out + row_of(first + i) * head_size + dim;
        outs[i] = *reinterpret_cast<const float4*>(out);
      }
    };
    load_outs(0, kLaneDims * lane);

    // The state over all splits, lane by lane, then over the lanes.
    float max = kMinusInfinity;
    for (int32_t split_idx = lane; split_idx < num_splits; split_idx += 32) {
      max = fmaxf(max, workspace.states[row_of(split_idx)].max);
    }
    max = warp_max(max);
    const float origin = max == kMinusInfinity ? 0.0f : max;
    float sum = 0.0f;
    for (int32_t split_idx = lane; split_idx < num_splits; split_idx += 32) {
      const SoftmaxState state = workspace.states[row_of(split_idx)];
      sum += expf(state.max - origin) * state.sum;
    }
    const SoftmaxState total{max, warp_sum(sum)};

    const int64_t token = int64_t{shared.query_begin} + row.query;
    const float factor = finish_row(p, total, token, row.head, lane == 0);
    for (int dim = kLaneDims * lane; dim < head_size; dim += kLaneDims * 32) {
      if (dim >= kLaneDims * 32) load_outs(0, dim);
      float x[kLaneDims] = {};
      for (int32_t first = 0; first < num_splits; first += kBatch) {
        if (first > 0) load_outs(first, dim);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (first + i >= num_splits) break;
          const float weight = expf(workspace.states[row_of(first + i)].max - origin);
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

}  // namespace int8kv
