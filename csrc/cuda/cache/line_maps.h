// Full slot groups in the cache write: which tokens fill one, and where its codes lie while they
// are gathered in shared memory and in the cache. Host and device.
//
// Gathered codes lie as in a plane of a block that has a single slot group. In the cache the K
// codes of a slot group are in one piece, its V codes in one piece per dim group.
#pragma once

#include "cuda/alignment.h"

namespace int8kv {

// Byte of a gathered code; `slot` counts from the first of the group.
template <typename C>
INT8KV_HD int k_gathered_byte(int slot, int dim) {
  // head_size is the way from one slot group to the next, and there is no next.
  return C::k_byte(/*head_size=*/0, slot, dim);
}
template <typename C>
INT8KV_HD int v_gathered_byte(int slot, int dim) {
  return C::v_byte(/*block_size=*/kSlotGroup, slot, dim);
}

// 16-byte vectors of a gathered slot group.
template <typename C>
INT8KV_HD constexpr int gathered_vectors(int head_size) {
  return C::bytes(head_size * kSlotGroup) / kVectorBytes;
}

// Byte of a chunk to which gathered vector `vector` belongs; `slot` is the first of the group.
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

// Bit j of `runs`: token j + 1 has the slot after token j's. True if tokens j to j + 15 are a run.
INT8KV_HD bool group_runs(uint64_t runs, int j) { return (runs >> j & 0x7fff) == 0x7fff; }

// The token, counted from 15 before the window of 16, that starts a group in the window, or -1.
// There is at most one: a group is as long as the window.
INT8KV_HD int group_start_in_window(uint64_t starts) {
  for (int j = kSlotGroup - 1; j < 2 * kSlotGroup - 1; ++j) {
    if (starts >> j & 1) return j;
  }
  return -1;
}

}  // namespace int8kv
