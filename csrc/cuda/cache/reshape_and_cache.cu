// Cache write: equalize and rotate K, quantize K and V, store into the interleaved planes.
//
//   grid   (windows of 16 tokens, num_kv_heads, 2: K and V); block = 16 warps, one token each
//
// At 8 bits one slot owns 2 bytes of every 32-byte line of K and every second byte of a line of V.
// A prompt fills lines together: where 16 tokens in a row go to the 16 slots of one slot group,
// their codes meet in shared memory and leave as 16-byte stores of full lines. The block whose
// window holds the first token of such a group takes all of it; every other token is stored by
// itself.
//
// The bytes equal reference.py's: additions in the order of rotation.h, no multiplication feeds an
// addition (so nothing can contract into an FMA), IEEE division and rintf.
#include "cuda/alignment.h"
#include "cuda/cache/line_maps.h"
#include "cuda/device.cuh"
#include "cuda/key_transform.cuh"
#include "cuda/launch.h"
#include "cuda/plane_codes.cuh"

namespace int8kv {
namespace {

constexpr int kWarps = kSlotGroup;      // tokens of a window
constexpr int kReach = kSlotGroup - 1;  // a group begins at most this far before its last token
constexpr int kSeen = 64;               // slots looked at, from `window - kReach`; 46 are used

// Where a slot is. 32 bits, in which division is cheap, hold every slot of a cache that fits a GPU.
struct SlotPlace {
  uint32_t block;
  int32_t offset;
};

INT8KV_DEVICE SlotPlace place_of(const KVCache& cache, int64_t slot) {
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

// What one warp does with the tokens of its block: K or V of one KV head.
template <typename F, int kPairs>
struct TokenWriter {
  using K = typename F::K;
  using V = typename F::V;
  using Vector = HeadVector<kPairs>;
  static constexpr int kMaxHead = 64 * kPairs;
  static constexpr int kGroupBytes =
      (K::kBits > V::kBits ? K::bytes(kMaxHead) : V::bytes(kMaxHead)) * kSlotGroup;

  const ReshapeAndCacheParams& p;
  bool is_key;
  int kv_head;
  int lane;

  __device__ Vector load(int64_t token) const {
    const int64_t offset = is_key ? token * p.key_token_stride + kv_head * p.key_head_stride
                                  : token * p.value_token_stride + kv_head * p.value_head_stride;
    return load_head<kPairs>(is_key ? p.key : p.value, offset, p.dtype, p.cache.head_size, lane);
  }

  // Quantizes a vector for a slot and writes its scale; store(pair, code, code) gets the codes.
  template <typename Store>
  __device__ void quantize(Vector vector, int8_t* chunk, int offset, Store&& store) const {
    const KVCache& cache = p.cache;
    for_each_pair(vector, cache.head_size, lane, [](int, float (&x)[2]) {
      x[0] = sanitize(x[0]);
      x[1] = sanitize(x[1]);
    });
    if (is_key) transform_key(vector, p.key_transform, kv_head, cache.head_size, lane);
    const float amax = warp_amax(vector);
    const uint16_t scale_bits = is_key ? scale_bits_from_amax<typename F::K>(amax)
                                       : scale_bits_from_amax<typename F::V>(amax);
    const float scale = bf16_bits_to_float(scale_bits);
    const float reciprocal = divide(1.0f, scale);
    for_each_pair(vector, cache.head_size, lane, [&](int pair, float (&x)[2]) {
      store(pair, quantize_by(x[0], scale, reciprocal), quantize_by(x[1], scale, reciprocal));
    });
    if (lane != 0) return;
    if (is_key) {
      PlaneCodes<K>::store_scale(chunk + cache.k_scale<F>(offset), scale_bits);
    } else {
      PlaneCodes<V>::store_scale(chunk + cache.v_scale<F>(offset), scale_bits);
    }
  }

  // Codes to shared memory as those of slot `member` of its slot group, the scale to the cache.
  __device__ void store_in_group(const Vector& vector, int64_t slot, int member,
                                 int8_t* gathered) const {
    const SlotPlace place = place_of(p.cache, slot);
    int8_t* chunk = p.cache.chunk(place.block, kv_head);
    quantize(vector, chunk, place.offset, [&](int pair, int8_t a, int8_t b) {
      if (is_key) {
        PlaneCodes<K>::store_k_dims(gathered + k_gathered_byte<K>(member, 2 * pair), a, b);
      } else {
        PlaneCodes<V>::store_v_dims(gathered + v_gathered_byte<V>(member, 2 * pair), a, b);
      }
    });
  }

  // Codes and scale to the cache.
  __device__ void store_alone(const Vector& vector, int64_t slot) const {
    const KVCache& cache = p.cache;
    const SlotPlace place = place_of(cache, slot);
    int8_t* chunk = cache.chunk(place.block, kv_head);
    quantize(vector, chunk, place.offset, [&](int pair, int8_t a, int8_t b) {
      if (is_key) {
        PlaneCodes<K>::store_k_dims(chunk + cache.k_code<F>(place.offset, 2 * pair), a, b);
      } else {
        PlaneCodes<V>::store_v_dims(chunk + cache.v_code<F>(place.offset, 2 * pair), a, b);
      }
    });
  }

  // The gathered codes of the slot group from `first_slot` on to the cache: one vector per thread.
  __device__ void flush_group(int64_t first_slot, const int8_t* gathered) const {
    const KVCache& cache = p.cache;
    const int vector = threadIdx.x;
    if (vector >=
        (is_key ? gathered_vectors<K>(cache.head_size) : gathered_vectors<V>(cache.head_size))) {
      return;
    }
    const SlotPlace place = place_of(cache, first_slot);
    const int32_t byte = is_key ? k_vector_byte<F>(cache, place.offset, vector)
                                : v_vector_byte<F>(cache, place.offset, vector);
    *reinterpret_cast<uint4*>(cache.chunk(place.block, kv_head) + byte) =
        *reinterpret_cast<const uint4*>(gathered + kVectorBytes * vector);
  }
};

// The full slot groups: bit j says that tokens j to j + 15, whose slots are slots[j] and so on,
// fill one. All lanes of a warp call.
INT8KV_DEVICE uint64_t find_full_groups(const int64_t (&slots)[kSeen + 1], int lane) {
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
  return starts;
}

template <typename F, int kPairs>
__global__ void __launch_bounds__(kWarps * 32, kPairs <= 4 ? 2 : 1)
    reshape_and_cache_kernel(const __grid_constant__ ReshapeAndCacheParams p) {
  using Writer = TokenWriter<F, kPairs>;
  alignas(kVectorBytes) __shared__ int8_t gathered[Writer::kGroupBytes];
  __shared__ int64_t slots[kSeen + 1];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const Writer writer{p, blockIdx.z == 0, static_cast<int>(blockIdx.y), lane};

  for (int64_t window = int64_t{blockIdx.x} * kWarps; window < p.num_tokens;
       window += int64_t{gridDim.x} * kWarps) {
    // This warp's token is on its way while the slots are looked at.
    const int64_t own = window + warp;
    HeadVector<kPairs> vector = {};
    if (own < p.num_tokens) vector = writer.load(own);

    // Look at the slots of the window and of the tokens that may share a group with it.
    if (threadIdx.x <= kSeen) {
      const int64_t token = window - kReach + threadIdx.x;
      const bool exists = threadIdx.x < kWarps + 2 * kReach && token >= 0 && token < p.num_tokens;
      slots[threadIdx.x] = exists ? p.slot_mapping[token] : -1;
    }
    __syncthreads();
    const uint64_t groups = find_full_groups(slots, lane);
    const int first = group_start_in_window(groups);

    // The group that starts in this window, into shared memory.
    if (first >= 0) {
      const int64_t token = window - kReach + first + warp;
      HeadVector<kPairs> member = vector;
      if (token != own) member = writer.load(token);
      writer.store_in_group(member, slots[first] + warp, warp, gathered);
    }

    // This warp's token of the window, if no group has it.
    const int64_t slot = slots[kReach + warp];
    const int in_group = static_cast<int>(static_cast<uint32_t>(slot) % kSlotGroup);
    if (slot >= 0 && !(groups >> (kReach + warp - in_group) & 1)) writer.store_alone(vector, slot);

    // The group's full lines, to the cache.
    __syncthreads();
    if (first >= 0) writer.flush_group(slots[first], gathered);
    __syncthreads();
  }
}

template <typename F, int kPairs>
cudaError_t launch(const ReshapeAndCacheParams& params, cudaStream_t stream) {
  constexpr int64_t kMaxWindows = 65535;
  const int64_t windows = (params.num_tokens + kWarps - 1) / kWarps;
  const dim3 grid(static_cast<unsigned>(windows < kMaxWindows ? windows : kMaxWindows),
                  static_cast<unsigned>(params.cache.num_kv_heads), 2);
  return launch_kernel(reshape_and_cache_kernel<F, kPairs>, grid, kWarps * 32, 0, stream, params);
}

}  // namespace

cudaError_t launch_reshape_and_cache(const ReshapeAndCacheParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0 || params.cache.num_kv_heads == 0) return cudaSuccess;
  if (!is_vector_aligned(params.cache)) return cudaErrorMisalignedAddress;
  if (params.cache.num_blocks > (int64_t{1} << 32) / params.cache.block_size) {
    return cudaErrorInvalidValue;
  }
  return with_cuda_format(params.cache.format, [&]<typename F>() {
    return with_head_pairs(params.cache.head_size,
                           [&]<int kPairs>() { return launch<F, kPairs>(params, stream); });
  });
}

}  // namespace int8kv
