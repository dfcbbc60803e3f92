// The cache write of eight bits: equalize and rotate K, quantize K and V, store them into the
// interleaved planes.
//
//   grid   (windows of 16 tokens, shares of the KV heads); block = 16 rows of head_rows.cuh
//
// The rows of the next KV head are on their way while those of this one are computed. Where 16
// tokens in a row go to the 16 slots of one slot group, their codes meet in shared memory, a row of
// bytes each, and leave as 16-byte stores of full lines (slot_groups.cuh).
//
// What sanitize() would change, and equalizers that are no powers of two, are rare: a warp votes,
// and takes the way of the reference only where it must.
#pragma once

#include "cuda/cache/head_rows.cuh"
#include "cuda/cache/quantize_vector.cuh"
#include "cuda/cache/slot_groups.cuh"

namespace int8kv {

struct Int8WriteParams : ReshapeAndCacheParams {
  bool rows_are_aligned;      // every row of key and value starts on 16 bytes
  bool equalizer_is_aligned;  // and the equalizer
};

// x / 127 of a normal x, correctly rounded: the reciprocal is, so that one correction makes the
// quotient so (Markstein, see quantize_by); the test goes through all mantissas.
INT8KV_DEVICE float divide_by_127(float x) {
  constexpr float kReciprocal = 1.0f / 127.0f;
  const float quotient = x * kReciprocal;
  return fmaf(fmaf(-quotient, 127.0f, x), kReciprocal, quotient);
}

// 1 / x, correctly rounded, of a bf16 number in [1, 2), from an approximation within 2^-22. With m
// = 128 x, an integer, 1 / x is at least 2^-33 of itself away from the middle of two floats; after
// one step of Newton's the error is 2^-44, before it is rounded.
INT8KV_DEVICE float improve_reciprocal(float x, float guess) {
  return fmaf(guess, fmaf(-x, guess, 1.0f), guess);
}

template <typename Shape>
struct RowCodes {
  uint2 bytes[Shape::kChunks];  // of this lane's dims
  uint16_t scale_bits;          // of the row
};

template <typename Shape, DType kDType>
struct Int8Writer {
  using Rows = HeadRows<Shape>;
  using Raw = RawRows<Shape, kDType>;
  using Tile = GroupTile<Shape>;
  static constexpr int kThreads = kSlotGroup * Shape::kLanes;

  const Int8WriteParams& p;
  int lane;

  INT8KV_DEVICE Raw load(bool is_key, int64_t token, int kv_head) const {
    const int64_t offset = is_key ? token * p.key_token_stride + kv_head * p.key_head_stride
                                  : token * p.value_token_stride + kv_head * p.value_head_stride;
    const bool exists = token < p.num_tokens && kv_head < p.cache.num_kv_heads;
    return Raw::load(is_key ? p.key : p.value, offset, p.cache.head_size, lane, exists,
                     p.rows_are_aligned);
  }

  // Keys and values as they are quantized, but for the last multiplication of the rotation.
  INT8KV_DEVICE void prepare(bool is_key, int kv_head, Rows& rows) const {
    // Sums this small have no term that sanitize() would change, before or after the equalizer.
    constexpr float kPlainSum = 1e20f;
    const float* factors = is_key ? p.key_transform.factors(kv_head, p.cache.head_size) : nullptr;
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) sum += fabsf(rows.x[c][i]);
    }
    bool is_plain = sum <= kPlainSum;
    float inverse[Shape::kChunks][kLaneDims];
    if (factors != nullptr) {
      is_plain = is_plain && p.equalizer_is_aligned && load_inverses(factors, inverse);
    }
    if (ballot(!is_plain) != 0) {
      prepare_anything(factors, rows);
    } else if (factors != nullptr) {
#pragma unroll
      for (int c = 0; c < Shape::kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) rows.x[c][i] *= inverse[c][i];
      }
    }
    if (is_key && p.key_transform.rotate) {
      rotate_rows(rows, rotation_block(p.cache.head_size), lane);
    }
  }

  // Quantizes rows that are to be multiplied by `norm` first.
  //
  // A code is the row's element times norm / scale. Both are brought into range by the power of two
  // of the scale, which changes no bit of the product; the quotient is then rounded correctly by
  // the reciprocal and one correction, as the scale is a bf16 number (VectorQuantizer). Adding 1.5
  // * 2^23 rounds to an integer, half to even, and leaves it in the lowest byte.
  INT8KV_DEVICE RowCodes<Shape> quantize(const Rows& rows, float norm) const {
    constexpr float kToInteger = 12582912.0f;
    RowCodes<Shape> codes;
    const float amax = rows_amax(rows) * norm;
    codes.scale_bits = float_to_bf16_bits(amax >= kMinMagnitude ? divide_by_127(amax) : 1.0f);
    const uint32_t exponent = (static_cast<uint32_t>(codes.scale_bits) << 16) & 0x7f800000u;
    const float to_steps = inverse_of_power(exponent);
    const float scale = bf16_bits_to_float(codes.scale_bits) * to_steps;
    const float reciprocal = improve_reciprocal(scale, approximate_reciprocal(scale));
    const float factor = norm * to_steps;
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
      uint32_t words[2];
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        uint32_t bits[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float steps = divide_by_bf16(rows.x[c][4 * w + i] * factor, scale, reciprocal);
          bits[i] = float_bits(steps + kToInteger);
        }
        words[w] = byte_permute(byte_permute(bits[0], bits[1], 0x0040),
                                byte_permute(bits[2], bits[3], 0x0040), 0x5410);
      }
      codes.bytes[c] = {words[0], words[1]};
    }
    return codes;
  }

  INT8KV_DEVICE RowCodes<Shape> codes_of(bool is_key, int kv_head, const Raw& raw) const {
    Rows rows = raw.floats();
    prepare(is_key, kv_head, rows);
    const bool rotates = is_key && p.key_transform.rotate;
    return quantize(rows, rotates ? rotation_norm(rotation_block(p.cache.head_size)) : 1.0f);
  }

  INT8KV_DEVICE void store_scale(bool is_key, int8_t* chunk, int offset,
                                 const RowCodes<Shape>& codes) const {
    if (lane % Shape::kLanes != 0) return;
    const int32_t byte = is_key ? p.cache.k_scale<K8V8>(offset) : p.cache.v_scale<K8V8>(offset);
    *reinterpret_cast<uint16_t*>(chunk + byte) = codes.scale_bits;
  }

  // The codes of slot `member` of its slot group to shared memory.
  INT8KV_DEVICE void store_in_group(bool is_key, int member, const RowCodes<Shape>& codes,
                                    int8_t* tile) const {
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
      auto* to = tile + Tile::byte(is_key, member, row_dim<Shape>(lane, c));
      if (row_dim<Shape>(lane, c) < p.cache.head_size)
        *reinterpret_cast<uint2*>(to) = codes.bytes[c];
    }
  }

  // The codes of one slot to the cache, in pieces of two bytes (K) or one (V).
  INT8KV_DEVICE void store_alone(bool is_key, int8_t* chunk, int offset,
                                 const RowCodes<Shape>& codes) const {
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
      const int dim = row_dim<Shape>(lane, c);
      if (dim >= p.cache.head_size) continue;
      const uint32_t words[2] = {codes.bytes[c].x, codes.bytes[c].y};
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) {
        const uint32_t rest = words[i / 4] >> (i % 4 * 8);
        if (!is_key) {
          chunk[p.cache.v_code<K8V8>(offset, dim + i)] = static_cast<int8_t>(rest);
        } else if (i % 2 == 0) {
          *reinterpret_cast<uint16_t*>(chunk + p.cache.k_code<K8V8>(offset, dim + i)) =
              static_cast<uint16_t>(rest);
        }
      }
    }
  }

  // The gathered codes of a slot group to the cache: first the vectors of K, then those of V, one
  // per thread and turn.
  INT8KV_DEVICE void flush_group(int8_t* chunk, int offset, const int8_t* tile) const {
    for_each_vector<kThreads>(p.cache, offset, [&](bool is_key, int vector, int32_t byte) {
      *reinterpret_cast<uint4*>(chunk + byte) =
          is_key ? key_vector(vector, tile) : value_vector(vector, tile);
    });
  }

 private:
  // 1 / factor of this lane's dims; whether all are powers of two, and neither large nor small.
  INT8KV_DEVICE bool load_inverses(const float* factors,
                                   float (&inverse)[Shape::kChunks][kLaneDims]) const {
    constexpr uint32_t kLeast = (127u - 30u) << 23, kRange = 60u << 23;  // 2^-30 to 2^30
    uint32_t largest = 0, mantissas = 0;
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
      const int dim = row_dim<Shape>(lane, c) < p.cache.head_size ? row_dim<Shape>(lane, c) : 0;
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const uint4 four = *reinterpret_cast<const uint4*>(factors + dim + 4 * w);
        const uint32_t bits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          largest = max(largest, bits[i] - kLeast);
          mantissas |= bits[i];
          inverse[c][4 * w + i] = inverse_of_power(bits[i]);
        }
      }
    }
    return (mantissas & 0x007fffffu) == 0 && largest <= kRange;
  }

  // The equalizer may be anything, so what it makes of a key is sanitized.
  INT8KV_DEVICE void prepare_anything(const float* factors, Rows& rows) const {
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
      const bool exists = row_dim<Shape>(lane, c) < p.cache.head_size;
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) {
        float& x = rows.x[c][i];
        x = sanitize(x);
        if (factors != nullptr && exists) x = sanitize(x / factors[row_dim<Shape>(lane, c) + i]);
      }
    }
  }

  INT8KV_DEVICE uint4 key_vector(int vector, const int8_t* tile) const {
    const int slot = Tile::key_slot(vector), dim = Tile::key_dim(vector);
    const auto two = [&](int i) -> uint32_t {
      return *reinterpret_cast<const uint16_t*>(tile + Tile::byte(true, slot + i, dim));
    };
    return {two(0) | two(1) << 16, two(2) | two(3) << 16, two(4) | two(5) << 16,
            two(6) | two(7) << 16};
  }

  INT8KV_DEVICE uint4 value_vector(int vector, const int8_t* tile) const {
    const int slot = Tile::value_slot(vector), dim = Tile::value_dim(vector);
    const uint2 even = *reinterpret_cast<const uint2*>(tile + Tile::byte(false, slot, dim));
    const uint2 odd = *reinterpret_cast<const uint2*>(tile + Tile::byte(false, slot + 1, dim));
    return {byte_permute(even.x, odd.x, 0x5140), byte_permute(even.x, odd.x, 0x7362),
            byte_permute(even.y, odd.y, 0x5140), byte_permute(even.y, odd.y, 0x7362)};
  }
};

// Threads of a multiprocessor that the registers allow for, at least. A thread has 32 bytes of rows
// on their way, so that the usual head size has 24 KB; the others spill with so few registers.
template <typename Shape, DType kDType>
constexpr int kLeastThreads = Shape::kLanes == 16 && kDType != DType::kFloat32 ? 768 : 512;

template <typename Shape, DType kDType>
__global__ void __launch_bounds__(Int8Writer<Shape, kDType>::kThreads,
                                  kLeastThreads<Shape, kDType> /
                                      Int8Writer<Shape, kDType>::kThreads)
    reshape_and_cache_int8_kernel(const __grid_constant__ Int8WriteParams p) {
  using Writer = Int8Writer<Shape, kDType>;
  using Raw = typename Writer::Raw;
  constexpr bool kIsAhead = Shape::kChunks == 1;  // two heads of 512 spill registers
  alignas(kVectorBytes) __shared__ int8_t tile[GroupTile<Shape>::kBytes];
  __shared__ SeenSlots slots;
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x / Shape::kLanes;  // of the 16 of the block
  const Writer writer{p, lane};

  for (int64_t window = int64_t{blockIdx.x} * kSlotGroup; window < p.num_tokens;
       window += int64_t{gridDim.x} * kSlotGroup) {
    // The first rows are on their way while the slots are looked at.
    int kv_head = blockIdx.y;
    int64_t token = window + row;
    Raw key = writer.load(true, token, kv_head), value = writer.load(false, token, kv_head);
    const SlotGroups groups = look_at_slots(p, window, slots, lane);
    const int64_t own_slot = groups.slot_alone(slots, row);
    const bool are_alone = ballot(own_slot >= 0) != 0;  // some of the rows of this warp
    const int64_t first_slot = groups.first_slot(slots);
    if (groups.has_group() && groups.first_token(window) != window) {
      token = groups.first_token(window) + row;
      key = writer.load(true, token, kv_head), value = writer.load(false, token, kv_head);
    }

    for (; kv_head < p.cache.num_kv_heads; kv_head += gridDim.y) {
      Raw next_key, next_value;
      const auto load_next = [&] {
        next_key = writer.load(true, token, kv_head + gridDim.y);
        next_value = writer.load(false, token, kv_head + gridDim.y);
      };
      if (kIsAhead) load_next();
      const auto store_alone = [&](bool is_key, const RowCodes<Shape>& codes) {
        if (own_slot < 0) return;
        const SlotPlace place = place_of(p.cache, own_slot);
        int8_t* chunk = p.cache.chunk(place.block, kv_head);
        writer.store_scale(is_key, chunk, place.offset, codes);
        writer.store_alone(is_key, chunk, place.offset, codes);
      };
      if (groups.has_group()) {
        const SlotPlace place = place_of(p.cache, first_slot);
        int8_t* chunk = p.cache.chunk(place.block, kv_head);
#pragma unroll
        for (const bool is_key : {true, false}) {
          const auto codes = writer.codes_of(is_key, kv_head, is_key ? key : value);
          writer.store_scale(is_key, chunk, place.offset + row, codes);
          writer.store_in_group(is_key, row, codes, tile);
        }
        __syncthreads();
        writer.flush_group(chunk, place.offset, tile);
        __syncthreads();
        if (are_alone) {  // tokens before or after the group
#pragma unroll
          for (const bool is_key : {true, false}) {
            const Raw own = writer.load(is_key, window + row, kv_head);
            store_alone(is_key, writer.codes_of(is_key, kv_head, own));
          }
        }
      } else if (are_alone) {
        store_alone(true, writer.codes_of(true, kv_head, key));
        store_alone(false, writer.codes_of(false, kv_head, value));
      }
      if (!kIsAhead) load_next();
      key = next_key, value = next_value;
    }
    __syncthreads();  // the slots have been read
  }
}

}  // namespace int8kv
