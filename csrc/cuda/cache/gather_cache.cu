// The way back from the cache to floats: stretches of sequences, for attention libraries. Launch of
// the kernel of eight bits (int8_gather.cuh), and the one that all other formats share.
//
//   grid   (rows, num_kv_heads); block = 16 warps, one row each
//
// The lines of a slot group hold 16 slots: the warps of a block read other parts of the same lines,
// mostly from the L1 cache. Rows are written 4 bytes per lane, coalesced. The traits of K and V are
// chosen row by row.
#include "cuda/alignment.h"
#include "cuda/cache/int8_gather.cuh"
#include "cuda/cache/packed_codes.cuh"
#include "cuda/device.cuh"
#include "cuda/key_transform.cuh"
#include "cuda/launch.h"

namespace int8kv {
namespace {

constexpr int kGatherWarps = 16;
constexpr int64_t kMaxBlocks = 65535;

struct LowBitGatherParams : GatherCacheParams {
  FormatPlanes planes;
};

// One row of one KV head.
template <int kPairs>
struct LowBitGather {
  using Params = LowBitGatherParams;

  static __device__ void row(const Params& p, int8_t* chunk, int slot, int64_t row, int kv_head,
                             int lane) {
    const int head_size = p.cache.head_size;
    auto key = load<true>(p, chunk, slot, lane);
    restore_key(key, p.key_transform, kv_head, head_size, lane);
    store(p, p.key, row * p.key_token_stride + kv_head * p.key_head_stride, key, lane);
    auto value = load<false>(p, chunk, slot, lane);
    if (p.planes.v.bits < 8) warp_hadamard_rotate(value, head_size, lane);
    store(p, p.value, row * p.value_token_stride + kv_head * p.value_head_stride, value, lane);
  }

 private:
  template <bool kIsKey>
  static __device__ HeadVector<kPairs> load(const Params& p, int8_t* chunk, int slot, int lane) {
    const KVCache& cache = p.cache;
    const VectorPlanes& planes = p.planes.of(kIsKey);
    const auto float_at = [](const int8_t* byte) {
      return bf16_bits_to_float(*reinterpret_cast<const uint16_t*>(byte));
    };
    const int8_t* params = chunk + planes.scales + Codes<8>::kScaleBytes * slot;
    const float scale = float_at(params);
    HeadVector<kPairs> vector = {};
    with_codes(planes.bits, [&]<typename C>() {
      const PlaneMap<C, kIsKey> map{chunk + planes.codes, cache.block_size, cache.head_size};
      const float middle = C::kHasMidpoint ? float_at(params + cache.midpoint_offset()) : 0.0f;
      for_each_pair(vector, cache.head_size, lane, [&](int pair, float (&x)[2]) {
        const TwoCodes codes = load_codes(map, slot, 2 * pair);
        x[0] = dequantize<C>(codes.first, scale, middle);
        x[1] = dequantize<C>(codes.second, scale, middle);
      });
    });
    return vector;
  }

  static __device__ void store(const Params& p, void* to, int64_t offset,
                               HeadVector<kPairs>& vector, int lane) {
    for_each_pair(vector, p.cache.head_size, lane, [&](int pair, float (&x)[2]) {
      store_pair(to, offset + 2 * pair, p.dtype, x[0], x[1]);
    });
  }
};

template <int kPairs>
__global__ void __launch_bounds__(kGatherWarps * 32)
    gather_cache_low_bit_kernel(const __grid_constant__ LowBitGatherParams p) {
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
    LowBitGather<kPairs>::row(p, cache.chunk(block, kv_head), slot, row, kv_head, lane);
  }
}

template <int kPairs>
cudaError_t launch_low_bit(const LowBitGatherParams& params, cudaStream_t stream) {
  const int64_t blocks = (params.num_rows + kGatherWarps - 1) / kGatherWarps;
  const dim3 grid(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks),
                  static_cast<unsigned>(params.cache.num_kv_heads));
  return launch_kernel(gather_cache_low_bit_kernel<kPairs>, grid, kGatherWarps * 32, 0, stream,
                       params);
}

template <typename Shape, DType kDType>
cudaError_t launch_int8(const Int8GatherParams& params, cudaStream_t stream) {
  const int64_t windows = first_window(params.num_rows, params.num_seqs);
  const dim3 grid(static_cast<unsigned>(windows < kMaxBlocks ? windows : kMaxBlocks),
                  static_cast<unsigned>(params.cache.num_kv_heads));
  return launch_kernel(gather_cache_int8_kernel<Shape, kDType>, grid, kSlotGroup * Shape::kLanes, 0,
                       stream, params);
}

}  // namespace

cudaError_t launch_gather_cache(const GatherCacheParams& params, cudaStream_t stream) {
  if (params.num_rows == 0 || params.num_seqs == 0 || params.cache.num_kv_heads == 0) {
    return cudaSuccess;
  }
  if (!is_vector_aligned(params.cache)) return cudaErrorMisalignedAddress;
  const int head_size = params.cache.head_size;
  if (head_size > max_cuda_head_size(params.cache.format)) return cudaErrorInvalidValue;
  if (params.cache.format == CacheFormat::kK8V8) {
    const Int8GatherParams int8{params, rows_are_aligned(params)};
    return with_rows_of(head_size, params.dtype, [&]<typename Shape, DType kDType>() {
      return launch_int8<Shape, kDType>(int8, stream);
    });
  }
  const LowBitGatherParams low_bits{params, format_planes(params.cache)};
  return head_size <= 64 ? launch_low_bit<1>(low_bits, stream)
                         : launch_low_bit<2>(low_bits, stream);
}

}  // namespace int8kv
