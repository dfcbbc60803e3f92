// One element and one 16-byte vector of the two directions, for the kernels of the ladder.
//
// Quantize and Dequantize have the same members, so each rung is written once. kBytes is the size
// of a floating-point element; fp16 and bf16 share the code and differ by a branch that no warp
// splits.
#pragma once

#include "cuda/elements.cuh"
#include "ladder/params.h"

namespace int8kv {

// The elements of 16 bytes.
template <int kBytes>
INT8KV_DEVICE void unpack(const uint4& vector, DType dtype, float (&x)[16 / kBytes]) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kBytes == 4) {
      x[i] = bits_to_float(words[i]);
    } else if (dtype == DType::kBFloat16) {
      x[2 * i] = bits_to_float(words[i] << 16);
      x[2 * i + 1] = bits_to_float(words[i] & 0xffff0000u);
    } else {
      x[2 * i] = half_bits_to_float(static_cast<uint16_t>(words[i] & 0xffffu));
      x[2 * i + 1] = half_bits_to_float(static_cast<uint16_t>(words[i] >> 16));
    }
  }
}

// The codes that belong to 16 bytes of elements: 4 or 8.
template <int kBytes>
struct alignas(16 / kBytes) CodeVector {
  uint32_t words[4 / kBytes];
};

template <int kBytes_>
struct Quantize {
  using Params = QuantizePerChannelParams;
  using Value = float;   // as loaded
  using Vector = uint4;  // kVector values as loaded
  static constexpr int kBytes = kBytes_;
  static constexpr int kVector = 16 / kBytes;

  static INT8KV_DEVICE Value load(const Params& p, int64_t token, int64_t channel) {
    return load_element<kBytes>(p.x, token * p.x_token_stride + channel, p.dtype);
  }
  static INT8KV_DEVICE void store(const Params& p, int64_t token, int64_t channel, Value x,
                                  float scale) {
    p.codes[token * p.num_channels + channel] = quantize_saturated(x, scale);
  }
  static INT8KV_DEVICE const Vector* vector_at(const Params& p, int64_t token, int64_t channel) {
    return reinterpret_cast<const Vector*>(static_cast<const char*>(p.x) +
                                           (token * p.x_token_stride + channel) * kBytes);
  }
  static INT8KV_DEVICE CodeVector<kBytes> convert(const Params& p, const Vector& vector,
                                                  const float (&scales)[kVector]) {
    float x[kVector];
    unpack<kBytes>(vector, p.dtype, x);
    CodeVector<kBytes> codes{};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const auto code = static_cast<uint8_t>(quantize_saturated(x[i], scales[i]));
      codes.words[i / 4] |= static_cast<uint32_t>(code) << (8 * (i % 4));
    }
    return codes;
  }
  static INT8KV_DEVICE CodeVector<kBytes>* result_at(const Params& p, int64_t token,
                                                     int64_t channel) {
    return reinterpret_cast<CodeVector<kBytes>*>(p.codes + token * p.num_channels + channel);
  }
};

template <int kBytes_>
struct Dequantize {
  using Params = DequantizePerChannelParams;
  using Value = int8_t;
  using Vector = CodeVector<kBytes_>;
  static constexpr int kBytes = kBytes_;
  static constexpr int kVector = 16 / kBytes;

  static INT8KV_DEVICE Value load(const Params& p, int64_t token, int64_t channel) {
    return p.codes[token * p.num_channels + channel];
  }
  static INT8KV_DEVICE void store(const Params& p, int64_t token, int64_t channel, Value code,
                                  float scale) {
    const int64_t i = token * p.num_channels + channel;
    if constexpr (kBytes == 4) {
      static_cast<float*>(p.x)[i] = code * scale;
    } else {
      static_cast<uint16_t*>(p.x)[i] = to_16_bits(code * scale, p.dtype);
    }
  }
  static INT8KV_DEVICE const Vector* vector_at(const Params& p, int64_t token, int64_t channel) {
    return reinterpret_cast<const Vector*>(p.codes + token * p.num_channels + channel);
  }
  static INT8KV_DEVICE uint4 convert(const Params& p, const Vector& codes,
                                     const float (&scales)[kVector]) {
    uint32_t bits[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const auto code = static_cast<int8_t>(codes.words[i / 4] >> (8 * (i % 4)));
      const float x = code * scales[i];
      bits[i] = kBytes == 4 ? float_bits(x) : to_16_bits(x, p.dtype);
    }
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = kBytes == 4 ? bits[i] : bits[2 * i % kVector] | bits[(2 * i + 1) % kVector] << 16;
    }
    return {words[0], words[1], words[2], words[3]};
  }
  static INT8KV_DEVICE uint4* result_at(const Params& p, int64_t token, int64_t channel) {
    return reinterpret_cast<uint4*>(static_cast<char*>(p.x) +
                                    (token * p.num_channels + channel) * kBytes);
  }
};

}  // namespace int8kv
