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

// Codes [num_rows, block_size] of channels, class by class, within a class in the order of the
// channels. Those of the last class are low bytes; their high bytes lie apart.
struct ClassRows {
  const int8_t* codes;
  const int8_t* high_bytes;
  const uint8_t* classes;  // [num_channels]
  const int16_t* means;    // [num_channels], which codes are differences to
  int64_t next[256];       // the row of the next channel of every class
  int32_t last_class;
};

struct ChannelKernels {
  // The channels of the first block become their codes plus their means.
  void (*restore_short)(const Channels<int16_t>&, ClassRows);
  void (*restore_long)(const Channels<int32_t>&, ClassRows);
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
