// Keys and values of several tokens in the registers of one warp: kLanes lanes to a row of up to
// kLanes * 8 dims, 8 neighbouring dims per lane, which are 16 bytes of fp16 and bf16. The first
// three stages of the rotation stay in a lane, and up to four rows share an instruction.
//
// HeadVector has one row in 32 lanes, two dims at a time, which is what the codes of a token that
// is stored by itself look like; here full slot groups are what counts.
#pragma once

#include "cuda/alignment.h"
#include "cuda/cache/line_maps.h"
#include "cuda/elements.cuh"
#include "format/rotation.h"

namespace int8kv {

constexpr int kLaneDims = 8;

// kChunks is 2 for the largest head size alone: the second 256 dims lie in the same lanes.
template <int kLanes_, int kChunks_>
struct RowShape {
  static constexpr int kLanes = kLanes_;
  static constexpr int kChunks = kChunks_;
  static constexpr int kRows = 32 / kLanes;  // of a warp
  static constexpr int kChunkDims = kLanes * kLaneDims;
  static constexpr int kMaxHead = kChunks * kChunkDims;
};

// Calls f.operator()<Shape, kDType>() with the shape of the smallest rows that hold a head.
template <typename F>
cudaError_t with_rows_of(int head_size, DType dtype, F&& f) {
  const auto with_dtype = [&]<typename Shape>() {
    if (dtype == DType::kFloat32) return f.template operator()<Shape, DType::kFloat32>();
    if (dtype == DType::kFloat16) return f.template operator()<Shape, DType::kFloat16>();
    return f.template operator()<Shape, DType::kBFloat16>();
  };
  if (head_size <= 64) return with_dtype.template operator()<RowShape<8, 1>>();
  if (head_size <= 128) return with_dtype.template operator()<RowShape<16, 1>>();
  if (head_size <= 256) return with_dtype.template operator()<RowShape<32, 1>>();
  if (head_size <= kMaxHeadSize) return with_dtype.template operator()<RowShape<32, 2>>();
  return cudaErrorInvalidValue;
}

// Whether every row of the keys and values of an operator starts on 16 bytes.
template <typename Params>
bool rows_are_aligned(const Params& p) {
  const uint64_t element_bytes = p.dtype == DType::kFloat32 ? 4 : 2;
  const auto strides = static_cast<uint64_t>(p.key_token_stride | p.key_head_stride |
                                             p.value_token_stride | p.value_head_stride);
  return (reinterpret_cast<uintptr_t>(p.key) | reinterpret_cast<uintptr_t>(p.value) |
          strides * element_bytes) %
             kVectorBytes ==
         0;
}

template <typename Shape>
struct HeadRows {
  float x[Shape::kChunks][kLaneDims];
};

// The first dim of a chunk that a lane has of its row.
template <typename Shape>
INT8KV_DEVICE int row_dim(int lane, int chunk) {
  return chunk * Shape::kChunkDims + lane % Shape::kLanes * kLaneDims;
}

// What a lane loads of a row, as it lies in memory: on its way while others are computed.
template <typename Shape, DType kDType>
struct RawRows {
  static constexpr int kVectors = kDType == DType::kFloat32 ? 2 : 1;  // per chunk
  uint4 words[Shape::kChunks][kVectors];

  // The lane's part of the row at `offset` in elements, 0 beyond head_size and without a row.
  // With `is_aligned` all rows start on 16 bytes.
  static INT8KV_DEVICE RawRows load(const void* base, int64_t offset, int head_size, int lane,
                                    bool exists, bool is_aligned) {
    constexpr int kElementBytes = kDType == DType::kFloat32 ? 4 : 2;
    RawRows raw = {};
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
      const int dim = row_dim<Shape>(lane, c);
      if (!exists || dim >= head_size) continue;
      const auto* from = static_cast<const unsigned char*>(base) + (offset + dim) * kElementBytes;
      if (is_aligned) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          raw.words[c][v] = reinterpret_cast<const uint4*>(from)[v];
        }
      } else {
        load_elements(from, reinterpret_cast<uint32_t*>(raw.words[c]));
      }
    }
    return raw;
  }

  INT8KV_DEVICE HeadRows<Shape> floats() const {
    HeadRows<Shape> rows;
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
      const auto* word = reinterpret_cast<const uint32_t*>(words[c]);
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) {
        if constexpr (kDType == DType::kFloat32) {
          rows.x[c][i] = bits_to_float(word[i]);
        } else if constexpr (kDType == DType::kBFloat16) {
          rows.x[c][i] = bits_to_float(i % 2 == 0 ? word[i / 2] << 16 : word[i / 2] & 0xffff0000u);
        } else {
          rows.x[c][i] = half_bits_to_float(static_cast<uint16_t>(word[i / 2] >> (i % 2 * 16)));
        }
      }
    }
    return rows;
  }

  static INT8KV_DEVICE RawRows from_floats(const HeadRows<Shape>& rows) {
    RawRows raw;
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
      auto* word = reinterpret_cast<uint32_t*>(raw.words[c]);
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) {
        if constexpr (kDType == DType::kFloat32) {
          word[i] = float_bits(rows.x[c][i]);
        } else if (i % 2 == 0) {
          word[i / 2] = to_16_bits(rows.x[c][i], kDType) |
                        static_cast<uint32_t>(to_16_bits(rows.x[c][i + 1], kDType)) << 16;
        }
      }
    }
    return raw;
  }

  // The inverse of load().
  INT8KV_DEVICE void store(void* base, int64_t offset, int head_size, int lane,
                           bool is_aligned) const {
    constexpr int kElementBytes = kDType == DType::kFloat32 ? 4 : 2;
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
      const int dim = row_dim<Shape>(lane, c);
      if (dim >= head_size) continue;
      auto* to = static_cast<unsigned char*>(base) + (offset + dim) * kElementBytes;
      if (is_aligned) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) reinterpret_cast<uint4*>(to)[v] = words[c][v];
      } else {
        const auto* word = reinterpret_cast<const uint32_t*>(words[c]);
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) {
          if constexpr (kDType == DType::kFloat32) {
            reinterpret_cast<uint32_t*>(to)[i] = word[i];
          } else {
            reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(word[i / 2] >> (i % 2 * 16));
          }
        }
      }
    }
  }

 private:
  static INT8KV_DEVICE void load_elements(const unsigned char* from, uint32_t* words) {
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) {
      if constexpr (kDType == DType::kFloat32) {
        words[i] = reinterpret_cast<const uint32_t*>(from)[i];
      } else {
        const uint32_t half = reinterpret_cast<const uint16_t*>(from)[i];
        words[i / 2] = i % 2 == 0 ? half : words[i / 2] | half << 16;
      }
    }
  }
};

// The rotation of rotation.h without its last multiplication, bit for bit: a product with 1 or -1
// is exact, so that it can be part of an addition.
template <typename Shape>
INT8KV_DEVICE void rotate_rows(HeadRows<Shape>& rows, int block, int lane) {
#pragma unroll
  for (int c = 0; c < Shape::kChunks; ++c) {
    float (&x)[kLaneDims] = rows.x[c];
#pragma unroll
    for (int half = 1; half < kLaneDims; half *= 2) {
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) {
        if (i & half) continue;
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
    }
#pragma unroll
    for (int mask = 1; mask < Shape::kLanes; mask *= 2) {
      if (kLaneDims * mask >= block) break;
      const float sign = lane & mask ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) x[i] = fmaf(x[i], sign, shuffle_xor(x[i], mask));
    }
  }
}

// Codes of eight bits of a slot group in shared memory, a row of bytes per slot: first K, then V.
// Rows are 8 bytes longer than their codes, so that lanes which store or load at the same time meet
// in no bank of shared memory, but for two in heads of up to 64.
template <typename Shape>
struct GroupTile {
  static constexpr int kRowBytes = Shape::kMaxHead + kLaneDims;
  static constexpr int kBytes = 2 * kSlotGroup * kRowBytes;

  static INT8KV_HD int byte(bool is_key, int member, int dim) {
    return ((is_key ? 0 : kSlotGroup) + member) * kRowBytes + dim;
  }
  // A vector of K in the cache is two dims of eight slots.
  static INT8KV_HD int key_slot(int vector) { return vector % 2 * 8; }
  static INT8KV_HD int key_dim(int vector) { return vector / 2 * 2; }
  // A vector of V is eight dims of two slots.
  static INT8KV_HD int value_slot(int vector) { return vector % 16 / 2 * 2; }
  static INT8KV_HD int value_dim(int vector) {
    return vector / 16 * kDimGroup + vector % 2 * kLaneDims;
  }
};

// Calls f(is_key, vector, byte) for the vectors of the slot group that begins with a slot of a
// block: first those of K, then those of V, one per thread and turn; `byte` is the place in the
// chunk.
template <int kThreads, typename F>
INT8KV_DEVICE void for_each_vector(const KVCache& cache, int first_slot, F&& f) {
  const int num_vectors = gathered_vectors<Codes<8>>(cache.head_size);  // of K, and of V
  for (int i = threadIdx.x; i < 2 * num_vectors; i += kThreads) {
    const bool is_key = i < num_vectors;
    const int vector = is_key ? i : i - num_vectors;
    f(is_key, vector,
      is_key ? k_vector_byte<K8V8>(cache, first_slot, vector)
             : v_vector_byte<K8V8>(cache, first_slot, vector));
  }
}

// The largest magnitude of each row, in all of its lanes.
template <typename Shape>
INT8KV_DEVICE float rows_amax(const HeadRows<Shape>& rows) {
  float amax = 0.0f;
#pragma unroll
  for (int c = 0; c < Shape::kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) amax = fmaxf(amax, fabsf(rows.x[c][i]));
  }
#pragma unroll
  for (int mask = 1; mask < Shape::kLanes; mask *= 2) amax = fmaxf(amax, shuffle_xor(amax, mask));
  return amax;
}

}  // namespace int8kv
