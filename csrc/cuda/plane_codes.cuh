// What a single thread reads from and writes to the planes of the cache: two neighbouring codes at
// a time, since two lie in one word, and scales. The addresses come from KVCache's methods, or from
// the trait of the plane where codes are gathered in shared memory.
#pragma once

#include "cuda/ptx.cuh"
#include "format/quantizer.h"

namespace int8kv {

template <typename C>
struct PlaneCodes;

template <>
struct PlaneCodes<Codes<8>> {
  // K codes of an even dim and the next, of one slot; `codes` is the byte of the first.
  static INT8KV_DEVICE float2 k_dims(const int8_t* codes) { return two_bytes(codes); }
  static INT8KV_DEVICE void store_k_dims(int8_t* codes, int8_t first, int8_t second) {
    *reinterpret_cast<uint16_t*>(codes) = static_cast<uint16_t>(
        static_cast<uint8_t>(first) | static_cast<uint32_t>(static_cast<uint8_t>(second)) << 8);
  }

  // V codes of an even slot and the next, of one dim; `codes` is the byte of the first.
  static INT8KV_DEVICE float2 v_slots(const int8_t* codes) { return two_bytes(codes); }

  // V codes of an even dim and the next, of one slot. `codes` is the byte of the even slot, `slot`
  // or the one before it: the four bytes from there on are both dims of both slots.
  static INT8KV_DEVICE float2 v_dims(const int8_t* codes, int slot) {
    const uint32_t own = *reinterpret_cast<const uint32_t*>(codes) >> (slot % 2 * 8);
    return make_float2(static_cast<int8_t>(own & 0xffu), static_cast<int8_t>(own >> 16 & 0xffu));
  }
  // `codes` is the byte of the slot itself.
  static INT8KV_DEVICE void store_v_dims(int8_t* codes, int8_t first, int8_t second) {
    codes[0] = first;
    codes[2] = second;
  }

  static INT8KV_DEVICE float scale(const int8_t* scale_byte) {
    return bf16_bits_to_float(*reinterpret_cast<const uint16_t*>(scale_byte));
  }
  static INT8KV_DEVICE void store_scale(int8_t* scale_byte, uint16_t scale_bits) {
    *reinterpret_cast<uint16_t*>(scale_byte) = scale_bits;
  }

 private:
  static INT8KV_DEVICE float2 two_bytes(const int8_t* codes) {
    const uint16_t two = *reinterpret_cast<const uint16_t*>(codes);
    return make_float2(static_cast<int8_t>(two & 0xff), static_cast<int8_t>(two >> 8));
  }
};

}  // namespace int8kv
