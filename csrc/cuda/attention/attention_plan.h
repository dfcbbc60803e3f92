// How a batch is cut into equal shares of work, and which keys a query sees. Host and device.
//
// An item is (sequence, KV head, tile of query rows). Query rows are (token, head of the GQA group)
// pairs, so that one pass over the keys serves them all. Its work is counted in tiles of 64 keys,
// and a few for its beginning and end. The work of all items, one after another, forms a line of
// which every block takes an equal stretch: whole items, and at both ends perhaps a piece of one.
#pragma once

#include "format/params.h"
#include "cuda/index_maps.h"

namespace int8kv {

constexpr int kMinStretch = 4;  // tiles; one for each warp of a block
constexpr int kItemCost = 4;    // tiles that take as long as what is done once per item: about 3 us

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

  INT8KV_HD int32_t per_item() const { return num_tiles + kItemCost; }
  INT8KV_HD int64_t total(int32_t num_kv_heads) const {
    return int64_t{row_tiles} * per_item() * num_kv_heads;
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

// a / b of positive numbers; 64-bit division takes a GPU a hundred instructions.
INT8KV_HD int64_t divide(int64_t a, int64_t b) {
  if (a >> 32 == 0 && b >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// How many of the launched blocks share a line of `total` tiles.
INT8KV_HD int32_t sharing_blocks(int64_t total, int32_t num_blocks) {
  const int64_t enough = (total + kMinStretch - 1) / kMinStretch;
  return static_cast<int32_t>(enough < num_blocks ? enough : num_blocks);
}

INT8KV_HD int64_t stretch_begin(int64_t total, int32_t block, int32_t blocks) {
  return divide(total * block, blocks);
}

// The block whose stretch holds a place on the line.
INT8KV_HD int32_t block_at(int64_t total, int64_t place, int32_t blocks) {
  return static_cast<int32_t>(divide((place + 1) * blocks - 1, total));
}

// The tiles of an item that belong to a stretch from place `begin` to `end` of the item. Who has
// but the start of its cost leaves the item to the next: so that pieces are never empty.
struct Piece {
  int32_t begin, end;  // tiles of the item

  INT8KV_HD bool is_empty() const { return end <= begin; }
};

INT8KV_HD Piece piece_of(const SequenceWork& work, int64_t begin, int64_t end) {
  const int64_t last = end < work.per_item() ? end : work.per_item();
  return {begin > kItemCost ? static_cast<int32_t>(begin) - kItemCost : 0,
          last > kItemCost ? static_cast<int32_t>(last) - kItemCost : 0};
}

}  // namespace int8kv
