// Vectors of 16 bytes, the widest access of a thread: the kernels on the cache move codes in
// nothing else where they can. Host and device.
#pragma once

#include "format/cache_format.h"

namespace int8kv {

constexpr int kVectorBytes = 16;

// Whether every chunk of the cache starts on a whole vector; its planes then do, too.
INT8KV_HD bool is_vector_aligned(const KVCache& cache) {
  return (reinterpret_cast<uintptr_t>(cache.data) | static_cast<uint64_t>(cache.block_stride) |
          static_cast<uint64_t>(cache.head_stride)) %
             kVectorBytes ==
         0;
}

}  // namespace int8kv
