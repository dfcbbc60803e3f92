// What the per-channel quantization of arXiv 2601.04719 is called with, and its rungs from plain to
// fast: simd/quantize_per_channel.cpp and quantize_per_channel.cu. Serving never calls it.
#pragma once

#include <cstdint>

#include "format/params.h"

namespace int8kv {

enum class CpuVariant : int32_t { kColumnStrided, kRowMajor, kTiled, kSimd, kVectorized };
enum class CudaVariant : int32_t { kNaive, kTiled, kCoarsened, kVectorized, kFused };

struct QuantizePerChannelParams {
  const void* x;           // [num_tokens, num_channels], last stride 1
  int64_t x_token_stride;  // elements
  int8_t* codes;           // [num_tokens, num_channels] contiguous
  float* scales;           // [num_channels]
  int64_t num_tokens;
  int64_t num_channels;
  DType dtype;          // of x
  bool compute_scales;  // write scales from x first; else they are read as they are
};

struct DequantizePerChannelParams {
  const int8_t* codes;  // [num_tokens, num_channels] contiguous
  const float* scales;  // [num_channels]
  void* x;              // [num_tokens, num_channels] contiguous
  int64_t num_tokens;
  int64_t num_channels;
  DType dtype;  // of x
};

}  // namespace int8kv
