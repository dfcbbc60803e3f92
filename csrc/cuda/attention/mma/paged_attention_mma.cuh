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
//
// Below 8 bits codes become odd numbers around 0 (DoubledCodes). A midpoint of K is multiplied by
// the sum of the query and added to the score, one of V by the probability and added to a sum per
// row, which all dims get; the output is rotated back where it is stored.
#pragma once

#include "cuda/attention/mma/mma_item.cuh"
#include "cuda/attention/work_items.cuh"

namespace int8kv {

template <typename F>
constexpr bool kHasTwoPlanes = KSpans<typename F::K>::kHasHigh || VSpans<typename F::V>::kHasHigh;

// Blocks per multiprocessor that the registers are to allow: as many as the shared memory holds, or
// as do without spilling: three where K or V lie in two planes, with 128 dims.
template <typename F, int kSpans, int kRowTiles, bool kSimple>
constexpr int kResidentBlocks =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    1;
#elif defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
    2;
#else
    kSpans > 2 || kRowTiles > 1                    ? 2
    : kSimple && !(kSpans > 1 && kHasTwoPlanes<F>) ? 4
                                                   : 3;
#endif

template <typename F, int kSpans, int kRowTiles, bool kSimple>
__global__ void __launch_bounds__(kAttentionThreads, kResidentBlocks<F, kSpans, kRowTiles, kSimple>)
    paged_attention_decode_kernel(const __grid_constant__ AttentionParams p) {
  using Item = MmaItem<F, kSpans, kRowTiles, kSimple>;
  for_each_work_item(p, Item::kRows, [&](const WorkItem& work_item, const WorkItem& stored_item) {
    Item item(p, work_item);
    item.load_queries(work_item);
    __syncthreads();
    item.attend();
    item.publish();
    __syncthreads();
    item.store(stored_item);
  });
}

}  // namespace int8kv
