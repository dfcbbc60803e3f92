// What the CUDA kernels on the cache offer to csrc/ops. No Torch.
//
// Every launcher only enqueues kernels on `stream`: it neither allocates nor synchronizes, its
// launch shapes come from sizes that the host knows, and it is safe inside a CUDA graph capture.
// The returned error is that of the launches; arguments are checked by csrc/ops before.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "format/params.h"

namespace int8kv {

// Quantizes params.num_tokens keys and values into their slots.
//
// Requires: cache.data, cache.block_stride and cache.head_stride multiples of 16 bytes; at most
// 2^32 slots; a head size of at most max_cuda_head_size().
cudaError_t launch_reshape_and_cache(const ReshapeAndCacheParams& params, cudaStream_t stream);

// Writes keys and values of stretches of sequences as floats; rows from the smaller of num_rows and
// cu_seq_lens[num_seqs] on are left alone.
//
// Requires: the alignment and the head sizes of launch_reshape_and_cache().
cudaError_t launch_gather_cache(const GatherCacheParams& params, cudaStream_t stream);

// Checks what an operator is told by integers on the device, as the CPU operators do on the host;
// whatever is wrong is printed, and the kernel fails. For a first run, where no number of a caller
// is trusted yet.
cudaError_t launch_check_bounds(const ReshapeAndCacheParams& params, cudaStream_t stream);
cudaError_t launch_check_bounds(const PagedAttentionParams& params, int64_t max_blocks_per_seq,
                                cudaStream_t stream);
cudaError_t launch_check_bounds(const GatherCacheParams& params, int64_t max_blocks_per_seq,
                                cudaStream_t stream);

// Bytes of device memory that launch_paged_attention() needs on the current device, a few for every
// thread block that it holds at once and none for a sequence:
//   2 * num_blocks * rows_per_tile * (head_size + 2) * 4 + 12 * num_blocks
cudaError_t paged_attention_workspace_bytes(const PagedAttentionParams& params, size_t* bytes);

// Loads every kernel that launch_paged_attention() may choose for batches of params.dtype over
// params.cache, of which the format and the head size count: a graph capture must not be what loads
// them first. Returns how many `arrivals` they need.
cudaError_t prepare_paged_attention(const PagedAttentionParams& params, int64_t* num_arrivals);

// Attention of every row over its sequence's keys. The thread blocks that the device holds at once
// share the work equally; what they share is merged by those that end last. The bits of a row
// depend on the lengths of all sequences of the batch. fp16 and bf16 up to head_size 256 run on
// tensor cores with fp16 operands and fp32 sums; fp32 and head_size 512 run in fp32. Formats below
// 8 bits likewise, with fewer variants for speed: format_kernels.cuh says which.
//
// `arrivals` are counters in device memory, all 0 and left so, for one launch at a time: the caller
// keeps some for each stream. Null: those in the workspace are zeroed first, by a launch more.
//
// Requires: the alignment and the head sizes of launch_reshape_and_cache(); num_heads a multiple of
// num_kv_heads; workspace aligned to 16 bytes, contents arbitrary; as many arrivals as
// prepare_paged_attention() says. Anything else returns cudaErrorInvalidValue, or
// cudaErrorMisalignedAddress for addresses.
cudaError_t launch_paged_attention(const PagedAttentionParams& params, void* workspace,
                                   size_t workspace_bytes, uint32_t* arrivals, int64_t num_arrivals,
                                   cudaStream_t stream);

}  // namespace int8kv
