// What the splits of an item leave in device memory, from the attention kernel to
// combine_splits_kernel. Host and device.
//
// Beside whole items, which leave nothing here, a block computes at most two splits: at the
// beginning of its share one that is not the first of its item (place 0 of 2), and at the end one
// that is (place 1).
#pragma once

#include "format/softmax_state.h"

namespace int8kv {

// An item that several blocks share, as noted by the block that has its first split. The blocks
// after that one have a split each, up to the last.
struct SharedItem {
  int32_t last_block;  // -1: this block begins no item that goes on in others
  int32_t query_begin;
  int32_t query_len;
  int32_t row_tile;
  int32_t kv_head;
};

struct Workspace {
  float* out;                // [num_blocks, 2, rows_per_tile, head_size], not normalized
  SoftmaxState* states;      // [num_blocks, 2, rows_per_tile]
  SharedItem* shared_items;  // [num_blocks]

  // The index of row 0 of a block's split in `states`.
  static INT8KV_HD int64_t first_row(int64_t block, bool is_first_split, int rows_per_tile) {
    return (2 * block + is_first_split) * rows_per_tile;
  }
};

}  // namespace int8kv
