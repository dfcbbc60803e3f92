// Loops on the channels of blocks. Compiled once per instruction set.
//
// A channel is a row; floats and lines of the cache want tokens, or pairs of them, as rows. Tiles
// of sixteen by sixteen are transposed in registers, so that every cache line is written at once.
#include "store/channels.h"

#include "cpu/simd/vectors.h"

namespace int8kv::cpu::INT8KV_ISA {

namespace {

constexpr int32_t kLineBytes = 2 * kLanes;

template <typename T>
void restore(const Channels<T>& to, ClassRows rows) {
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
    if (rows.classes[c] == rows.last_class) {
      for (int32_t t = 0; t < size; ++t) row[t] = static_cast<T>(row[t] + high[t] * 256);
      high += size;
    }
  }
}

INT8KV_INLINE i32x16 load_integers(const int32_t* from) { return load<i32x16>(from); }
INT8KV_INLINE i32x16 load_integers(const int16_t* from) {
  return as<i32x16>(widen(load<u16x16>(from))) << 16 >> 16;
}

template <typename T>
void dequantize(const Channels<const T>& from, const float* steps, int64_t steps_stride,
                float* out) {
  const int32_t width = from.num_channels, size = from.block_size;
  const int32_t tiled_width = width / kLanes * kLanes, tiled_size = size / kLanes * kLanes;
  for (int64_t block = 0; block < from.num_blocks; ++block) {
    const float* own_steps = steps + block * steps_stride;
    float* own = out + block * size * width;
    for (int32_t c = 0; c < tiled_width; c += kLanes) {
      for (int32_t t = 0; t < tiled_size; t += kLanes) {
        const f32x16 step = load<f32x16>(own_steps + t);
        f32x16 rows[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          rows[i] = to_floats(load_integers(from.row(block, c + i) + t)) * step;
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

constexpr int32_t kRunDims = 8;  // of K, that lie on top of the next eight

// The fields of a plane, which lie on top of each other: `codes_of(field)` has a code in each byte
// of a lane.
template <int kFields, typename V, typename CodesOf>
INT8KV_INLINE V join_fields(int32_t shift, V mask, const CodesOf& codes_of) {
  V joined{};
  unrolled<kFields>(
      [&](auto field) { joined |= (codes_of(field) >> shift & mask) << (field * (8 / kFields)); });
  return joined;
}

// [block_size / 16][head_size / (8 fields)][8 dims / 2][16 slots][2 dims]
template <int kFields>
void pack_k(const Channels<const int16_t>& from, const CodePlane& plane) {
  const int32_t head_size = plane.head_size, size = from.block_size;
  const u16x16 mask = u16x16{} + static_cast<uint16_t>(((1 << 8 / kFields) - 1) * 0x101);
  for (int64_t block = 0; block < from.num_blocks; ++block) {
    for (int32_t head = 0; head < from.num_channels / head_size; ++head) {
      const int16_t* rows = from.row(block, head * head_size);
      int8_t* line = plane.data + block * plane.block_stride + head * plane.head_stride;
      for (int32_t slot = 0; slot < size; slot += kLanes) {
        for (int32_t run = 0; run < head_size; run += kRunDims * kFields) {
          for (int32_t first = run; first < run + kRunDims; first += 2, line += kLineBytes) {
            const auto pairs = [&](int field) {
              const int32_t dim = first + field * kRunDims;
              if (dim >= head_size) return u16x16{};
              const int16_t* even = rows + dim * size + slot;
              return (load<u16x16>(even) & 0xff) | load<u16x16>(even + size) << 8;
            };
            store(line, join_fields<kFields>(plane.shift, mask, pairs));
          }
        }
      }
    }
  }
}

// Sixteen slots of a channel, or 32, which are as many pairs as there are lanes.
template <bool kWhole>
INT8KV_INLINE u32x16 load_slots(const int16_t* from) {
  if constexpr (kWhole) return load<u32x16>(from);
  alignas(64) int16_t slots[2 * kLanes] = {};
  std::memcpy(slots, from, sizeof(slots) / 2);
  return load<u32x16>(slots);
}

// Lines of V of 32 slots, or of the last sixteen.
template <int kFields, bool kWhole>
INT8KV_INLINE void pack_v_lines(const int16_t* rows, int32_t num_dims, int32_t size, int32_t shift,
                                int8_t* lines) {
  const u32x16 mask = u32x16{} + ((1u << 8 / kFields) - 1) * 0x101u;
  f32x16 tile[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const auto pairs = [&](int field) {
      const int32_t dim = i + field * kLanes;
      if (dim >= num_dims) return u32x16{};
      const u32x16 slots = load_slots<kWhole>(rows + dim * size);
      return (slots & 0xffu) | (slots >> 8 & 0xff00u);
    };
    tile[i] = as<f32x16>(join_fields<kFields>(shift, mask, pairs));
  }
  transpose(tile);
  for (int i = 0; i < (kWhole ? kLanes : kLanes / 2); ++i) {
    store(lines + i * kLineBytes, low_16(as<u32x16>(tile[i])));
  }
}

// [head_size / (16 fields)][block_size / 2][16 dims][2 slots]
template <int kFields>
void pack_v(const Channels<const int16_t>& from, const CodePlane& plane) {
  const int32_t head_size = plane.head_size, size = from.block_size;
  for (int64_t block = 0; block < from.num_blocks; ++block) {
    for (int32_t head = 0; head < from.num_channels / head_size; ++head) {
      int8_t* lines = plane.data + block * plane.block_stride + head * plane.head_stride;
      for (int32_t run = 0; run < head_size; run += kLanes * kFields, lines += size * kLanes) {
        const int16_t* rows = from.row(block, head * head_size + run);
        const int32_t num_dims = head_size - run;
        int32_t slot = 0;
        for (; slot + 2 * kLanes <= size; slot += 2 * kLanes) {
          pack_v_lines<kFields, true>(rows + slot, num_dims, size, plane.shift,
                                      lines + slot * kLanes);
        }
        if (slot < size) {
          pack_v_lines<kFields, false>(rows + slot, num_dims, size, plane.shift,
                                       lines + slot * kLanes);
        }
      }
    }
  }
}

// Calls f with the fields of a byte as a constant.
template <typename F>
void with_fields(int32_t bits, const F& f) {
  if (bits == 8) return f.template operator()<1>();
  if (bits == 4) return f.template operator()<2>();
  if (bits == 2) return f.template operator()<4>();
  f.template operator()<8>();
}

void pack_codes(const Channels<const int16_t>& from, const CodePlane& plane) {
  with_fields(plane.bits, [&]<int kFields>() {
    (plane.of_values ? pack_v<kFields> : pack_k<kFields>)(from, plane);
  });
}

}  // namespace

const ChannelKernels& channel_kernels() {
  static constexpr ChannelKernels kernels{restore<int16_t>, restore<int32_t>, dequantize<int16_t>,
                                          dequantize<int32_t>, pack_codes};
  return kernels;
}

}  // namespace int8kv::cpu::INT8KV_ISA
