// Codes below 8 bits on their way into the cache: one byte each, then packed into the planes of
// their trait. Included by reshape_and_cache.cpp, once per instruction set.
#pragma once

#include "cpu/simd/vectors.h"

namespace int8kv::cpu::INT8KV_ISA {

namespace {

typedef uint32_t LineWords __attribute__((vector_size(kLineBytes)));

// Head sizes are padded to lines of the plane with most fields, one bit of V.
constexpr int kMaxPaddedHeadSize = 512;
static_assert(kMaxPaddedHeadSize % BitPlane<1>::kVDims == 0 && kMaxPaddedHeadSize >= kMaxHeadSize);

// The codes of 16 vectors, whose bytes past the head size are 0.
struct CodeBytes {
  // Of a slot group: lines of Codes<8>, [head_size / 2] of K or [head_size / 16][8 slot pairs] of
  // V. Else [16 vectors][kMaxPaddedHeadSize].
  alignas(64) uint8_t x[kLanes * kMaxPaddedHeadSize];
};

// Calls f(plane, its first byte, lowest bit of a code in it) for the planes of a trait; types stand
// for the first and the last.
template <typename C, typename F>
INT8KV_INLINE void for_each_plane(int8_t* codes, int32_t low_bytes, const F& f) {
  f(typename C::Low{}, codes, std::integral_constant<int, 0>{});
  if constexpr (C::kBits > C::kLowBits) {
    f(typename C::High{}, codes + low_bytes, std::integral_constant<int, C::kLowBits>{});
  }
}

// kFields lines of Codes<8>, `stride` bytes apart, as one. There are no shifts of bytes, and none
// are needed: the mask takes away what words bring in from the next one.
template <typename Plane, int kBit>
INT8KV_INLINE void pack_line(const uint8_t* lines, int64_t stride, int8_t* to) {
  LineWords packed = {};
  for (int field = 0; field < Plane::kFields; ++field) {
    LineWords line;
    std::memcpy(&line, lines + field * stride, sizeof(line));
    packed |= (line >> kBit & Plane::kMask * 0x01010101u) << field * 8 / Plane::kFields;
  }
  std::memcpy(to, &packed, sizeof(packed));
}

// `codes` is the first byte of the planes of the chunk, `slot` the first of the group.
template <typename C>
void pack_k_group(const CodeBytes& bytes, int8_t* codes, const KVCache& cache, int32_t slot) {
  const int32_t head_size = cache.head_size;
  for_each_plane<C>(
      codes, C::Low::k_bytes(cache.block_size, head_size),
      [&]<typename Plane, int kBit>(Plane, int8_t* plane, std::integral_constant<int, kBit>) {
        for (int32_t dim = 0; dim < head_size; dim += Plane::kKDims) {
          for (int32_t d = 0; d < 8; d += 2) {
            pack_line<Plane, kBit>(bytes.x + (dim + d) / 2 * kLineBytes, 4 * kLineBytes,
                                   plane + Plane::k_byte(head_size, slot, dim + d));
          }
        }
      });
}

template <typename C>
void pack_v_group(const CodeBytes& bytes, int8_t* codes, const KVCache& cache, int32_t slot) {
  constexpr int64_t kGroupBytes = kSlotGroup / 2 * kLineBytes;
  for_each_plane<C>(
      codes, C::Low::v_bytes(cache.block_size, cache.head_size),
      [&]<typename Plane, int kBit>(Plane, int8_t* plane, std::integral_constant<int, kBit>) {
        for (int32_t dim = 0; dim < cache.head_size; dim += Plane::kVDims) {
          const uint8_t* lines = bytes.x + dim / kDimGroup * kGroupBytes;
          for (int32_t s = 0; s < kSlotGroup; s += 2) {
            pack_line<Plane, kBit>(lines + s / 2 * kLineBytes, kGroupBytes,
                                   plane + Plane::v_byte(cache.block_size, slot + s, dim));
          }
        }
      });
}

// The same of eight bytes of one vector, whose codes lie side by side.
template <typename Plane, int kBit>
INT8KV_INLINE uint64_t pack_bytes(const uint8_t* codes, int64_t stride) {
  uint64_t packed = 0;
  for (int field = 0; field < Plane::kFields; ++field) {
    uint64_t bytes;
    std::memcpy(&bytes, codes + field * stride, sizeof(bytes));
    packed |= (bytes >> kBit & Plane::kMask * 0x0101010101010101u) << field * 8 / Plane::kFields;
  }
  return packed;
}

template <typename C>
void pack_k_vector(const uint8_t* vector, int8_t* codes, const KVCache& cache, int32_t slot) {
  const int32_t head_size = cache.head_size;
  for_each_plane<C>(
      codes, C::Low::k_bytes(cache.block_size, head_size),
      [&]<typename Plane, int kBit>(Plane, int8_t* plane, std::integral_constant<int, kBit>) {
        for (int32_t dim = 0; dim < head_size; dim += Plane::kKDims) {
          const uint64_t packed = pack_bytes<Plane, kBit>(vector + dim, 8);
          int8_t* to = plane + Plane::k_byte(head_size, slot, dim);
          for (int32_t d = 0; d < 8; d += 2) {
            const auto pair = static_cast<uint16_t>(packed >> 8 * d);
            std::memcpy(to + d / 2 * kLineBytes, &pair, sizeof(pair));
          }
        }
      });
}

template <typename C>
void pack_v_vector(const uint8_t* vector, int8_t* codes, const KVCache& cache, int32_t slot) {
  for_each_plane<C>(
      codes, C::Low::v_bytes(cache.block_size, cache.head_size),
      [&]<typename Plane, int kBit>(Plane, int8_t* plane, std::integral_constant<int, kBit>) {
        for (int32_t dim = 0; dim < cache.head_size; dim += Plane::kVDims) {
          int8_t* to = plane + Plane::v_byte(cache.block_size, slot, dim);
          for (int32_t half = 0; half < kDimGroup; half += 8) {
            const uint64_t packed = pack_bytes<Plane, kBit>(vector + dim + half, kDimGroup);
            for (int32_t d = 0; d < 8; ++d) {
              to[2 * (half + d)] = static_cast<int8_t>(packed >> 8 * d);
            }
          }
        }
      });
}

}  // namespace

}  // namespace int8kv::cpu::INT8KV_ISA
