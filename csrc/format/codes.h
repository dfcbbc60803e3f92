// How the codes of K and of V lie in a chunk: the trait Codes<bits> of every number of bits.
//
// Eight bits are one plane of signed bytes. Fewer bits are unsigned codes in planes of 4, 2 and 1
// bits: six bits are the lower four in one plane and the upper two in the next, five bits four and
// one. All planes are made of lines of 32 bytes, and a byte belongs to one slot, so that writes of
// different tokens never share one.
#pragma once

#include <cstdint>

#include "format/host_device.h"

namespace int8kv {

constexpr int kSlotGroup = 16;  // slots that share a line of K codes; block_size is a multiple
constexpr int kDimGroup = 16;   // dims that share a line of V codes; head_size is a multiple
constexpr int kMaxHeadSize = 512;
constexpr int kLineBytes = 32;

INT8KV_HD constexpr int32_t round_up(int32_t x, int32_t unit) {
  return (x + unit - 1) / unit * unit;
}

// `kBits` bits (4, 2 or 1) of every code. A line is kFields lines of Codes<8> (below) on top of
// each other:
//
//   K  [block_size / 16][head_size / (8 fields)][8 dims / 2][16 slots][2 dims], field f: 8 dims on
//   V  [head_size / (16 fields)][block_size / 2][16 dims][2 slots], field f: 16 dims on
//
// Head sizes are padded to whole lines with codes of 0, which nothing reads.
template <int kBits>
struct BitPlane {
  static constexpr int kFields = 8 / kBits;
  static constexpr int kMask = (1 << kBits) - 1;
  static constexpr int kKDims = 8 * kFields;   // dims that share lines of K
  static constexpr int kVDims = 16 * kFields;  // dims that share a line of V

  static INT8KV_HD constexpr int32_t k_group_bytes(int32_t head_size) {  // of a slot group
    return kSlotGroup * round_up(head_size, kKDims) / kFields;
  }
  static INT8KV_HD constexpr int32_t k_bytes(int32_t block_size, int32_t head_size) {
    return block_size / kSlotGroup * k_group_bytes(head_size);
  }
  static INT8KV_HD constexpr int32_t v_group_bytes(int32_t block_size) {  // of kVDims dims
    return kDimGroup * block_size;
  }
  static INT8KV_HD constexpr int32_t v_bytes(int32_t block_size, int32_t head_size) {
    return round_up(head_size, kVDims) / kVDims * v_group_bytes(block_size);
  }

  // Byte of a code within the plane, and its lowest bit there.
  static INT8KV_HD constexpr int32_t k_byte(int32_t head_size, int32_t slot, int32_t dim) {
    return slot / kSlotGroup * k_group_bytes(head_size) + dim / kKDims * 4 * kLineBytes +
           dim % 8 / 2 * kLineBytes + slot % kSlotGroup * 2 + dim % 2;
  }
  static INT8KV_HD constexpr int k_shift(int32_t dim) { return dim % kKDims / 8 * kBits; }
  static INT8KV_HD constexpr int32_t v_byte(int32_t block_size, int32_t slot, int32_t dim) {
    return dim / kVDims * v_group_bytes(block_size) + slot / 2 * kLineBytes + dim % kDimGroup * 2 +
           slot % 2;
  }
  static INT8KV_HD constexpr int v_shift(int32_t dim) { return dim % kVDims / kDimGroup * kBits; }
};

// There is no such plane.
template <>
struct BitPlane<0> {
  static INT8KV_HD constexpr int32_t k_bytes(int32_t, int32_t) { return 0; }
  static INT8KV_HD constexpr int32_t v_bytes(int32_t, int32_t) { return 0; }
};

// Unsigned codes of six bits or fewer, with a scale and a midpoint per vector (quantizer.h).
template <int kBits_>
struct Codes {
  static constexpr int kBits = kBits_;
  static constexpr bool kHasMidpoint = true;
  static constexpr int kLevels = (1 << kBits) - 1;  // the largest code
  static constexpr int kScaleBytes = 2;             // bf16, as the midpoint
  static constexpr int kParamBytes = 4;
  static constexpr int kLowBits = kBits < 4 ? kBits : 4;
  using Low = BitPlane<kLowBits>;
  using High = BitPlane<kBits - kLowBits>;

  static INT8KV_HD constexpr int32_t k_bytes(int32_t block_size, int32_t head_size) {
    return Low::k_bytes(block_size, head_size) + High::k_bytes(block_size, head_size);
  }
  static INT8KV_HD constexpr int32_t v_bytes(int32_t block_size, int32_t head_size) {
    return Low::v_bytes(block_size, head_size) + High::v_bytes(block_size, head_size);
  }

  // Byte of the lower bits of a code, from the first of its planes on.
  static INT8KV_HD constexpr int32_t k_byte(int32_t head_size, int32_t slot, int32_t dim) {
    return Low::k_byte(head_size, slot, dim);
  }
  static INT8KV_HD constexpr int32_t v_byte(int32_t block_size, int32_t slot, int32_t dim) {
    return Low::v_byte(block_size, slot, dim);
  }

  // A code, given the first byte of its planes.
  static INT8KV_HD int32_t load_k(const int8_t* codes, int32_t block_size, int32_t head_size,
                                  int32_t slot, int32_t dim) {
    int32_t code = codes[Low::k_byte(head_size, slot, dim)] >> Low::k_shift(dim) & Low::kMask;
    if constexpr (kBits > kLowBits) {
      const int8_t* high = codes + Low::k_bytes(block_size, head_size);
      code |= (high[High::k_byte(head_size, slot, dim)] >> High::k_shift(dim) & High::kMask)
              << kLowBits;
    }
    return code;
  }
  static INT8KV_HD int32_t load_v(const int8_t* codes, int32_t block_size, int32_t head_size,
                                  int32_t slot, int32_t dim) {
    int32_t code = codes[Low::v_byte(block_size, slot, dim)] >> Low::v_shift(dim) & Low::kMask;
    if constexpr (kBits > kLowBits) {
      const int8_t* high = codes + Low::v_bytes(block_size, head_size);
      code |= (high[High::v_byte(block_size, slot, dim)] >> High::v_shift(dim) & High::kMask)
              << kLowBits;
    }
    return code;
  }
};

// One signed byte per code. A line of 32 bytes holds two steps of a dot product for 16 outputs,
// which is one 16-bit multiply-add of AVX-512 and one pair of fragment registers of a tensor core:
//
//   K codes  [block_size / 16][head_size / 2][16 slots][2 dims]
//   V codes  [head_size / 16][block_size / 2][16 dims][2 slots]
template <>
struct Codes<8> {
  static constexpr int kBits = 8;
  static constexpr bool kHasMidpoint = false;
  static constexpr float kMax = 127.0f;  // -128 is unused, so that negation stays exact
  static constexpr int kLineBytes = int8kv::kLineBytes;
  static constexpr int kScaleBytes = 2;  // bf16
  static constexpr int kParamBytes = 2;

  // Bytes of `count` codes, a multiple of a line's.
  static INT8KV_HD constexpr int32_t bytes(int32_t count) { return count; }
  static INT8KV_HD constexpr int32_t k_bytes(int32_t block_size, int32_t head_size) {
    return block_size * head_size;
  }
  static INT8KV_HD constexpr int32_t v_bytes(int32_t block_size, int32_t head_size) {
    return block_size * head_size;
  }

  // Byte of a code within its plane.
  static INT8KV_HD constexpr int32_t k_byte(int32_t head_size, int32_t slot, int32_t dim) {
    return slot / kSlotGroup * head_size * kSlotGroup + dim / 2 * kLineBytes +
           slot % kSlotGroup * 2 + dim % 2;
  }
  static INT8KV_HD constexpr int32_t v_byte(int32_t block_size, int32_t slot, int32_t dim) {
    return dim / kDimGroup * block_size * kDimGroup + slot / 2 * kLineBytes + dim % kDimGroup * 2 +
           slot % 2;
  }

  // A code, given the first byte of its plane.
  static INT8KV_HD int32_t load_k(const int8_t* codes, int32_t, int32_t head_size, int32_t slot,
                                  int32_t dim) {
    return codes[k_byte(head_size, slot, dim)];
  }
  static INT8KV_HD int32_t load_v(const int8_t* codes, int32_t block_size, int32_t, int32_t slot,
                                  int32_t dim) {
    return codes[v_byte(block_size, slot, dim)];
  }
};

}  // namespace int8kv
