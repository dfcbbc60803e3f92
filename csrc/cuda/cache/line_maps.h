// Where a slot and the 16-byte vectors of a slot group lie in the cache: its K codes of eight bits
// in one piece, its V codes in one piece per dim group. Host and device.
#pragma once

#include "cuda/alignment.h"

namespace int8kv {

// Where a slot is. 32 bits, in which division is cheap, hold every slot of a cache that fits a GPU.
struct SlotPlace {
  uint32_t block;
  int32_t offset;
};

INT8KV_HD SlotPlace place_of(const KVCache& cache, int64_t slot) {
  const auto index = static_cast<uint32_t>(slot);
  const auto block_size = static_cast<uint32_t>(cache.block_size);
  const uint32_t block = index / block_size;
  return {block, static_cast<int32_t>(index - block * block_size)};
}

// 16-byte vectors of a slot group.
template <typename C>
INT8KV_HD constexpr int gathered_vectors(int head_size) {
  return C::bytes(head_size * kSlotGroup) / kVectorBytes;
}

// Byte of a chunk to which vector `vector` of a slot group belongs; `slot` is the first of the
// group.
template <typename F>
INT8KV_HD int32_t k_vector_byte(const KVCache& cache, int slot, int vector) {
  return cache.k_code<F>(slot, 0) + vector * kVectorBytes;
}
template <typename F>
INT8KV_HD int32_t v_vector_byte(const KVCache& cache, int slot, int vector) {
  constexpr int kDimGroupVectors = gathered_vectors<typename F::V>(kDimGroup);
  return cache.v_code<F>(slot, vector / kDimGroupVectors * kDimGroup) +
         vector % kDimGroupVectors * kVectorBytes;
}

}  // namespace int8kv
