// What a lane of the tensor-core kernel makes of the words of the cache: codes as fp16 operands,
// scales as fp32, and powers of two.
#pragma once

#include "cuda/attention/tile_maps.h"
#include "cuda/ptx.cuh"
#include "format/quantizer.h"

namespace int8kv {

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

// A lane's codes of one step of the products, 16 dims of K or 16 slots of V, for four row tiles.
template <typename C>
struct OperandCodes;

template <>
struct OperandCodes<Codes<8>> {
  uint4 first, second;  // the first and the last 8 of the 16; a word of each per row tile

  // Step `step` of the tile span of K or V that begins at byte `base` of the ring. The bytes are
  // added before the pointer: the other way round takes up to 6 registers more.
  template <typename TileSpan>
  static INT8KV_DEVICE OperandCodes load(const unsigned char* ring, int base, int lane, int step) {
    return {vector_at(ring + (base + TileSpan::vector_byte(lane, 2 * step))),
            vector_at(ring + (base + TileSpan::vector_byte(lane, 2 * step + 1)))};
  }

  // The first operand of mma_m16n8k16() for a row tile.
  INT8KV_DEVICE void to_half2(int row_tile, uint32_t (&a)[4]) const {
    convert(word_of(first, row_tile), a[0], a[1]);
    convert(word_of(second, row_tile), a[2], a[3]);
  }

 private:
  static INT8KV_DEVICE uint4 vector_at(const unsigned char* vector) {
    return *reinterpret_cast<const uint4*>(vector);
  }

  // Four codes of two outputs: low gets the first two, high the last two, as fp16 pairs.
  static INT8KV_DEVICE void convert(uint32_t codes, uint32_t& low, uint32_t& high) {
    constexpr uint32_t kBias = 0x64806480u;  // 1152, twice
    const uint32_t biased = codes ^ 0x80808080u;
    low = sub_half2(byte_permute(biased, 0x64646464u, 0x4140), kBias);
    high = sub_half2(byte_permute(biased, 0x64646464u, 0x4342), kBias);
  }
};

}  // namespace int8kv
