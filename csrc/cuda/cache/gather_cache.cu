// The way back from the cache to floats: stretches of sequences, for attention libraries.
//
//   grid   (rows, num_kv_heads); block = 16 warps, one row each
//
// The lines of a slot group hold 16 slots: the warps of a block read other parts of the same lines,
// mostly from the L1 cache. Rows are written 4 bytes per lane, coalesced.
#include "format/quantizer.h"
#include "cuda/index_maps.h"
#include "cuda/launch.h"
#include "cuda/primitives.cuh"
#include "cuda/row.cuh"

namespace int8kv {
namespace {

constexpr int kGatherWarps = 16;

INT8KV_DEVICE float scale_at(const int8_t* chunk, int64_t plane, int slot) {
  return bf16_bits_to_float(reinterpret_cast<const uint16_t*>(chunk + plane)[slot]);
}

template <int kPairs>
__device__ void gather_key(const GatherCacheParams& p, const int8_t* chunk, int slot, int64_t row,
                           int kv_head, int lane) {
  const KVCache& cache = p.cache;
  const float scale = scale_at(chunk, cache.k_scales(), slot);
  Row<kPairs> x = {};
  for_each_pair(x, cache.head_size, lane, [&](int pair, float (&two)[2]) {
    const auto codes = *reinterpret_cast<const uint16_t*>(chunk + cache.k_code(slot, 2 * pair));
    two[0] = low_code(codes) * scale;
    two[1] = high_code(codes) * scale;
  });
  if (p.rotate_keys) warp_hadamard_rotate(x, cache.head_size, lane);  // is its own inverse
  const float* equalizer =
      p.key_equalizer == nullptr ? nullptr : p.key_equalizer + int64_t{kv_head} * cache.head_size;
  const int64_t offset = row * p.key_token_stride + kv_head * p.key_head_stride;
  for_each_pair(x, cache.head_size, lane, [&](int pair, float (&two)[2]) {
    const float first = equalizer == nullptr ? 1.0f : equalizer[2 * pair];
    const float second = equalizer == nullptr ? 1.0f : equalizer[2 * pair + 1];
    store_pair(p.key, offset + 2 * pair, p.dtype, two[0] * first, two[1] * second);
  });
}

template <int kPairs>
__device__ void gather_value(const GatherCacheParams& p, const int8_t* chunk, int slot, int64_t row,
                             int kv_head, int lane) {
  const KVCache& cache = p.cache;
  const float scale = scale_at(chunk, cache.v_scales(), slot);
  const int64_t offset = row * p.value_token_stride + kv_head * p.value_head_stride;
  Row<kPairs> unused;
  for_each_pair(unused, cache.head_size, lane, [&](int pair, float (&)[2]) {
    // Two dims of two slots: {dim 0 slot 0, dim 0 slot 1, dim 1 slot 0, dim 1 slot 1}.
    const int8_t* four = chunk + cache.v_code(slot / 2 * 2, 2 * pair);
    const uint32_t codes = *reinterpret_cast<const uint32_t*>(four) >> (slot % 2 * 8);
    const float first = static_cast<int8_t>(codes & 0xffu);
    const float second = static_cast<int8_t>(codes >> 16 & 0xffu);
    store_pair(p.value, offset + 2 * pair, p.dtype, first * scale, second * scale);
  });
}

template <int kPairs>
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
    gather_key<kPairs>(p, chunk, slot, row, kv_head, lane);
    gather_value<kPairs>(p, chunk, slot, row, kv_head, lane);
  }
}

template <int kPairs>
cudaError_t launch(const GatherCacheParams& params, cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = 65535;
  const int64_t blocks = (params.num_rows + kGatherWarps - 1) / kGatherWarps;
  const dim3 grid(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks),
                  static_cast<unsigned>(params.cache.num_kv_heads));
  return launch_kernel(gather_cache_kernel<kPairs>, grid, kGatherWarps * 32, 0, stream, params);
}

}  // namespace

cudaError_t launch_gather_cache(const GatherCacheParams& params, cudaStream_t stream) {
  if (params.num_rows == 0 || params.num_seqs == 0 || params.cache.num_kv_heads == 0) {
    return cudaSuccess;
  }
  if (!is_vector_aligned(params.cache)) return cudaErrorMisalignedAddress;
  const int head_size = params.cache.head_size;
  if (head_size <= 64) return launch<1>(params, stream);
  if (head_size <= 128) return launch<2>(params, stream);
  if (head_size <= 256) return launch<4>(params, stream);
  if (head_size <= kMaxHeadSize) return launch<8>(params, stream);
  return cudaErrorInvalidValue;
}

}  // namespace int8kv
