// The rotation of keys and queries: a product with the orthonormal Hadamard matrix in Sylvester's
// order, in blocks of rotation_block(head_size) dims, which leaves q . k unchanged and spreads an
// outlier channel over its block.
//
// Each device has its own loop for it; the order of the operations is part of the cache format:
// for half = 1, 2, 4, ... (a, b) becomes (a + b, a - b), and one multiplication by rotation_norm()
// comes last.
#pragma once

#include <cstdint>

#include "format/host_device.h"

namespace int8kv {

// The largest power of two that divides head_size, at most 256.
INT8KV_HD int32_t rotation_block(int32_t head_size) {
  const int32_t block = head_size & -head_size;
  return block < 256 ? block : 256;
}

// 1 / sqrt(block) for a power of two, correctly rounded: exact for even powers.
INT8KV_HD float rotation_norm(int32_t block) {
  float norm = 1.0f;
  for (int32_t b = block; b >= 4; b /= 4) norm *= 0.5f;
  int32_t log2_block = 0;
  for (int32_t b = block; b > 1; b /= 2) ++log2_block;
  return log2_block % 2 == 0 ? norm : norm * 0.70710678118654752440f;
}

}  // namespace int8kv
