// Cache write: launch of the kernel of eight bits (int8_writer.cuh), and the one that all other
// formats share.
//
//   grid   (windows of 16 tokens, num_kv_heads, 2: K and V); block = 16 warps, one token each
//
// The bytes equal reference.py's: additions in the order of rotation.h, no multiplication feeds an
// addition (so nothing can contract into an FMA), IEEE division and rintf.
#include "cuda/alignment.h"
#include "cuda/cache/int8_writer.cuh"
#include "cuda/cache/low_bit_writer.cuh"
#include "cuda/cache/slot_groups.cuh"
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace int8kv {
namespace {

constexpr int kWarps = kSlotGroup;  // tokens of a window

template <int kPairs>
__global__ void __launch_bounds__(kWarps * 32, 2)
    reshape_and_cache_low_bit_kernel(const __grid_constant__ LowBitWriteParams p) {
  using Writer = LowBitWriter<kPairs>;
  alignas(kVectorBytes) __shared__ int8_t gathered[Writer::kGroupBytes];
  __shared__ SeenSlots slots;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const Writer writer{p, blockIdx.z == 0, static_cast<int>(blockIdx.y), lane};

  for (int64_t window = int64_t{blockIdx.x} * kWarps; window < p.num_tokens;
       window += int64_t{gridDim.x} * kWarps) {
    // This warp's token is on its way while the slots are looked at.
    const int64_t own = window + warp;
    HeadVector<kPairs> vector = {};
    if (own < p.num_tokens) vector = writer.load(own);

    const SlotGroups groups = look_at_slots(p, window, slots, lane);

    // The group that starts in this window, into shared memory.
    if (groups.has_group()) {
      const int64_t token = groups.first_token(window) + warp;
      HeadVector<kPairs> member = vector;
      if (token != own) member = writer.load(token);
      writer.store_in_group(member, groups.first_slot(slots) + warp, warp, gathered);
    }

    // This warp's token of the window, if no group has it.
    const int64_t slot = groups.slot_alone(slots, warp);
    if (slot >= 0) writer.store_alone(vector, slot);

    // The group's full lines, to the cache.
    __syncthreads();
    if (groups.has_group()) writer.flush_group(groups.first_slot(slots), gathered);
    __syncthreads();
  }
}

constexpr int64_t kMaxWindows = 65535;

unsigned num_windows(int64_t num_tokens) {
  const int64_t windows = (num_tokens + kSlotGroup - 1) / kSlotGroup;
  return static_cast<unsigned>(windows < kMaxWindows ? windows : kMaxWindows);
}

template <int kPairs>
cudaError_t launch_low_bit(const LowBitWriteParams& params, cudaStream_t stream) {
  const dim3 grid(num_windows(params.num_tokens), static_cast<unsigned>(params.cache.num_kv_heads),
                  2);
  return launch_kernel(reshape_and_cache_low_bit_kernel<kPairs>, grid, kWarps * 32, 0, stream,
                       params);
}

template <typename Shape, DType kDType>
cudaError_t launch_int8(const Int8WriteParams& params, cudaStream_t stream) {
  constexpr auto kKernel = reshape_and_cache_int8_kernel<Shape, kDType>;
  constexpr int kThreads = kSlotGroup * Shape::kLanes;
  // Few tokens are spread over all KV heads. Of many, a block takes several heads, one on its way
  // while another is computed, as long as every multiprocessor has blocks to follow.
  int resident = 0;
  const cudaError_t error = resident_blocks<kKernel>(kThreads, 0, &resident);
  if (error != cudaSuccess) return error;
  const unsigned windows = num_windows(params.num_tokens);
  const auto heads = static_cast<unsigned>(params.cache.num_kv_heads);
  const unsigned wanted = (2 * static_cast<unsigned>(resident) + windows - 1) / windows;
  return launch_kernel(kKernel, dim3(windows, wanted < heads ? wanted : heads), kThreads, 0, stream,
                       params);
}

}  // namespace

cudaError_t launch_reshape_and_cache(const ReshapeAndCacheParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0 || params.cache.num_kv_heads == 0) return cudaSuccess;
  if (!is_vector_aligned(params.cache)) return cudaErrorMisalignedAddress;
  if (params.cache.num_blocks > (int64_t{1} << 32) / params.cache.block_size ||
      params.cache.head_size > max_cuda_head_size(params.cache.format)) {
    return cudaErrorInvalidValue;
  }
  const int head_size = params.cache.head_size;
  if (params.cache.format == CacheFormat::kK8V8) {
    const auto equalizer = reinterpret_cast<uintptr_t>(params.key_transform.equalizer);
    const Int8WriteParams int8{params, rows_are_aligned(params), equalizer % kVectorBytes == 0};
    return with_rows_of(head_size, params.dtype, [&]<typename Shape, DType kDType>() {
      return launch_int8<Shape, kDType>(int8, stream);
    });
  }
  const LowBitWriteParams low_bits{params, format_planes(params.cache)};
  return head_size <= 64 ? launch_low_bit<1>(low_bits, stream)
                         : launch_low_bit<2>(low_bits, stream);
}

}  // namespace int8kv
