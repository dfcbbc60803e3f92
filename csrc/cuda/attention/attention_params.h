// What the attention kernels get. Host and device.
#pragma once

#include "cuda/divisor.h"
#include "format/params.h"
#include "format/softmax_state.h"

namespace int8kv {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * 32;
// Splits of an item are merged 32 at a time, in two steps.
constexpr int kMaxAttentionBlocks = 32 * 32;

// What the splits of an item leave in device memory for the block that merges them.
//
// Beside whole items, which leave nothing here, a block computes at most two splits: at the
// beginning of its share one that is not the first of its item (place 0 of 2), and at the end one
// that is (place 1).
struct Workspace {
  static constexpr int kArrivals = 3;  // per block

  float* out;            // [num_blocks, 2, rows_per_tile, head_size], not normalized
  SoftmaxState* states;  // [num_blocks, 2, rows_per_tile]
  uint32_t* arrivals;    // [num_blocks, kArrivals], all 0 before a launch and after it

  // The index of row 0 of a block's split in `states`.
  static INT8KV_HD int64_t first_row(int64_t block, bool is_first_split, int rows_per_tile) {
    return (2 * block + is_first_split) * rows_per_tile;
  }
  // How many splits have arrived of the group that begins with a split of this block.
  INT8KV_HD uint32_t* group_arrivals(int64_t block, bool is_first_split) const {
    return arrivals + kArrivals * block + is_first_split;
  }
  // How many groups have arrived of the item that begins in this block.
  INT8KV_HD uint32_t* item_arrivals(int64_t block) const {
    return arrivals + kArrivals * block + 2;
  }
};

// The arguments of the operator, what the kernels divide by before they know which keys to ask for,
// and the workspace.
struct AttentionParams : PagedAttentionParams {
  Divisor queries_per_kv;
  Divisor block_size;
  Divisor num_blocks;  // that are launched
  Workspace workspace;
};

}  // namespace int8kv
