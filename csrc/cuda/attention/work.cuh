// What the attention kernels share: the scheduler, the preparation of a query row, and what becomes
// of a row when its keys are done.
//
// The scheduler needs no plan from the host. Every block sums up the work of all sequences and
// finds its own stretch of it (attention_plan.h), so that the launch shape is the number of blocks
// the chip holds, for any batch. An item that several blocks share is put together by a second
// kernel.
#pragma once

#include "format/softmax_state.h"
#include "cuda/attention/attention_plan.h"
#include "cuda/row.cuh"

namespace int8kv {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * 32;

// The first piece of an item that goes on in other blocks, in the block that has it.
struct Joint {
  int32_t last_block;  // with a piece of the item; -1: there is no such item
  int32_t query_begin;
  int32_t query_len;
  int32_t row_tile;
  int32_t kv_head;
};

// Pieces of items. A block has at most two: the end of an item, at 2 * block, or one that an item
// only passes through, and the beginning of one, at 2 * block + 1.
struct Workspace {
  float* out;            // [2 * num_blocks, rows_per_tile, head_size], not normalized
  SoftmaxState* states;  // [2 * num_blocks, rows_per_tile]
  Joint* joints;         // [num_blocks]
};

struct WorkItem {
  int32_t seq;
  int32_t query_begin;  // row of the sequence's first token in `query`
  int32_t query_len;
  int32_t seq_len;
  int32_t row_tile;
  int32_t kv_head;
  int32_t tile_begin, tile_end;  // of the keys; the piece that is this block's
  bool is_first, is_last;        // piece of the item

  INT8KV_DEVICE bool is_whole() const { return is_first && is_last; }
  // Where row 0 of the piece is in Workspace::states.
  INT8KV_DEVICE int64_t partial(int rows_per_tile) const {
    return (int64_t{blockIdx.x} * 2 + is_first) * rows_per_tile;
  }
};

// One row of a work item's tile: a token and a head.
struct QueryRow {
  int32_t query;  // token within the sequence
  int32_t head;
  bool exists;  // the last tile of a sequence may be partly empty
};

INT8KV_DEVICE QueryRow query_row(const PagedAttentionParams& p, const WorkItem& item,
                                 int rows_per_tile, int row) {
  const int group = p.num_heads / p.cache.num_kv_heads;
  const int index = item.row_tile * rows_per_tile + row;
  return {index / group, item.kv_head * group + index % group, index < item.query_len * group};
}

INT8KV_DEVICE int64_t shuffle_up_64(int64_t x, int delta) {
  const auto low = static_cast<uint32_t>(shuffle_up(static_cast<int32_t>(x), delta));
  return int64_t{shuffle_up(static_cast<int32_t>(x >> 32), delta)} << 32 | low;
}

// Calls body(item) for every item of this block's stretch, by all threads together, and writes the
// block's joint.
template <typename Body>
__device__ void for_each_work_item(const PagedAttentionParams& p, int rows_per_tile,
                                   const Workspace& workspace, Body&& body) {
  __shared__ int64_t work_end[kAttentionThreads];  // inclusive prefix sum over 128 sequences
  __shared__ int64_t warp_total[kAttentionWarps];
  __shared__ int64_t line_total;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const auto work_of = [&](int32_t seq) {
    const int32_t query_len = p.query_start_loc[seq + 1] - p.query_start_loc[seq];
    return sequence_work(p, query_len, p.seq_lens[seq], rows_per_tile);
  };
  // Fills work_end for the sequences from `first` on; returns their sum.
  const auto sum_up = [&](int32_t first) {
    const int32_t own = first + threadIdx.x;
    int64_t sum = own < p.num_seqs ? work_of(own).total(p.cache.num_kv_heads) : 0;
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
    return work_end[kAttentionThreads - 1];
  };

  int64_t total = 0;
  for (int32_t first = 0; first < p.num_seqs; first += kAttentionThreads) total += sum_up(first);
  const int32_t blocks = sharing_blocks(total, static_cast<int32_t>(gridDim.x));
  const auto block = static_cast<int32_t>(blockIdx.x);
  if (threadIdx.x == 0) {
    line_total = total;  // of thread 0 alone, to spare a register
    workspace.joints[block] = {-1, 0, 0, 0, 0};
  }
  if (block >= blocks) return;
  int64_t next = stretch_begin(total, block, blocks);  // counted from sequence `first`
  auto left = static_cast<int32_t>(stretch_begin(total, block + 1, blocks) - next);
  for (int32_t first = 0; first < p.num_seqs && left > 0; first += kAttentionThreads) {
    if (p.num_seqs > kAttentionThreads) sum_up(first);
    while (left > 0 && next < work_end[kAttentionThreads - 1]) {
      int low = 0, high = kAttentionThreads - 1;  // the first sequence that ends after `next`
      while (low < high) {
        const int middle = (low + high) / 2;
        if (work_end[middle] > next) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      WorkItem item;
      item.seq = first + low;
      item.query_begin = p.query_start_loc[item.seq];
      item.query_len = p.query_start_loc[item.seq + 1] - item.query_begin;
      item.seq_len = p.seq_lens[item.seq];
      const SequenceWork work = work_of(item.seq);
      const int64_t local = next - (low == 0 ? 0 : work_end[low - 1]);
      const int64_t index = divide(local, work.per_item());
      const auto begin = static_cast<int32_t>(local - index * work.per_item());
      const Piece piece = piece_of(work, begin, int64_t{begin} + left);
      const int32_t rest = work.per_item() - begin;
      next += rest;
      left -= rest;  // negative if the item goes on in other blocks
      if (piece.is_empty()) continue;
      item.kv_head = static_cast<int32_t>(divide(index, work.row_tiles));
      const auto row_index = static_cast<int32_t>(index - int64_t{item.kv_head} * work.row_tiles);
      item.row_tile = row_tile_of(row_index, work.row_tiles);
      item.tile_begin = work.first_tile + piece.begin;
      item.tile_end = work.first_tile + piece.end;
      item.is_first = piece.begin == 0;
      item.is_last = piece.end == work.num_tiles;
      if (threadIdx.x == 0 && item.is_first && !item.is_last) {
        const int32_t all = sharing_blocks(line_total, static_cast<int32_t>(gridDim.x));
        const int64_t last_place = stretch_begin(line_total, block + 1, all) - left - 1;
        workspace.joints[block] = {block_at(line_total, last_place, all), item.query_begin,
                                   item.query_len, item.row_tile, item.kv_head};
      }
      body(item);
    }
    next -= work_end[kAttentionThreads - 1];
  }
}

// What the first and the last row of an item's tile see; those between see something between.
struct TileRanges {
  KeyRange first;
  KeyRange last;
};

INT8KV_DEVICE TileRanges tile_ranges(const PagedAttentionParams& p, const WorkItem& item,
                                     int rows_per_tile) {
  const QueryRow first = query_row(p, item, rows_per_tile, 0);
  const QueryRow last = query_row(p, item, rows_per_tile, rows_per_tile - 1);
  const int32_t before = item.seq_len - item.query_len;
  const int32_t last_query = last.exists ? last.query : item.query_len - 1;
  return {visible_keys(p, before + first.query, item.seq_len),
          visible_keys(p, before + last_query, item.seq_len)};
}

// The keys of a piece that at least one row of its tile sees.
INT8KV_DEVICE KeyRange piece_keys(const PagedAttentionParams& p, const WorkItem& item,
                                  int rows_per_tile) {
  const TileRanges ranges = tile_ranges(p, item, rows_per_tile);
  const int64_t end = int64_t{item.tile_end} * kTileSlots;
  KeyRange keys{ranges.first.begin, ranges.last.end};
  keys.begin = max(keys.begin, item.tile_begin * kTileSlots);
  if (keys.end > end) keys.end = static_cast<int32_t>(end);
  return keys;
}

// The keys that all rows of its tile see.
INT8KV_DEVICE KeyRange keys_all_see(const PagedAttentionParams& p, const WorkItem& item,
                                    int rows_per_tile) {
  const TileRanges ranges = tile_ranges(p, item, rows_per_tile);
  return {ranges.last.begin, ranges.first.end};
}

// The chunk that holds slot `position`, which the caller has clamped to keys that a row sees.
INT8KV_DEVICE const int8_t* chunk_at(const PagedAttentionParams& p, const int32_t* block_table,
                                     int32_t position, int32_t kv_head) {
  return p.cache.chunk(block_table[position / p.cache.block_size], kv_head);
}

// A query row as the scores use it: equalized and rotated, fp32.
template <int kPairs>
__device__ Row<kPairs> load_query(const PagedAttentionParams& p, int64_t token, int head,
                                  int kv_head, int lane) {
  const int head_size = p.cache.head_size;
  const int64_t offset = token * p.query_token_stride + head * p.query_head_stride;
  Row<kPairs> row = load_row<kPairs>(p.query, offset, p.dtype, head_size, lane);
  if (p.key_equalizer != nullptr) {
    const float* equalizer = p.key_equalizer + int64_t{kv_head} * head_size;
    for_each_pair(row, head_size, lane, [&](int pair, float (&x)[2]) {
      x[0] *= equalizer[2 * pair];
      x[1] *= equalizer[2 * pair + 1];
    });
  }
  if (p.rotate_keys) warp_hadamard_rotate(row, head_size, lane);
  return row;
}

INT8KV_DEVICE void store_out(const PagedAttentionParams& p, int64_t token, int head, int dim,
                             float x) {
  const int64_t index = token * p.out_token_stride + head * p.out_head_stride + dim;
  if (p.dtype == DType::kFloat32) {
    static_cast<float*>(p.out)[index] = x;
  } else if (p.dtype == DType::kFloat16) {
    static_cast<uint16_t*>(p.out)[index] = float_to_half_bits(x);
  } else {
    static_cast<uint16_t*>(p.out)[index] = x == x ? float_to_bf16_bits(x) : uint16_t{0x7fc0};
  }
}

// Adds the head's sink, writes the row's lse (by the one thread that `writes_lse`) and returns what
// the unnormalized output is multiplied by.
INT8KV_DEVICE float finish_row(const PagedAttentionParams& p, SoftmaxState state, int64_t token,
                               int head, bool writes_lse) {
  float factor = 1.0f;
  const float poison = 0.0f * state.sum;  // NaN if a score was, which a sink must not hide
  if (p.sinks != nullptr) factor = merge_sink(state, p.sinks[head]);
  state.sum += poison;
  if (p.lse != nullptr && writes_lse) p.lse[head * p.num_tokens + token] = log_sum_exp(state);
  return state.max == kMinusInfinity ? 0.0f : factor / state.sum;
}

}  // namespace int8kv
