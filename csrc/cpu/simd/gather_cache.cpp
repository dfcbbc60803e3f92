// The way back from the cache to floats. Compiled once per instruction set.
//
// The slots of a slot group are handled at a time, whichever of them are asked for: a line of K
// holds two dims of all of them, a line of V sixteen dims of two.
#include "cpu/simd/kernels.h"
#include "cpu/simd/vectors.h"

namespace int8kv::cpu::INT8KV_ISA {

namespace {

// A slot group of one KV head, and where its rows go.
struct Group {
  const GatherCacheParams& p;
  const int8_t* chunk;
  int32_t slot;        // the first of the group
  int32_t begin, end;  // of the slots that are asked for, within the group
  int64_t row;         // of slot `begin`
  int32_t kv_head;

  int32_t head_size() const { return p.cache.head_size; }
};

// Scales and midpoints of the slots.
struct Steps {
  f32x16 scale, middle;
};

// Those of codes with trait C; `scale_byte` is that of the first slot.
template <typename C>
INT8KV_INLINE Steps steps_of(const Group& g, int32_t scale_byte) {
  const auto at = [&](int32_t byte) { return bf16_to_floats(load<u16x16>(g.chunk + byte)); };
  if constexpr (C::kHasMidpoint) {
    return {at(scale_byte), at(scale_byte + g.p.cache.midpoint_offset())};
  } else {
    return {at(scale_byte), f32x16{}};
  }
}

// As dequantize() of quantizer.h.
template <typename C>
INT8KV_INLINE f32x16 values_of(i32x16 codes, f32x16 scale, [[maybe_unused]] f32x16 middle) {
  if constexpr (!C::kHasMidpoint) {
    return to_floats(codes) * scale;
  } else {
    return (to_floats(codes) - C::kLevels * 0.5f) * scale + middle;
  }
}

// The first (0) or second (1) bytes of the 16 pairs of a line, signed.
INT8KV_INLINE i32x16 bytes_of(const int8_t* line, int which) {
  return as<i32x16>(widen(load<u16x16>(line))) << (24 - 8 * which) >> 24;
}

// Fields of a plane in those bytes; `shift` is their lowest bit in a byte.
template <typename Plane>
INT8KV_INLINE i32x16 fields_of(const int8_t* line, int which, int shift) {
  return as<i32x16>(widen(load<u16x16>(line))) >> (8 * which + shift) & Plane::kMask;
}

// Of a dim, slot by slot.
template <typename C>
INT8KV_INLINE i32x16 key_codes(const Group& g, int32_t dim) {
  const KVCache& cache = g.p.cache;
  const int which = dim % 2;
  const int8_t* line = g.chunk + C::k_byte(cache.head_size, g.slot, dim - which);
  if constexpr (C::kBits == 8) {
    return bytes_of(line, which);
  } else {
    i32x16 codes = fields_of<typename C::Low>(line, which, C::Low::k_shift(dim));
    if constexpr (C::kBits > C::kLowBits) {
      using High = typename C::High;
      const int8_t* plane = g.chunk + C::Low::k_bytes(cache.block_size, cache.head_size);
      line = plane + High::k_byte(cache.head_size, g.slot, dim - which);
      codes |= fields_of<High>(line, which, High::k_shift(dim)) << C::kLowBits;
    }
    return codes;
  }
}

// Of a slot, 16 dims from `dim` on; `planes` is the first byte of the planes of V.
template <typename C>
INT8KV_INLINE i32x16 value_codes(const Group& g, const int8_t* planes, int32_t slot, int32_t dim) {
  const KVCache& cache = g.p.cache;
  const int which = slot % 2;
  const int8_t* line = planes + C::v_byte(cache.block_size, slot - which, dim);
  if constexpr (C::kBits == 8) {
    return bytes_of(line, which);
  } else {
    i32x16 codes = fields_of<typename C::Low>(line, which, C::Low::v_shift(dim));
    if constexpr (C::kBits > C::kLowBits) {
      using High = typename C::High;
      const int8_t* plane = planes + C::Low::v_bytes(cache.block_size, cache.head_size);
      line = plane + High::v_byte(cache.block_size, slot - which, dim);
      codes |= fields_of<High>(line, which, High::v_shift(dim)) << C::kLowBits;
    }
    return codes;
  }
}

// Stores the lanes that are asked for as rows, each times `factors` if there are any.
INT8KV_INLINE void store_rows(const Group& g, const LaneBlock& block, void* to,
                              int64_t token_stride, int64_t head_stride, const float* factors) {
  for (int32_t dim = 0; dim < g.head_size(); dim += kLanes) {
    f32x16 rows[kLanes];
    for (int i = 0; i < kLanes; ++i) rows[i] = load<f32x16>(block.x + (dim + i) * kLanes);
    transpose(rows);
    const f32x16 factor = factors == nullptr ? splat(1.0f) : load<f32x16>(factors + dim);
    for (int32_t i = g.begin; i < g.end; ++i) {
      const int64_t offset = (g.row + i - g.begin) * token_stride + g.kv_head * head_stride;
      store_floats(to, g.p.dtype, offset + dim, rows[i] * factor);
    }
  }
}

template <typename F>
void gather_keys(const Group& g, LaneBlock& block) {
  using C = typename F::K;
  const GatherCacheParams& p = g.p;
  const Steps steps = steps_of<C>(g, p.cache.k_scale<F>(g.slot));
  for (int32_t dim = 0; dim < g.head_size(); ++dim) {
    store(block.x + dim * kLanes, values_of<C>(key_codes<C>(g, dim), steps.scale, steps.middle));
  }
  if (p.key_transform.rotate) hadamard_rotate(block, g.head_size());
  store_rows(g, block, p.key, p.key_token_stride, p.key_head_stride,
             p.key_transform.factors(g.kv_head, g.head_size()));
}

// Values of a slot, 16 dims from `dim` on.
template <typename C>
INT8KV_INLINE f32x16 values_at(const Group& g, const int8_t* planes, const Steps& steps, int32_t i,
                               int32_t dim) {
  return values_of<C>(value_codes<C>(g, planes, g.slot + i, dim), splat(steps.scale[i]),
                      splat(steps.middle[i]));
}

// The 16 dims that lie side by side in the cache do so in a value, too.
template <typename C, int kParts>
void gather_rotated_values(const Group& g, const int8_t* planes, const Steps& steps) {
  const GatherCacheParams& p = g.p;
  for (int32_t i = g.begin; i < g.end; ++i) {
    const int64_t row = g.row + i - g.begin;
    const int64_t offset = row * p.value_token_stride + g.kv_head * p.value_head_stride;
    for (int32_t begin = 0; begin < g.head_size(); begin += kParts * kLanes) {
      f32x16 x[kParts];
      for (int k = 0; k < kParts; ++k) {
        x[k] = values_at<C>(g, planes, steps, i, begin + k * kLanes);
      }
      hadamard_rotate(x);
      for (int k = 0; k < kParts; ++k) {
        store_floats(p.value, p.dtype, offset + begin + k * kLanes, x[k]);
      }
    }
  }
}

template <typename F>
void gather_values(const Group& g) {
  using C = typename F::V;
  const GatherCacheParams& p = g.p;
  const int8_t* planes = g.chunk + p.cache.v_codes<F>();
  const Steps steps = steps_of<C>(g, p.cache.v_scale<F>(g.slot));
  if constexpr (F::kRotatesValues) {
    with_rotation_parts(g.head_size(), [&](auto parts) __attribute__((always_inline)) {
      gather_rotated_values<C, parts>(g, planes, steps);
    });
  } else {
    for (int32_t i = g.begin; i < g.end; ++i) {
      const int64_t offset =
          (g.row + i - g.begin) * p.value_token_stride + g.kv_head * p.value_head_stride;
      for (int32_t dim = 0; dim < g.head_size(); dim += kLanes) {
        store_floats(p.value, p.dtype, offset + dim, values_at<C>(g, planes, steps, i, dim));
      }
    }
  }
}

}  // namespace

template <typename F>
void gather_slots(const GatherCacheParams& p, int64_t row, int32_t count, int64_t block_id,
                  int32_t slot) {
  LaneBlock block;
  const int32_t begin = slot % kSlotGroup;
  for (int32_t kv_head = 0; kv_head < p.cache.num_kv_heads; ++kv_head) {
    const Group group{
        p, p.cache.chunk(block_id, kv_head), slot - begin, begin, begin + count, row, kv_head};
    gather_keys<F>(group, block);
    gather_values<F>(group);
  }
}

#define INT8KV_INSTANTIATE(k, v)                                                                  \
  template void gather_slots<FormatOf<k, v>>(const GatherCacheParams&, int64_t, int32_t, int64_t, \
                                             int32_t);
INT8KV_FOR_EACH_FORMAT(INT8KV_INSTANTIATE)
#undef INT8KV_INSTANTIATE

}  // namespace int8kv::cpu::INT8KV_ISA
