// Conversions of one fp16 number on the host, for code that has no vectors: GCC 11 has no _Float16
// on x86. vectors.h has the same for sixteen lanes.
#pragma once

#include <cmath>

#include "format/quantizer.h"

namespace int8kv {

// 2^112 moves the exponent's bias from 15 to 127 and makes subnormals normal.
INT8KV_HD float half_to_float(uint16_t half) {
  const uint32_t rest = half & 0x7fffu, sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const float magnitude = bits_to_float(rest << 13) * 5.192296858534828e33f;
  const uint32_t special = 0x7f800000u | (rest & 0x3ffu) << 13;
  return bits_to_float(sign | (rest >= 0x7c00u ? special : float_bits(magnitude)));
}

// Rounded half to even.
INT8KV_HD uint16_t float_to_half(float x) {
  const uint32_t bits = float_bits(x), abs_bits = bits & 0x7fffffffu;
  const uint32_t sign = (bits & 0x80000000u) >> 16;
  const float magnitude = std::fabs(x);
  // Normal: rebias and round on the 13 dropped bits. Subnormal: adding 0.5 leaves the result,
  // rounded, in the low bits.
  const uint32_t normal = (abs_bits - (112u << 23) + 0xfffu + ((abs_bits >> 13) & 1u)) >> 13;
  const uint32_t tiny = float_bits(magnitude + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 6.103515625e-05f ? tiny : normal;
  half = magnitude < 65520.0f ? half : 0x7c00u;
  half = abs_bits > 0x7f800000u ? 0x7e00u : half;
  return static_cast<uint16_t>(half | sign);
}

}  // namespace int8kv
