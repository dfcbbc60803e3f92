// The key transform of params.h on a vector in the registers of a warp: of a key before it is
// quantized, of the query that meets it, and back to the key as it was.
#pragma once

#include "cuda/head_vector.cuh"
#include "format/params.h"

namespace int8kv {

// The equalizer may be anything, so what it makes of a key is sanitized.
template <int kPairs>
INT8KV_DEVICE void transform_key(HeadVector<kPairs>& key, const KeyTransform& transform,
                                 int kv_head, int head_size, int lane) {
  const float* factors = transform.factors(kv_head, head_size);
  if (factors != nullptr) {
    for_each_pair(key, head_size, lane, [&](int pair, float (&x)[2]) {
      x[0] = sanitize(x[0] / factors[2 * pair]);
      x[1] = sanitize(x[1] / factors[2 * pair + 1]);
    });
  }
  if (transform.rotate) warp_hadamard_rotate(key, head_size, lane);
}

template <int kPairs>
INT8KV_DEVICE void multiply_by_equalizer(HeadVector<kPairs>& vector, const KeyTransform& transform,
                                         int kv_head, int head_size, int lane) {
  const float* factors = transform.factors(kv_head, head_size);
  if (factors == nullptr) return;
  for_each_pair(vector, head_size, lane, [&](int pair, float (&x)[2]) {
    x[0] *= factors[2 * pair];
    x[1] *= factors[2 * pair + 1];
  });
}

template <int kPairs>
INT8KV_DEVICE void transform_query(HeadVector<kPairs>& query, const KeyTransform& transform,
                                   int kv_head, int head_size, int lane) {
  multiply_by_equalizer(query, transform, kv_head, head_size, lane);
  if (transform.rotate) warp_hadamard_rotate(query, head_size, lane);
}

// Undoes transform_key(); the rotation is its own inverse.
template <int kPairs>
INT8KV_DEVICE void restore_key(HeadVector<kPairs>& key, const KeyTransform& transform, int kv_head,
                               int head_size, int lane) {
  if (transform.rotate) warp_hadamard_rotate(key, head_size, lane);
  multiply_by_equalizer(key, transform, kv_head, head_size, lane);
}

}  // namespace int8kv
