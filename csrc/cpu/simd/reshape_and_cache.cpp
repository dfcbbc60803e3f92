// Cache write: equalize and rotate keys, then scale, round and store keys and values. Compiled once
// per instruction set.
//
// Sixteen (token, KV head) vectors, one per lane, are handled at a time. When they are the 16
// consecutive slots of a slot group, their codes are whole lines of the cache; else they are stored
// one by one.
#include "cpu/simd/kernels.h"
#include "cpu/simd/pack_codes.h"
#include "cpu/simd/vectors.h"

namespace int8kv::cpu::INT8KV_ISA {

namespace {

struct Lane {
  int64_t token;
  int32_t kv_head;
  int64_t slot;
};

// Where the codes and scales of a lane go.
struct Target {
  int8_t* chunk;
  int32_t slot;
};

struct LaneSet {
  Lane lanes[kLanes];
  int32_t count = 0;

  // Whether the lanes are one whole slot group of one KV head, in order.
  bool is_slot_group() const {
    if (count != kLanes || lanes[0].slot % kSlotGroup != 0) return false;
    for (int i = 1; i < kLanes; ++i) {
      if (lanes[i].slot != lanes[0].slot + i || lanes[i].kv_head != lanes[0].kv_head) return false;
    }
    return true;
  }
};

const char* key_of(const ReshapeAndCacheParams& p, int64_t token, int32_t kv_head) {
  const int64_t offset = token * p.key_token_stride + kv_head * p.key_head_stride;
  return static_cast<const char*>(p.key) + offset * element_size(p.dtype);
}

const char* value_of(const ReshapeAndCacheParams& p, int64_t token, int32_t kv_head) {
  const int64_t offset = token * p.value_token_stride + kv_head * p.value_head_stride;
  return static_cast<const char*>(p.value) + offset * element_size(p.dtype);
}

void prefetch(const char* data, int64_t bytes) {
  constexpr int64_t kLineBytes = 64;
  for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(data + i);
}

// Whether `count` floats are powers of two whose reciprocals are normal, so that multiplying by
// those is dividing. `count` is a multiple of kLanes.
bool are_powers_of_two(const float* x, int64_t count) {
  u32x16 wrong = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const u32x16 bits = load<u32x16>(x + i);
    wrong |= bits & 0x807fffffu;  // positive, and no other bit of the significand
    wrong |= ((bits - (1u << 23)) | ((253u << 23) - bits)) & 0x80000000u;  // the exponent's range
  }
  uint32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= wrong[i];
  return any == 0;
}

// The vectors of a lane set on their way into the cache.
struct Write {
  Write(const ReshapeAndCacheParams& params, const LaneSet& lane_set, bool powers_of_two)
      : p(params),
        cache(params.cache),
        set(lane_set),
        equalizes_by_powers_of_two(powers_of_two),
        is_slot_group(set.is_slot_group()) {
    for (int i = 0; i < (is_slot_group ? 1 : set.count); ++i) {
      const Lane& lane = set.lanes[i];
      targets[i] = {cache.chunk(lane.slot / cache.block_size, lane.kv_head),
                    static_cast<int32_t>(lane.slot % cache.block_size)};
    }
  }

  // Stores the scales of vectors with the largest magnitudes `amax` in a plane of codes with trait
  // C, and returns them. `scale_byte(slot)` is where in the chunk a slot's scale belongs.
  template <typename C, typename ScaleByte>
  f32x16 store_scales(f32x16 amax, const ScaleByte& scale_byte) const {
    const u16x16 bits =
        float_to_bf16(select(less(amax, splat(kMinMagnitude)), splat(1.0f), amax / C::kMax));
    store_params(bits, scale_byte);
    return bf16_to_floats(bits);
  }

  // Stores a scale or a midpoint of every vector; `byte(slot)` is where in the chunk it belongs.
  template <typename Byte>
  void store_params(u16x16 bits, const Byte& byte) const {
    if (is_slot_group) {
      store(targets[0].chunk + byte(targets[0].slot), bits);
      return;
    }
    for (int i = 0; i < set.count; ++i) {
      const uint16_t one = bits[i];
      std::memcpy(targets[i].chunk + byte(targets[i].slot), &one, sizeof(one));
    }
  }

  const ReshapeAndCacheParams& p;
  const KVCache& cache;
  const LaneSet& set;
  const bool equalizes_by_powers_of_two;
  const bool is_slot_group;
  Target targets[kLanes];  // of a slot group only the first
};

// Divides by stored scales (bf16, normal), bit for bit as IEEE division does.
//
// A division takes as long as ten multiplications. The product with the reciprocal, corrected by
// its remainder, is the correctly rounded quotient: for every pair of the 2^7 significands of a
// scale and the 2^23 of a value this was compared with the division. Both are first multiplied by
// the power of two that brings the scale into [1, 2), so that no remainder is subnormal, unless its
// quotient rounds to 0 anyway.
class Quotient {
 public:
  Quotient() = default;
  INT8KV_MEMBER explicit Quotient(f32x16 scale) : scale_(scale) {
    if constexpr (kHasFma) {
      const u32x16 exponent = as<u32x16>(scale) & 0x7f800000u;
      power_of_two_ = as<f32x16>((254u << 23) - exponent);
      scale_ = scale * power_of_two_;
      reciprocal_ = 1.0f / scale_;
    }
  }

  // That of one lane, for all lanes.
  INT8KV_MEMBER Quotient(const Quotient& all, int lane) : scale_(splat(all.scale_[lane])) {
    if constexpr (kHasFma) {
      power_of_two_ = splat(all.power_of_two_[lane]);
      reciprocal_ = splat(all.reciprocal_[lane]);
    }
  }

  INT8KV_MEMBER f32x16 operator()(f32x16 x) const {
    if constexpr (kHasFma) {
      return corrected(x * power_of_two_);
    } else {
      return x / scale_;
    }
  }

  // Of x - y, where both differ by a few scales at most: multiplied by the power of two first, they
  // are subtracted while x is multiplied.
  INT8KV_MEMBER f32x16 of_difference(f32x16 x, f32x16 y) const {
    if constexpr (kHasFma) {
      return corrected(fma(x, power_of_two_, y * -power_of_two_));
    } else {
      return (x - y) / scale_;
    }
  }

 private:
  INT8KV_MEMBER f32x16 corrected(f32x16 x) const {
    const f32x16 quotient = x * reciprocal_;
    return fma(fma(-quotient, scale_, x), reciprocal_, quotient);
  }

  f32x16 scale_, power_of_two_, reciprocal_;
};

// Codes of 8 bits, as quantize_value does: the low bytes of the results, which are rounding sums.
class Quantizer {
 public:
  INT8KV_MEMBER explicit Quantizer(f32x16 scale) : quotient_(scale) {}
  INT8KV_MEMBER i32x16 codes(f32x16 x) const { return as<i32x16>(quotient_(x) + kRoundingSum); }

 private:
  Quotient quotient_;
};

// The least and the largest element of the vector of each lane.
struct Ends {
  f32x16 low, high;
};

// Codes below 8 bits of one vector per lane (quantizer.h). Clamped before they are rounded, as the
// limits are whole.
template <typename C>
class LowBitQuantizer {
 public:
  // Of vectors with these ends, whose scales and midpoints it stores; `scale_byte(slot)` is where
  // in the chunk a slot's scale belongs.
  template <typename ScaleByte>
  LowBitQuantizer(const Write& w, const Ends& ends, const ScaleByte& scale_byte) {
    const f32x16 low = ends.low, high = ends.high;
    const u16x16 middle_bits = float_to_bf16((low + high) * 0.5f + f32x16{});
    middle_ = bf16_to_floats(middle_bits);
    const f32x16 half = max(high - middle_, middle_ - low);
    const f32x16 steps = (half + half) / static_cast<float>(C::kLevels);
    const u16x16 scale_bits =
        float_to_bf16(select(less(half, splat(kMinMagnitude)), f32x16{}, steps));
    const f32x16 scale = bf16_to_floats(scale_bits);
    const auto has_steps = less(f32x16{}, scale);
    levels_ = select(has_steps, splat(C::kLevels), f32x16{});
    quotient_ = Quotient(select(has_steps, scale, splat(1.0f)));
    w.store_params(scale_bits, scale_byte);
    w.store_params(middle_bits,
                   [&](int32_t slot) { return scale_byte(slot) + w.cache.midpoint_offset(); });
  }

  // That of the vector of one lane, for all lanes.
  INT8KV_MEMBER LowBitQuantizer(const LowBitQuantizer& all, int lane)
      : middle_(splat(all.middle_[lane])),
        levels_(splat(all.levels_[lane])),
        quotient_(all.quotient_, lane) {}

  // The low bytes of the results, which are rounding sums.
  INT8KV_MEMBER i32x16 codes(f32x16 x) const {
    const f32x16 steps = quotient_.of_difference(x, middle_) + C::kLevels * 0.5f;
    return as<i32x16>(max(f32x16{}, min(levels_, steps)) + kRoundingSum);
  }

 private:
  f32x16 middle_, levels_;  // 0 levels where the ends of a vector are too close
  Quotient quotient_;
};

// The low bytes of two int32 vectors, alternating: 16 pairs.
INT8KV_INLINE i16x16 interleave(i32x16 even, i32x16 odd) {
  return narrow_to_16((even & 0xff) | ((odd << 24) >> 16));
}

// The low bytes of a vector.
INT8KV_INLINE i8x16 low_bytes(i32x16 x) { return narrow_to_8((x << 24) >> 24); }

INT8KV_INLINE f32x16 min_of(f32x16 (&x)[kLanes]) {
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) x[i] = min(x[i], x[i + n]);
  }
  return x[0];
}

INT8KV_INLINE f32x16 max_of(f32x16 (&x)[kLanes]) {
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) x[i] = max(x[i], x[i + n]);
  }
  return x[0];
}

// Transformed keys, one vector per lane: the rotation then needs no exchange between lanes.
__attribute__((noinline)) void load_keys(const Write& w, LaneBlock& block) {
  const ReshapeAndCacheParams& p = w.p;
  const int32_t head_size = w.cache.head_size;
  const void* vectors[kLanes];
  for (int i = 0; i < w.set.count; ++i) {
    vectors[i] = key_of(p, w.set.lanes[i].token, w.set.lanes[i].kv_head);
  }
  load_lanes(block, vectors, w.set.count, p.dtype, head_size, [&](f32x16 x, int lane, int32_t dim) {
    x = sanitize(x);
    const float* factors = p.key_transform.factors(w.set.lanes[lane].kv_head, head_size);
    if (factors == nullptr) return x;
    factors += dim;
    if (!w.equalizes_by_powers_of_two) return sanitize(x / load<f32x16>(factors));
    const u32x16 reciprocals = (254u << 23) - load<u32x16>(factors);
    return saturate(x * as<f32x16>(reciprocals));
  });
  if (p.key_transform.rotate) hadamard_rotate(block, head_size);
}

// Of one vector per lane.
Ends ends_of(const LaneBlock& block, int32_t head_size) {
  // Four chains, as the next one of a chain waits four cycles for the one before.
  constexpr int32_t kChains = 4;
  f32x16 low[kChains], high[kChains];
  for (int32_t d = 0; d < kChains; ++d) low[d] = high[d] = load<f32x16>(block.x + d * kLanes);
  for (int32_t dim = kChains; dim < head_size; dim += kChains) {
    for (int32_t d = 0; d < kChains; ++d) {
      const f32x16 x = load<f32x16>(block.x + (dim + d) * kLanes);
      low[d] = min(low[d], x);
      high[d] = max(high[d], x);
    }
  }
  return {min(min(low[0], low[1]), min(low[2], low[3])),
          max(max(high[0], high[1]), max(high[2], high[3]))};
}

// Rotated values, vector after vector, and their ends: the 16 dims that lie side by side in the
// cache do so in a value, too.
template <int kParts>
Ends load_rotated_values(const Write& w, LaneBlock& block) {
  const ReshapeAndCacheParams& p = w.p;
  const int32_t head_size = w.cache.head_size;
  f32x16 low[kLanes] = {}, high[kLanes] = {};  // of one lane each
  for (int i = 0; i < w.set.count; ++i) {
    const void* vector = value_of(p, w.set.lanes[i].token, w.set.lanes[i].kv_head);
    for (int32_t begin = 0; begin < head_size; begin += kParts * kLanes) {
      f32x16 x[kParts];
      for (int k = 0; k < kParts; ++k) {
        x[k] = sanitize(load_floats(vector, p.dtype, begin + k * kLanes));
      }
      hadamard_rotate(x);
      for (int k = 0; k < kParts; ++k) {
        store(block.x + i * head_size + begin + k * kLanes, x[k]);
        const bool is_first = begin + k == 0;
        low[i] = is_first ? x[k] : min(low[i], x[k]);
        high[i] = is_first ? x[k] : max(high[i], x[k]);
      }
    }
  }
  transpose(low);
  transpose(high);
  return {min_of(low), max_of(high)};
}

__attribute__((noinline)) Ends load_values(const Write& w, LaneBlock& block) {
  return with_rotation_parts(w.cache.head_size, [&](auto parts) __attribute__((always_inline)) {
    return load_rotated_values<parts>(w, block);
  });
}

// Pairs of dims of a slot group are lines of the cache as they come.
template <typename F>
void write_int8_keys(const Write& w, const LaneBlock& block) {
  const int32_t head_size = w.cache.head_size;
  f32x16 largest[kDimGroup] = {};
  for (int32_t dim = 0; dim < head_size; dim += kDimGroup) {
    for (int32_t d = 0; d < kDimGroup; ++d) {
      largest[d] = max(largest[d], abs(load<f32x16>(block.x + (dim + d) * kLanes)));
    }
  }
  const Quantizer quantizer(w.store_scales<typename F::K>(
      max_of(largest), [&](int32_t slot) { return w.cache.k_scale<F>(slot); }));
  for (int32_t dim = 0; dim < head_size; dim += kDimGroup) {
    i32x16 codes[kDimGroup];  // of one dim each, lane by lane
    for (int32_t d = 0; d < kDimGroup; ++d) {
      codes[d] = quantizer.codes(load<f32x16>(block.x + (dim + d) * kLanes));
    }
    if (w.is_slot_group) {
      int8_t* lines = w.targets[0].chunk + w.cache.k_code<F>(w.targets[0].slot, dim);
      for (int32_t d = 0; d < kDimGroup; d += 2) {
        store(lines + d / 2 * F::K::kLineBytes, interleave(codes[d], codes[d + 1]));
      }
      continue;
    }
    transpose(codes);  // of one lane each, dim by dim
    for (int i = 0; i < w.set.count; ++i) {
      int8_t bytes[kDimGroup];
      store(bytes, low_bytes(codes[i]));
      int8_t* to = w.targets[i].chunk + w.cache.k_code<F>(w.targets[i].slot, dim);
      for (int32_t d = 0; d < kDimGroup; d += 2) {
        std::memcpy(to + d / 2 * F::K::kLineBytes, bytes + d, 2);
      }
    }
  }
}

// Vector after vector: the 16 dims that lie side by side in the cache do so in a value, too.
template <typename F>
void write_int8_values(const Write& w, LaneBlock& block) {
  const ReshapeAndCacheParams& p = w.p;
  const int32_t head_size = w.cache.head_size;
  f32x16 largest[kLanes] = {};  // of one lane each
  for (int i = 0; i < w.set.count; ++i) {
    const void* vector = value_of(p, w.set.lanes[i].token, w.set.lanes[i].kv_head);
    for (int32_t dim = 0; dim < head_size; dim += kLanes) {
      const f32x16 x = sanitize(load_floats(vector, p.dtype, dim));
      store(block.x + i * head_size + dim, x);
      largest[i] = max(largest[i], abs(x));
    }
  }
  transpose(largest);
  const f32x16 scales = w.store_scales<typename F::V>(
      max_of(largest), [&](int32_t slot) { return w.cache.v_scale<F>(slot); });
  if (w.is_slot_group) {
    for (int32_t i = 0; i < kLanes; i += 2) {
      const Quantizer even(splat(scales[i])), odd(splat(scales[i + 1]));
      const float* x = block.x + i * head_size;
      for (int32_t dim = 0; dim < head_size; dim += kDimGroup) {
        store(w.targets[0].chunk + w.cache.v_code<F>(w.targets[0].slot + i, dim),
              interleave(even.codes(load<f32x16>(x + dim)),
                         odd.codes(load<f32x16>(x + head_size + dim))));
      }
    }
    return;
  }
  for (int32_t i = 0; i < w.set.count; ++i) {
    const Quantizer quantizer(splat(scales[i]));
    for (int32_t dim = 0; dim < head_size; dim += kDimGroup) {
      int8_t bytes[kDimGroup];
      store(bytes, low_bytes(quantizer.codes(load<f32x16>(block.x + i * head_size + dim))));
      int8_t* to = w.targets[i].chunk + w.cache.v_code<F>(w.targets[i].slot, dim);
      for (int32_t d = 0; d < kDimGroup; ++d) to[2 * d] = bytes[d];
    }
  }
}

// Clears what the planes hold past the head size, codes of 0, up to a multiple of `unit`.
void clear_padding(const Write& w, CodeBytes& bytes, int32_t unit) {
  const int32_t head_size = w.cache.head_size, count = round_up(head_size, unit) - head_size;
  if (w.is_slot_group) {
    std::memset(bytes.x + head_size * kLanes, 0, count * kLanes);
    return;
  }
  for (int i = 0; i < w.set.count; ++i) {
    std::memset(bytes.x + i * kMaxPaddedHeadSize + head_size, 0, count);
  }
}

// Keys below 8 bits, one vector per lane.
template <typename F>
void write_low_bit_keys(const Write& w, const LaneBlock& block, CodeBytes& bytes) {
  using C = typename F::K;
  const int32_t head_size = w.cache.head_size;
  const LowBitQuantizer<C> quantizer(w, ends_of(block, head_size),
                                     [&](int32_t slot) { return w.cache.k_scale<F>(slot); });
  clear_padding(w, bytes, BitPlane<1>::kKDims);
  for (int32_t dim = 0; dim < head_size; dim += kDimGroup) {
    i32x16 codes[kDimGroup];  // of one dim each, lane by lane
    for (int32_t d = 0; d < kDimGroup; ++d) {
      codes[d] = quantizer.codes(load<f32x16>(block.x + (dim + d) * kLanes));
    }
    if (w.is_slot_group) {
      for (int32_t d = 0; d < kDimGroup; d += 2) {
        store(bytes.x + (dim + d) / 2 * kLineBytes, interleave(codes[d], codes[d + 1]));
      }
      continue;
    }
    transpose(codes);  // of one lane each, dim by dim
    for (int i = 0; i < w.set.count; ++i) {
      store(bytes.x + i * kMaxPaddedHeadSize + dim, low_bytes(codes[i]));
    }
  }
  if (w.is_slot_group) {
    pack_k_group<C>(bytes, w.targets[0].chunk, w.cache, w.targets[0].slot);
    return;
  }
  for (int i = 0; i < w.set.count; ++i) {
    pack_k_vector<C>(bytes.x + i * kMaxPaddedHeadSize, w.targets[i].chunk, w.cache,
                     w.targets[i].slot);
  }
}

// Values below 8 bits, vector after vector.
template <typename F>
void write_low_bit_values(const Write& w, const LaneBlock& block, const Ends& ends,
                          CodeBytes& bytes) {
  using C = typename F::V;
  const int32_t head_size = w.cache.head_size, plane = w.cache.v_codes<F>();
  const LowBitQuantizer<C> quantizer(w, ends,
                                     [&](int32_t slot) { return w.cache.v_scale<F>(slot); });
  clear_padding(w, bytes, BitPlane<1>::kVDims);
  if (w.is_slot_group) {
    for (int32_t i = 0; i < kLanes; i += 2) {
      const LowBitQuantizer<C> even(quantizer, i), odd(quantizer, i + 1);
      const float* x = block.x + i * head_size;
      for (int32_t dim = 0; dim < head_size; dim += kDimGroup) {
        store(bytes.x + (dim + i) / 2 * kLineBytes,
              interleave(even.codes(load<f32x16>(x + dim)),
                         odd.codes(load<f32x16>(x + head_size + dim))));
      }
    }
    pack_v_group<C>(bytes, w.targets[0].chunk + plane, w.cache, w.targets[0].slot);
    return;
  }
  for (int i = 0; i < w.set.count; ++i) {
    const LowBitQuantizer<C> own(quantizer, i);
    uint8_t* vector = bytes.x + i * kMaxPaddedHeadSize;
    for (int32_t dim = 0; dim < head_size; dim += kDimGroup) {
      store(vector + dim, low_bytes(own.codes(load<f32x16>(block.x + i * head_size + dim))));
    }
    pack_v_vector<C>(vector, w.targets[i].chunk + plane, w.cache, w.targets[i].slot);
  }
}

template <typename F>
void write_keys(const Write& w, LaneBlock& block, CodeBytes& bytes) {
  load_keys(w, block);
  if constexpr (!F::K::kHasMidpoint) {
    write_int8_keys<F>(w, block);
  } else {
    write_low_bit_keys<F>(w, block, bytes);
  }
}

template <typename F>
void write_values(const Write& w, LaneBlock& block, CodeBytes& bytes) {
  if constexpr (!F::kRotatesValues) {
    write_int8_values<F>(w, block);
  } else {
    write_low_bit_values<F>(w, block, load_values(w, block), bytes);
  }
}

}  // namespace

// Lanes run over tokens first, so that prefill fills slot groups, and a lane set is closed where a
// slot group ends, so that an unaligned start costs one set of single stores and not every set.
template <typename F>
void quantize_tokens(const ReshapeAndCacheParams& p, int64_t token_begin, int64_t token_end,
                     int32_t head_begin, int32_t head_end) {
  const int32_t head_size = p.cache.head_size;
  const float* factors = p.key_transform.factors(head_begin, head_size);
  const bool powers_of_two =
      factors != nullptr &&
      are_powers_of_two(factors, static_cast<int64_t>(head_end - head_begin) * head_size);
  const int64_t head_bytes = head_size * element_size(p.dtype);
  LaneBlock block;
  CodeBytes bytes;
  LaneSet set;
  const auto flush = [&] {
    const Write write(p, set, powers_of_two);
    write_keys<F>(write, block, bytes);
    write_values<F>(write, block, bytes);
    set.count = 0;
  };
  for (int32_t kv_head = head_begin; kv_head < head_end; ++kv_head) {
    for (int64_t token = token_begin; token < token_end; ++token) {
      const int64_t slot = p.slot_mapping[token];
      if (slot < 0) continue;
      set.lanes[set.count++] = {token, kv_head, slot};
      // Hardware prefetchers do not follow rows that are a token apart: with these prefetches 4096
      // tokens of 8 heads of 128 take 1.1 ms on two threads instead of 1.7.
      if (token + kLanes < token_end) {
        prefetch(key_of(p, token + kLanes, kv_head), head_bytes);
        prefetch(value_of(p, token + kLanes, kv_head), head_bytes);
      }
      const bool closes = slot % kSlotGroup == kSlotGroup - 1 && token_end - token > kLanes;
      if (set.count == kLanes || closes) flush();
    }
  }
  if (set.count > 0) flush();
}

#define INT8KV_INSTANTIATE(k, v)                                                                \
  template void quantize_tokens<FormatOf<k, v>>(const ReshapeAndCacheParams&, int64_t, int64_t, \
                                                int32_t, int32_t);
INT8KV_FOR_EACH_FORMAT(INT8KV_INSTANTIATE)
#undef INT8KV_INSTANTIATE

}  // namespace int8kv::cpu::INT8KV_ISA
