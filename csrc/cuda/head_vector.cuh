// One vector of head_size elements in the registers of one warp: a key, a value or a query row.
//
// Lane l holds the pairs of dims 2 * (l + 32 * i) and the next, i < kPairs: loads are coalesced,
// a pair is one 16-bit element of 8-bit K codes, and every stage of the rotation is either within a
// lane or one shuffle. Pairs past head_size are zero.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/warp_reduce.cuh"
#include "format/rotation.h"

namespace int8kv {

template <int kPairs>
struct HeadVector {
  float x[kPairs][2];
};

INT8KV_HD int head_pair(int lane, int i) { return lane + 32 * i; }

template <int kPairs>
INT8KV_DEVICE HeadVector<kPairs> load_head(const void* base, int64_t offset, DType dtype,
                                           int head_size, int lane) {
  HeadVector<kPairs> vector;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int pair = head_pair(lane, i);
    const float2 x =
        2 * pair < head_size ? load_pair(base, offset + 2 * pair, dtype) : make_float2(0.0f, 0.0f);
    vector.x[i][0] = x.x;
    vector.x[i][1] = x.y;
  }
  return vector;
}

// Calls f(pair, x) with this lane's pairs; x[0] is element 2 * pair.
template <int kPairs, typename F>
INT8KV_DEVICE void for_each_pair(HeadVector<kPairs>& vector, int head_size, int lane, F&& f) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int pair = head_pair(lane, i);
    if (2 * pair < head_size) f(pair, vector.x[i]);
  }
}

template <int kPairs>
INT8KV_DEVICE float warp_amax(const HeadVector<kPairs>& vector) {
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    amax = fmaxf(amax, fmaxf(fabsf(vector.x[i][0]), fabsf(vector.x[i][1])));
  }
  return warp_max(amax);
}

INT8KV_DEVICE void butterfly(float& low, float& high) {
  const float a = low, b = high;
  low = a + b;
  high = a - b;
}

// The rotation of rotation.h, bit for bit: the same additions, and a + b == b + a.
template <int kPairs>
INT8KV_DEVICE void warp_hadamard_rotate(HeadVector<kPairs>& vector, int head_size, int lane) {
  auto& x = vector.x;
  const int block = rotation_block(head_size);
  const float norm = rotation_norm(block);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) butterfly(x[i][0], x[i][1]);
#pragma unroll
  for (int half = 2; half <= 32; half *= 2) {
    if (half >= block) break;
    const bool is_high = lane & (half / 2);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float other = shuffle_xor(x[i][e], half / 2);
        x[i][e] = is_high ? other - x[i][e] : x[i][e] + other;
      }
    }
  }
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {  // half = 64 * step: pairs i and i + step of a lane
    if (64 * step >= block) break;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (i & step || i + step >= kPairs) continue;
      butterfly(x[i][0], x[i + step][0]);
      butterfly(x[i][1], x[i + step][1]);
    }
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    x[i][0] *= norm;
    x[i][1] *= norm;
  }
}

}  // namespace int8kv
