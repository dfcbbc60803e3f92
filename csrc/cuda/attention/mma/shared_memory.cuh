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

// Dynamic shared memory: rings | scales | query operands | TileRows | WarpStates | lane states |
// sums of the rows' queries, where keys have midpoints | sums of midpoints of each warp and row,
// where values have some. A warp's ring holds its output when an item ends.
template <typename F, int kSpans, int kRowTiles>
struct MmaLayout {
  using Format = F;
  using Buffers = TileBuffers<F>;
  // Row tiles whose scores are in registers at once; a warp goes over the keys of a tile once for
  // each part, and for that holds a whole tile.
  static constexpr int kPartTiles = kRowTiles < 2 ? kRowTiles : 2;
  static constexpr int kParts = kRowTiles / kPartTiles;
  // Spans of fewer bits are smaller: about as many bytes are on their way with every format.
  static constexpr int kBytesAhead = 2 * kTileSlots * kSpanDims;
  static constexpr int kSpansAhead = (kBytesAhead - 1) / Buffers::kSpanBytes + 1;
  static constexpr int kRing = kParts > 1 ? 2 * kSpans : kSpansAhead < 4 ? kSpansAhead : 4;
  // Tiles whose scales are on their way or in use: a tile's are read when its spans of K are.
  static constexpr int kTilesAhead = (kSpans + kRing - 1) / (2 * kSpans);
  static constexpr int kScaleBuffers = 1 + (kTilesAhead > 1 ? kTilesAhead : 1);
  static constexpr int kRows = 8 * kRowTiles;
  static constexpr int kDims = kSpans * kSpanDims;
  static constexpr int kOutBytes = kRows * kDims * 4;
  static constexpr int kCodeBytes = kRing * Buffers::kSpanBytes;
  static constexpr int kRingBytes = kCodeBytes > kOutBytes ? kCodeBytes : kOutBytes;  // of a warp
  static constexpr int kScaleBytes = kScaleBuffers * Buffers::kScaleBytes;            // of a warp
  static constexpr int kScales = kAttentionWarps * kRingBytes;
  static constexpr int kQuery = kScales + kAttentionWarps * kScaleBytes;
  static constexpr int kTileRows = kQuery + kRows * kDims * kQueryTerms * 2;
  static constexpr int kStates = kTileRows + static_cast<int>(sizeof(TileRows<kRows>));
  static constexpr int kLaneStates = kStates + static_cast<int>(sizeof(WarpStates<kRows>));
  // Of each column of the scores: maximum, sum and, where values have midpoints, their sum.
  static constexpr int kColumnStates = F::V::kHasMidpoint ? 3 : 2;
  static constexpr int kLaneStateBytes =
      kParts > 1 ? kColumnStates * 2 * kRowTiles* kAttentionThreads * 4 : 0;
  static constexpr int kQuerySums = kLaneStates + kLaneStateBytes;
  static constexpr int kMiddles = kQuerySums + (F::K::kHasMidpoint ? kRows * 4 : 0);
  static constexpr int kBytes = kMiddles + (F::V::kHasMidpoint ? kAttentionWarps * kRows * 4 : 0);
};

}  // namespace int8kv
