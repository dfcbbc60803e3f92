// The ladder of per-channel quantization on CPU: what quantize_per_channel.cpp offers to the
// operators, and the loops of simd/quantize_per_channel.cpp, compiled once per instruction set.
#pragma once

#include "cpu/kernels.h"
#include "ladder/params.h"

namespace int8kv::cpu {

void quantize_per_channel(const QuantizePerChannelParams& params, CpuVariant variant,
                          const ParallelFor& pool);
void dequantize_per_channel(const DequantizePerChannelParams& params, CpuVariant variant,
                            const ParallelFor& pool);

// Every function handles the tokens [token_begin, token_end) on the calling thread.
struct PerChannelKernels {
  // amax[num_channels] becomes the largest sanitized magnitude per channel; 0 for no tokens.
  void (*channel_amax)(const QuantizePerChannelParams&, CpuVariant, int64_t token_begin,
                       int64_t token_end, float* amax);
  void (*quantize)(const QuantizePerChannelParams&, CpuVariant, int64_t token_begin,
                   int64_t token_end);
  void (*dequantize)(const DequantizePerChannelParams&, CpuVariant, int64_t token_begin,
                     int64_t token_end);
};

// Those of the instruction set in use.
const PerChannelKernels& per_channel_kernels();

}  // namespace int8kv::cpu
