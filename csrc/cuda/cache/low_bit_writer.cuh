// What one warp does with the tokens of its block in the cache write of formats other than K8V8,
// which share one kernel: K or V of one KV head, by the traits of the format.
//
// A full slot group is gathered in shared memory as the planes of a block of 16 slots, and leaves
// as 16-byte stores.
#pragma once

#include "cuda/cache/line_maps.h"
#include "cuda/cache/packed_codes.cuh"
#include "cuda/cache/quantize_vector.cuh"
#include "cuda/key_transform.cuh"

namespace int8kv {

struct LowBitWriteParams : ReshapeAndCacheParams {
  FormatPlanes planes;
};

template <int kPairs>
struct LowBitWriter {
  using Vector = HeadVector<kPairs>;
  // Eight bits of the largest head take most.
  static constexpr int kGroupBytes = kSlotGroup * 64 * kPairs;

  const LowBitWriteParams& p;
  bool is_key;
  int kv_head;
  int lane;

  __device__ Vector load(int64_t token) const {
    const int64_t offset = is_key ? token * p.key_token_stride + kv_head * p.key_head_stride
                                  : token * p.value_token_stride + kv_head * p.value_head_stride;
    return load_head<kPairs>(is_key ? p.key : p.value, offset, p.dtype, p.cache.head_size, lane);
  }

  // Codes to shared memory as those of slot `member` of its slot group, the scale to the cache.
  __device__ void store_in_group(const Vector& vector, int64_t slot, int member,
                                 int8_t* gathered) const {
    const SlotPlace place = place_of(p.cache, slot);
    store(vector, p.cache.chunk(place.block, kv_head), place.offset, gathered, kSlotGroup, member);
  }

  // Codes and scale to the cache.
  __device__ void store_alone(const Vector& vector, int64_t slot) const {
    const SlotPlace place = place_of(p.cache, slot);
    int8_t* chunk = p.cache.chunk(place.block, kv_head);
    store(vector, chunk, place.offset, chunk + p.planes.of(is_key).codes, p.cache.block_size,
          place.offset);
  }

  // The gathered codes of the slot group from `first_slot` on to the cache: one vector per thread.
  __device__ void flush_group(int64_t first_slot, const int8_t* gathered) const {
    const SlotPlace place = place_of(p.cache, first_slot);
    int8_t* codes = p.cache.chunk(place.block, kv_head) + p.planes.of(is_key).codes;
    with_codes(p.planes.of(is_key).bits, [&]<typename C>() {
      if (is_key) {
        flush_planes<C, true>(codes, place.offset, gathered);
      } else {
        flush_planes<C, false>(codes, place.offset, gathered);
      }
    });
  }

 private:
  // Quantizes a vector, writes its scale and midpoint to slot `offset` of a chunk, and its codes to
  // slot `slot` of the planes at `codes`, which are those of a block of `block_size` slots.
  __device__ void store(Vector vector, int8_t* chunk, int offset, int8_t* codes, int block_size,
                        int slot) const {
    const int head_size = p.cache.head_size;
    for_each_pair(vector, head_size, lane, [](int, float (&x)[2]) {
      x[0] = sanitize(x[0]);
      x[1] = sanitize(x[1]);
    });
    const VectorPlanes& planes = p.planes.of(is_key);
    if (is_key) {
      transform_key(vector, p.key_transform, kv_head, head_size, lane);
    } else if (planes.bits < 8) {
      warp_hadamard_rotate(vector, head_size, lane);
    }
    const VectorRange range = warp_range(vector, head_size, lane);
    int8_t* scale = chunk + planes.scales + Codes<8>::kScaleBytes * offset;
    with_codes(planes.bits, [&]<typename C>() {
      const VectorQuantizer<C> quantizer(range);
      CodePairs<kPairs> pairs;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float (&x)[2] = vector.x[i];
        const int32_t two = (quantizer.code(x[0]) & 0xff) | (quantizer.code(x[1]) & 0xff) << 8;
        pairs[i] = 2 * head_pair(lane, i) < head_size ? static_cast<uint32_t>(two) : 0;
      }
      if (is_key) {
        store_codes<C, true, kPairs>({codes, block_size, head_size}, slot, lane, pairs);
      } else {
        store_codes<C, false, kPairs>({codes, block_size, head_size}, slot, lane, pairs);
      }
      if (lane != 0) return;
      *reinterpret_cast<uint16_t*>(scale) = quantizer.scale_bits;
      if constexpr (C::kHasMidpoint) {
        *reinterpret_cast<uint16_t*>(scale + p.cache.midpoint_offset()) = quantizer.middle_bits;
      }
    });
  }

  template <typename C, bool kIsKey>
  __device__ void flush_planes(int8_t* codes, int slot, const int8_t* gathered) const {
    const KVCache& cache = p.cache;
    const PlaneMap<C, kIsKey> to{codes, cache.block_size, cache.head_size};
    int vector = threadIdx.x;  // of the plane in hand
    to.for_each([&]<typename Plane>(int8_t* plane, int) {
      // The slot group is in one piece in a plane of K, in one per kVDims dims in a plane of V.
      constexpr int kPieceVectors = kSlotGroup * kDimGroup / kVectorBytes;
      const int32_t bytes = kIsKey ? Plane::k_group_bytes(cache.head_size)
                                   : Plane::v_bytes(kSlotGroup, cache.head_size);
      if (vector >= 0 && vector < bytes / kVectorBytes) {
        const int32_t byte =
            kIsKey ? Plane::k_byte(cache.head_size, slot, 0) + vector * kVectorBytes
                   : Plane::v_byte(cache.block_size, slot, vector / kPieceVectors * Plane::kVDims) +
                         vector % kPieceVectors * kVectorBytes;
        *reinterpret_cast<uint4*>(plane + byte) =
            *reinterpret_cast<const uint4*>(gathered + kVectorBytes * vector);
      }
      vector -= bytes / kVectorBytes;
      gathered += bytes;
    });
  }
};

}  // namespace int8kv
