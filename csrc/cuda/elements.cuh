// Elements of fp32, fp16 and bf16 tensors, one or two at a time.
#pragma once

#include "cuda/ptx.cuh"
#include "format/params.h"
#include "format/quantizer.h"

namespace int8kv {

template <int kBytes>
INT8KV_DEVICE float load_element(const void* x, int64_t i, DType dtype) {
  if constexpr (kBytes == 4) return static_cast<const float*>(x)[i];
  const uint16_t bits = static_cast<const uint16_t*>(x)[i];
  return dtype == DType::kFloat16 ? half_bits_to_float(bits) : bf16_bits_to_float(bits);
}

// Elements [index] and [index + 1]; one load where the address allows it.
INT8KV_DEVICE float2 load_pair(const void* base, int64_t index, DType dtype) {
  if (dtype == DType::kFloat32) {
    const float* x = static_cast<const float*>(base) + index;
    if (reinterpret_cast<uintptr_t>(x) % 8 == 0) return *reinterpret_cast<const float2*>(x);
    return make_float2(x[0], x[1]);
  }
  const uint16_t* x = static_cast<const uint16_t*>(base) + index;
  uint32_t bits;
  if (reinterpret_cast<uintptr_t>(x) % 4 == 0) {
    bits = *reinterpret_cast<const uint32_t*>(x);
  } else {
    bits = x[0] | static_cast<uint32_t>(x[1]) << 16;
  }
  if (dtype == DType::kBFloat16) {
    return make_float2(bits_to_float(bits << 16), bits_to_float(bits & 0xffff0000u));
  }
  return make_float2(half_bits_to_float(static_cast<uint16_t>(bits & 0xffffu)),
                     half_bits_to_float(static_cast<uint16_t>(bits >> 16)));
}

INT8KV_DEVICE uint16_t to_16_bits(float x, DType dtype) {
  return dtype == DType::kBFloat16 ? float_to_bf16_bits(x) : float_to_half_bits(x);
}

// The inverse of load_pair(); the values are finite.
INT8KV_DEVICE void store_pair(void* base, int64_t index, DType dtype, float first, float second) {
  if (dtype == DType::kFloat32) {
    float* x = static_cast<float*>(base) + index;
    if (reinterpret_cast<uintptr_t>(x) % 8 == 0) {
      *reinterpret_cast<float2*>(x) = make_float2(first, second);
    } else {
      x[0] = first;
      x[1] = second;
    }
    return;
  }
  uint16_t* x = static_cast<uint16_t*>(base) + index;
  const uint16_t low = to_16_bits(first, dtype), high = to_16_bits(second, dtype);
  if (reinterpret_cast<uintptr_t>(x) % 4 == 0) {
    *reinterpret_cast<uint32_t*>(x) = low | static_cast<uint32_t>(high) << 16;
  } else {
    x[0] = low;
    x[1] = high;
  }
}

}  // namespace int8kv
