// How a batch is cut into equal shares of work, one per thread block. Host and device.
//
// A work item is (sequence, KV head, tile of query rows). Query rows are the (token, head) pairs of
// the query heads that share the KV head, so that one pass over the keys serves them all. An item
// is worth as many work tiles as it has tiles of 64 keys, and kItemCost more for its beginning and
// end. The work tiles of a batch are numbered from item to item, and every block takes an equal
// range of the numbers: whole items, and at both ends perhaps a split of one.
#pragma once

#include "cuda/attention/tile_maps.h"
#include "cuda/attention/visible_keys.h"

namespace int8kv {

constexpr int kMinShare = 4;  // work tiles of a block, as many as it has warps
constexpr int kItemCost = 4;  // tiles that take as long as what is done once per item: about 3 us

// The items of one sequence. Each has at least one tile of keys, even where its rows see no key:
// they are to be written all the same.
struct SequenceWork {
  int32_t row_tiles;
  int32_t first_tile;  // of the keys
  int32_t num_tiles;   // of each item

  // Work tiles.
  INT8KV_HD int32_t per_item() const { return num_tiles + kItemCost; }
  INT8KV_HD int64_t total(int32_t num_kv_heads) const {
    return int64_t{row_tiles} * per_item() * num_kv_heads;
  }
};

INT8KV_HD SequenceWork sequence_work(const PagedAttentionParams& p, int32_t query_len,
                                     int32_t seq_len, int32_t rows_per_tile) {
  if (query_len <= 0) return {0, 0, 0};
  const int32_t rows = query_len * p.num_queries_per_kv();
  const int32_t row_tiles = (rows + rows_per_tile - 1) / rows_per_tile;
  const int32_t first_tile = visible_keys(p, seq_len - query_len, seq_len).begin / kTileSlots;
  const int32_t end_tile = seq_len > 0 ? (seq_len - 1) / kTileSlots + 1 : 0;
  return {row_tiles, first_tile, end_tile > first_tile ? end_tile - first_tile : 1};
}

// The row tile of item `index` of a KV head. Where queries see only what is before them, the first
// tiles of a prompt have fewer keys than the last, so items that follow one another pair the two.
INT8KV_HD int32_t row_tile_of(int32_t index, int32_t row_tiles) {
  return index % 2 == 0 ? index / 2 : row_tiles - 1 - index / 2;
}

// a / b of positive numbers; 64-bit division takes a GPU a hundred instructions.
INT8KV_HD int64_t divide_positive(int64_t a, int64_t b) {
  if (a >> 32 == 0 && b >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// How many of the launched blocks get a share of `total` work tiles.
INT8KV_HD int32_t sharing_blocks(int64_t total, int32_t num_blocks) {
  const int64_t enough = (total + kMinShare - 1) / kMinShare;
  return static_cast<int32_t>(enough < num_blocks ? enough : num_blocks);
}

// The first work tile of a block's share.
INT8KV_HD int64_t share_begin(int64_t total, int32_t block, int32_t blocks) {
  return divide_positive(total * block, blocks);
}

// The block whose share has a work tile.
INT8KV_HD int32_t block_of(int64_t total, int64_t work_tile, int32_t blocks) {
  return static_cast<int32_t>(divide_positive((work_tile + 1) * blocks - 1, total));
}

// The tiles of keys of a split: those of an item that lie in one share.
struct SplitTiles {
  int32_t begin, end;  // counted from the first tile of the item

  INT8KV_HD bool is_empty() const { return end <= begin; }
};

// The split of the work tiles [begin, end) of an item, which may reach past its end. The first
// kItemCost work tiles stand for the item's cost and have no keys. A share that ends among them
// therefore gets an empty split, which its block skips, and the block with the next share begins
// the item: no block computes a split without keys.
INT8KV_HD SplitTiles split_tiles(const SequenceWork& work, int64_t begin, int64_t end) {
  const int64_t last = end < work.per_item() ? end : work.per_item();
  return {begin > kItemCost ? static_cast<int32_t>(begin) - kItemCost : 0,
          last > kItemCost ? static_cast<int32_t>(last) - kItemCost : 0};
}

}  // namespace int8kv
