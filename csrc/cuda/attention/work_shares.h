// How a batch is cut into equal shares of work, one per thread block. Host and device.
//
// A work item is (sequence, KV head, tile of query rows). Query rows are the (token, head) pairs of
// the query heads that share the KV head, so that one pass over the keys serves them all. An item
// is worth as many work tiles as it has tiles of 64 keys, and kItemCost more for its beginning and
// end. The work tiles of a batch are numbered from item to item, and every block takes an equal
// range of the numbers: whole items, and at both ends perhaps a split of one.
#pragma once

#include "cuda/attention/attention_params.h"
#include "cuda/attention/tile_maps.h"
#include "cuda/attention/visible_keys.h"

namespace int8kv {

struct WorkItem {
  int32_t seq;
  int32_t query_begin;  // row of the sequence's first token in `query`
  int32_t query_len;
  int32_t seq_len;
  int32_t row_tile;
  int32_t kv_head;
  int32_t tile_begin, tile_end;  // of the keys; the split that is a block's
  bool is_first, is_last;        // split of the item

  INT8KV_HD bool is_whole() const { return is_first && is_last; }
};

// Work tiles of a block at least: two tiles for each of its warps, the second on its way while the
// first is multiplied, and half as many splits to merge as with one.
constexpr int kMinShare = 8;
constexpr int kItemCost = 4;  // tiles that take as long as what is done once per item: about 3 us

// The items of one sequence. Each has at least one tile of keys, even where its rows see no key:
// they are to be written all the same.
struct SequenceWork {
  int32_t row_tiles;   // 0 where a step has no query of the sequence, and the rest means nothing
  int32_t first_tile;  // of the keys
  int32_t num_tiles;   // of each item

  // Work tiles.
  INT8KV_HD int32_t per_item() const { return num_tiles + kItemCost; }
  INT8KV_HD int64_t total(int32_t num_kv_heads) const {
    return static_cast<int64_t>(uint64_t{static_cast<uint32_t>(row_tiles * num_kv_heads)} *
                                static_cast<uint32_t>(per_item()));
  }
};

INT8KV_HD SequenceWork sequence_work(const AttentionParams& p, int32_t query_len, int32_t seq_len,
                                     int32_t rows_per_tile) {
  const auto rows = static_cast<uint32_t>((query_len > 0 ? query_len : 0) * p.queries_per_kv.value);
  const auto tile = static_cast<uint32_t>(rows_per_tile);
  const auto row_tiles = static_cast<int32_t>((rows + tile - 1) / tile);
  const int32_t first_tile = tile_of(visible_keys(p, seq_len - query_len, seq_len).begin);
  const int32_t end_tile = end_tile_of(seq_len > 0 ? seq_len : 0);
  return {row_tiles, first_tile, end_tile > first_tile ? end_tile - first_tile : 1};
}

// The row tile of item `index` of a KV head. Where queries see only what is before them, the first
// tiles of a prompt have fewer keys than the last, so items that follow one another pair the two.
INT8KV_HD int32_t row_tile_of(int32_t index, int32_t row_tiles) {
  return index % 2 == 0 ? index / 2 : row_tiles - 1 - index / 2;
}

// a / b of positive numbers; 64-bit division takes a GPU a hundred instructions.
INT8KV_HD int64_t divide_positive(int64_t a, int32_t b) {
  if (a >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// The shares of a batch: `length` work tiles each, the first `longer` of them one more, and those
// after the last work tile fewer or none.
struct WorkShares {
  int64_t total;
  int32_t length;
  int32_t longer;

  // A share without work begins behind the last work tile, by less than kMinShare tiles per block.
  INT8KV_HD int64_t begin(int32_t block) const {
    return int64_t{length} * block + (block < longer ? block : longer);
  }
  // Of the share that begins there; not positive where it is without work.
  INT8KV_HD int32_t length_of(int32_t block, int64_t begin) const {
    const int32_t most = length + (block < longer);
    return total - begin < most ? static_cast<int32_t>(total - begin) : most;
  }
  // Of a share with work.
  INT8KV_HD int64_t end(int32_t block) const {
    return begin(block) + length_of(block, begin(block));
  }
  // The block whose share has a work tile.
  INT8KV_HD int32_t block_of(int64_t tile) const {
    const int64_t rest = tile - int64_t{length + 1} * longer;
    const int64_t block =
        rest < 0 ? divide_positive(tile, length + 1) : longer + divide_positive(rest, length);
    return static_cast<int32_t>(block);
  }
};

INT8KV_HD WorkShares work_shares(int64_t total, const Divisor& num_blocks) {
  if (total <= int64_t{kMinShare} * num_blocks.value) return {total, kMinShare, 0};
  const int64_t length =
      total >> 31 == 0 ? num_blocks.divide(static_cast<int32_t>(total)) : total / num_blocks.value;
  return {total, static_cast<int32_t>(length),
          static_cast<int32_t>(total - length * num_blocks.value)};
}

// The tiles of keys of a split: those of an item that lie in one share.
struct SplitTiles {
  int32_t begin, end;  // counted from the first tile of the item

  INT8KV_HD bool is_empty() const { return end <= begin; }
};

// The split of an item's work tiles from `begin` on that are in a share with `left` more, which may
// reach past the item's end. The first kItemCost work tiles stand for the item's cost and have no
// keys. A share that ends among them therefore gets an empty split, which its block skips, and the
// block with the next share begins the item: no block computes a split without keys.
INT8KV_HD SplitTiles split_tiles(const SequenceWork& work, int32_t begin, int32_t left) {
  const int32_t rest = work.per_item() - begin;
  const int32_t last = begin + (left < rest ? left : rest);
  return {begin > kItemCost ? begin - kItemCost : 0, last > kItemCost ? last - kItemCost : 0};
}

}  // namespace int8kv
