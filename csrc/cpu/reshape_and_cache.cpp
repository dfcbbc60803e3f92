// Shares one cache write among the threads, by tokens and KV heads.
#include "cpu/kernels.h"

namespace int8kv::cpu {

void reshape_and_cache(const ReshapeAndCacheParams& p, const ParallelFor& pool, const char* isa) {
  const Kernels& kernels = kernels_for(p.cache.format, isa);
  const int32_t num_heads = p.cache.num_kv_heads;
  // Few tokens: lanes run over the heads too, on one thread; a pool start costs as much as the
  // work.
  constexpr int64_t kTokensPerTask = 64;
  if (p.num_tokens * num_heads <= kTokensPerTask) {
    kernels.quantize_tokens(p, 0, p.num_tokens, 0, num_heads);
    return;
  }
  // Heads of the same tokens one after the other: their keys lie side by side.
  const int64_t chunks = (p.num_tokens + kTokensPerTask - 1) / kTokensPerTask;
  parallel_for(pool, chunks * num_heads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int32_t head = static_cast<int32_t>(task % num_heads);
      const int64_t token = task / num_heads * kTokensPerTask;
      const int64_t token_end =
          token + kTokensPerTask < p.num_tokens ? token + kTokensPerTask : p.num_tokens;
      kernels.quantize_tokens(p, token, token_end, head, head + 1);
    }
  });
}

}  // namespace int8kv::cpu
