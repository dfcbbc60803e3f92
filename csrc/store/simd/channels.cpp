// Loops on the channels of blocks. Compiled once per instruction set.
//
// A channel is a row; floats and lines of the cache want tokens, or pairs of them, as rows. Tiles
// of sixteen by sixteen are transposed in registers, so that every cache line is written at once.
#include "store/channels.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/simd/vectors.h"
#include "store/simd/planes.h"

namespace int8kv::cpu::INT8KV_ISA {

namespace {

INT8KV_INLINE f32x16 load_integers(const int32_t* from) { return to_floats(load<i32x16>(from)); }
INT8KV_INLINE f32x16 load_integers(const int16_t* from) {
  return to_floats(as<i32x16>(widen(load<u16x16>(from))) << 16 >> 16);
}
INT8KV_INLINE void store_integers(int32_t* to, f32x16 x) { store(to, to_ints(x)); }
INT8KV_INLINE void store_integers(int16_t* to, f32x16 x) { store(to, narrow_to_16(to_ints(x))); }

template <typename T>
void measure(const Channels<const T>& from, float* out) {
  const int32_t width = from.num_channels, size = from.block_size;
  const int32_t tiled_size = size / kLanes * kLanes;
  for (int64_t block = 0; block < from.num_blocks; ++block, out += 3 * width) {
    for (int32_t c = 0; c < width; ++c) {
      const T* row = from.row(block, c);
      f32x16 sums{}, squares{}, magnitudes{};
      for (int32_t t = 0; t < tiled_size; t += kLanes) sums += load_integers(row + t);
      float sum = reduce_add(sums);
      for (int32_t t = tiled_size; t < size; ++t) sum += static_cast<float>(row[t]);
      const float mean = sum / static_cast<float>(size);
      for (int32_t t = 0; t < tiled_size; t += kLanes) {
        const f32x16 rest = load_integers(row + t) - mean;
        squares += rest * rest;
        magnitudes = max(magnitudes, abs(rest));
      }
      float square = reduce_add(squares), largest = reduce_max(magnitudes);
      for (int32_t t = tiled_size; t < size; ++t) {
        const float rest = static_cast<float>(row[t]) - mean;
        square += rest * rest;
        largest = std::max(largest, std::fabs(rest));
      }
      out[c] = mean;
      out[width + c] = square / static_cast<float>(size);
      out[2 * width + c] = largest;
    }
  }
}

// Differences are floats here: those that are not exact are far beyond every limit.
template <typename T>
void split(const Channels<const T>& from, int32_t max_wide, ClassRows<int8_t> rows) {
  const int32_t size = from.block_size, tiled_size = size / kLanes * kLanes;
  int8_t* high = rows.high_bytes;
  const auto limited = [](float rest, int32_t limit) {
    return std::fabs(rest) > static_cast<float>(limit) ? kEscape : static_cast<int32_t>(rest);
  };
  for (int32_t c = 0; c < from.num_channels; ++c) {
    int8_t* to = rows.codes + rows.next[rows.classes[c]]++ * size;
    const auto mean = static_cast<float>(rows.means[c]);
    const T* row = from.row(0, c);
    if (rows.is_last(c)) {
      for (int32_t t = 0; t < size; ++t) {
        const int32_t rest = limited(static_cast<float>(row[t]) - mean, max_wide);
        to[t] = static_cast<int8_t>(rest);
        high[t] = static_cast<int8_t>((rest - to[t]) >> 8);
      }
      high += size;
      continue;
    }
    for (int32_t t = 0; t < tiled_size; t += kLanes) {
      const f32x16 rest = load_integers(row + t) - mean;
      const auto escape = splat(kEscape);
      const auto codes = narrow_to_8(to_ints(select(less(splat(127), abs(rest)), escape, rest)));
      std::memcpy(to + t, &codes, sizeof(codes));
    }
    for (int32_t t = tiled_size; t < size; ++t) {
      to[t] = static_cast<int8_t>(limited(static_cast<float>(row[t]) - mean, 127));
    }
  }
}

template <typename T>
void restore(const Channels<T>& to, ClassRows<const int8_t> rows) {
  typedef T Integers __attribute__((vector_size(kLanes * sizeof(T))));
  const int32_t size = to.block_size, tiled_size = size / kLanes * kLanes;
  const int8_t* high = rows.high_bytes;
  for (int32_t c = 0; c < to.num_channels; ++c) {
    const int8_t* from = rows.codes + rows.next[rows.classes[c]]++ * size;
    const T mean = rows.means[c];
    T* row = to.row(0, c);
    for (int32_t t = 0; t < tiled_size; t += kLanes) {
      i8x16 codes;
      std::memcpy(&codes, from + t, sizeof(codes));
      const Integers integers = __builtin_convertvector(codes, Integers) + mean;
      std::memcpy(row + t, &integers, sizeof(integers));
    }
    for (int32_t t = tiled_size; t < size; ++t) row[t] = static_cast<T>(from[t] + mean);
    if (rows.is_last(c)) {
      for (int32_t t = 0; t < size; ++t) row[t] = static_cast<T>(row[t] + high[t] * 256);
      high += size;
    }
  }
}

// The largest float that is an integer of T.
template <typename T>
constexpr float kLargest = sizeof(T) == 2 ? 32767.0f : 2147483520.0f;

// Round half to even, as round_even(), however large x is: from 2^23 on there is nothing to round.
INT8KV_INLINE f32x16 round_any(f32x16 x) {
  constexpr float kWhole = 8388608.0f;
  const f32x16 magnitude = abs(x), rounded = (magnitude + kWhole) - kWhole;
  const u32x16 sign = as<u32x16>(x) & 0x80000000u;
  return select(less(magnitude, splat(kWhole)), as<f32x16>(as<u32x16>(rounded) | sign), x);
}

template <typename T>
void quantize(const Channels<T>& to, const float* steps, int64_t steps_stride,
              const float* vectors) {
  const int32_t width = to.num_channels, size = to.block_size;
  const int32_t tiled_width = width / kLanes * kLanes, tiled_size = size / kLanes * kLanes;
  const f32x16 limit = splat(kLargest<T>);
  for (int64_t block = 0; block < to.num_blocks; ++block) {
    const float* own_steps = steps + block * steps_stride;
    const float* own = vectors + block * size * width;
    for (int32_t c = 0; c < tiled_width; c += kLanes) {
      for (int32_t t = 0; t < tiled_size; t += kLanes) {
        const f32x16 step = load<f32x16>(own_steps + t);
        f32x16 rows[kLanes];
        for (int i = 0; i < kLanes; ++i) rows[i] = load<f32x16>(own + (t + i) * width + c);
        transpose(rows);
        for (int i = 0; i < kLanes; ++i) {
          const f32x16 rounded = round_any(rows[i] / step);
          store_integers(to.row(block, c + i) + t, max(-limit, min(limit, rounded)));
        }
      }
    }
    for (int32_t t = 0; t < size; ++t) {
      for (int32_t c = t < tiled_size ? tiled_width : 0; c < width; ++c) {
        const float rounded = std::nearbyint(own[t * width + c] / own_steps[t]);
        to.row(block, c)[t] = static_cast<T>(std::clamp(rounded, -kLargest<T>, kLargest<T>));
      }
    }
  }
}

template <typename T>
void dequantize(const Channels<const T>& from, const float* steps, int64_t steps_stride,
                float* vectors) {
  const int32_t width = from.num_channels, size = from.block_size;
  const int32_t tiled_width = width / kLanes * kLanes, tiled_size = size / kLanes * kLanes;
  for (int64_t block = 0; block < from.num_blocks; ++block) {
    const float* own_steps = steps + block * steps_stride;
    float* own = vectors + block * size * width;
    for (int32_t c = 0; c < tiled_width; c += kLanes) {
      for (int32_t t = 0; t < tiled_size; t += kLanes) {
        const f32x16 step = load<f32x16>(own_steps + t);
        f32x16 rows[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          rows[i] = load_integers(from.row(block, c + i) + t) * step;
        }
        transpose(rows);
        for (int i = 0; i < kLanes; ++i) store(own + (t + i) * width + c, rows[i]);
      }
    }
    for (int32_t t = 0; t < size; ++t) {
      for (int32_t c = t < tiled_size ? tiled_width : 0; c < width; ++c) {
        own[t * width + c] = static_cast<float>(from.row(block, c)[t]) * own_steps[t];
      }
    }
  }
}

template <typename T>
constexpr IntegerKernels<T> kIntegerKernels{measure<T>, split<T>, restore<T>, quantize<T>,
                                            dequantize<T>};

}  // namespace

const ChannelKernels& channel_kernels() {
  static constexpr ChannelKernels kernels{kIntegerKernels<int16_t>, kIntegerKernels<int32_t>,
                                          pack_codes, unpack_codes};
  return kernels;
}

}  // namespace int8kv::cpu::INT8KV_ISA
