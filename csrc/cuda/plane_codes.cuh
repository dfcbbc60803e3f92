// What a single thread reads from the planes of the cache: two neighbouring codes at a time, since
// two lie in one word, and scales. The addresses come from KVCache's methods.
#pragma once

#include "cuda/ptx.cuh"
#include "format/quantizer.h"

namespace int8kv {

// Codes below 8 bits, less half the levels.
template <typename C>
struct PlaneCodes {
  // K codes of an even dim and the next, of one slot; `codes` is the byte of its first in the lower
  // plane.
  static INT8KV_DEVICE float2 k_dims(const int8_t* codes, const int8_t* chunk, const KVCache& cache,
                                     int slot, int dim) {
    uint32_t two =
        word(codes + C::Low::k_byte(cache.head_size, 0, dim)) >> C::Low::k_shift(dim) & kLowMask;
    if constexpr (C::kBits > C::kLowBits) {
      const int8_t* high = chunk + C::Low::k_bytes(cache.block_size, cache.head_size) +
                           C::High::k_byte(cache.head_size, slot, dim);
      two |= (word(high) >> C::High::k_shift(dim) & kHighMask) << C::kLowBits;
    }
    return centered(two);
  }

  // V codes of an even slot and the next, of one dim; `v_codes` is the first byte of the planes.
  static INT8KV_DEVICE float2 v_slots(const int8_t* chunk, int32_t v_codes, const KVCache& cache,
                                      int slot, int dim) {
    const int8_t* codes = chunk + v_codes;
    uint32_t two =
        word(codes + C::Low::v_byte(cache.block_size, slot, dim)) >> C::Low::v_shift(dim) &
        kLowMask;
    if constexpr (C::kBits > C::kLowBits) {
      const int8_t* high = codes + C::Low::v_bytes(cache.block_size, cache.head_size);
      two |= (word(high + C::High::v_byte(cache.block_size, slot, dim)) >> C::High::v_shift(dim) &
              kHighMask)
             << C::kLowBits;
    }
    return centered(two);
  }

  static INT8KV_DEVICE float scale(const int8_t* scale_byte) {
    return bf16_bits_to_float(word(scale_byte));
  }

 private:
  static constexpr uint32_t kLowMask = C::Low::kMask * 0x101u;
  static constexpr uint32_t kHighMask = ((1u << (C::kBits - C::kLowBits)) - 1) * 0x101u;

  static INT8KV_DEVICE uint32_t word(const int8_t* byte) {
    return *reinterpret_cast<const uint16_t*>(byte);
  }
  static INT8KV_DEVICE float2 centered(uint32_t two) {
    constexpr float kMiddle = C::kLevels * 0.5f;
    return make_float2(static_cast<float>(two & 0xffu) - kMiddle,
                       static_cast<float>(two >> 8) - kMiddle);
  }
};

template <>
struct PlaneCodes<Codes<8>> {
  static INT8KV_DEVICE float2 v_slots(const int8_t* chunk, int32_t v_codes, const KVCache& cache,
                                      int slot, int dim) {
    return two_bytes(chunk + (v_codes + Codes<8>::v_byte(cache.block_size, slot, dim)));
  }

  // K codes of an even dim and the next, of one slot; `codes` is the byte of the first.
  static INT8KV_DEVICE float2 k_dims(const int8_t* codes) { return two_bytes(codes); }

  static INT8KV_DEVICE float scale(const int8_t* scale_byte) {
    return bf16_bits_to_float(*reinterpret_cast<const uint16_t*>(scale_byte));
  }

 private:
  static INT8KV_DEVICE float2 two_bytes(const int8_t* codes) {
    const uint16_t two = *reinterpret_cast<const uint16_t*>(codes);
    return make_float2(static_cast<int8_t>(two & 0xff), static_cast<int8_t>(two >> 8));
  }
};

}  // namespace int8kv
