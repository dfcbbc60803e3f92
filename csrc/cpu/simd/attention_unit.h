// One AttentionUnit at work: its place in the batch, a thread's working memory, and the queries as
// integer terms. Included by paged_attention.cpp of this folder, once per instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/vectors.h"

namespace int8kv::cpu::INT8KV_ISA {

namespace {

constexpr float kMaxTerm = 32767.0f;
constexpr float kSecondTerm = 65534.0f;  // the first term is off by at most 0.5
constexpr int kMaxTerms = 2;

// Working memory of one thread. Strides are those of the head size in hand, so that only the part
// in use is touched.
struct Scratch {
  alignas(64) int16_t queries[kMaxTerms * kMaxRows * kMaxHeadSize];  // see Unit::query_terms
  alignas(64) int16_t weights[kMaxTerms * kMaxRows * kTileSlots];    // [term][row][kTileSlots]
  alignas(64) int8_t codes[kTileSlots * kMaxHeadSize];               // of a tile, below 8 bits
  alignas(64) int32_t products[kMaxTerms * kMaxRows * kMaxHeadSize];
  alignas(64) float out[kMaxRows * (kPartialHeader + kMaxHeadSize)];    // of the split in hand
  alignas(64) float total[kMaxRows * (kPartialHeader + kMaxHeadSize)];  // of the splits before it
  alignas(64) float k_scales[kTileSlots];   // 0 past the end of the sequence
  alignas(64) float v_scales[kTileSlots];   // same
  alignas(64) float k_middles[kTileSlots];  // same; of formats that have midpoints
  alignas(64) float v_middles[kTileSlots];  // same
  float maxes[kMaxRows + kLanes];  // the softmax states; lanes past the last row are never used
  float sums[kMaxRows];
  float row_scales[kMaxRows];  // of the first term of the queries, softmax_scale included
  int32_t query_sums[kMaxTerms][kMaxRows];  // of a row's terms
  // Of the rows of the head in hand: the scale of the first term of the weights, and what `out` is
  // multiplied by before a tile is added.
  float weight_scales[kMaxRows];
  int32_t weight_sums[kMaxTerms][kMaxRows];  // of a row's terms in the tile
  float middle_sums[kMaxRows];               // of the probabilities times the midpoints of V
  float rescales[kMaxRows + kLanes];
  bool is_finite[kMaxRows];  // whether the query is
  LaneBlock lane_block;
};

// One unit at work: what does not change from tile to tile.
struct Unit : AttentionUnit {
  const PagedAttentionParams& p;
  Scratch& s;
  float* out;  // [total_rows][partial_size], of the split in hand
  int32_t num_terms;
  int32_t num_queries_per_kv;
  int32_t head_size;
  int32_t block_size;

  Unit(const PagedAttentionParams& params, const AttentionUnit& unit, char* scratch)
      : AttentionUnit(unit),
        p(params),
        s(*reinterpret_cast<Scratch*>(scratch)),
        out(s.out),
        num_terms(params.dtype == DType::kFloat32 ? 2 : 1),
        num_queries_per_kv(params.num_queries_per_kv()),
        head_size(params.cache.head_size),
        block_size(params.cache.block_size) {}

  // Rows are numbered through all heads of the unit, head after head.
  int32_t kv_head(int32_t row) const { return head_begin + row / num_rows; }
  int32_t row_of_head(int32_t row) const { return row_begin + row % num_rows; }
  int64_t token(int32_t row) const { return first_token + row_of_head(row) / num_queries_per_kv; }
  int32_t head(int32_t row) const {
    return kv_head(row) * num_queries_per_kv + row_of_head(row) % num_queries_per_kv;
  }
  int32_t position(int32_t row) const {
    return seq_len - query_len + row_of_head(row) / num_queries_per_kv;
  }
  // The keys [begin, end) that a row sees.
  int32_t key_begin(int32_t row) const {
    if (p.sliding_window == 0) return 0;
    const int64_t begin = static_cast<int64_t>(position(row)) - p.sliding_window + 1;
    return begin > 0 ? static_cast<int32_t>(begin) : 0;
  }
  int32_t key_end(int32_t row) const {
    int64_t end = seq_len;
    if (p.causal) {
      end = static_cast<int64_t>(position(row)) + 1;
    } else if (p.sliding_window != 0) {
      end = static_cast<int64_t>(position(row)) + p.sliding_window;
    }
    return end < 0 ? 0 : end < seq_len ? static_cast<int32_t>(end) : seq_len;
  }
  const int8_t* chunk(int32_t slot, int32_t unit_head) const {
    return p.cache.chunk(p.block_table[seq * p.block_table_stride + slot / block_size],
                         head_begin + unit_head);
  }
  // Those of the rows [0, num_rows) of the head in hand.
  int32_t* products(int32_t row_of_head, int32_t term) const {
    return s.products + (term * num_rows + row_of_head) * kTileSlots;
  }
  int16_t* weights(int32_t row_of_head, int32_t term) const {
    return s.weights + (term * num_rows + row_of_head) * kTileSlots;
  }
  // The terms of the queries of one head lie together.
  int16_t* query_terms(int32_t unit_head, int32_t term) const {
    return s.queries + (unit_head * num_terms + term) * num_rows * head_size;
  }
};

// Equalizes and rotates the queries and turns them into integer terms.
void load_queries(const PagedAttentionParams& p, const AttentionUnit& unit, char* scratch) {
  Unit u(p, unit, scratch);
  Scratch& s = u.s;
  const int64_t bytes = element_size(p.dtype);
  const int32_t num_rows = u.total_rows();
  for (int32_t first = 0; first < num_rows; first += kLanes) {
    const int32_t lanes = num_rows - first < kLanes ? num_rows - first : kLanes;
    LaneBlock& block = s.lane_block;
    const void* vectors[kLanes];
    for (int32_t lane = 0; lane < lanes; ++lane) {
      const int64_t offset =
          u.token(first + lane) * p.query_token_stride + u.head(first + lane) * p.query_head_stride;
      vectors[lane] = static_cast<const char*>(p.query) + offset * bytes;
    }
    load_lanes(
        block, vectors, lanes, p.dtype, u.head_size, [&](f32x16 x, int32_t lane, int32_t dim) {
          const float* factors = p.key_transform.factors(u.kv_head(first + lane), u.head_size);
          return factors == nullptr ? x : x * load<f32x16>(factors + dim);
        });
    if (p.key_transform.rotate) hadamard_rotate(block, u.head_size);
    // NaN survives in the sum, where it would get lost in the maximum.
    f32x16 amax = {}, sum = {};
    for (int32_t dim = 0; dim < u.head_size; ++dim) {
      const f32x16 x = abs(load<f32x16>(block.x + dim * kLanes));
      amax = max(amax, x);
      sum += x;
    }
    const f32x16 has_signal = select(less(f32x16{}, amax), splat(1.0f), f32x16{});
    const f32x16 to_term = select(less(f32x16{}, amax), kMaxTerm / amax, f32x16{});
    for (int32_t lane = 0; lane < lanes; ++lane) {
      s.row_scales[first + lane] = has_signal[lane] * amax[lane] / kMaxTerm * p.softmax_scale;
      s.is_finite[first + lane] = sum[lane] - sum[lane] == 0.0f;
    }
    i32x16 sums[kMaxTerms] = {};
    for (int32_t dim = 0; dim < u.head_size; dim += kLanes) {
      i32x16 terms[kMaxTerms][kLanes];
      for (int32_t d = 0; d < kLanes; ++d) {
        const f32x16 x = load<f32x16>(block.x + (dim + d) * kLanes) * to_term;
        const f32x16 term = round_even(x);
        terms[0][d] = to_ints(term);
        terms[1][d] = to_ints(round_even((x - term) * kSecondTerm));
        for (int t = 0; t < kMaxTerms; ++t) sums[t] += terms[t][d];
      }
      for (int32_t t = 0; t < u.num_terms; ++t) {
        transpose(terms[t]);
        for (int32_t lane = 0; lane < lanes; ++lane) {
          const int32_t row = first + lane;
          int16_t* to = u.query_terms(row / u.num_rows, t) + row % u.num_rows * u.head_size + dim;
          store(to, narrow_to_16(terms[t][lane]));
        }
      }
    }
    for (int32_t lane = 0; lane < lanes; ++lane) {
      for (int t = 0; t < kMaxTerms; ++t) s.query_sums[t][first + lane] = sums[t][lane];
    }
  }
}

}  // namespace

}  // namespace int8kv::cpu::INT8KV_ISA
