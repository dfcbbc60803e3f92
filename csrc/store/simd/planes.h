// Codes between channels, where the tokens of each lie side by side, and the planes of a chunk, see
// codes.h. Included by channels.cpp, once per instruction set.
#pragma once

#include "cpu/simd/vectors.h"
#include "store/channels.h"

namespace int8kv::cpu::INT8KV_ISA {

constexpr int32_t kLineBytes = 2 * kLanes;
constexpr int32_t kRunDims = 8;  // of K, that lie on top of the next eight

// A mask of the fields of kFields to a byte, in every byte of a lane.
template <int kFields, typename V, typename Lane>
INT8KV_INLINE V field_mask(Lane ones) {
  return V{} + static_cast<Lane>(((1u << 8 / kFields) - 1) * ones);
}

// The fields of a plane, which lie on top of each other: `codes_of(field)` has a code in each byte
// of a lane.
template <int kFields, typename V, typename CodesOf>
INT8KV_INLINE V join_fields(int32_t shift, V mask, const CodesOf& codes_of) {
  V joined{};
  unrolled<kFields>(
      [&](auto field) { joined |= (codes_of(field) >> shift & mask) << (field * (8 / kFields)); });
  return joined;
}

// Integers of 16 bits from their lower bytes, which alone have a sign.
template <typename V, typename Lane>
INT8KV_INLINE V extend_sign(V codes, Lane ones) {
  return codes | (codes & static_cast<Lane>(0x80u * ones)) * static_cast<Lane>(0x1fe);
}

// Calls f(line, slots of channel `first` of the head, `first`) for every line of K:
// [block_size / 16][head_size / (8 fields)][8 dims / 2][16 slots][2 dims].
template <int kFields, typename T, typename Byte, typename F>
INT8KV_INLINE void for_each_k_line(const Channels<T>& channels, const CodePlane<Byte>& plane,
                                   const F& f) {
  const int32_t head_size = plane.head_size, size = channels.block_size;
  for (int64_t block = 0; block < channels.num_blocks; ++block) {
    for (int32_t head = 0; head < channels.num_channels / head_size; ++head) {
      T* rows = channels.row(block, head * head_size);
      Byte* line = plane.data + block * plane.block_stride + head * plane.head_stride;
      for (int32_t slot = 0; slot < size; slot += kLanes) {
        for (int32_t run = 0; run < head_size; run += kRunDims * kFields) {
          for (int32_t first = run; first < run + kRunDims; first += 2, line += kLineBytes) {
            f(line, rows + first * size + slot, first);
          }
        }
      }
    }
  }
}

template <int kFields>
void pack_k(const Channels<const int16_t>& from, const CodePlane<int8_t>& plane) {
  const int32_t size = from.block_size;
  const auto mask = field_mask<kFields, u16x16, uint16_t>(0x101);
  for_each_k_line<kFields>(from, plane, [&](int8_t* line, const int16_t* slots, int32_t first) {
    const auto pairs = [&](int field) {
      if (first + field * kRunDims >= plane.head_size) return u16x16{};
      const int16_t* even = slots + field * kRunDims * size;
      return (load<u16x16>(even) & 0xff) | load<u16x16>(even + size) << 8;
    };
    store(line, join_fields<kFields>(plane.shift, mask, pairs));
  });
}

template <int kFields>
void unpack_k(const Channels<int16_t>& to, const CodePlane<const int8_t>& plane) {
  const int32_t size = to.block_size;
  const auto mask = field_mask<kFields, u16x16, uint16_t>(1);
  for_each_k_line<kFields>(to, plane, [&](const int8_t* line, int16_t* slots, int32_t first) {
    const auto fields = load<u16x16>(line);
    unrolled<kFields>([&](auto field) {
      if (first + field * kRunDims >= plane.head_size) return;
      for (int odd = 0; odd < 2; ++odd) {
        int16_t* row = slots + (field * kRunDims + odd) * size;
        const u16x16 codes = fields >> (odd * 8 + field * (8 / kFields)) & mask;
        if constexpr (kFields == 1) {
          store(row, extend_sign<u16x16, uint16_t>(codes, 1));
        } else {
          const u16x16 lower = plane.shift ? load<u16x16>(row) : u16x16{};
          store(row, lower | codes << plane.shift);
        }
      }
    });
  });
}

// Sixteen slots of a channel, or 32, which are as many pairs as there are lanes.
template <bool kWhole>
INT8KV_INLINE u32x16 load_slots(const int16_t* from) {
  if constexpr (kWhole) return load<u32x16>(from);
  alignas(64) int16_t slots[2 * kLanes] = {};
  std::memcpy(slots, from, sizeof(slots) / 2);
  return load<u32x16>(slots);
}

template <bool kWhole>
INT8KV_INLINE void store_slots(int16_t* to, u32x16 pairs) {
  if constexpr (kWhole) return store(to, pairs);
  alignas(64) int16_t slots[2 * kLanes];
  store(slots, pairs);
  std::memcpy(to, slots, sizeof(slots) / 2);
}

// Lines of V of 32 slots, or of the last sixteen.
template <int kFields, bool kWhole>
INT8KV_INLINE void pack_v_lines(const int16_t* rows, int32_t num_dims, int32_t size, int32_t shift,
                                int8_t* lines) {
  const auto mask = field_mask<kFields, u32x16, uint32_t>(0x101);
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

template <int kFields, bool kWhole>
INT8KV_INLINE void unpack_v_lines(int16_t* rows, int32_t num_dims, int32_t size, int32_t shift,
                                  const int8_t* lines) {
  const auto mask = field_mask<kFields, u32x16, uint32_t>(0x10001);
  f32x16 tile[kLanes] = {};
  for (int i = 0; i < (kWhole ? kLanes : kLanes / 2); ++i) {
    tile[i] = as<f32x16>(widen(load<u16x16>(lines + i * kLineBytes)));
  }
  transpose(tile);
  for (int i = 0; i < kLanes; ++i) {
    const auto pairs = as<u32x16>(tile[i]);
    const u32x16 slots = (pairs & 0xffu) | (pairs & 0xff00u) << 8;
    unrolled<kFields>([&](auto field) {
      const int32_t dim = i + field * kLanes;
      if (dim >= num_dims) return;
      const u32x16 codes = slots >> (field * (8 / kFields)) & mask;
      int16_t* row = rows + dim * size;
      if constexpr (kFields == 1) {
        store_slots<kWhole>(row, extend_sign<u32x16, uint32_t>(codes, 0x10001));
      } else {
        const u32x16 lower = shift ? load_slots<kWhole>(row) : u32x16{};
        store_slots<kWhole>(row, lower | codes << shift);
      }
    });
  }
}

// Calls f(lines, slots of the first of its channels, how many channels there are) for lines of V of
// 32 slots, `true`, or of the last sixteen: [head_size / (16 fields)][block_size / 2][16 dims]
// [2 slots].
template <int kFields, typename T, typename Byte, typename F>
INT8KV_INLINE void for_each_v_lines(const Channels<T>& channels, const CodePlane<Byte>& plane,
                                    const F& f) {
  const int32_t head_size = plane.head_size, size = channels.block_size;
  for (int64_t block = 0; block < channels.num_blocks; ++block) {
    for (int32_t head = 0; head < channels.num_channels / head_size; ++head) {
      Byte* lines = plane.data + block * plane.block_stride + head * plane.head_stride;
      for (int32_t run = 0; run < head_size; run += kLanes * kFields, lines += size * kLanes) {
        T* rows = channels.row(block, head * head_size + run);
        int32_t slot = 0;
        for (; slot + 2 * kLanes <= size; slot += 2 * kLanes) {
          f(lines + slot * kLanes, rows + slot, head_size - run, std::true_type{});
        }
        if (slot < size) {
          f(lines + slot * kLanes, rows + slot, head_size - run, std::false_type{});
        }
      }
    }
  }
}

template <int kFields>
void pack_v(const Channels<const int16_t>& from, const CodePlane<int8_t>& plane) {
  for_each_v_lines<kFields>(
      from, plane, [&](int8_t* lines, const int16_t* rows, int32_t num_dims, auto is_whole) {
        pack_v_lines<kFields, is_whole>(rows, num_dims, from.block_size, plane.shift, lines);
      });
}

template <int kFields>
void unpack_v(const Channels<int16_t>& to, const CodePlane<const int8_t>& plane) {
  for_each_v_lines<kFields>(
      to, plane, [&](const int8_t* lines, int16_t* rows, int32_t num_dims, auto is_whole) {
        unpack_v_lines<kFields, is_whole>(rows, num_dims, to.block_size, plane.shift, lines);
      });
}

// Calls f with the fields of a byte as a constant.
template <typename F>
void with_fields(int32_t bits, const F& f) {
  if (bits == 8) return f.template operator()<1>();
  if (bits == 4) return f.template operator()<2>();
  if (bits == 2) return f.template operator()<4>();
  f.template operator()<8>();
}

static void pack_codes(const Channels<const int16_t>& from, const CodePlane<int8_t>& plane) {
  with_fields(plane.bits, [&]<int kFields>() {
    (plane.of_values ? pack_v<kFields> : pack_k<kFields>)(from, plane);
  });
}

static void unpack_codes(const Channels<int16_t>& to, const CodePlane<const int8_t>& plane) {
  with_fields(plane.bits, [&]<int kFields>() {
    (plane.of_values ? unpack_v<kFields> : unpack_k<kFields>)(to, plane);
  });
}

}  // namespace int8kv::cpu::INT8KV_ISA
