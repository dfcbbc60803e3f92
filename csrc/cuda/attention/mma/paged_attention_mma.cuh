// Attention on tensor cores for fp16 and bf16 queries, made for decode and verification.
//
//   block  4 warps; a tile of 8 * kRowTiles query rows of one KV head against a split of its keys
//   warp   every fourth tile of 64 keys, with a softmax state of its own; merged at the end
//
// Each warp copies its codes into a ring of its own in shared memory (code_stream.cuh), laid out so
// that a 16-byte vector holds what one lane multiplies: nothing is shuffled, and the loop has no
// barrier. An 8-bit code becomes fp16 by byte permutes: 0x6400 | (code + 128) is 1152 + code. All
// operands are fp16 for bf16 queries too, each made to fit by a power of two: one per query row,
// one running one for the probabilities times the V scales. A query element is the sum of two fp16
// terms, so that scores are as exact as in fp32 after the rotation too. K scales meet the scores, V
// scales the probabilities; no code is scaled.
#pragma once

#include "cuda/attention/mma/mma_item.cuh"

namespace int8kv {

// Blocks per multiprocessor that the registers are to allow: as many as the shared memory holds, or
// as do without spilling.
template <int kSpans, int kRowTiles, bool kSimple>
constexpr int kResidentBlocks =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    1;
#elif defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
    2;
#else
    kSpans > 2 || kRowTiles > 1 ? 2
    : kSimple                   ? 4
                                : 3;
#endif

template <typename F, int kSpans, int kRowTiles, bool kSimple>
__global__ void __launch_bounds__(kAttentionThreads, kResidentBlocks<kSpans, kRowTiles, kSimple>)
    paged_attention_decode_kernel(const __grid_constant__ PagedAttentionParams p,
                                  const __grid_constant__ Workspace workspace) {
  using Item = MmaItem<F, kSpans, kRowTiles, kSimple>;
  __shared__ WorkItem stored_item;
  for_each_work_item(p, Item::kRows, workspace, [&](const WorkItem& work_item) {
    Item item(p, work_item);
    item.load_queries(work_item);
    if (threadIdx.x == 0) stored_item = work_item;
    __syncthreads();
    item.attend();
    item.publish();
    __syncthreads();
    item.store(stored_item, workspace);
    __syncthreads();
  });
}

}  // namespace int8kv
