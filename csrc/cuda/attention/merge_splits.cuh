// The merge of an item that several blocks share, by those of them that end last: no block waits
// for another, and no second kernel is launched.
//
// Splits are merged in groups of neighbours, then the groups. Whoever leaves the last split of a
// group merges the group, and whoever leaves the last group of an item writes its rows. Which
// splits are summed up in which order depends on their numbers alone, so that equal lengths give
// equal bits. Either step of up to 144 splits loads all it needs at once: one merge of 66 would
// load 12 at a time, six rounds of about 0.5 us each, and one block would move all bytes.
#pragma once

#include "cuda/attention/query_rows.cuh"
#include "cuda/warp_reduce.cuh"

namespace int8kv {

constexpr int kMergeBatch = 12;  // splits that a lane has on their way; 16 spill registers

// The splits of an item: one each of `count` blocks in a row.
struct ItemSplits {
  int32_t first_block;
  int32_t count;

  // Splits of a group: one batch, where that makes at most as many groups.
  INT8KV_HD int32_t group_size() const {
    return count <= kMergeBatch                 ? kMergeBatch
           : count <= 8 * 8                     ? 8
           : count <= kMergeBatch * kMergeBatch ? kMergeBatch
                                                : 32;
  }
  INT8KV_HD int32_t num_groups() const { return (count + group_size() - 1) / group_size(); }
  // Row 0 of a split in Workspace::states.
  INT8KV_HD int64_t first_row(int32_t split, int rows_per_tile) const {
    return Workspace::first_row(int64_t{first_block} + split, split == 0, rows_per_tile);
  }
};

// The item of a block, for when its split is done, and where the block goes on. In shared memory.
struct StoredItem {
  WorkItem item;
  WorkShares shares;
  int64_t next;       // work tile
  int32_t left;       // of the block's share after the item; negative if it goes on in others
  int32_t first_seq;  // of the sequences in shared memory
  int32_t num_tiles;  // of keys, which are the item's last work tiles
};

// Merges `count` splits, at most 32: number 0, `step`, 2 * `step` and so on from split `begin` on.
// Writes the rows of the item if it is kFinal, else the merged split over the first of them. A warp
// per row, four dims per lane, and a split per lane for the weights.
template <bool kFinal>
INT8KV_DEVICE void merge_splits(const AttentionParams& p, const WorkItem& item, int rows_per_tile,
                                const ItemSplits& splits, int32_t begin, int32_t count,
                                int32_t step) {
  constexpr int kLaneDims = 4;
  const int head_size = p.cache.head_size;
  const int lane = threadIdx.x % 32;
  const int64_t stride = int64_t{2} * step * rows_per_tile * head_size;  // from split to split

  for (int r = threadIdx.x / 32; r < rows_per_tile; r += kAttentionWarps) {
    const QueryRow row = query_row(p, item, rows_per_tile, r);
    if (!row.exists) continue;
    const int64_t first_row = splits.first_row(begin, rows_per_tile) + r;
    const int64_t own_row = splits.first_row(begin + lane * step, rows_per_tile) + r;
    SoftmaxState state;
    if (lane < count) {
      const auto* own = reinterpret_cast<const float2*>(p.workspace.states + own_row);
      const float2 x = load_from_l2(own);
      state = {x.x, x.y};
    }
    const float max = warp_max(state.max);
    const float weight = expf(state.max - (max == kMinusInfinity ? 0.0f : max));
    const SoftmaxState total{max, warp_sum(weight * state.sum)};
    const int64_t token = int64_t{item.query_begin} + row.query;
    const float factor = kFinal ? finish_row(p, total, token, row.head, lane == 0) : 1.0f;

    for (int first_dim = 0; first_dim < head_size; first_dim += kLaneDims * 32) {
      const int dim = first_dim + kLaneDims * lane;
      float* const first_out = p.workspace.out + first_row * head_size + dim;
      // Split 0 lies in the other place of its block.
      const float* out = p.workspace.out +
                         (splits.first_row(begin + step, rows_per_tile) + r) * head_size + dim -
                         stride;
      float x[kLaneDims] = {};
      for (int32_t first = 0; first < count; first += kMergeBatch) {
        float4 outs[kMergeBatch] = {};
#pragma unroll
        for (int i = 0; i < kMergeBatch; ++i, out += stride) {
          if (first + i < count && dim < head_size) {
            const float* from = first + i == 0 ? first_out : out;
            outs[i] = load_from_l2(reinterpret_cast<const float4*>(from));
          }
        }
#pragma unroll
        for (int i = 0; i < kMergeBatch; ++i) {
          if (first + i >= count) break;
          const float split_weight = shuffle(weight, first + i);
          x[0] += split_weight * outs[i].x;
          x[1] += split_weight * outs[i].y;
          x[2] += split_weight * outs[i].z;
          x[3] += split_weight * outs[i].w;
        }
      }
      if (dim >= head_size) continue;
      if constexpr (kFinal) {
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) store_out(p, token, row.head, dim + i, x[i] * factor);
      } else {
        *reinterpret_cast<float4*>(first_out) = make_float4(x[0], x[1], x[2], x[3]);
      }
    }
    if (!kFinal && lane == 0) p.workspace.states[first_row] = total;  // every lane has read its own
  }
}

// Says that what this block wrote to the workspace is there, as one of `count`, and returns whether
// it is the last. By one thread, after a barrier of the block; what the others wrote can be read
// after another one.
INT8KV_DEVICE bool arrive(uint32_t* arrivals, int32_t count) {
  const auto last = static_cast<uint32_t>(count - 1);
  return atomic_inc(arrivals, last) == last;
}

// Leaves this block's split of an item to the others, and merges what it is the last of. By all
// threads together, after a barrier.
INT8KV_DEVICE void merge_if_last(const AttentionParams& p, const StoredItem& stored,
                                 int rows_per_tile) {
  __shared__ ItemSplits splits;
  __shared__ bool is_last;
  const WorkItem& item = stored.item;
  const auto block = static_cast<int32_t>(blockIdx.x);
  const auto group_begin = [&] {
    return (block - splits.first_block) / splits.group_size() * splits.group_size();
  };
  const auto group_count = [&] { return min(splits.group_size(), splits.count - group_begin()); };
  if (threadIdx.x == 0) {
    const int64_t end = stored.shares.end(block) - stored.left;  // of the item's work tiles
    const int32_t first_block = stored.shares.block_of(end - stored.num_tiles);
    splits = {first_block, stored.shares.block_of(end - 1) - first_block + 1};
    const int32_t begin = group_begin();
    is_last = arrive(p.workspace.group_arrivals(first_block + begin, begin == 0), group_count());
  }
  __syncthreads();
  if (!is_last) return;
  const int32_t num_groups = splits.num_groups();
  if (num_groups == 1) {
    merge_splits<true>(p, item, rows_per_tile, splits, 0, splits.count, 1);
    return;
  }
  merge_splits<false>(p, item, rows_per_tile, splits, group_begin(), group_count(), 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = arrive(p.workspace.item_arrivals(splits.first_block), num_groups);
  }
  __syncthreads();
  if (!is_last) return;
  merge_splits<true>(p, item, rows_per_tile, splits, 0, num_groups, splits.group_size());
}

}  // namespace int8kv
