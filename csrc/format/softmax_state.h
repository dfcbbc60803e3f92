// The state of a running softmax over a part of the keys, and the merge of two such states.
//
//   max = max_i s_i     sum = sum_i exp(s_i - max)     out = sum_i exp(s_i - max) * v_i
//
// The empty part is {-inf, 0} with out = 0; merging with it changes nothing, bit for bit.
#pragma once

#include "format/host_device.h"

#if !defined(__CUDA_ARCH__)
#include <cmath>
#endif

namespace int8kv {

constexpr float kMinusInfinity = -__builtin_huge_valf();

struct SoftmaxState {
  float max = kMinusInfinity;
  float sum = 0.0f;
};

// What the two `out` vectors of a merge are multiplied by.
struct MergeFactors {
  float left;
  float right;
};

// Merges `right` into `left`; the caller then sets out = left_factor * out_left + right_factor *
// out_right.
INT8KV_HD MergeFactors merge(SoftmaxState& left, const SoftmaxState& right) {
  if (right.max == kMinusInfinity) return {1.0f, 0.0f};
  if (left.max == kMinusInfinity) {
    left = right;
    return {0.0f, 1.0f};
  }
  const float max = left.max > right.max ? left.max : right.max;
  const MergeFactors factors{::expf(left.max - max), ::expf(right.max - max)};
  left = {max, left.sum * factors.left + right.sum * factors.right};
  return factors;
}

// A sink is a key with a score and no value: it only takes probability.
INT8KV_HD float merge_sink(SoftmaxState& state, float sink) {
  const MergeFactors factors = merge(state, SoftmaxState{sink, 1.0f});
  return factors.left;
}

// log(sum_i exp(s_i)), natural; -inf for the empty state. Where no maximum was found because scores
// are NaN, the sum says so.
INT8KV_HD float log_sum_exp(const SoftmaxState& state) {
  if (state.max == kMinusInfinity && state.sum == 0.0f) return kMinusInfinity;
  return state.max + ::logf(state.sum);
}

}  // namespace int8kv
