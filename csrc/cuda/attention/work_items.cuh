// The scheduler of the attention kernels: which work items a block computes, and which splits.
//
// It needs no plan from the host. Every block sums up the work of all sequences and finds its own
// share of it (work_shares.h), so that the launch shape is the number of blocks the chip holds, for
// any batch. An item that several blocks share is put together by those that end last
// (merge_splits.cuh).
#pragma once

#include "cuda/attention/merge_splits.cuh"
#include "cuda/attention/work_shares.h"

namespace int8kv {

INT8KV_DEVICE int64_t shuffle_up_64(int64_t x, int delta) {
  const auto low = static_cast<uint32_t>(shuffle_up(static_cast<int32_t>(x), delta));
  return int64_t{shuffle_up(static_cast<int32_t>(x >> 32), delta)} << 32 | low;
}

// The sum of x, not negative, over this lane and those before it. In 32 bits where they hold it.
INT8KV_DEVICE int64_t warp_prefix_sum(int64_t x, int lane) {
  if (ballot(x >> 26 != 0) == 0) {
    auto sum = static_cast<int32_t>(x);
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) sum = add_shuffled_up(sum, delta);
    return sum;
  }
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const int64_t before = shuffle_up_64(x, delta);
    if (lane >= delta) x += before;
  }
  return x;
}

struct Sequence {
  int32_t query_begin;
  int32_t query_len;
  int32_t seq_len;
  SequenceWork work;
};

// Of a sequence that exists.
INT8KV_DEVICE Sequence load_sequence(const AttentionParams& p, int32_t seq, int rows_per_tile) {
  Sequence sequence;
  sequence.query_begin = p.query_start_loc[seq];
  sequence.query_len = p.query_start_loc[seq + 1] - sequence.query_begin;
  sequence.seq_len = p.seq_lens[seq];
  sequence.work = sequence_work(p, sequence.query_len, sequence.seq_len, rows_per_tile);
  return sequence;
}

// The work of 128 sequences of a batch, summed up in shared memory by all threads of a block. No
// more of them is kept there: with 32 bytes per sequence an A100 would hold three blocks, not four.
struct WorkSums {
  const AttentionParams& p;
  int rows_per_tile;
  int64_t* work_end;    // [kAttentionThreads], work tiles up to the end of each sequence
  int64_t* warp_total;  // [kAttentionWarps]

  // Sums up the sequences from `first_seq` on and returns the work of all 128. After a barrier, if
  // there were sums before.
  INT8KV_DEVICE int64_t sum_from(int32_t first_seq) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int32_t own = first_seq + threadIdx.x;
    int64_t sum = own < p.num_seqs
                      ? load_sequence(p, own, rows_per_tile).work.total(p.cache.num_kv_heads)
                      : 0;
    sum = warp_prefix_sum(sum, lane);
    if (lane == 31) warp_total[warp] = sum;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kAttentionWarps - 1; ++w) sum += w < warp ? warp_total[w] : 0;
    work_end[threadIdx.x] = sum;  // find_sequence() has a barrier
    return total();
  }

  INT8KV_DEVICE int64_t total() const {
    int64_t sum = 0;
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) sum += warp_total[w];
    return sum;
  }

  // The first of the 128 sequences that ends after a work tile, which one of them must have. By all
  // threads together.
  INT8KV_DEVICE int find_sequence(int64_t work_tile) const {
    return count_threads(work_end[threadIdx.x] <= work_tile);
  }
};

// The item of a sequence that has one of the sequence's work tiles.
struct ItemPlace {
  int32_t index;  // of the item within the sequence
  int32_t begin;  // the work tile, counted from the item's first
};

INT8KV_DEVICE ItemPlace place_of_item(const SequenceWork& work, int64_t work_tile) {
  const int64_t index = divide_positive(work_tile, work.per_item());
  return {static_cast<int32_t>(index), static_cast<int32_t>(work_tile - index * work.per_item())};
}

INT8KV_DEVICE WorkItem make_item(const Sequence& sequence, int32_t seq, int32_t index,
                                 const SplitTiles& tiles) {
  const SequenceWork& work = sequence.work;
  WorkItem item;
  item.seq = seq;
  item.query_begin = sequence.query_begin;
  item.query_len = sequence.query_len;
  item.seq_len = sequence.seq_len;
  item.kv_head = index;
  item.row_tile = 0;
  if (work.row_tiles > 1) {
    const auto row_tiles = static_cast<uint32_t>(work.row_tiles);
    item.kv_head = static_cast<int32_t>(static_cast<uint32_t>(index) / row_tiles);
    item.row_tile = row_tile_of(index - item.kv_head * work.row_tiles, work.row_tiles);
  }
  item.tile_begin = work.first_tile + tiles.begin;
  item.tile_end = work.first_tile + tiles.end;
  item.is_first = tiles.begin == 0;
  item.is_last = tiles.end == work.num_tiles;
  return item;
}

// Static shared memory of the scheduler, for who counts how many blocks fit: a little more than it
// has.
constexpr int kScheduleBytes = kAttentionThreads * sizeof(int64_t) + 256;

// Calls body(item, stored) for every split of this block's share, by all threads together, and
// merges the items of which this block's split is the last to arrive. `stored` is the item in
// shared memory, which need not stay in registers; it is there from the body's first barrier on.
template <typename Body>
__device__ void for_each_work_item(const AttentionParams& p, int rows_per_tile, Body&& body) {
  __shared__ int64_t work_end[kAttentionThreads];
  __shared__ int64_t warp_total[kAttentionWarps];
  __shared__ StoredItem stored;
  const WorkSums sums{p, rows_per_tile, work_end, warp_total};
  // A single sequence, whose step is short, needs neither sums nor the barriers around them.
  const bool is_one = p.num_seqs == 1;
  const bool are_many = p.num_seqs > kAttentionThreads;
  int64_t total = 0;
  if (is_one) {
    total = load_sequence(p, 0, rows_per_tile).work.total(p.cache.num_kv_heads);
  } else {
    // The first 128 sequences come last, so that it is their sums that are left.
    for (uint32_t stretch = (static_cast<uint32_t>(p.num_seqs) - 1) / kAttentionThreads;;
         --stretch) {
      total += sums.sum_from(stretch * kAttentionThreads);
      if (stretch == 0) break;
      __syncthreads();  // the sums have been read
    }
  }
  const auto block = static_cast<int32_t>(blockIdx.x);
  const WorkShares shares = work_shares(total, p.num_blocks);
  int64_t next = shares.begin(block);  // counted from sequence `first`
  int32_t left = shares.length_of(block, next);
  if (threadIdx.x == 0) stored.shares = shares;
  int32_t first = 0;
  while (left > 0) {
    while (left > 0 && (!are_many || next < sums.total())) {
      const int index = is_one ? 0 : sums.find_sequence(next);
      const int64_t begin = index == 0 ? 0 : work_end[index - 1];
      const Sequence sequence = load_sequence(p, first + index, rows_per_tile);
      const SequenceWork& work = sequence.work;
      const ItemPlace place = place_of_item(work, next - begin);
      const SplitTiles tiles = split_tiles(work, place.begin, left);
      const int32_t rest = work.per_item() - place.begin;
      next += rest;
      left -= rest;  // negative if the item goes on in other blocks
      if (tiles.is_empty()) continue;
      const WorkItem item = make_item(sequence, first + index, place.index, tiles);
      if (threadIdx.x == 0) stored = {item, stored.shares, next, left, first, work.num_tiles};
      body(item, stored.item);
      __syncthreads();
      if (!stored.item.is_whole()) merge_if_last(p, stored, rows_per_tile);
      next = stored.next;  // not in registers meanwhile
      left = stored.left;
      first = stored.first_seq;
      if (is_one && left > 0) __syncthreads();  // all have read it; find_sequence() has a barrier
    }
    if (are_many && left > 0) {
      next -= sums.total();
      first += kAttentionThreads;
      __syncthreads();  // the sums have been read
      sums.sum_from(first);
    }
  }
}

}  // namespace int8kv
