// Cache write: equalize and rotate K, quantize K and V, store into the interleaved planes.
//
//   grid   (windows of 16 tokens, num_kv_heads, 2: K and V); block = 16 warps, one token each
//
// One slot owns 2 bytes of every 32-byte line of K and every second byte of a line of V. A prompt
// fills lines together: where 16 tokens in a row go to the 16 slots of one slot group, their codes
// meet in shared memory and leave as 16-byte stores of full lines. The block whose window holds the
// first token of such a group takes all of it; every other token is stored by itself.
//
// The bytes equal reference.py's: additions in the order of int8_quant.h, no multiplication
// feeds an addition (so nothing can contract into an FMA), IEEE division and rintf.
#include "format/quantizer.h"
#include "cuda/index_maps.h"
#include "cuda/launch.h"
#include "cuda/primitives.cuh"
#include "cuda/row.cuh"

namespace int8kv {
namespace {

constexpr int kWarps = kSlotGroup;      // tokens of a window
constexpr int kReach = kSlotGroup - 1;  // a group begins at most this far before its last token
constexpr int kSeen = 64;               // slots looked at, from `window - kReach`; 46 are used

template <int kPairs>
__device__ Row<kPairs> load_token(const ReshapeAndCacheParams& p, bool is_key, int64_t token,
                                  int kv_head, int lane) {
  const int64_t offset = is_key ? token * p.key_token_stride + kv_head * p.key_head_stride
                                : token * p.value_token_stride + kv_head * p.value_head_stride;
  return load_row<kPairs>(is_key ? p.key : p.value, offset, p.dtype, p.cache.head_size, lane);
}

// Equalizes and rotates.
template <int kPairs>
__device__ void transform_key(const ReshapeAndCacheParams& p, Row<kPairs>& row, int kv_head,
                              int lane) {
  const int head_size = p.cache.head_size;
  if (p.key_equalizer != nullptr) {
    const float* equalizer = p.key_equalizer + int64_t{kv_head} * head_size;
    for_each_pair(row, head_size, lane, [&](int pair, float (&x)[2]) {
      x[0] = sanitize(x[0] / equalizer[2 * pair]);
      x[1] = sanitize(x[1] / equalizer[2 * pair + 1]);
    });
  }
  if (p.rotate_keys) warp_hadamard_rotate(row, head_size, lane);
}

// Where a slot is. 32 bits, in which division is cheap, hold every slot of a cache that fits a GPU.
struct Place {
  uint32_t block;
  int32_t offset;
};

INT8KV_DEVICE Place place_of(const KVCache& cache, int64_t slot) {
  const auto index = static_cast<uint32_t>(slot);
  const auto block_size = static_cast<uint32_t>(cache.block_size);
  const uint32_t block = index / block_size;
  return {block, static_cast<int32_t>(index - block * block_size)};
}

// quantize_value(x, scale) with reciprocal = 1 / scale, correctly rounded: two corrections make the
// quotient so too (Markstein, "Computation of elementary functions on the IBM RISC System/6000
// processor", 1990). Division does the same, and tests for what sanitized values never are.
INT8KV_DEVICE int8_t quantize_by(float x, float scale, float reciprocal) {
  float steps = x * reciprocal;
  steps = fmaf(fmaf(-steps, scale, x), reciprocal, steps);
  steps = fmaf(fmaf(-steps, scale, x), reciprocal, steps);
  return static_cast<int8_t>(rintf(steps));
}

// Quantizes one token; store(pair, code, code) gets the codes, the scale goes to `scales[0]`.
template <int kPairs, typename Store>
__device__ void quantize_token(const ReshapeAndCacheParams& p, bool is_key, Row<kPairs> row,
                               int kv_head, int lane, uint16_t* scales, Store&& store) {
  for_each_pair(row, p.cache.head_size, lane, [](int, float (&x)[2]) {
    x[0] = sanitize(x[0]);
    x[1] = sanitize(x[1]);
  });
  if (is_key) transform_key(p, row, kv_head, lane);
  const uint16_t scale_bits = scale_bits_from_amax(warp_amax(row));
  const float scale = bf16_bits_to_float(scale_bits);
  const float reciprocal = divide(1.0f, scale);
  for_each_pair(row, p.cache.head_size, lane, [&](int pair, float (&x)[2]) {
    store(pair, quantize_by(x[0], scale, reciprocal), quantize_by(x[1], scale, reciprocal));
  });
  if (lane == 0) *scales = scale_bits;
}

INT8KV_DEVICE void store_key_pair(int8_t* line, int8_t first, int8_t second) {
  *reinterpret_cast<uint16_t*>(line) = static_cast<uint16_t>(
      static_cast<uint8_t>(first) | static_cast<uint32_t>(static_cast<uint8_t>(second)) << 8);
}

template <int kPairs>
__global__ void __launch_bounds__(kWarps * 32, kPairs <= 4 ? 2 : 1)
    reshape_and_cache_kernel(const __grid_constant__ ReshapeAndCacheParams p) {
  alignas(16) __shared__ int8_t tile[kPairs * 64 * kSlotGroup];
  __shared__ int64_t slots[kSeen + 1];
  const KVCache& cache = p.cache;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int kv_head = blockIdx.y;
  const bool is_key = blockIdx.z == 0;
  const int64_t scale_plane = is_key ? cache.k_scales() : cache.v_scales();

  for (int64_t window = int64_t{blockIdx.x} * kWarps; window < p.num_tokens;
       window += int64_t{gridDim.x} * kWarps) {
    // This warp's token is on its way while the slots are looked at.
    const int64_t own = window + warp;
    Row<kPairs> row = {};
    if (own < p.num_tokens) row = load_token<kPairs>(p, is_key, own, kv_head, lane);

    // Look at the slots of the window and of the tokens that may share a group with it.
    if (threadIdx.x <= kSeen) {
      const int64_t token = window - kReach + threadIdx.x;
      const bool exists = threadIdx.x < kWarps + 2 * kReach && token >= 0 && token < p.num_tokens;
      slots[threadIdx.x] = exists ? p.slot_mapping[token] : -1;
    }
    __syncthreads();

    // Find the full groups: bit j of `starts` says that tokens j to j + 15 fill one.
    uint64_t runs = 0, starts = 0;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int64_t slot = slots[lane + 32 * part];
      const bool goes_on = slot >= 0 && slots[lane + 32 * part + 1] == slot + 1;
      runs |= static_cast<uint64_t>(ballot(goes_on)) << (32 * part);
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int64_t slot = slots[lane + 32 * part];
      const bool is_start = slot >= 0 && static_cast<uint32_t>(slot) % kSlotGroup == 0 &&
                            group_runs(runs, lane + 32 * part);
      starts |= static_cast<uint64_t>(ballot(is_start)) << (32 * part);
    }
    const int first = group_start_in_window(starts);

    // The group that starts in this window, into shared memory.
    if (first >= 0) {
      const Place place = place_of(cache, slots[first] + warp);
      uint16_t* scales =
          reinterpret_cast<uint16_t*>(cache.chunk(place.block, kv_head) + scale_plane) +
          place.offset;
      const int64_t token = window - kReach + first + warp;
      Row<kPairs> member = row;
      if (token != own) member = load_token<kPairs>(p, is_key, token, kv_head, lane);
      quantize_token<kPairs>(p, is_key, member, kv_head, lane, scales,
                             [&](int pair, int8_t a, int8_t b) {
                               if (is_key) {
                                 store_key_pair(tile + k_tile_byte(warp, 2 * pair), a, b);
                               } else {
                                 tile[v_tile_byte(warp, 2 * pair)] = a;
                                 tile[v_tile_byte(warp, 2 * pair + 1)] = b;
                               }
                             });
    }

    // This warp's token of the window, if no group has it.
    const int64_t slot = slots[kReach + warp];
    const int in_group = static_cast<int>(static_cast<uint32_t>(slot) % kSlotGroup);
    if (slot >= 0 && !(starts >> (kReach + warp - in_group) & 1)) {
      const auto [block, offset] = place_of(cache, slot);
      int8_t* chunk = cache.chunk(block, kv_head);
      uint16_t* scales = reinterpret_cast<uint16_t*>(chunk + scale_plane) + offset;
      quantize_token<kPairs>(p, is_key, row, kv_head, lane, scales,
                             [&](int pair, int8_t a, int8_t b) {
                               if (is_key) {
                                 store_key_pair(chunk + cache.k_code(offset, 2 * pair), a, b);
                               } else {
                                 chunk[cache.v_code(offset, 2 * pair)] = a;
                                 chunk[cache.v_code(offset, 2 * pair + 1)] = b;
                               }
                             });
    }

    // The group's full lines, to the cache: one 16-byte vector per thread.
    __syncthreads();
    if (first >= 0 && static_cast<int>(threadIdx.x) < cache.head_size) {
      const auto [block, offset] = place_of(cache, slots[first]);
      const int vector = threadIdx.x;
      const int64_t byte = is_key ? k_group_vector_byte(cache, offset, vector)
                                  : v_group_vector_byte(cache, offset, vector);
      *reinterpret_cast<uint4*>(cache.chunk(block, kv_head) + byte) =
          *reinterpret_cast<const uint4*>(tile + 16 * vector);
    }
    __syncthreads();
  }
}

template <int kPairs>
cudaError_t launch(const ReshapeAndCacheParams& params, cudaStream_t stream) {
  constexpr int64_t kMaxWindows = 65535;
  const int64_t windows = (params.num_tokens + kWarps - 1) / kWarps;
  const dim3 grid(static_cast<unsigned>(windows < kMaxWindows ? windows : kMaxWindows),
                  static_cast<unsigned>(params.cache.num_kv_heads), 2);
  return launch_kernel(reshape_and_cache_kernel<kPairs>, grid, kWarps * 32, 0, stream, params);
}

}  // namespace

cudaError_t launch_reshape_and_cache(const ReshapeAndCacheParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0 || params.cache.num_kv_heads == 0) return cudaSuccess;
  if (!is_vector_aligned(params.cache)) return cudaErrorMisalignedAddress;
  if (params.cache.num_blocks > (int64_t{1} << 32) / params.cache.block_size) {
    return cudaErrorInvalidValue;
  }
  const int head_size = params.cache.head_size;
  if (head_size <= 64) return launch<1>(params, stream);
  if (head_size <= 128) return launch<2>(params, stream);
  if (head_size <= 256) return launch<4>(params, stream);
  if (head_size <= kMaxHeadSize) return launch<8>(params, stream);
  return cudaErrorInvalidValue;
}

}  // namespace int8kv
