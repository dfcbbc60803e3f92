// The attention kernels of one format: which there are, and which of them a batch gets.
#pragma once

#include "cuda/attention/kernel_choice.h"
#include "cuda/attention/mma/paged_attention_mma.cuh"
#include "cuda/attention/paged_attention_plain.cuh"
#include "cuda/device.cuh"

namespace int8kv {
namespace {

template <auto kKernel>
cudaError_t choose(int rows_per_tile, int shared_bytes, KernelChoice* choice) {
  *choice = {kKernel, 0, rows_per_tile, shared_bytes};
  int blocks = 0;
  const cudaError_t error =
      resident_blocks<kKernel>(kAttentionThreads, static_cast<size_t>(shared_bytes), &blocks);
  choice->num_blocks = blocks < kMaxAttentionBlocks ? blocks : kMaxAttentionBlocks;
  return error;
}

template <typename F, int kSpans, int kRowTiles, bool kSimple>
cudaError_t choose_mma(KernelChoice* choice) {
  using Layout = MmaLayout<F, kSpans, kRowTiles>;
  return choose<paged_attention_decode_kernel<F, kSpans, kRowTiles, kSimple>>(
      Layout::kRows, Layout::kBytes, choice);
}

template <typename F, int kSpans, int kRowTiles>
cudaError_t choose_mma(bool is_simple, KernelChoice* choice) {
  return is_simple ? choose_mma<F, kSpans, kRowTiles, true>(choice)
                   : choose_mma<F, kSpans, kRowTiles, false>(choice);
}

// As many row tiles as the query tokens of a sequence and the query heads per KV head need on
// average, and as the device has shared memory for in two blocks per multiprocessor: with four
// warps it would wait for memory most of the time. A matter of speed alone: every kernel computes
// every batch.
template <typename F, int kSpans>
cudaError_t choose_mma(int64_t num_rows, bool is_simple, KernelChoice* choice) {
  if (num_rows <= 8) return choose_mma<F, kSpans, 1>(is_simple, choice);
  if (num_rows > 16) {
    int most_bytes = 0;
    const cudaError_t error = half_shared_bytes(&most_bytes);
    if (error != cudaSuccess) return error;
    // Never the variant for simple models, which spills registers with so many rows.
    if (MmaLayout<F, kSpans, 4>::kBytes + kScheduleBytes <= most_bytes) {
      return choose_mma<F, kSpans, 4, false>(choice);
    }
  }
  return choose_mma<F, kSpans, 2>(is_simple, choice);
}

// Fewer kernels than with 8 bits, since a wheel has them of 24 formats. Up to 8 rows per KV head
// have a kernel of their own for head size 64 and one for 128, in models with neither softcap nor
// ALiBi. All other batches take one for every head size up to 128, with one row tile or two: heads
// of up to 64 leave half of it idle, and more than 16 rows go over the keys more than once.
template <typename F>
cudaError_t choose_low_bit_mma(int64_t num_rows, int head_size, bool is_simple,
                               KernelChoice* choice) {
  if (num_rows > 8) return choose_mma<F, 2, 2, false>(choice);
  if (!is_simple) return choose_mma<F, 2, 1, false>(choice);
  return head_size <= kSpanDims ? choose_mma<F, 1, 1, true>(choice)
                                : choose_mma<F, 2, 1, true>(choice);
}

}  // namespace

template <typename F>
cudaError_t choose_kernel(const PagedAttentionParams& params, KernelChoice* choice) {
  const int head_size = params.cache.head_size;
  if (head_size > F::kMaxCudaHeadSize) return cudaErrorInvalidValue;
  if (params.dtype == DType::kFloat32 || head_size > 256) {
    return choose<paged_attention_plain_kernel<F>>(kAttentionWarps, 0, choice);
  }
  const int64_t query_len = (params.num_tokens + params.num_seqs - 1) / params.num_seqs;
  const int64_t num_rows = query_len * params.num_queries_per_kv();
  const int spans = head_size <= kSpanDims ? 1 : head_size <= 2 * kSpanDims ? 2 : 4;
  const bool is_simple =
      head_size == spans * kSpanDims && params.softcap == 0.0f && params.alibi_slopes == nullptr;
  if constexpr (F::kMaxCudaHeadSize < kMaxHeadSize) {
    return choose_low_bit_mma<F>(num_rows, head_size, is_simple, choice);
  } else {
    if (spans == 1) return choose_mma<F, 1>(num_rows, is_simple, choice);
    if (spans == 2) return choose_mma<F, 2>(num_rows, is_simple, choice);
    return choose_mma<F, 4, 1>(is_simple, choice);
  }
}

}  // namespace int8kv
