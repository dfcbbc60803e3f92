// One warp's codes on their way from the cache to tensor-core operands.
//
// Every lane copies the 16-byte vectors that it will multiply itself into a ring of its own, kRing
// units of 64 keys x 64 dims ahead of their use: the units of a tile are the spans of K, then those
// of V. What a lane waits for is its own copy, so no barrier is needed; only the scales, 256 bytes
// a tile, are copied by some lanes for all.
#pragma once

#include "work.cuh"

namespace int8kv {

constexpr int kRing = 3;
constexpr int kUnitBytes = kSpanVectors * 32 * 16;  // one warp's vectors of one tile and span
constexpr int kScaleSlots = 2;                      // tiles whose scales are on their way
constexpr int kScaleBytes = 2 * 8 * 16;             // K and V scales of one tile

// Four codes of two outputs: low gets the first two, high the last two, as fp16 pairs.
INT8KV_DEVICE void codes_to_half2(uint32_t codes, uint32_t& low, uint32_t& high) {
  constexpr uint32_t kBias = 0x64806480u;  // 1152, twice
  const uint32_t biased = codes ^ 0x80808080u;
  low = sub_half2(byte_permute(biased, 0x64646464u, 0x4140), kBias);
  high = sub_half2(byte_permute(biased, 0x64646464u, 0x4342), kBias);
}

INT8KV_DEVICE uint32_t word_of(const uint4& vector, int i) {
  return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

// bf16 number `i` of eight.
INT8KV_DEVICE float scale_of(const uint4& scales, int i) {
  const uint32_t word = word_of(scales, i / 2);
  return bits_to_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
}

// 2^(biased - 127), 0 below the normal range.
INT8KV_DEVICE float power_of_two(int biased) {
  return biased > 0 ? bits_to_float(static_cast<uint32_t>(biased) << 23) : 0.0f;
}

// One warp's way through its tiles: copies kRing units ahead of their use.
template <int kSpans>
struct Stream {
  const PagedAttentionParams& p;
  const int32_t* block_table;
  int32_t kv_head;
  KeyRange keys;  // of the item
  int lane;
  unsigned char* ring;    // this lane's vector 0 of unit 0
  unsigned char* scales;  // this warp's
  int32_t tile_end;

  int32_t tile = 0;  // of the next unit to copy
  int scale_slot = 0;
  int write = 0, read = 0;           // ring positions
  int32_t k_block = 0, v_block = 0;  // of `tile`, fetched one tile early
  const int8_t* k_vectors = nullptr;
  const int8_t* v_vectors = nullptr;

  // Keys that no row sees have no block: the nearest that is seen stands in, and is masked.
  INT8KV_DEVICE int32_t clamped(int32_t key) const {
    return max(keys.begin / kSlotGroup * kSlotGroup, min(key, keys.end - 1));
  }
  // The same for the first of 8 or 16 slots, kept aligned.
  INT8KV_DEVICE int32_t clamped_to(int32_t key, int align) const {
    return clamped(key) / align * align;
  }
  INT8KV_DEVICE int32_t k_key() const {
    return clamped_to(tile * kTileSlots + k_lane_slot(lane), 8);
  }
  INT8KV_DEVICE int32_t v_key() const {
    return clamped_to(tile * kTileSlots + v_lane_slot(lane), kSlotGroup);
  }
  INT8KV_DEVICE void fetch_blocks() {
    if (tile >= tile_end) return;
    k_block = block_table[k_key() / p.cache.block_size];
    v_block = block_table[v_key() / p.cache.block_size];
  }

  INT8KV_DEVICE void start_tile() {
    const KVCache& cache = p.cache;
    const int k_slot = k_key() % cache.block_size;
    const int v_slot = v_key() % cache.block_size;
    const int8_t* k_chunk = cache.chunk(k_block, kv_head);
    k_vectors = k_chunk + cache.k_code(k_slot, k_lane_dim(lane));
    v_vectors = cache.chunk(v_block, kv_head) + cache.v_code(v_slot, v_lane_dim(lane));
    // The scales of the 8 slots of lanes 4g to 4g + 3: lane 4g copies K's, lane 4g + 1 V's.
    if (lane % 4 < 2) {
      const int64_t plane = lane % 4 == 0 ? cache.k_scales() : cache.v_scales();
      copy_async_16(scales + scale_slot * kScaleBytes + (lane % 4 * 8 + lane / 4) * 16,
                    k_chunk + plane + k_slot * 2);
    }
    scale_slot = (scale_slot + 1) % kScaleSlots;
  }

  // Copies unit `unit` of `tile`: K spans, then V spans.
  INT8KV_DEVICE void copy_unit(int unit) {
    if (tile < tile_end) {
      if (unit == 0) start_tile();
      const int span = unit % kSpans;
      const int head_size = p.cache.head_size;
      unsigned char* slot = ring + write * kUnitBytes;
#pragma unroll
      for (int i = 0; i < kSpanVectors; ++i) {
        if (unit < kSpans) {
          if (span * kSpanDims + k_vector_dim(i) >= head_size) continue;
          copy_async_16(slot + i * 512, k_vectors + k_vector_byte(span, i));
        } else {
          if (span * kSpanDims + v_lane_dim(lane) >= head_size) continue;
          copy_async_16(slot + i * 512, v_vectors + v_vector_byte(p.cache.block_size, span, i));
        }
      }
      if (unit == 2 * kSpans - 1) {
        tile += kAttentionWarps;
        fetch_blocks();
      }
    }
    copy_async_commit();
    write = write + 1 == kRing ? 0 : write + 1;
  }

  INT8KV_DEVICE void begin(int32_t first_tile) {
    tile = first_tile;
    fetch_blocks();
#pragma unroll
    for (int unit = 0; unit < kRing; ++unit) copy_unit(unit % (2 * kSpans));
  }

  INT8KV_DEVICE void wait_unit() { copy_async_wait<kRing - 1>(); }
  INT8KV_DEVICE uint4 vector(int i) const {
    return *reinterpret_cast<const uint4*>(ring + read * kUnitBytes + i * 512);
  }
  // Gives unit `unit` of the tile in use back to the ring.
  INT8KV_DEVICE void next_unit(int unit) {
    read = read + 1 == kRing ? 0 : read + 1;
    copy_unit((unit + kRing) % (2 * kSpans));
  }
};

}  // namespace int8kv
