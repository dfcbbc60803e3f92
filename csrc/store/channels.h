// Integers of blocks, channel by channel, on their way from a file of the store to the cache: what
// channels.cpp offers to the operators, and the loops of simd/channels.cpp, compiled once per
// instruction set. All run on the calling thread, which is one of the store's own.
#pragma once

#include "cpu/kernels.h"

namespace int8kv::cpu {

// Integers [num_blocks, num_channels, block_size]: the tokens of a channel lie side by side.
template <typename T>
struct Channels {
  T* data;
  int64_t block_stride;  // elements
  int64_t num_blocks;
  int32_t num_channels;
  int32_t block_size;

  T* row(int64_t block, int64_t channel) const {
    return data + block * block_stride + channel * block_size;
  }
};

// A plane of codes of K or V, see codes.h, of whole KV heads of head_size channels.
struct CodePlane {
  int8_t* data;
  int64_t block_stride;
  int64_t head_stride;
  int32_t head_size;
  int32_t bits;   // of a field: 8, 4, 2 or 1
  int32_t shift;  // lowest bit of a code that this plane holds
  bool of_values;
};

struct ChannelKernels {
  // A channel of the first block becomes the next row of the codes [num_rows, block_size] of its
  // class, whose rows begin at next_rows[class], plus its mean; those of class num_classes have
  // none.
  void (*restore_short)(const Channels<int16_t>&, const int8_t* codes, const uint8_t* classes,
                        const int16_t* means, int64_t* next_rows, int32_t num_classes);
  void (*restore_long)(const Channels<int32_t>&, const int8_t* codes, const uint8_t* classes,
                       const int16_t* means, int64_t* next_rows, int32_t num_classes);
  // out[block][token][channel] = integer * steps[block * steps_stride + token].
  void (*dequantize_short)(const Channels<const int16_t>&, const float* steps, int64_t steps_stride,
                           float* out);
  void (*dequantize_long)(const Channels<const int32_t>&, const float* steps, int64_t steps_stride,
                          float* out);
  void (*pack_codes)(const Channels<const int16_t>&, const CodePlane&);
};

// Those of the instruction set in use.
const ChannelKernels& channel_kernels();

}  // namespace int8kv::cpu
