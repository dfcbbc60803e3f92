// The scheduler of the attention kernels: which work items a block computes, and which splits.
//
// It needs no plan from the host. Every block sums up the work of all sequences and finds its own
// share of it (work_shares.h), so that the launch shape is the number of blocks the chip holds, for
// any batch. An item that several blocks share is put together by combine_splits_kernel.
#pragma once

#include "cuda/attention/work_shares.h"
#include "cuda/attention/workspace.h"
#include "cuda/ptx.cuh"

namespace int8kv {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * 32;

struct WorkItem {
  int32_t seq;
  int32_t query_begin;  // row of the sequence's first token in `query`
  int32_t query_len;
  int32_t seq_len;
  int32_t row_tile;
  int32_t kv_head;
  int32_t tile_begin, tile_end;  // of the keys; the split that is this block's
  bool is_first, is_last;        // split of the item

  INT8KV_DEVICE bool is_whole() const { return is_first && is_last; }
  // Where row 0 of the split is in Workspace::states.
  INT8KV_DEVICE int64_t first_row(int rows_per_tile) const {
    return Workspace::first_row(blockIdx.x, is_first, rows_per_tile);
  }
};

INT8KV_DEVICE int64_t shuffle_up_64(int64_t x, int delta) {
  const auto low = static_cast<uint32_t>(shuffle_up(static_cast<int32_t>(x), delta));
  return int64_t{shuffle_up(static_cast<int32_t>(x >> 32), delta)} << 32 | low;
}

struct Sequence {
  int32_t seq;
  int32_t query_begin;
  int32_t query_len;
  int32_t seq_len;
};

INT8KV_DEVICE Sequence load_sequence(const PagedAttentionParams& p, int32_t seq) {
  const int32_t query_begin = p.query_start_loc[seq];
  return {seq, query_begin, p.query_start_loc[seq + 1] - query_begin, p.seq_lens[seq]};
}

INT8KV_DEVICE SequenceWork work_of(const PagedAttentionParams& p, const Sequence& sequence,
                                   int rows_per_tile) {
  return sequence_work(p, sequence.query_len, sequence.seq_len, rows_per_tile);
}

// The work of 128 sequences of a batch, summed up in shared memory by all threads of a block.
struct WorkSums {
  const PagedAttentionParams& p;
  int rows_per_tile;
  int64_t* work_end;    // [kAttentionThreads], work tiles up to the end of each sequence
  int64_t* warp_total;  // [kAttentionWarps]
  int lane;
  int warp;

  // Fills work_end for the sequences from `first_seq` on and returns the work of all 128.
  INT8KV_DEVICE int64_t sum_from(int32_t first_seq) const {
    const int32_t own = first_seq + threadIdx.x;
    int64_t sum = own < p.num_seqs
                      ? work_of(p, load_sequence(p, own), rows_per_tile).total(p.cache.num_kv_heads)
                      : 0;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int64_t before = shuffle_up_64(sum, delta);
      if (lane >= delta) sum += before;
    }
    if (lane == 31) warp_total[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; ++w) sum += warp_total[w];
    work_end[threadIdx.x] = sum;
    __syncthreads();
    return total();
  }

  INT8KV_DEVICE int64_t total() const { return work_end[kAttentionThreads - 1]; }

  // The first of the 128 sequences that ends after a work tile, which one of them has.
  INT8KV_DEVICE int find_sequence(int64_t work_tile) const {
    int low = 0, high = kAttentionThreads - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (work_end[middle] > work_tile) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
};

// The item of a sequence that has one of the sequence's work tiles.
struct ItemPlace {
  int64_t index;  // of the item within the sequence
  int32_t begin;  // the work tile, counted from the item's first
};

INT8KV_DEVICE ItemPlace place_of_item(const SequenceWork& work, int64_t work_tile) {
  const int64_t index = divide_positive(work_tile, work.per_item());
  return {index, static_cast<int32_t>(work_tile - index * work.per_item())};
}

INT8KV_DEVICE WorkItem make_item(const Sequence& sequence, const SequenceWork& work, int64_t index,
                                 const SplitTiles& tiles) {
  WorkItem item;
  item.seq = sequence.seq;
  item.query_begin = sequence.query_begin;
  item.query_len = sequence.query_len;
  item.seq_len = sequence.seq_len;
  item.kv_head = static_cast<int32_t>(divide_positive(index, work.row_tiles));
  const auto row_index = static_cast<int32_t>(index - int64_t{item.kv_head} * work.row_tiles);
  item.row_tile = row_tile_of(row_index, work.row_tiles);
  item.tile_begin = work.first_tile + tiles.begin;
  item.tile_end = work.first_tile + tiles.end;
  item.is_first = tiles.begin == 0;
  item.is_last = tiles.end == work.num_tiles;
  return item;
}

// Calls body(item) for every split of this block's share, by all threads together, and notes in the
// workspace the item that goes on in other blocks.
template <typename Body>
__device__ void for_each_work_item(const PagedAttentionParams& p, int rows_per_tile,
                                   const Workspace& workspace, Body&& body) {
  __shared__ int64_t work_end[kAttentionThreads];
  __shared__ int64_t warp_total[kAttentionWarps];
  __shared__ int64_t batch_total;  // of thread 0 alone, to spare a register
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const WorkSums sums{p, rows_per_tile, work_end, warp_total, lane, warp};
  int64_t total = 0;
  for (int32_t first = 0; first < p.num_seqs; first += kAttentionThreads) {
    total += sums.sum_from(first);
  }
  const int32_t blocks = sharing_blocks(total, static_cast<int32_t>(gridDim.x));
  const auto block = static_cast<int32_t>(blockIdx.x);
  if (threadIdx.x == 0) {
    batch_total = total;
    workspace.shared_items[block] = {-1, 0, 0, 0, 0};
  }
  if (block >= blocks) return;

  int64_t next = share_begin(total, block, blocks);  // counted from sequence `first`
  auto left = static_cast<int32_t>(share_begin(total, block + 1, blocks) - next);
  for (int32_t first = 0; first < p.num_seqs && left > 0; first += kAttentionThreads) {
    if (p.num_seqs > kAttentionThreads) sums.sum_from(first);
    while (left > 0 && next < sums.total()) {
      const int index = sums.find_sequence(next);
      const int64_t work_tile = next - (index == 0 ? 0 : work_end[index - 1]);
      const Sequence sequence = load_sequence(p, first + index);
      const SequenceWork work = work_of(p, sequence, rows_per_tile);
      const ItemPlace place = place_of_item(work, work_tile);
      const SplitTiles tiles = split_tiles(work, place.begin, int64_t{place.begin} + left);
      const int32_t rest = work.per_item() - place.begin;
      next += rest;
      left -= rest;  // negative if the item goes on in other blocks
      if (tiles.is_empty()) continue;
      const WorkItem item = make_item(sequence, work, place.index, tiles);
      if (threadIdx.x == 0 && item.is_first && !item.is_last) {
        const int32_t all = sharing_blocks(batch_total, static_cast<int32_t>(gridDim.x));
        const int64_t last_work_tile = share_begin(batch_total, block + 1, all) - left - 1;
        workspace.shared_items[block] = {block_of(batch_total, last_work_tile, all),
                                         item.query_begin, item.query_len, item.row_tile,
                                         item.kv_head};
      }
      body(item);
    }
    next -= sums.total();
  }
}

}  // namespace int8kv
