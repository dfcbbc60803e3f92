// Which lane owns which slot, dim and byte. Host and device, so that a host test can check every
// map against KVCache::k_code and KVCache::v_code.
//
// The tensor-core kernel works on tiles of 64 slots and spans of 64 dims. With g = lane / 4 and
// t = lane % 4, the first operand of mma.m16n8k16 takes rows g and g + 8 and columns 2t, 2t + 1 of
// each half from lane (g, t). A 32-bit word of K codes is 2 slots x 2 dims: after conversion rows g
// and g + 8 of one half. One 16-byte vector is 8 slots x 2 dims: that half for 4 row tiles. V is
// the same with slots and dims exchanged:
//
//   scores = K * Q^T   row g, g + 8 of row tile w: slot 8g + 2w, 8g + 2w + 1   columns: query rows
//   out^T = V^T * P^T  row g, g + 8 of row tile v: dim  8g + 2v, 8g + 2v + 1   columns: query rows
//
// So a lane's scores are 8 neighbouring slots and its outputs 8 neighbouring dims of a span.
#pragma once

#include "format/params.h"

namespace int8kv {

constexpr int kTileSlots = 64;
constexpr int kSpanDims = 64;
constexpr int kSpanVectors = 8;  // 16-byte vectors per lane of one tile and span, K or V

INT8KV_HD bool is_vector_aligned(const KVCache& cache) {
  return (reinterpret_cast<uintptr_t>(cache.data) | static_cast<uint64_t>(cache.block_stride) |
          static_cast<uint64_t>(cache.head_stride)) %
             16 ==
         0;
}

// --- tensor-core tiles ---------------------------------------------------------------------------
//
// A unit is the codes of a tile and a span, K or V, 4 KiB. It is copied with 8 lanes to a slot
// group: each of a lane's 8 vectors is part of 128 bytes in a row, a whole line of the L2 cache.
// In shared memory the vectors of K lie as in the cache; those of V are permuted within 128 bytes,
// so that the 8 lanes that read at once find theirs in different banks.

// First of the 8 slots of a lane's K vectors, of its scores and of its scales.
INT8KV_HD int k_lane_slot(int lane) { return lane / 4 * 8; }
// First of the 8 dims of a lane's outputs.
INT8KV_HD int v_lane_dim(int lane) { return lane / 4 * 8; }

// The slot group that a lane copies, and its first byte within a line.
INT8KV_HD int copy_group(int lane) { return lane / 8; }
INT8KV_HD int copy_byte(int lane) { return lane % 8 * 16; }

// Copied vector i of a K unit: its first dim, and bytes from the lane's vector 0 in the cache.
INT8KV_HD int k_copy_dim(int i) { return i * 8; }
INT8KV_HD int64_t k_copy_source(int span, int i) {
  return int64_t{span * kSpanDims + k_copy_dim(i)} * kSlotGroup;
}
INT8KV_HD int k_copy_target(int lane, int i) {
  return copy_group(lane) * 1024 + i * 128 + copy_byte(lane);
}
// Where a lane finds vector i for its products: dims 8 * i + 2 * (lane % 4) and the next.
INT8KV_HD int k_vector_byte(int lane, int i) {
  return lane / 8 * 1024 + i * 128 + lane % 4 * 32 + lane / 4 % 2 * 16;
}

// The same of a V unit, whose vector i is half a line of dim group i / 2.
INT8KV_HD int v_copy_dim(int i) { return i / 2 * kDimGroup; }
INT8KV_HD int64_t v_copy_source(int block_size, int span, int i) {
  return int64_t{span * kSpanDims + v_copy_dim(i)} * block_size + i % 2 * 128;
}
INT8KV_HD int v_copy_target(int lane, int i) {
  const int group = copy_group(lane);
  return i / 2 * 1024 + group * 256 + i % 2 * 128 + (lane % 8 / 2 ^ group) * 32 + lane % 2 * 16;
}
// Vector i: slots 16 * (lane % 4) + i % 2 * 8 + i / 2 * 2 and the next, dims 8 * (lane / 4) on.
INT8KV_HD int v_vector_byte(int lane, int i) {
  const int group = lane % 4;
  return lane / 8 * 1024 + group * 256 + i % 2 * 128 + (i / 2 ^ group) * 32 + lane / 4 % 2 * 16;
}

// Where query row `row`, dims 2 * pair and the next, go in the second operand of the scores:
// 32-bit word index in [head_size / 16][row_tiles][32 lanes][term][2], term 0 or 1.
INT8KV_HD int query_word(int row_tiles, int row, int pair, int term) {
  const int lane = row % 8 * 4 + pair % 4;
  return ((pair / 8 * row_tiles + row / 8) * 32 + lane) * 4 + 2 * term + pair % 8 / 4;
}

// --- cache write ---------------------------------------------------------------------------------

// Bytes of one slot group gathered in shared memory: K [head_size / 2][16 slots][2 dims],
// V [head_size / 16][8][16 dims][2 slots].
INT8KV_HD int k_tile_byte(int slot, int dim) { return dim / 2 * 32 + slot * 2 + dim % 2; }
INT8KV_HD int v_tile_byte(int slot, int dim) {
  return dim / kDimGroup * 256 + slot / 2 * 32 + dim % kDimGroup * 2 + slot % 2;
}
// Where 16-byte vector `vector` of such a group belongs in the chunk; `slot` is the group's first.
INT8KV_HD int64_t k_group_vector_byte(const KVCache& cache, int slot, int vector) {
  return cache.k_code(slot, 0) + vector * 16;
}
INT8KV_HD int64_t v_group_vector_byte(const KVCache& cache, int slot, int vector) {
  return cache.v_code(slot, vector / 16 * kDimGroup) + vector % 16 * 16;
}

// Bit j of `runs`: token j + 1 has the slot after token j's. True if tokens j to j + 15 are a run.
INT8KV_HD bool group_runs(uint64_t runs, int j) { return (runs >> j & 0x7fff) == 0x7fff; }

// The token, counted from 15 before the window of 16, that starts a group in the window, or -1.
// There is at most one: a group is as long as the window.
INT8KV_HD int group_start_in_window(uint64_t starts) {
  for (int j = kSlotGroup - 1; j < 2 * kSlotGroup - 1; ++j) {
    if (starts >> j & 1) return j;
  }
  return -1;
}

}  // namespace int8kv
