// One vector of head_size elements in the registers of one warp.
//
// Lane l holds the pairs of dims 2 * (l + 32 * i) and the next, i < kPairs: loads are coalesced,
// a pair is one 16-bit element of the K codes, and every stage of the rotation is either within a
// lane or one shuffle. Pairs past head_size are zero.
#pragma once

#include "format/quantizer.h"
#include "cuda/elements.cuh"
#include "cuda/primitives.cuh"

namespace int8kv {

template <int kPairs>
struct Row {
  float x[kPairs][2];
};

INT8KV_HD int row_pair(int lane, int i) { return lane + 32 * i; }

INT8KV_DEVICE float low_code(uint16_t codes) { return static_cast<int8_t>(codes & 0xff); }
INT8KV_DEVICE float high_code(uint16_t codes) { return static_cast<int8_t>(codes >> 8); }

template <int kPairs>
INT8KV_DEVICE Row<kPairs> load_row(const void* base, int64_t offset, DType dtype, int head_size,
                                   int lane) {
  Row<kPairs> row;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int pair = row_pair(lane, i);
    const float2 x =
        2 * pair < head_size ? load_pair(base, offset + 2 * pair, dtype) : make_float2(0.0f, 0.0f);
    row.x[i][0] = x.x;
    row.x[i][1] = x.y;
  }
  return row;
}

template <int kPairs, typename F>
INT8KV_DEVICE void for_each_pair(Row<kPairs>& row, int head_size, int lane, F&& f) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int pair = row_pair(lane, i);
    if (2 * pair < head_size) f(pair, row.x[i]);
  }
}

template <int kPairs>
INT8KV_DEVICE float warp_amax(const Row<kPairs>& row) {
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    amax = fmaxf(amax, fmaxf(fabsf(row.x[i][0]), fabsf(row.x[i][1])));
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) amax = fmaxf(amax, shuffle_xor(amax, mask));
  return amax;
}

INT8KV_DEVICE void butterfly(float& low, float& high) {
  const float a = low, b = high;
  low = a + b;
  high = a - b;
}

// The rotation of int8_quant.h, bit for bit: the same additions, and a + b == b + a.
template <int kPairs>
INT8KV_DEVICE void warp_hadamard_rotate(Row<kPairs>& row, int head_size, int lane) {
  const int block = rotation_block(head_size);
  const float norm = rotation_norm(block);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) butterfly(row.x[i][0], row.x[i][1]);
#pragma unroll
  for (int half = 2; half <= 32; half *= 2) {
    if (half >= block) break;
    const bool is_high = lane & (half / 2);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float other = shuffle_xor(row.x[i][e], half / 2);
        row.x[i][e] = is_high ? other - row.x[i][e] : row.x[i][e] + other;
      }
    }
  }
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {  // half = 64 * step: pairs i and i + step of a lane
    if (64 * step >= block) break;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (i & step || i + step >= kPairs) continue;
      butterfly(row.x[i][0], row.x[i + step][0]);
      butterfly(row.x[i][1], row.x[i + step][1]);
    }
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    row.x[i][0] *= norm;
    row.x[i][1] *= norm;
  }
}

}  // namespace int8kv
