// Per-channel quantization of [num_tokens, num_channels], the ladder of arXiv 2601.04719 and one
// rung beyond it.
//
//   scales[c]   = max_t |x[t][c]| / 127
//   codes[t][c] = round_half_even(x[t][c] / scales[c]), saturated at +-127; NaN becomes 0
//
//   naive       one thread per element, blocks of 16 x 16: a warp touches two rows and stores
//               single bytes
//   tiled       the same through shared memory: no element is used twice, so this adds a barrier
//               and nothing else
//   coarsened   4 elements of a row per thread, 16 apart so that a warp's accesses stay together:
//               fewer threads, the same bytes per instruction
//   vectorized  16 bytes of x and 4 or 8 codes per access; a thread keeps its channels from token
//               to token and so reads their scales once. Needs rows that start on whole vectors, as
//               every head size gives; any other matrix takes `coarsened`
//   fused       finds the scales, too, in one launch: strips of channels that fit into the L2 cache
//               are read twice, and from memory once (quantize_queue.h)
//
// What a rung gains is for the records of benchmarks/ladder to say. To compare with: 5 bytes must
// move per element of fp32, 3 per element of 16 bits.
#include "cuda/device.cuh"
#include "ladder/launch.h"
#include "ladder/quantize_per_channel.cuh"
#include "ladder/quantize_queue.h"

namespace int8kv {
namespace {

constexpr int kTile = 16;
constexpr int kTileThreads = kTile * kTile;
constexpr int kCoarsening = 4;
constexpr int kVectorThreads = 256;
constexpr int kUnroll = 4;  // independent vectors in flight per thread
constexpr int64_t kMaxGridY = 65535;

// The first token of this thread in a grid of 16 x 16 tiles, and the way to its next.
INT8KV_DEVICE int64_t tile_token() { return int64_t{blockIdx.y} * kTile + threadIdx.x / kTile; }
INT8KV_DEVICE int64_t tile_step() { return int64_t{gridDim.y} * kTile; }

template <typename Op>
__global__ void __launch_bounds__(kTileThreads)
    per_channel_naive_kernel(const __grid_constant__ typename Op::Params p) {
  const int64_t channel = int64_t{blockIdx.x} * kTile + threadIdx.x % kTile;
  if (channel >= p.num_channels) return;
  for (int64_t token = tile_token(); token < p.num_tokens; token += tile_step()) {
    Op::store(p, token, channel, Op::load(p, token, channel), p.scales[channel]);
  }
}

template <typename Op>
__global__ void __launch_bounds__(kTileThreads)
    per_channel_tiled_kernel(const __grid_constant__ typename Op::Params p) {
  __shared__ typename Op::Value tile[kTileThreads];
  const int64_t channel = int64_t{blockIdx.x} * kTile + threadIdx.x % kTile;
  for (int64_t first = int64_t{blockIdx.y} * kTile; first < p.num_tokens; first += tile_step()) {
    const int64_t token = first + threadIdx.x / kTile;
    const bool exists = token < p.num_tokens && channel < p.num_channels;
    if (exists) tile[threadIdx.x] = Op::load(p, token, channel);
    __syncthreads();
    if (exists) Op::store(p, token, channel, tile[threadIdx.x], p.scales[channel]);
  }
}

template <typename Op>
__global__ void __launch_bounds__(kTileThreads)
    per_channel_coarsened_kernel(const __grid_constant__ typename Op::Params p) {
  const int64_t first = int64_t{blockIdx.x} * (kTile * kCoarsening) + threadIdx.x % kTile;
  for (int64_t token = tile_token(); token < p.num_tokens; token += tile_step()) {
#pragma unroll
    for (int i = 0; i < kCoarsening; ++i) {
      const int64_t channel = first + i * kTile;
      if (channel >= p.num_channels) break;
      Op::store(p, token, channel, Op::load(p, token, channel), p.scales[channel]);
    }
  }
}

// How a block of `vectorized` covers the matrix: `columns` threads along the channels, the others
// along the tokens.
struct VectorPlan {
  int32_t columns;           // a power of two
  int32_t tokens_per_block;  // a multiple of kUnroll * kVectorThreads / columns
  int64_t column_blocks;
};

template <typename Op>
__global__ void __launch_bounds__(kVectorThreads)
    per_channel_vectorized_kernel(const __grid_constant__ typename Op::Params p,
                                  const __grid_constant__ VectorPlan plan) {
  const int64_t column =
      blockIdx.x % plan.column_blocks * plan.columns + threadIdx.x % plan.columns;
  const int64_t channel = column * Op::kVector;
  if (channel >= p.num_channels) return;
  const int rows = kVectorThreads / plan.columns;
  const int64_t begin = blockIdx.x / plan.column_blocks * plan.tokens_per_block;
  const int64_t end = min(begin + plan.tokens_per_block, p.num_tokens);
  float scales[Op::kVector];
#pragma unroll
  for (int i = 0; i < Op::kVector; ++i) scales[i] = p.scales[channel + i];
  for (int64_t first = begin + threadIdx.x / plan.columns; first < end; first += kUnroll * rows) {
    typename Op::Vector vectors[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i * rows < end) vectors[i] = *Op::vector_at(p, first + i * rows, channel);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t token = first + i * rows;
      if (token < end) *Op::result_at(p, token, channel) = Op::convert(p, vectors[i], scales);
    }
  }
}

// What the blocks of the fused kernel tell each other; zero before the launch.
struct QueueState {
  uint32_t* ticket;   // the next to be handed out
  uint32_t* amax;     // [num_channels] bits of the largest magnitude so far
  uint32_t* arrived;  // [num_strips] amax items done
  uint32_t* ready;    // [num_strips] 1 when the strip's scales are written
};

// Puts the maxima of an item into state.amax; the block that completes a strip writes its scales.
template <int kBytes>
__device__ void amax_item(const QuantizePerChannelParams& p, const QuantizeQueue& queue,
                          const QueueState& state, const QueueItem& item, bool is_aligned) {
  constexpr int kVector = 16 / kBytes;
  __shared__ uint32_t strip_amax[kMaxStripVectors * kVector];
  __shared__ bool completes;
  const int column = threadIdx.x % queue.strip_vectors;
  const int rows = kQueueThreads / queue.strip_vectors;
  const int64_t strip_channel = item.strip * queue.strip_channels;
  const int64_t channel = strip_channel + column * kVector;
  for (int i = threadIdx.x; i < queue.strip_channels; i += kQueueThreads) strip_amax[i] = 0;
  __syncthreads();

  // Own tokens. A NaN compares false and is left out.
  float largest[kVector] = {};
  const auto take = [&](int i, float x) {
    const float magnitude = fabsf(x);
    largest[i] = magnitude > largest[i] ? magnitude : largest[i];
  };
  const int64_t first = item.first_token + threadIdx.x / queue.strip_vectors;
  const int64_t end = channel < p.num_channels ? p.num_tokens : 0;
  if (is_aligned) {
    uint4 vectors[kQueuePasses] = {};
#pragma unroll
    for (int pass = 0; pass < kQueuePasses; ++pass) {
      const int64_t token = first + pass * rows;
      if (token < end) vectors[pass] = *Quantize<kBytes>::vector_at(p, token, channel);
    }
#pragma unroll
    for (int pass = 0; pass < kQueuePasses; ++pass) {
      float x[kVector];
      unpack<kBytes>(vectors[pass], p.dtype, x);
#pragma unroll
      for (int i = 0; i < kVector; ++i) take(i, x[i]);
    }
  } else {
    for (int pass = 0; pass < kQueuePasses && first + pass * rows < end; ++pass) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (channel + i >= p.num_channels) break;
        take(i, Quantize<kBytes>::load(p, first + pass * rows, channel + i));
      }
    }
  }

  // Lanes of a warp with the same channels, then warps, then blocks. As bits, magnitudes keep their
  // order.
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    for (int mask = queue.strip_vectors; mask < 32; mask *= 2) {
      largest[i] = fmaxf(largest[i], shuffle_xor(largest[i], mask));
    }
    if (static_cast<int>(threadIdx.x % 32) < queue.strip_vectors) {
      atomic_max(strip_amax + column * kVector + i, float_bits(largest[i]));
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < queue.strip_channels; i += kQueueThreads) {
    if (strip_channel + i < p.num_channels)
      atomic_max(state.amax + strip_channel + i, strip_amax[i]);
  }

  // Every maximum of this block is out before its arrival is.
  fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    completes = atomic_add(state.arrived + item.strip, 1) + 1 == queue.items_per_strip;
    fence();
  }
  __syncthreads();
  if (!completes) return;
  for (int i = threadIdx.x; i < queue.strip_channels; i += kQueueThreads) {
    if (strip_channel + i >= p.num_channels) break;
    const float amax = bits_to_float(load_acquire(state.amax + strip_channel + i));
    p.scales[strip_channel + i] = scale_from_amax<Codes<8>>(fminf(amax, kMaxMagnitude));
  }
  fence();
  __syncthreads();
  if (threadIdx.x == 0) store_release(state.ready + item.strip, 1);
}

template <int kBytes>
__device__ void quantize_item(const QuantizePerChannelParams& p, const QuantizeQueue& queue,
                              const QueueState& state, const QueueItem& item, bool is_aligned) {
  constexpr int kVector = 16 / kBytes;
  if (threadIdx.x == 0) wait_until_set(state.ready + item.strip);
  __syncthreads();
  const int rows = kQueueThreads / queue.strip_vectors;
  const int64_t channel =
      item.strip * queue.strip_channels + threadIdx.x % queue.strip_vectors * kVector;
  if (channel >= p.num_channels) return;
  float scales[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    // Past L1, which may hold this line from before the scales were written.
    scales[i] = channel + i < p.num_channels ? load_from_l2(p.scales + channel + i) : 1.0f;
  }
  const int64_t first = item.first_token + threadIdx.x / queue.strip_vectors;
  if (!is_aligned) {
    for (int pass = 0; pass < kQueuePasses; ++pass) {
      const int64_t token = first + pass * rows;
      if (token >= p.num_tokens) return;
      for (int i = 0; i < kVector && channel + i < p.num_channels; ++i) {
        const float x = Quantize<kBytes>::load(p, token, channel + i);
        Quantize<kBytes>::store(p, token, channel + i, x, scales[i]);
      }
    }
    return;
  }
  uint4 vectors[kQueuePasses];
#pragma unroll
  for (int pass = 0; pass < kQueuePasses; ++pass) {
    const int64_t token = first + pass * rows;
    if (token < p.num_tokens) {
      vectors[pass] = load_last_use(Quantize<kBytes>::vector_at(p, token, channel));
    }
  }
#pragma unroll
  for (int pass = 0; pass < kQueuePasses; ++pass) {
    const int64_t token = first + pass * rows;
    if (token >= p.num_tokens) return;
    *Quantize<kBytes>::result_at(p, token, channel) =
        Quantize<kBytes>::convert(p, vectors[pass], scales);
  }
}

// Takes tickets until there are none. The next one is fetched while the current one is worked on.
template <int kBytes>
__global__ void __launch_bounds__(kQueueThreads, 2)
    quantize_fused_kernel(const __grid_constant__ QuantizePerChannelParams p,
                          const __grid_constant__ QuantizeQueue queue,
                          const __grid_constant__ QueueState state, int64_t num_tickets,
                          bool is_aligned) {
  __shared__ uint32_t tickets[2];
  if (threadIdx.x == 0) tickets[0] = atomic_add(state.ticket, 1);
  for (int turn = 0;; turn = 1 - turn) {
    __syncthreads();
    const int64_t ticket = tickets[turn];
    if (ticket >= num_tickets) return;
    if (threadIdx.x == 0) tickets[1 - turn] = atomic_add(state.ticket, 1);
    const QueueItem item = queue_item(queue, ticket);
    if (item.is_amax) {
      amax_item<kBytes>(p, queue, state, item, is_aligned);
    } else {
      quantize_item<kBytes>(p, queue, state, item, is_aligned);
    }
  }
}

int element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

bool is_aligned(const void* x, int64_t x_row_bytes, const void* codes, int64_t num_channels,
                int bytes) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0 && x_row_bytes % 16 == 0 &&
         reinterpret_cast<uintptr_t>(codes) % (16 / bytes) == 0 && num_channels % (16 / bytes) == 0;
}
bool is_aligned(const QuantizePerChannelParams& p) {
  const int bytes = element_bytes(p.dtype);
  return is_aligned(p.x, p.x_token_stride * bytes, p.codes, p.num_channels, bytes);
}
bool is_aligned(const DequantizePerChannelParams& p) {
  const int bytes = element_bytes(p.dtype);
  return is_aligned(p.x, p.num_channels * bytes, p.codes, p.num_channels, bytes);
}

dim3 tile_grid(int64_t num_tokens, int64_t num_channels, int channels_per_block) {
  const int64_t rows = (num_tokens + kTile - 1) / kTile;
  return dim3(static_cast<unsigned>((num_channels + channels_per_block - 1) / channels_per_block),
              static_cast<unsigned>(min(rows, kMaxGridY)));
}

template <typename Op>
cudaError_t launch_vectorized(const typename Op::Params& p, cudaStream_t stream) {
  constexpr int64_t kMaxColumns = 64;
  constexpr int64_t kEnoughBlocks = 2048;  // for every multiprocessor of a large GPU, twice
  const int64_t vectors = p.num_channels / Op::kVector;
  VectorPlan plan{};
  plan.columns = 1;
  while (plan.columns < vectors && plan.columns < kMaxColumns) plan.columns *= 2;
  plan.column_blocks = (vectors + plan.columns - 1) / plan.columns;
  const auto blocks_of = [&](int64_t tokens) {
    return (p.num_tokens + tokens - 1) / tokens * plan.column_blocks;
  };
  // More tokens per block read the scales less often, as long as every multiprocessor has work; at
  // least so many that the grid has no more than 2^31 - 1 blocks.
  plan.tokens_per_block = kUnroll * kVectorThreads / plan.columns;
  for (int i = 0; i < 2; ++i) {
    if (blocks_of(2 * plan.tokens_per_block) >= kEnoughBlocks) plan.tokens_per_block *= 2;
  }
  while (blocks_of(plan.tokens_per_block) > INT32_MAX) plan.tokens_per_block *= 2;
  const dim3 grid(static_cast<unsigned>(blocks_of(plan.tokens_per_block)));
  return launch_kernel(per_channel_vectorized_kernel<Op>, grid, kVectorThreads, 0, stream, p, plan);
}

template <typename Op>
cudaError_t launch_variant(const typename Op::Params& p, CudaVariant variant, cudaStream_t stream) {
  if (variant == CudaVariant::kVectorized && is_aligned(p)) return launch_vectorized<Op>(p, stream);
  const bool is_wide = variant == CudaVariant::kCoarsened || variant == CudaVariant::kVectorized;
  const auto kernel = is_wide                          ? per_channel_coarsened_kernel<Op>
                      : variant == CudaVariant::kTiled ? per_channel_tiled_kernel<Op>
                                                       : per_channel_naive_kernel<Op>;
  const dim3 grid = tile_grid(p.num_tokens, p.num_channels, is_wide ? kTile * kCoarsening : kTile);
  return launch_kernel(kernel, grid, kTileThreads, 0, stream, p);
}

template <int kBytes>
cudaError_t launch_queue(const QuantizePerChannelParams& p, bool quantize, void* workspace,
                         size_t workspace_bytes, cudaStream_t stream) {
  int resident = 0;
  int64_t l2 = 0;
  cudaError_t error = resident_blocks<quantize_fused_kernel<kBytes>>(kQueueThreads, 0, &resident);
  if (error == cudaSuccess) error = l2_bytes(&l2);
  if (error == cudaSuccess) error = zero_async(workspace, workspace_bytes, stream);
  if (error != cudaSuccess) return error;
  // A quarter: beside the strip that is quantized the cache holds the one whose maxima are taken,
  // the codes, and what else the GPU does. Without a second reading, wide strips are best.
  const int64_t strip_bytes = quantize ? l2 / 4 : INT64_MAX;
  QuantizeQueue queue =
      make_quantize_queue(p.num_tokens, p.num_channels, kBytes, strip_bytes, resident);
  const int64_t num_tickets = (quantize ? 2 : 1) * queue.num_items();
  if (!quantize) queue.lead = queue.num_items();
  if (num_tickets + 2 * int64_t{resident} > UINT32_MAX) return cudaErrorInvalidValue;
  QueueState state{};
  state.ticket = static_cast<uint32_t*>(workspace);
  state.amax = state.ticket + 1;
  state.arrived = state.amax + p.num_channels;
  state.ready = state.arrived + queue.num_strips;
  const dim3 grid(static_cast<unsigned>(min(int64_t{resident}, num_tickets)));
  return launch_kernel(quantize_fused_kernel<kBytes>, grid, kQueueThreads, 0, stream, p, queue,
                       state, num_tickets, is_aligned(p));
}

}  // namespace

size_t quantize_per_channel_workspace_bytes(const QuantizePerChannelParams& p) {
  const int64_t strips = (p.num_channels + kMinStripChannels - 1) / kMinStripChannels;
  return sizeof(uint32_t) * (1 + p.num_channels + 2 * strips);
}

cudaError_t launch_quantize_per_channel(const QuantizePerChannelParams& p, CudaVariant variant,
                                        void* workspace, size_t workspace_bytes,
                                        cudaStream_t stream) {
  if (workspace_bytes < quantize_per_channel_workspace_bytes(p)) return cudaErrorInvalidValue;
  const bool is_fused = variant == CudaVariant::kFused;
  const bool is_wide = element_bytes(p.dtype) == 4;
  if (is_fused && !p.compute_scales) return cudaErrorInvalidValue;
  if (p.compute_scales && p.num_channels > 0) {
    const cudaError_t error =
        is_wide ? launch_queue<4>(p, is_fused, workspace, workspace_bytes, stream)
                : launch_queue<2>(p, is_fused, workspace, workspace_bytes, stream);
    if (is_fused || error != cudaSuccess) return error;
  }
  if (p.num_tokens == 0 || p.num_channels == 0) return cudaSuccess;
  return is_wide ? launch_variant<Quantize<4>>(p, variant, stream)
                 : launch_variant<Quantize<2>>(p, variant, stream);
}

cudaError_t launch_dequantize_per_channel(const DequantizePerChannelParams& p, CudaVariant variant,
                                          cudaStream_t stream) {
  if (variant == CudaVariant::kFused) return cudaErrorInvalidValue;
  if (p.num_tokens == 0 || p.num_channels == 0) return cudaSuccess;
  return element_bytes(p.dtype) == 4 ? launch_variant<Dequantize<4>>(p, variant, stream)
                                     : launch_variant<Dequantize<2>>(p, variant, stream);
}

}  // namespace int8kv
