// The way back from the cache to floats: stretches of sequences, for attention libraries.
//
//   grid   (rows, num_kv_heads); block = 16 warps, one row each
//
// The lines of a slot group hold 16 slots: the warps of a block read other parts of the same lines,
// mostly from the L1 cache. Rows are written 4 bytes per lane, coalesced.
#include "cuda/alignment.h"
#include "cuda/device.cuh"
#include "cuda/key_transform.cuh"
#include "cuda/launch.h"
#include "cuda/plane_codes.cuh"

namespace int8kv {
namespace {

constexpr int kGatherWarps = 16;

template <typename F, int kPairs>
__device__ void gather_key(const GatherCacheParams& p, const int8_t* chunk, int slot, int64_t row,
                           int kv_head, int lane) {
  using Plane = PlaneCodes<typename F::K>;
  const KVCache& cache = p.cache;
  const float scale = Plane::scale(chunk + cache.k_scale<F>(slot));
  HeadVector<kPairs> key = {};
  for_each_pair(key, cache.head_size, lane, [&](int pair, float (&x)[2]) {
    const float2 codes = Plane::k_dims(chunk + cache.k_code<F>(slot, 2 * pair));
    x[0] = codes.x * scale;
    x[1] = codes.y * scale;
  });
  restore_key(key, p.key_transform, kv_head, cache.head_size, lane);
  const int64_t offset = row * p.key_token_stride + kv_head * p.key_head_stride;
  for_each_pair(key, cache.head_size, lane, [&](int pair, float (&x)[2]) {
    store_pair(p.key, offset + 2 * pair, p.dtype, x[0], x[1]);
  });
}

template <typename F, int kPairs>
__device__ void gather_value(const GatherCacheParams& p, const int8_t* chunk, int slot, int64_t row,
                             int kv_head, int lane) {
  using Plane = PlaneCodes<typename F::V>;
  const KVCache& cache = p.cache;
  const float scale = Plane::scale(chunk + cache.v_scale<F>(slot));
  const int64_t offset = row * p.value_token_stride + kv_head * p.value_head_stride;
  HeadVector<kPairs> unused;
  for_each_pair(unused, cache.head_size, lane, [&](int pair, float (&)[2]) {
    const int even_slot = slot / 2 * 2;
    const float2 codes = Plane::v_dims(chunk + cache.v_code<F>(even_slot, 2 * pair), slot);
    store_pair(p.value, offset + 2 * pair, p.dtype, codes.x * scale, codes.y * scale);
  });
}

template <typename F, int kPairs>
__global__ void __launch_bounds__(kGatherWarps * 32)
    gather_cache_kernel(const __grid_constant__ GatherCacheParams p) {
  const KVCache& cache = p.cache;
  const int lane = threadIdx.x % 32;
  const int kv_head = blockIdx.y;
  const int64_t num_rows = min(p.num_rows, int64_t{p.cu_seq_lens[p.num_seqs]});
  for (int64_t row = int64_t{blockIdx.x} * kGatherWarps + threadIdx.x / 32; row < num_rows;
       row += int64_t{gridDim.x} * kGatherWarps) {
    const int32_t seq = p.seq_of(row);
    const int64_t position = p.seq_starts[seq] + row - p.cu_seq_lens[seq];
    const int64_t block = p.block_table[seq * p.block_table_stride + position / cache.block_size];
    const auto slot = static_cast<int>(position % cache.block_size);
    const int8_t* chunk = cache.chunk(block, kv_head);
    gather_key<F, kPairs>(p, chunk, slot, row, kv_head, lane);
    gather_value<F, kPairs>(p, chunk, slot, row, kv_head, lane);
  }
}

template <typename F, int kPairs>
cudaError_t launch(const GatherCacheParams& params, cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = 65535;
  const int64_t blocks = (params.num_rows + kGatherWarps - 1) / kGatherWarps;
  const dim3 grid(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks),
                  static_cast<unsigned>(params.cache.num_kv_heads));
  return launch_kernel(gather_cache_kernel<F, kPairs>, grid, kGatherWarps * 32, 0, stream, params);
}

}  // namespace

cudaError_t launch_gather_cache(const GatherCacheParams& params, cudaStream_t stream) {
  if (params.num_rows == 0 || params.num_seqs == 0 || params.cache.num_kv_heads == 0) {
    return cudaSuccess;
  }
  if (!is_vector_aligned(params.cache)) return cudaErrorMisalignedAddress;
  return with_cuda_format(params.cache.format, [&]<typename F>() {
    return with_head_pairs(params.cache.head_size,
                           [&]<int kPairs>() { return launch<F, kPairs>(params, stream); });
  });
}

}  // namespace int8kv
