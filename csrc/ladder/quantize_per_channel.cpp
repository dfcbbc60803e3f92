// Scales, codes and threads of the per-channel ladder. Only the last rung, `vectorized`, uses more
// than the calling thread.
#include "ladder/quantize_per_channel.h"

#include <algorithm>
#include <vector>

#include "format/quantizer.h"

namespace int8kv::cpu {

INT8KV_DISPATCH(PerChannelKernels, per_channel_kernels)

namespace {

// A smaller share of the elements is not worth the start of a thread (about 10 us).
constexpr int64_t kElementsPerTask = 1 << 16;

int64_t num_tasks(int64_t num_tokens, int64_t num_channels, CpuVariant variant,
                  const ParallelFor& pool) {
  if (variant != CpuVariant::kVectorized) return 1;
  const int64_t worth = num_tokens * num_channels / kElementsPerTask;
  return std::max<int64_t>(1, std::min<int64_t>({worth, num_tokens, pool.num_threads}));
}

// Calls body(task, token_begin, token_end) over equal shares of the tokens.
template <typename Body>
void for_each_share(int64_t tasks, int64_t num_tokens, const ParallelFor& pool, const Body& body) {
  if (tasks == 1) {
    body(0, 0, num_tokens);
    return;
  }
  parallel_for(pool, tasks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      body(task, num_tokens / tasks * task + std::min(task, num_tokens % tasks),
           num_tokens / tasks * (task + 1) + std::min(task + 1, num_tokens % tasks));
    }
  });
}

}  // namespace

void quantize_per_channel(const QuantizePerChannelParams& p, CpuVariant variant,
                          const ParallelFor& pool) {
  const PerChannelKernels& kernels = per_channel_kernels();
  const int64_t tasks = num_tasks(p.num_tokens, p.num_channels, variant, pool);
  if (p.compute_scales) {
    std::vector<float> amax(tasks * p.num_channels);
    for_each_share(tasks, p.num_tokens, pool, [&](int64_t task, int64_t begin, int64_t end) {
      kernels.channel_amax(p, variant, begin, end, amax.data() + task * p.num_channels);
    });
    for (int64_t c = 0; c < p.num_channels; ++c) {
      float largest = 0.0f;
      for (int64_t task = 0; task < tasks; ++task) {
        largest = std::max(largest, amax[task * p.num_channels + c]);
      }
      p.scales[c] = scale_from_amax<Codes<8>>(largest);
    }
  }
  for_each_share(tasks, p.num_tokens, pool, [&](int64_t, int64_t begin, int64_t end) {
    kernels.quantize(p, variant, begin, end);
  });
}

void dequantize_per_channel(const DequantizePerChannelParams& p, CpuVariant variant,
                            const ParallelFor& pool) {
  const PerChannelKernels& kernels = per_channel_kernels();
  const int64_t tasks = num_tasks(p.num_tokens, p.num_channels, variant, pool);
  for_each_share(tasks, p.num_tokens, pool, [&](int64_t, int64_t begin, int64_t end) {
    kernels.dequantize(p, variant, begin, end);
  });
}

}  // namespace int8kv::cpu
