// The tiles of the tensor-core kernel: which lane owns which slot, dim and byte. Host and device.
//
// A tile is 64 slots, a span 64 dims, and a tile span the codes of both, K or V. With g = lane / 4
// and t = lane % 4, the first operand of mma.m16n8k16 takes rows g and g + 8 and columns 2t, 2t + 1
// of each half from lane (g, t). At 8 bits a 32-bit word of K codes is 2 slots x 2 dims: after
// conversion rows g and g + 8 of one half. One 16-byte vector is 8 slots x 2 dims: that half for 4
// row tiles. V is the same with slots and dims exchanged:
//
//   scores = K * Q^T   row g, g + 8 of row tile w: slot 8g + 2w, 8g + 2w + 1   columns: query rows
//   out^T = V^T * P^T  row g, g + 8 of row tile v: dim  8g + 2v, 8g + 2v + 1   columns: query rows
//
// So a lane's scores are 8 neighbouring slots and its outputs 8 neighbouring dims of a span. Below
// 8 bits a vector holds the same codes for every field of its bytes, 8 dims (K) or 16 (V) apart: a
// lane has the same slots and dims as with 8 bits, takes one field of a vector at a time, and
// vectors that differ in nothing but the field are one.
#pragma once

#include "cuda/alignment.h"

namespace int8kv {

constexpr int kTileSlots = 64;
constexpr int kSpanDims = 64;

// The tile that has a position, which is not negative: one shift, where a signed division has three
// instructions.
INT8KV_HD int32_t tile_of(int32_t position) {
  return static_cast<int32_t>(static_cast<uint32_t>(position) / kTileSlots);
}
// The first tile from which on a stretch up to a position has no key.
INT8KV_HD int32_t end_tile_of(int32_t end) {
  return static_cast<int32_t>((static_cast<uint32_t>(end) + (kTileSlots - 1)) / kTileSlots);
}

// First of the 8 slots of a lane's K vectors, of its scores and of its scales.
INT8KV_HD int k_lane_slot(int lane) { return lane / 4 * 8; }
// First of the 8 dims of a lane's outputs.
INT8KV_HD int v_lane_dim(int lane) { return lane / 4 * 8; }

// Where query row `row`, dims 2 * pair and the next, go in the second operand of the scores:
// 32-bit word index in [head_size / 16][row_tiles][32 lanes][term][2], term 0 or 1.
INT8KV_HD int query_word(int row_tiles, int row, int pair, int term) {
  const int lane = row % 8 * 4 + pair % 4;
  return ((pair / 8 * row_tiles + row / 8) * 32 + lane) * 4 + 2 * term + pair % 8 / 4;
}

// A tile span is copied with 8 lanes to a slot group. What they copy at once is 128 bytes in a row,
// a whole line of the L2 cache: the slot group of a lane, and the place of its vector in the 128
// bytes.
INT8KV_HD int copy_group(int lane) { return lane / 8; }
INT8KV_HD int copy_byte(int lane) { return lane % 8 * kVectorBytes; }

// Tile spans of K, by the trait of the plane: Codes<8>, or a BitPlane. A lane copies kVectors
// vectors, and multiplies as many others.
//
// In shared memory the codes lie as in a plane of 64 slots with head_size 64.
template <typename Plane>
struct KTileSpan {
  static constexpr int kBytes = Plane::k_bytes(kTileSlots, kSpanDims);
  static constexpr int kVectors = kBytes / (32 * kVectorBytes);
  static constexpr int kGroupBytes = Plane::k_group_bytes(kSpanDims);  // of a slot group

  // The first of the kKDims dims of the span that copy i has, for all slots of the group.
  static INT8KV_HD int copy_dim(int i) { return i * Plane::kKDims; }
  static INT8KV_HD int32_t copy_source(const KVCache& cache, int span, int i) {
    return Plane::k_byte(cache.head_size, 0, span * kSpanDims + copy_dim(i));
  }
  static INT8KV_HD int lane_target(int lane) {
    return copy_group(lane) * kGroupBytes + copy_byte(lane);
  }
  static INT8KV_HD int copy_target(int i) { return Plane::k_byte(kSpanDims, 0, copy_dim(i)); }

  // The vector with dims 8 * i + 2 * (lane % 4) and the next, and the lowest bit of their fields:
  // as many i have the same vector as there are fields.
  static INT8KV_HD int vector_byte(int lane, int i) {
    return Plane::k_byte(kSpanDims, k_lane_slot(lane), lane % 4 * 2) +
           Plane::k_byte(kSpanDims, 0, i * 8);
  }
  static INT8KV_HD int shift(int i) { return Plane::k_shift(i * 8); }
};

template <>
struct KTileSpan<BitPlane<0>> {
  static constexpr int kBytes = 0;
};

template <>
struct KTileSpan<Codes<8>> {
  using C = Codes<8>;
  static constexpr int kBytes = C::bytes(kTileSlots * kSpanDims);
  static constexpr int kVectors = kBytes / (32 * kVectorBytes);
  static constexpr int kGroupBytes = C::k_byte(kSpanDims, kSlotGroup, 0);  // of a slot group

  // The first of the 8 dims of the span that copy i has, for all slots of the group.
  static INT8KV_HD int copy_dim(int i) { return i * 8; }
  // Bytes in the cache from the first K code of the slot group to copy i of a span.
  static INT8KV_HD int32_t copy_source(const KVCache& cache, int span, int i) {
    return C::k_byte(cache.head_size, 0, span * kSpanDims + copy_dim(i));
  }
  // Where a lane's copy 0 goes in shared memory, and copy i relative to it.
  static INT8KV_HD int lane_target(int lane) {
    return copy_group(lane) * kGroupBytes + copy_byte(lane);
  }
  static INT8KV_HD int copy_target(int i) { return C::k_byte(kSpanDims, 0, copy_dim(i)); }

  // Where a lane finds vector i for its products: dims 8 * i + 2 * (lane % 4) and the next.
  static INT8KV_HD int vector_byte(int lane, int i) {
    return C::k_byte(kSpanDims, k_lane_slot(lane), lane % 4 * 2) + C::k_byte(kSpanDims, 0, i * 8);
  }
};

// The same for V. In shared memory the codes lie as in a plane of 64 slots with head_size 64, but
// for the four lines of every 128 bytes: line n of slot group g lies in place of line n ^ g, so
// that the 8 lanes that read at once find theirs in different banks.
template <typename Plane>
struct VTileSpan {
  static constexpr int kBytes = Plane::v_bytes(kTileSlots, kSpanDims);
  static constexpr int kVectors = kBytes / (32 * kVectorBytes);
  static constexpr int kGroupBytes = Plane::v_byte(kTileSlots, kSlotGroup, 0);  // of a slot group

  // What copy i has: kVDims dims from this one of the span on, for 8 slots from this one on. In a
  // plane of one bit that is two spans, and each copies it.
  static INT8KV_HD int copy_dim(int i) { return i / 2 * Plane::kVDims; }
  static INT8KV_HD int copy_slot(int i) { return i % 2 * 8; }
  static INT8KV_HD int64_t copy_source(const KVCache& cache, int span, int i) {
    const int64_t line = (span * kSpanDims + copy_dim(i)) / Plane::kVDims;
    return line * Plane::v_group_bytes(cache.block_size) +
           Plane::v_byte(cache.block_size, copy_slot(i), 0);
  }
  static INT8KV_HD int lane_target(int lane) {
    const int group = copy_group(lane);
    return group * kGroupBytes + (lane % 8 / 2 ^ group) * kLineBytes + lane % 2 * kVectorBytes;
  }
  static INT8KV_HD int copy_target(int i) {
    return Plane::v_byte(kTileSlots, copy_slot(i), copy_dim(i));
  }

  // As below; lanes with other fields of the same bytes have the same vector.
  static INT8KV_HD int vector_byte(int lane, int i) {
    const int group = lane % 4;
    return Plane::v_byte(kTileSlots, group * kSlotGroup, v_lane_dim(lane)) +
           Plane::v_byte(kTileSlots, i % 2 * 8, 0) + (i / 2 ^ group) * kLineBytes;
  }
  // The lowest bit of the fields of a lane's dims.
  static INT8KV_HD int shift(int span, int lane) {
    return Plane::v_shift(span * kSpanDims + v_lane_dim(lane));
  }
};

template <>
struct VTileSpan<BitPlane<0>> {
  static constexpr int kBytes = 0;
};

template <>
struct VTileSpan<Codes<8>> {
  using C = Codes<8>;
  static constexpr int kBytes = C::bytes(kTileSlots * kSpanDims);
  static constexpr int kVectors = kBytes / (32 * kVectorBytes);
  static constexpr int kGroupBytes = C::v_byte(kTileSlots, kSlotGroup, 0);  // of a slot group

  // What copy i has: a dim group of the span from this dim on, for 8 slots of the slot group from
  // this one on.
  static INT8KV_HD int copy_dim(int i) { return i / 2 * kDimGroup; }
  static INT8KV_HD int copy_slot(int i) { return i % 2 * 8; }
  // In 64 bits, so that one instruction multiplies and adds to a pointer.
  static INT8KV_HD int64_t copy_source(const KVCache& cache, int span, int i) {
    const int64_t dim_group = (span * kSpanDims + copy_dim(i)) / kDimGroup;
    return dim_group * C::bytes(cache.block_size * kDimGroup) +
           C::v_byte(cache.block_size, copy_slot(i), 0);
  }
  static INT8KV_HD int lane_target(int lane) {
    const int group = copy_group(lane);
    return group * kGroupBytes + (lane % 8 / 2 ^ group) * C::kLineBytes + lane % 2 * kVectorBytes;
  }
  static INT8KV_HD int copy_target(int i) {
    return C::v_byte(kTileSlots, copy_slot(i), copy_dim(i));
  }

  // Vector i: slots 16 * (lane % 4) + i % 2 * 8 + i / 2 * 2 and the next, dims 8 * (lane / 4) on.
  static INT8KV_HD int vector_byte(int lane, int i) {
    const int group = lane % 4;
    return C::v_byte(kTileSlots, group * kSlotGroup, v_lane_dim(lane)) +
           C::v_byte(kTileSlots, i % 2 * 8, 0) + (i / 2 ^ group) * C::kLineBytes;
  }
};

// The planes of codes of a trait in a tile span, one after the other, and where they come from.
template <typename C>
struct KSpans {
  using Low = KTileSpan<typename C::Low>;
  using High = KTileSpan<typename C::High>;
  static constexpr bool kHasHigh = C::kBits > C::kLowBits;
  static constexpr int kBytes = Low::kBytes + High::kBytes;

  // Bytes from the first code of a slot group in the lower plane to the first in the upper one.
  static INT8KV_HD int32_t to_high(const KVCache& cache, int slot_group) {
    return C::Low::k_bytes(cache.block_size, cache.head_size) +
           slot_group *
               (C::High::k_group_bytes(cache.head_size) - C::Low::k_group_bytes(cache.head_size));
  }
};
template <typename C>
struct VSpans {
  using Low = VTileSpan<typename C::Low>;
  using High = VTileSpan<typename C::High>;
  static constexpr bool kHasHigh = C::kBits > C::kLowBits;
  static constexpr int kBytes = Low::kBytes + High::kBytes;

  static INT8KV_HD int32_t to_high(const KVCache& cache, int) {
    return C::Low::v_bytes(cache.block_size, cache.head_size);
  }
};
template <>
struct KSpans<Codes<8>> {
  using Low = KTileSpan<Codes<8>>;
  static constexpr bool kHasHigh = false;
  static constexpr int kBytes = Low::kBytes;
};
template <>
struct VSpans<Codes<8>> {
  using Low = VTileSpan<Codes<8>>;
  static constexpr bool kHasHigh = false;
  static constexpr int kBytes = Low::kBytes;
};

}  // namespace int8kv
