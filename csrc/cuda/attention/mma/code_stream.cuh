// One warp's codes on their way from the cache to tensor-core operands.
//
// A warp copies whole lines into a ring of its own, kRing tile spans (64 slots x 64 dims, K or V)
// ahead of their use, and the scales and midpoints of each tile with its first tile span. The tile
// spans of a tile are numbered: first the spans of K, then those of V. The lane that copies a
// vector is not the one that multiplies it, but both are of one warp, so that no barrier of the
// block is needed.
#pragma once

#include "cuda/attention/mma/operands.cuh"
#include "cuda/attention/query_rows.cuh"
#include "cuda/attention/tile_maps.h"

namespace int8kv {

// Where the codes and scales of a tile lie in a warp's shared memory.
template <typename F>
struct TileBuffers {
  using KSpan = KSpans<typename F::K>;
  using VSpan = VSpans<typename F::V>;
  static constexpr bool kHasMidpoints = F::K::kHasMidpoint || F::V::kHasMidpoint;
  static constexpr int kSpanBytes = KSpan::kBytes > VSpan::kBytes ? KSpan::kBytes : VSpan::kBytes;
  static constexpr int kKScaleBytes = kTileSlots * F::K::kScaleBytes;
  static constexpr int kVScaleBytes = kTileSlots * F::V::kScaleBytes;
  static constexpr int kAllScaleBytes = kKScaleBytes + kVScaleBytes;  // K, then V
  // The midpoints of K and V follow, if one of them has some.
  static constexpr int kScaleBytes = (kHasMidpoints ? 2 : 1) * kAllScaleBytes;
};

// One warp's way through its tiles. With kWholeSpans the head size is kSpans * 64.
template <typename F, int kSpans, bool kWholeSpans, int kRing, int kScaleBuffers>
struct CodeStream {
  using Buffers = TileBuffers<F>;
  using KSpan = typename Buffers::KSpan;
  using VSpan = typename Buffers::VSpan;
  static constexpr int kTileSpans = 2 * kSpans;  // of a tile: K, then V

  const AttentionParams& p;
  const int32_t* block_table;
  int32_t kv_head;
  KeyRange keys;  // of the split
  int lane;
  unsigned char* ring;    // this warp's
  unsigned char* scales;  // this warp's

  int32_t tile = 0;  // of the next tile span to copy
  int scale_buffer = 0;
  int write = 0, read = 0;  // ring positions
  int32_t block = 0;        // of this lane's slot group of `tile`, fetched one tile early
  int32_t slot_group = 0;   // of the block
  bool is_seen = false;     // whether any row sees a key of the group; others may have no block
  const int8_t* k_source = nullptr;
  const int8_t* v_source = nullptr;

  // The cache, its head size a constant where the kernel has one: with k8v8 on SM90 the kernel is 7
  // % smaller for that.
  INT8KV_DEVICE KVCache sized_cache() const {
    KVCache cache = p.cache;
    if constexpr (kWholeSpans) cache.head_size = kSpans * kSpanDims;
    return cache;
  }
  INT8KV_DEVICE int32_t tile_end() const { return end_tile_of(keys.end); }

  INT8KV_DEVICE void fetch_block() {
    const int32_t key = tile * kTileSlots + copy_group(lane) * kSlotGroup;
    is_seen = tile < tile_end() && key < keys.end && key + kSlotGroup > keys.begin;
    if (is_seen) {
      const int32_t index = p.block_size.divide(key);
      slot_group = static_cast<int32_t>(static_cast<uint32_t>(key - index * p.block_size.value) /
                                        kSlotGroup);
      block = block_table[static_cast<uint32_t>(index)];
    }
  }

  INT8KV_DEVICE void start_tile() {
    const KVCache cache = sized_cache();
    // All of these numbers are positive. As signed ones they would have upper halves to be computed
    // and multiplied: 18 instructions more until the first copy.
    const int8_t* chunk = cache.chunk(static_cast<uint32_t>(block), static_cast<uint32_t>(kv_head));
    const int32_t slot = slot_group * kSlotGroup;
    k_source = chunk + static_cast<uint32_t>(cache.k_code<F>(slot, 0) + copy_byte(lane));
    v_source = chunk + static_cast<uint32_t>(cache.v_code<F>(slot, 0) + copy_byte(lane));
    // A slot group has two vectors of K scales and two of V scales, for the first four of its eight
    // lanes, and as many of midpoints, for the last four.
    static_assert(F::K::kScaleBytes * kSlotGroup == 2 * kVectorBytes &&
                  F::V::kScaleBytes * kSlotGroup == 2 * kVectorBytes);
    const auto copy_params = [&](int32_t first, int buffer) {
      const bool is_value = lane % 4 >= 2;
      const int vector = lane % 2 * kVectorBytes;
      const int32_t source = is_value ? cache.v_scale<F>(slot) : cache.k_scale<F>(slot);
      copy_async_16(scales + scale_buffer * Buffers::kScaleBytes + buffer +
                        (is_value ? Buffers::kKScaleBytes : 0) +
                        copy_group(lane) * 2 * kVectorBytes + vector,
                    chunk + static_cast<uint32_t>(first + source + vector));
    };
    if (is_seen && lane % 8 < 4) copy_params(0, 0);
    if constexpr (Buffers::kHasMidpoints) {
      const bool exists = lane % 4 >= 2 ? F::V::kHasMidpoint : F::K::kHasMidpoint;
      if (is_seen && lane % 8 >= 4 && exists) {
        copy_params(cache.midpoint_offset(), Buffers::kAllScaleBytes);
      }
    }
    scale_buffer = (scale_buffer + 1) % kScaleBuffers;
  }

  // This lane's part of a plane of a span of K or V.
  template <typename TileSpan>
  INT8KV_DEVICE void copy_plane(const int8_t* source, int span, unsigned char* target) {
#pragma unroll
    for (int i = 0; i < TileSpan::kVectors; ++i) {
      const int dim = span * kSpanDims + TileSpan::copy_dim(i);
      if (!kWholeSpans && dim >= sized_cache().head_size) continue;
      copy_async_16(target + TileSpan::lane_target(lane) + TileSpan::copy_target(i),
                    source + TileSpan::copy_source(sized_cache(), span, i));
    }
  }
  template <typename Spans>
  INT8KV_DEVICE void copy_codes(const int8_t* source, int span, unsigned char* target) {
    copy_plane<typename Spans::Low>(source, span, target);
    if constexpr (Spans::kHasHigh) {
      const int8_t* high = source + Spans::to_high(sized_cache(), slot_group);
      copy_plane<typename Spans::High>(high, span, target + Spans::Low::kBytes);
    }
  }

  // Copies tile span `number` of `tile`, over one that every lane has read.
  INT8KV_DEVICE void copy_tile_span(int number) {
    if (number == 0) start_tile();
    if (is_seen) {
      unsigned char* target = ring + write * Buffers::kSpanBytes;
      if (number < kSpans) {
        copy_codes<KSpan>(k_source, number, target);
      } else {
        copy_codes<VSpan>(v_source, number - kSpans, target);
      }
    }
    if (number == kTileSpans - 1) {
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
    for (int i = 0; i < kRing; ++i) copy_tile_span(i % kTileSpans);
  }

  // Waits for the next kCount tile spans, as all lanes have copied them.
  template <int kCount>
  INT8KV_DEVICE void wait() {
    copy_async_wait<kRing - kCount>();
    __syncwarp();
  }

  // Codes of the tile span in use, or of one `ahead` of it, which is not wrapped around the ring.
  INT8KV_DEVICE KOperand<typename F::K> k_codes(int step, int ahead) const {
    return KOperand<typename F::K>::load(ring, (read + ahead) * Buffers::kSpanBytes, lane, step);
  }
  INT8KV_DEVICE VOperand<typename F::V> v_codes(int span, int step) const {
    return VOperand<typename F::V>::load(ring, read * Buffers::kSpanBytes, lane, span, step);
  }
  // Scales of this lane's 8 slots of a tile, and their midpoints.
  INT8KV_DEVICE const uint4& k_scales(int buffer) const {
    return *reinterpret_cast<const uint4*>(scales + buffer * Buffers::kScaleBytes +
                                           k_lane_slot(lane) * F::K::kScaleBytes);
  }
  INT8KV_DEVICE const uint4& v_scales(int buffer) const {
    return *reinterpret_cast<const uint4*>(scales + buffer * Buffers::kScaleBytes +
                                           Buffers::kKScaleBytes +
                                           k_lane_slot(lane) * F::V::kScaleBytes);
  }
  INT8KV_DEVICE const uint4& midpoints_of(const uint4& scales_of_lane) const {
    return (&scales_of_lane)[Buffers::kAllScaleBytes / kVectorBytes];
  }

  // Gives tile span `number` of the tile in use back to the ring.
  INT8KV_DEVICE void release(int number) {
    __syncwarp();
    read = read + 1 == kRing ? 0 : read + 1;
    copy_tile_span((number + kRing) % kTileSpans);
  }
};

}  // namespace int8kv
