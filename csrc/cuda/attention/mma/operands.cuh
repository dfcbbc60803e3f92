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

// Below 8 bits an operand is 2 * code - levels: twice the code less half the levels, an odd number
// that fp16 holds exactly and that is as often negative as positive. 0x6400 | 2 * code is 1024 +
// 2 * code, and comes of a code in bits 1 and up of its byte.
template <typename C>
struct DoubledCodes {
  static constexpr int kLowest = 1;
  static constexpr uint32_t kLowMask = C::Low::kMask * (0x01010101u << kLowest);
  static constexpr int kHighest = kLowest + C::kLowBits;

  // Four doubled codes of words of the planes, of the fields that begin at these bits.
  static INT8KV_DEVICE uint32_t make(uint32_t low, int low_shift, [[maybe_unused]] uint32_t high,
                                     [[maybe_unused]] int high_shift) {
    uint32_t doubled = rotate_right(low, low_shift - kLowest) & kLowMask;
    if constexpr (C::kBits > C::kLowBits) {
      constexpr uint32_t kHighMask = C::High::kMask * (0x01010101u << kHighest);
      doubled |= rotate_right(high, high_shift - kHighest) & kHighMask;
    }
    return doubled;
  }

  // As fp16 pairs: `first` of the lower two, `last` of the upper two.
  static INT8KV_DEVICE void convert(uint32_t doubled, uint32_t& first, uint32_t& last) {
    constexpr uint32_t kBias = (0x6400u | C::kLevels) * 0x10001u;
    first = sub_half2(byte_permute(doubled, 0x64646464u, 0x4140), kBias);
    last = sub_half2(byte_permute(doubled, 0x64646464u, 0x4342), kBias);
  }

 private:
  // Bits that leave on one side come back on the other, where the masks have none.
  static INT8KV_DEVICE uint32_t rotate_right(uint32_t x, int bits) {
    return x >> (bits & 31) | x << (-bits & 31);
  }
};

INT8KV_DEVICE uint4 vector_at(const unsigned char* vector) {
  return *reinterpret_cast<const uint4*>(vector);
}

// A lane's codes of one step of the products, 16 dims of K or 16 slots of V, for four row tiles.
template <typename C>
struct KOperand {
  using Spans = KSpans<C>;
  uint4 low, high;  // fields of the first and of the last 8 of the 16
  int step;

  // Step `step` of the tile span of K that begins at byte `base` of the ring.
  static INT8KV_DEVICE KOperand load(const unsigned char* ring, int base, int lane, int step) {
    const uint4 low = vector_at(ring + (base + Spans::Low::vector_byte(lane, 2 * step)));
    uint4 high = {};
    if constexpr (Spans::kHasHigh) {
      high =
          vector_at(ring + (base + Spans::Low::kBytes + Spans::High::vector_byte(lane, 2 * step)));
    }
    return {low, high, step};
  }

  // The first operand of mma_m16n8k16() for a row tile.
  INT8KV_DEVICE void to_half2(int row_tile, uint32_t (&a)[4]) const {
    DoubledCodes<C>::convert(half(row_tile, 2 * step), a[0], a[1]);
    DoubledCodes<C>::convert(half(row_tile, 2 * step + 1), a[2], a[3]);
  }

 private:
  INT8KV_DEVICE uint32_t half(int row_tile, int i) const {
    int high_shift = 0;
    if constexpr (Spans::kHasHigh) high_shift = Spans::High::shift(i);
    return DoubledCodes<C>::make(word_of(low, row_tile), Spans::Low::shift(i),
                                 word_of(high, row_tile), high_shift);
  }
};

template <typename C>
struct VOperand {
  using Spans = VSpans<C>;
  uint4 low[2], high[2];  // the first and the last 8 of the 16
  int low_shift, high_shift;

  static INT8KV_DEVICE VOperand load(const unsigned char* ring, int base, int lane, int span,
                                     int step) {
    VOperand codes = {};
    codes.low_shift = Spans::Low::shift(span, lane);
    if constexpr (Spans::kHasHigh) codes.high_shift = Spans::High::shift(span, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = 2 * step + half;
      codes.low[half] = vector_at(ring + (base + Spans::Low::vector_byte(lane, i)));
      if constexpr (Spans::kHasHigh) {
        codes.high[half] =
            vector_at(ring + (base + Spans::Low::kBytes + Spans::High::vector_byte(lane, i)));
      }
    }
    return codes;
  }

  INT8KV_DEVICE void to_half2(int row_tile, uint32_t (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t doubled = DoubledCodes<C>::make(word_of(low[half], row_tile), low_shift,
                                                     word_of(high[half], row_tile), high_shift);
      DoubledCodes<C>::convert(doubled, a[2 * half], a[2 * half + 1]);
    }
  }
};

// The same with 8 bits, of K and of V: a vector of codes for the first and the last 8 each.
struct Int8Operand {
  uint4 first, second;  // a word of each per row tile

  // Step `step` of the tile span of K or V that begins at byte `base` of the ring. The bytes are
  // added before the pointer: the other way round takes up to 6 registers more.
  template <typename TileSpan>
  static INT8KV_DEVICE Int8Operand load_vectors(const unsigned char* ring, int base, int lane,
                                                int step) {
    return {vector_at(ring + (base + TileSpan::vector_byte(lane, 2 * step))),
            vector_at(ring + (base + TileSpan::vector_byte(lane, 2 * step + 1)))};
  }

  // The first operand of mma_m16n8k16() for a row tile.
  INT8KV_DEVICE void to_half2(int row_tile, uint32_t (&a)[4]) const {
    convert(word_of(first, row_tile), a[0], a[1]);
    convert(word_of(second, row_tile), a[2], a[3]);
  }

 private:
  // Four codes of two outputs: low gets the first two, high the last two, as fp16 pairs.
  static INT8KV_DEVICE void convert(uint32_t codes, uint32_t& low, uint32_t& high) {
    constexpr uint32_t kBias = 0x64806480u;  // 1152, twice
    const uint32_t biased = codes ^ 0x80808080u;
    low = sub_half2(byte_permute(biased, 0x64646464u, 0x4140), kBias);
    high = sub_half2(byte_permute(biased, 0x64646464u, 0x4342), kBias);
  }
};

template <>
struct KOperand<Codes<8>> : Int8Operand {
  static INT8KV_DEVICE KOperand load(const unsigned char* ring, int base, int lane, int step) {
    return {load_vectors<KTileSpan<Codes<8>>>(ring, base, lane, step)};
  }
};
template <>
struct VOperand<Codes<8>> : Int8Operand {
  static INT8KV_DEVICE VOperand load(const unsigned char* ring, int base, int lane, int, int step) {
    return {load_vectors<VTileSpan<Codes<8>>>(ring, base, lane, step)};
  }
};

}  // namespace int8kv
