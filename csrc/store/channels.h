// Integers of blocks, channel by channel, on their way between a file of the store and the cache:
// what channels.cpp offers to the operators, and the loops of simd/, compiled once per instruction
// set. All run on the calling thread, which is one of the store's own.
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
template <typename Byte>
struct CodePlane {
  Byte* data;
  int64_t block_stride;
  int64_t head_stride;
  int32_t head_size;
  int32_t bits;   // of a field: 8, 4, 2 or 1
  int32_t shift;  // lowest bit of a code that this plane holds
  bool of_values;
};

// Codes [num_rows, block_size] of channels, class by class, within a class in the order of the
// channels. Those of the last class are low bytes; their high bytes lie apart.
template <typename Byte>
struct ClassRows {
  Byte* codes;
  Byte* high_bytes;
  const uint8_t* classes;  // [num_channels]
  const int16_t* means;    // [num_channels], which codes are differences to
  int64_t next[256];       // the row of the next channel of every class
  int32_t last_class;

  bool is_last(int32_t channel) const { return classes[channel] == last_class; }
};

// In the place of a difference that is listed apart.
constexpr int32_t kEscape = -128;

template <typename T>
struct IntegerKernels {
  // Of every channel its mean, the mean square of the differences to it, and the largest of them:
  // out[block][3][channel].
  void (*measure)(const Channels<const T>&, float* out);
  // The channels of the first block become codes. Differences to the mean beyond 127, in the last
  // class beyond max_wide, become kEscape.
  void (*split)(const Channels<const T>&, int32_t max_wide, ClassRows<int8_t>);
  // The inverse.
  void (*restore)(const Channels<T>&, ClassRows<const int8_t>);
  // integer = vectors[block][token][channel] / steps[block * steps_stride + token], rounded half to
  // even and saturated.
  void (*quantize)(const Channels<T>&, const float* steps, int64_t steps_stride,
                   const float* vectors);
  // vectors[block][token][channel] = integer * steps[block * steps_stride + token].
  void (*dequantize)(const Channels<const T>&, const float* steps, int64_t steps_stride,
                     float* vectors);
};

struct ChannelKernels {
  IntegerKernels<int16_t> of_shorts;
  IntegerKernels<int32_t> of_longs;
  void (*pack_codes)(const Channels<const int16_t>&, const CodePlane<int8_t>&);
  // The inverse; bits above those of the plane become 0, or at 8 bits those of the sign, and those
  // below stay as they are.
  void (*unpack_codes)(const Channels<int16_t>&, const CodePlane<const int8_t>&);

  template <typename T>
  const IntegerKernels<T>& of() const {
    if constexpr (sizeof(T) == sizeof(int16_t)) {
      return of_shorts;
    } else {
      return of_longs;
    }
  }
};

// Those of the instruction set in use.
const ChannelKernels& channel_kernels();

}  // namespace int8kv::cpu
