// Opt-in checks of what the host cannot see without waiting: slots, block ids and lengths that lie
// on the device. The CPU operators check the same, with the same words. A launch more per operator;
// safe inside a CUDA graph.
#include "cuda/attention/visible_keys.h"
#include "cuda/device.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace int8kv {
namespace {

constexpr int kThreads = 128;

__global__ void check_slots_kernel(const __grid_constant__ ReshapeAndCacheParams p) {
  const int64_t num_slots = p.cache.num_blocks * p.cache.block_size;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.num_tokens; i += step) {
    if (p.slot_mapping[i] >= num_slots) {
      fail_check("slot_mapping[%lld] is %lld but kv_cache has %lld slots", i, p.slot_mapping[i],
                 num_slots);
    }
  }
}

// What is read of the block table for one sequence.
struct Reads {
  const int32_t* blocks;  // of the sequence
  int64_t seq;
  int64_t begin, end;  // positions
};

// By the threads of a block together.
INT8KV_DEVICE void check_blocks(const KVCache& cache, const Reads& reads, int64_t max_blocks) {
  const int64_t last = (reads.end + cache.block_size - 1) / cache.block_size;
  if (last > max_blocks) {
    fail_check("sequence %lld reads up to position %lld but block_table has %lld columns",
               reads.seq, reads.end, max_blocks);
    return;
  }
  for (int64_t i = reads.begin / cache.block_size + threadIdx.x; i < last; i += kThreads) {
    if (reads.blocks[i] < 0 || reads.blocks[i] >= cache.num_blocks) {
      fail_check("block_table[%lld, %lld] is %lld, which kv_cache does not have", reads.seq, i,
                 reads.blocks[i]);
    }
  }
}

// Whether row bounds are in order: [begin, end) of one sequence.
INT8KV_DEVICE bool check_rows(const char* name_and_values, int64_t seq, int64_t begin, int64_t end,
                              int64_t num_rows) {
  if ((seq > 0 || begin == 0) && begin <= end && end <= num_rows) return true;
  fail_check(name_and_values, seq, begin, end);
  return false;
}

__global__ void check_attention_kernel(const __grid_constant__ PagedAttentionParams p,
                                       int64_t max_blocks) {
  for (int64_t seq = blockIdx.x; seq < p.num_seqs; seq += gridDim.x) {
    const int64_t begin = p.query_start_loc[seq], end = p.query_start_loc[seq + 1];
    const int32_t seq_len = p.seq_lens[seq];
    if (!check_rows("query_start_loc must start at 0, not decrease and not exceed the tokens of "
                    "query; sequence %lld has %lld, %lld",
                    seq, begin, end, p.num_tokens)) {
      continue;
    }
    if (begin == end) continue;
    if (seq_len < 0 || (p.causal && end - begin > seq_len)) {
      fail_check("sequence %lld has %lld query tokens but seq_lens says %lld", seq, end - begin,
                 seq_len);
      continue;
    }
    const auto first = static_cast<int32_t>(seq_len - (end - begin));
    check_blocks(p.cache,
                 {p.block_table + seq * p.block_table_stride, seq,
                  visible_keys(p, first, seq_len).begin, seq_len},
                 max_blocks);
  }
}

__global__ void check_gather_kernel(const __grid_constant__ GatherCacheParams p,
                                    int64_t max_blocks) {
  for (int64_t seq = blockIdx.x; seq < p.num_seqs; seq += gridDim.x) {
    const int64_t begin = p.cu_seq_lens[seq], end = p.cu_seq_lens[seq + 1];
    const int64_t first = p.seq_starts[seq];
    if (!check_rows("cu_seq_lens must start at 0, not decrease and not exceed the rows of key; "
                    "sequence %lld has %lld, %lld",
                    seq, begin, end, p.num_rows)) {
      continue;
    }
    if (begin == end) continue;
    if (first < 0) {
      fail_check("seq_starts[%lld] must not be negative, got %lld", seq, first, 0);
      continue;
    }
    check_blocks(p.cache,
                 {p.block_table + seq * p.block_table_stride, seq, first, first + end - begin},
                 max_blocks);
  }
}

unsigned blocks_for(int64_t count) {
  constexpr int64_t kMost = 65535;
  return static_cast<unsigned>(count < kMost ? count : kMost);
}

}  // namespace

cudaError_t launch_check_bounds(const ReshapeAndCacheParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return cudaSuccess;
  const int64_t blocks = (params.num_tokens + kThreads - 1) / kThreads;
  return launch_kernel(check_slots_kernel, dim3(blocks_for(blocks)), kThreads, 0, stream, params);
}

cudaError_t launch_check_bounds(const PagedAttentionParams& params, int64_t max_blocks_per_seq,
                                cudaStream_t stream) {
  if (params.num_seqs == 0) return cudaSuccess;
  return launch_kernel(check_attention_kernel, dim3(blocks_for(params.num_seqs)), kThreads, 0,
                       stream, params, max_blocks_per_seq);
}

cudaError_t launch_check_bounds(const GatherCacheParams& params, int64_t max_blocks_per_seq,
                                cudaStream_t stream) {
  if (params.num_seqs == 0) return cudaSuccess;
  return launch_kernel(check_gather_kernel, dim3(blocks_for(params.num_seqs)), kThreads, 0, stream,
                       params, max_blocks_per_seq);
}

}  // namespace int8kv
