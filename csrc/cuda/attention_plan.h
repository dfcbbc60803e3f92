// How a batch is cut into equal shares of work, and which keys a query sees. Host and device.
//
// An item is (sequence, KV head, tile of query rows). Query rows are (token, head of the GQA group)
// pairs, so that one pass over the keys serves them all. The work of an item is its tiles of 64
// keys. The tiles of all items, one item after another, form a line of which every block takes an
// equal stretch: whole items, and at both ends perhaps a piece of one.
#pragma once

#include "../params.h"
#include "index_maps.h"

namespace int8kv {

constexpr int kMinStretch = 4;  // tiles; one for each warp of a block

// Keys that a query sees: [begin, end).
struct KeyRange {
  int32_t begin;
  int32_t end;
};

INT8KV_HD KeyRange visible_keys(const PagedAttentionParams& p, int32_t position, int32_t seq_len) {
  const int64_t window = p.sliding_window > 0 ? p.sliding_window : int64_t{1} << 32;
  const int64_t first = position - window + 1;
  int64_t end = p.causal ? int64_t{position} + 1 : position + window;
  if (end > seq_len) end = seq_len;
  return {first > 0 ? static_cast<int32_t>(first) : 0, end > 0 ? static_cast<int32_t>(end) : 0};
}

// The items of one sequence. One that has query rows has tiles too, even without a key to see.
struct SequenceWork {
  int32_t row_tiles;
  int32_t first_tile;  // of the keys
  int32_t num_tiles;   // of each item

  INT8KV_HD int64_t total(int32_t num_kv_heads) const {
    return int64_t{row_tiles} * num_tiles * num_kv_heads;
  }
};

INT8KV_HD SequenceWork sequence_work(const PagedAttentionParams& p, int32_t query_len,
                                     int32_t seq_len, int32_t rows_per_tile) {
  if (query_len <= 0) return {0, 0, 0};
  const int32_t rows = query_len * (p.num_heads / p.cache.num_kv_heads);
  const int32_t row_tiles = (rows + rows_per_tile - 1) / rows_per_tile;
  const int32_t first_tile = visible_keys(p, seq_len - query_len, seq_len).begin / kTileSlots;
  const int32_t end_tile = seq_len > 0 ? (seq_len - 1) / kTileSlots + 1 : 0;
  return {row_tiles, first_tile, end_tile > first_tile ? end_tile - first_tile : 1};
}

// The row tile of item `index` of a KV head. Where queries see only what is before them, the first
// tiles of a prompt have fewer keys than the last: neighbours on the line pair the two.
INT8KV_HD int32_t row_tile_of(int32_t index, int32_t row_tiles) {
  return index % 2 == 0 ? index / 2 : row_tiles - 1 - index / 2;
}

// How many of the launched blocks share a line of `total` tiles.
INT8KV_HD int32_t sharing_blocks(int64_t total, int32_t num_blocks) {
  const int64_t enough = (total + kMinStretch - 1) / kMinStretch;
  return static_cast<int32_t>(enough < num_blocks ? enough : num_blocks);
}

INT8KV_HD int64_t stretch_begin(int64_t total, int32_t block, int32_t blocks) {
  return total * block / blocks;
}

// The block whose stretch holds a tile.
INT8KV_HD int32_t block_of_tile(int64_t total, int64_t tile, int32_t blocks) {
  return static_cast<int32_t>(((tile + 1) * blocks - 1) / total);
}

}  // namespace int8kv
