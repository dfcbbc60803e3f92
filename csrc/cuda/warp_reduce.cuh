// One number per lane, reduced over the 32 lanes of a warp; every lane gets the result, and all
// must call.
#pragma once

#include "cuda/ptx.cuh"

namespace int8kv {

INT8KV_DEVICE float warp_max(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

INT8KV_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

}  // namespace int8kv
