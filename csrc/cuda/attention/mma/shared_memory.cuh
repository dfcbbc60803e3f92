// Shared memory of the tensor-core kernel.
#pragma once

#include "cuda/attention/mma/code_stream.cuh"

namespace int8kv {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kQueryTerms = 2;  // fp16 terms of a query element, 11 bits each

// What the rows of a tile need besides their operands.
template <int kRows>
struct TileRows {
  float score_factor[kRows];  // power of two of the row times softmax_scale, see finish_scores()
  float alibi_slope[kRows];
  int32_t position[kRows];
  KeyRange visible[kRows];
  KeyRange seen_by_all;  // of the split's keys or more
};

// The states of the warps at the end of an item.
template <int kRows>
struct WarpStates {
  float max[kAttentionWarps][kRows];  // of score * log2(e)
  float sum[kAttentionWarps][kRows];
  float out_scale[kAttentionWarps];  // what the warp's output is to be multiplied by
};

// Dynamic shared memory: rings | scales | query operands | TileRows | WarpStates | lane states. A
// warp's ring holds its output when an item ends.
template <typename F, int kSpans, int kRowTiles>
struct MmaLayout {
  using Buffers = TileBuffers<F>;
  // Row tiles whose scores are in registers at once; a warp goes over the keys of a tile once for
  // each part, and for that holds a whole tile.
  static constexpr int kPartTiles = kRowTiles < 2 ? kRowTiles : 2;
  static constexpr int kParts = kRowTiles / kPartTiles;
  static constexpr int kRing = kParts > 1 ? 2 * kSpans : 2;
  static constexpr int kRingBytes = kRing * Buffers::kSpanBytes;            // of a warp
  static constexpr int kScaleBytes = kScaleBuffers * Buffers::kScaleBytes;  // of a warp
  static constexpr int kRows = 8 * kRowTiles;
  static constexpr int kDims = kSpans * kSpanDims;
  static constexpr int kScales = kAttentionWarps * kRingBytes;
  static constexpr int kQuery = kScales + kAttentionWarps * kScaleBytes;
  static constexpr int kTileRows = kQuery + kRows * kDims * kQueryTerms * 2;
  static constexpr int kStates = kTileRows + static_cast<int>(sizeof(TileRows<kRows>));
  static constexpr int kLaneStates = kStates + static_cast<int>(sizeof(WarpStates<kRows>));
  static constexpr int kLaneStateBytes = kParts > 1 ? 4 * kRowTiles* kAttentionThreads * 4 : 0;
  static constexpr int kBytes = kLaneStates + kLaneStateBytes;
  static_assert(kRows * kDims * 4 <= kRingBytes, "a warp's output must fit its ring");
};

}  // namespace int8kv
