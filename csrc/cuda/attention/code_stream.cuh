// One warp's codes on their way from the cache to tensor-core operands.
//
// A warp copies whole lines into a ring of its own, kRing units of 64 keys x 64 dims ahead of their
// use, and the scales of each tile with its first unit: the units of a tile are the spans of K,
// then those of V. Who copies what is not who multiplies it, but all of it stays within the warp,
// so that no barrier of the block is needed.
#pragma once

#include "cuda/attention/work.cuh"

namespace int8kv {

constexpr int kUnitBytes = kSpanVectors * 32 * 16;
constexpr int kScaleSlots = 2;           // tiles whose scales are on their way
constexpr int kScaleBytes = 2 * 8 * 16;  // K and V scales of one tile

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

// One warp's way through its tiles. With kWholeSpans the head size is kSpans * 64.
template <int kSpans, bool kWholeSpans, int kRing>
struct Stream {
  const PagedAttentionParams& p;
  const int32_t* block_table;
  int32_t kv_head;
  KeyRange keys;  // of the piece
  int lane;
  unsigned char* ring;    // this warp's
  unsigned char* scales;  // this warp's

  int32_t tile = 0;  // of the next unit to copy
  int scale_slot = 0;
  int write = 0, read = 0;  // ring positions
  int32_t block = 0;        // of this lane's slot group of `tile`, fetched one tile early
  int32_t slot = 0;         // of the group's first key in its block
  bool is_seen = false;     // whether any row sees a key of the group; others may have no block
  const int8_t* k_source = nullptr;
  const int8_t* v_source = nullptr;

  INT8KV_DEVICE int32_t tile_end() const { return (keys.end + kTileSlots - 1) / kTileSlots; }

  INT8KV_DEVICE void fetch_block() {
    const int32_t key = tile * kTileSlots + copy_group(lane) * kSlotGroup;
    is_seen = tile < tile_end() && key < keys.end && key + kSlotGroup > keys.begin;
    if (is_seen) {
      const auto block_size = static_cast<uint32_t>(p.cache.block_size);
      const uint32_t index = static_cast<uint32_t>(key) / block_size;
      slot = key - static_cast<int32_t>(index * block_size);
      block = block_table[index];
    }
  }

  INT8KV_DEVICE void start_tile() {
    const KVCache& cache = p.cache;
    // As KVCache::k_code and v_code of a group's first slot have it, in 32 bits.
    const int32_t codes = cache.block_size * cache.head_size;
    const int8_t* chunk = cache.chunk(block, kv_head);
    k_source = chunk + slot * cache.head_size + copy_byte(lane);
    v_source = chunk + codes + slot * kDimGroup + copy_byte(lane);
    // 16 K scales and 16 V scales of the group: two lanes each.
    if (is_seen && lane % 8 < 4) {
      const int is_value = lane % 4 / 2;
      copy_async_16(scales + scale_slot * kScaleBytes + is_value * (kScaleBytes / 2) +
                        copy_group(lane) * 32 + lane % 2 * 16,
                    chunk + 2 * codes + is_value * 2 * cache.block_size + slot * 2 + lane % 2 * 16);
    }
    scale_slot = (scale_slot + 1) % kScaleSlots;
  }

  // Copies unit `unit` of `tile`: K spans, then V spans. Every lane has read what it overwrites.
  INT8KV_DEVICE void copy_unit(int unit) {
    if (unit == 0) start_tile();
    if (is_seen) {
      const int span = unit % kSpans;
      unsigned char* target = ring + write * kUnitBytes;
#pragma unroll
      for (int i = 0; i < kSpanVectors; ++i) {
        const int dim = span * kSpanDims + (unit < kSpans ? k_copy_dim(i) : v_copy_dim(i));
        if (!kWholeSpans && dim >= p.cache.head_size) continue;
        if (unit < kSpans) {
          copy_async_16(target + k_copy_target(lane, i), k_source + k_copy_source(span, i));
        } else {
          copy_async_16(target + v_copy_target(lane, i),
                        v_source + v_copy_source(p.cache.block_size, span, i));
        }
      }
    }
    if (unit == 2 * kSpans - 1) {
      tile += kAttentionWarps;
      fetch_block();
    }
    copy_async_commit();
    write = write + 1 == kRing ? 0 : write + 1;
  }

  INT8KV_DEVICE void begin(int32_t first_tile) {
    tile = first_tile;
    fetch_block();
#pragma unroll
    for (int unit = 0; unit < kRing; ++unit) copy_unit(unit % (2 * kSpans));
  }

  // Waits for the next kUnits units, as all lanes have copied them.
  template <int kUnits>
  INT8KV_DEVICE void wait_units() {
    copy_async_wait<kRing - kUnits>();
    __syncwarp();
  }
  // Vector i of the unit in use, or of one `ahead` of it, which is not wrapped around the ring.
  INT8KV_DEVICE uint4 k_vector(int i, int ahead) const {
    return vector_at((read + ahead) * kUnitBytes + k_vector_byte(lane, i));
  }
  INT8KV_DEVICE uint4 v_vector(int i) const {
    return vector_at(read * kUnitBytes + v_vector_byte(lane, i));
  }
  INT8KV_DEVICE uint4 vector_at(int byte) const {
    return *reinterpret_cast<const uint4*>(ring + byte);
  }
  // Gives unit `unit` of the tile in use back to the ring.
  INT8KV_DEVICE void next_unit(int unit) {
    __syncwarp();
    read = read + 1 == kRing ? 0 : read + 1;
    copy_unit((unit + kRing) % (2 * kSpans));
  }
};

}  // namespace int8kv
