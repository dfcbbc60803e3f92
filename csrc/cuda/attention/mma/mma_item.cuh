// One work item on tensor cores, as the four warps of a block compute it: products of queries and
// codes, softmax, products of weights and codes. paged_attention_mma.cuh says how.
#pragma once

#include "cuda/attention/mma/query_tile.cuh"

namespace int8kv {

// The largest weight, a probability times a V scale, becomes 2^14 to 2^15 in fp16, so that 2^-28 of
// it is normal.
constexpr int kLargestWeightExponent = 14;
constexpr int kMinWeightExponent = 20;  // biased; below the smallest scale that is ever stored

// Half a dozen addresses follow from the number of a warp, more where there are midpoints. With one
// row tile, whose registers three or four blocks share, a third of the formats would spill on SM80
// and SM90 if those were held from item to item; on SM100 some spill if they are not.
template <typename F, int kRowTiles>
constexpr bool kHoldsWarp =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    true;
#else
    kRowTiles > 1 || !TileBuffers<F>::kHasMidpoints;
#endif

// The same of addresses that follow from the number of a lane. If they were held, a register would
// spill on SM90 with k8v5 and k8v6, whose V alone lies in two planes, and with k2v4.
template <typename F, int kRowTiles>
constexpr bool kHoldsLane =
    kHoldsWarp<F, kRowTiles> ||
    !(F::K::kBits == 8 ? VSpans<typename F::V>::kHasHigh : F::K::kBits == 2 && F::V::kBits == 4);

// One work item. With kSimple the head size is kSpans * 64 and scores are neither capped nor
// biased, as in most models.
template <typename F, int kSpans, int kRowTiles, bool kSimple>
class MmaItem {
 public:
  using Layout = MmaLayout<F, kSpans, kRowTiles>;
  static constexpr int kRows = Layout::kRows;
  static constexpr int kRing = Layout::kRing;
  static constexpr int kParts = Layout::kParts;
  static constexpr int kPartTiles = Layout::kPartTiles;
  static constexpr int kColumns = 2 * kRowTiles;       // query rows that a lane has scores of
  static constexpr int kPartColumns = 2 * kPartTiles;  // those of one part
  using Scores = float[4][kPartTiles][4];
  using Weights = uint32_t[4][kRowTiles][2];
  using Stream = CodeStream<F, kSpans, kSimple, kRing, Layout::kScaleBuffers>;

  // Starts the first copies.
  __device__ MmaItem(const AttentionParams& params, const WorkItem& work_item)
      : p(params),
        stream{
            params,
            params.block_table + static_cast<uint32_t>(work_item.seq) * params.block_table_stride,
            work_item.kv_head,
            split_keys(params, work_item, kRows),
            lane,
            dynamic_shared() + warp * Layout::kRingBytes,
            dynamic_shared() + Layout::kScales + warp * Layout::kScaleBytes} {
    // Tile n belongs to warp n % 4, wherever the split begins.
    const int32_t tile_begin = tile_of(stream.keys.begin);
    first_tile = tile_begin + ((warp - tile_begin) & (kAttentionWarps - 1));
    stream.begin(first_tile);
    unsigned char* shared = dynamic_shared();
    query = reinterpret_cast<uint32_t*>(shared + Layout::kQuery);
    rows = reinterpret_cast<TileRows<kRows>*>(shared + Layout::kTileRows);
    states = reinterpret_cast<WarpStates<kRows>*>(shared + Layout::kStates);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      row_max(c) = kMinusInfinity;
      row_sum(c) = 0.0f;
      if constexpr (F::V::kHasMidpoint) row_middle(c) = 0.0f;
    }
  }

  // Writes the query operands and TileRows; the caller synchronizes.
  __device__ void load_queries(const WorkItem& item) {
    int8kv::load_queries<F, kSpans, kRowTiles>(p, item, head_size(), query, *rows, query_sums());
  }

  __device__ void attend() {
    int scale_buffer = 0;
    for (int32_t tile = first_tile; tile < stream.tile_end(); tile += kAttentionWarps) {
      Weights weights;
      WeightScale weight_scale;
      if (kParts > 1) stream.template wait<kSpans>();
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        Scores scores = {};
#pragma unroll
        for (int span = 0; span < kSpans; ++span) {
          if (kParts == 1) stream.template wait<1>();
          multiply_keys(span, part, scores);
          if (kParts == 1) stream.release(span);
        }
        const int32_t tile_key = tile * kTileSlots;
        if (tile_key >= rows->seen_by_all.begin && tile_key + kTileSlots <= rows->seen_by_all.end) {
          softmax<false>(tile_key, part, scale_buffer, weight_scale, scores, weights);
        } else {
          softmax<true>(tile_key, part, scale_buffer, weight_scale, scores, weights);
        }
      }
      scale_buffer = (scale_buffer + 1) % Layout::kScaleBuffers;
#pragma unroll
      for (int span = 0; span < kSpans; ++span) {
        if (kParts > 1) stream.release(span);
      }
#pragma unroll
      for (int span = 0; span < kSpans; ++span) {
        stream.template wait<1>();
        multiply_values(span, weights);
        stream.release(kSpans + span);
      }
    }
    copy_async_wait<0>();
  }

  // Leaves this warp's state and output in shared memory; the caller synchronizes.
  __device__ void publish() {
    __syncwarp();  // no lane reads the ring any more
    float* own = reinterpret_cast<float*>(stream.ring);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      float total = row_sum(c);
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) total += shuffle_xor(total, mask);
      const int r = column_row(c);
      if (lane < 4) {
        states->max[warp][r] = row_max(c);
        states->sum[warp][r] = total;
      }
      if constexpr (F::V::kHasMidpoint) {
        float middle = row_middle(c);
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) middle += shuffle_xor(middle, mask);
        float* middles = reinterpret_cast<float*>(dynamic_shared() + Layout::kMiddles);
        if (lane < 4) middles[warp * kRows + r] = middle;
      }
#pragma unroll
      for (int span = 0; span < kSpans; ++span) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const float* x = out[span][v][c / 2];
          const int dim = span * kSpanDims + v_lane_dim(lane) + 2 * v;
          *reinterpret_cast<float2*>(own + r * Layout::kDims + dim) =
              make_float2(x[c % 2], x[c % 2 + 2]);
        }
      }
    }
    // The codes of values with midpoints are doubled (DoubledCodes).
    constexpr int kDoubled = F::V::kHasMidpoint ? 1 : 0;
    if (lane == 0) {
      states->out_scale[warp] = power_of_two(weight_exponent - kLargestWeightExponent - kDoubled);
    }
  }

  // Merges the warps and writes the rows of `item`, which need not stay in registers until then.
  __device__ void store(const WorkItem& item) { store_rows<Layout>(p, item, head_size(), *states); }

 private:
  INT8KV_DEVICE int head_size() const { return stream.sized_cache().head_size; }

  // The query row of a lane's column c of the scores and the output.
  INT8KV_DEVICE int column_row(int c) const { return c / 2 * 8 + lane % 4 * 2 + c % 2; }

  // The largest score of column c's row so far, in units of log2, and the sum over this lane's
  // keys: in shared memory where registers are few.
  INT8KV_DEVICE float& row_max(int c) { return lane_state(c); }
  INT8KV_DEVICE float& row_sum(int c) { return lane_state(kColumns + c); }
  // The sum of probabilities times midpoints of V, likewise.
  INT8KV_DEVICE float& row_middle(int c) { return lane_state(2 * kColumns + c); }
  INT8KV_DEVICE float& lane_state(int i) {
    if constexpr (kParts == 1) return state[i];
    float* states_of_lanes = reinterpret_cast<float*>(dynamic_shared() + Layout::kLaneStates);
    return states_of_lanes[i * kAttentionThreads + threadIdx.x];
  }

  // Twice the sum of each row's query, as the operands have it.
  INT8KV_DEVICE float* query_sums() const {
    return reinterpret_cast<float*>(dynamic_shared() + Layout::kQuerySums);
  }

  __device__ void multiply_keys(int span, int part, Scores& scores) {
    const int ahead = kParts > 1 ? span : 0;
#pragma unroll
    for (int step = 0; step < kSpanDims / 16; ++step) {
      if (!kSimple && span * kSpanDims + step * 16 >= head_size()) break;
      const auto codes = stream.k_codes(step, ahead);
      uint4 q[kPartTiles];
#pragma unroll
      for (int n = 0; n < kPartTiles; ++n) {
        const int row_tile = part * kPartTiles + n;
        const int operand = ((span * 4 + step) * kRowTiles + row_tile) * 32 + lane;
        q[n] = *reinterpret_cast<const uint4*>(query + 4 * operand);
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        uint32_t a[4];
        codes.to_half2(w, a);
#pragma unroll
        for (int n = 0; n < kPartTiles; ++n) {
          mma_m16n8k16(scores[w][n], a, q[n].x, q[n].y);
          mma_m16n8k16(scores[w][n], a, q[n].z, q[n].w);
        }
      }
    }
  }

  __device__ void multiply_values(int span, const Weights& weights) {
    if (!kSimple && span * kSpanDims >= head_size()) return;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const auto codes = stream.v_codes(span, w);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        uint32_t a[4];
        codes.to_half2(v, a);
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
          mma_m16n8k16(out[span][v][n], a, weights[w][n][0], weights[w][n][1]);
        }
      }
    }
  }

  // Scores of this lane's 8 keys x kPartColumns rows, in units of log2: scaled, capped, biased and,
  // with kMasked, masked in place.
  template <bool kMasked>
  __device__ void finish_scores(int32_t tile_key, int part, const uint4& k_scales, Scores& scores) {
    const int32_t first_key = tile_key + k_lane_slot(lane);
#pragma unroll
    for (int c = 0; c < kPartColumns; ++c) {
      const int r = column_row(part * kPartColumns + c);
      const float factor = rows->score_factor[r];
      [[maybe_unused]] float query_sum = 0.0f;
      if constexpr (F::K::kHasMidpoint) query_sum = query_sums()[r];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& score = scores[i / 2][c / 2][i % 2 * 2 + c % 2];
        if constexpr (F::K::kHasMidpoint) {
          const float middle = scale_of(stream.midpoints_of(k_scales), i);
          score = (score * scale_of(k_scales, i) + middle * query_sum) * factor;
        } else {
          score *= scale_of(k_scales, i) * factor;
        }
      }
      if (!kSimple && p.softcap > 0.0f) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& score = scores[i / 2][c / 2][i % 2 * 2 + c % 2];
          score = p.softcap * kLog2e * tanh_fast(score);
        }
      }
      if (!kSimple && p.alibi_slopes != nullptr) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          scores[i / 2][c / 2][i % 2 * 2 + c % 2] +=
              rows->alibi_slope[r] * static_cast<float>(first_key + i - rows->position[r]);
        }
      }
      if (kMasked) {
        const KeyRange visible = rows->visible[r];
        const int32_t begin = max(visible.begin, stream.keys.begin);
        const int32_t end = min(visible.end, stream.keys.end);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& score = scores[i / 2][c / 2][i % 2 * 2 + c % 2];
          score = first_key + i >= begin && first_key + i < end ? score : kMinusInfinity;
        }
      }
    }
  }

  // tanh within 1e-6 of the result's range; exact at both ends.
  static INT8KV_DEVICE float tanh_fast(float x) {
    return 1.0f - 2.0f / (exp2_fast(2.0f * kLog2e * x) + 1.0f);
  }

  // The scale of a tile's weights: what the output so far is multiplied by, since the scale has
  // grown from the tile before, and what V scales are multiplied by.
  struct WeightScale {
    float out_factor;
    float v_factor;
  };

  // V scale of key i of this lane's 8. Those that no row sees may be anything, NaN included.
  template <bool kMasked>
  __device__ float value_scale(int32_t tile_key, const uint4& v_scales, int i) const {
    const int32_t key = tile_key + k_lane_slot(lane) + i;
    const bool is_seen = !kMasked || (key >= stream.keys.begin && key < stream.keys.end);
    return is_seen ? scale_of(v_scales, i) : 0.0f;
  }

  // The midpoints of this lane's 8 V, as they are stored: registers are few. 0 of keys that no row
  // sees.
  template <bool kMasked>
  __device__ uint4 v_midpoints(int32_t tile_key, int scale_buffer) const {
    uint4 middles = stream.midpoints_of(stream.v_scales(scale_buffer));
    if (kMasked) {
      const int32_t first = tile_key + k_lane_slot(lane);
      const auto is_seen = [&](int i) {
        return first + i >= stream.keys.begin && first + i < stream.keys.end;
      };
      uint32_t* words[] = {&middles.x, &middles.y, &middles.z, &middles.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        *words[i] &= (is_seen(2 * i) ? 0xffffu : 0u) | (is_seen(2 * i + 1) ? 0xffff0000u : 0u);
      }
    }
    return middles;
  }

  // Raises the scale of the weights where a tile's V scales ask for it.
  template <bool kMasked>
  __device__ WeightScale raise_weight_scale(int32_t tile_key, const uint4& v_scales) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      largest = fmaxf(largest, value_scale<kMasked>(tile_key, v_scales, i));
    }
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
    const int exponent = max(weight_exponent, static_cast<int>(float_bits(largest) >> 23));
    const WeightScale scale{power_of_two(127 + weight_exponent - exponent),
                            power_of_two(254 - exponent + kLargestWeightExponent)};
    weight_exponent = exponent;
    return scale;
  }

  // Updates the running state of a part's rows by one tile and turns its scores into the second
  // operand of the output: fp16 weights, which are probabilities times V scales, as multiples of
  // 2^(weight_exponent - kLargestWeightExponent). The first part finds the exponent.
  template <bool kMasked>
  __device__ void softmax(int32_t tile_key, int part, int scale_buffer, WeightScale& weight_scale,
                          Scores& scores, Weights& weights) {
    finish_scores<kMasked>(tile_key, part, stream.k_scales(scale_buffer), scores);
    const uint4 v_scales = stream.v_scales(scale_buffer);
    if (part == 0) weight_scale = raise_weight_scale<kMasked>(tile_key, v_scales);
    float v_factors[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      v_factors[i] = value_scale<kMasked>(tile_key, v_scales, i) * weight_scale.v_factor;
    }
    uint4 v_middles = {};
    if constexpr (F::V::kHasMidpoint) v_middles = v_midpoints<kMasked>(tile_key, scale_buffer);
    float rescale[kPartColumns];
    bool is_rescaled = false;
#pragma unroll
    for (int c = 0; c < kPartColumns; ++c) {
      rescale[c] = weigh_column(part, c, v_factors, v_middles, scores) * weight_scale.out_factor;
      is_rescaled |= rescale[c] != 1.0f;
    }
    if (ballot(is_rescaled) != 0) {  // rarely, once the largest score has been seen
      rescale_out(part, rescale);
    }
    transpose_weights(part, scores, weights);
  }

  // Turns the scores of column c of a part into weights in place and adds them to the row's state;
  // returns by what the row's output so far is to be multiplied.
  INT8KV_DEVICE float weigh_column(int part, int c, const float (&v_factors)[8],
                                   [[maybe_unused]] const uint4& v_middles, Scores& scores) {
    float& old_max = row_max(part * kPartColumns + c);
    float tile_max = kMinusInfinity;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      tile_max = fmaxf(tile_max, scores[i / 2][c / 2][i % 2 * 2 + c % 2]);
    }
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
      tile_max = fmaxf(tile_max, shuffle_xor(tile_max, mask));
    }
    const float new_max = fmaxf(old_max, tile_max);
    const float origin = new_max == kMinusInfinity ? 0.0f : new_max;
    const float decay = exp2_fast(old_max - origin);
    old_max = new_max;
    float tile_sum = 0.0f;
    [[maybe_unused]] float tile_middle = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& score = scores[i / 2][c / 2][i % 2 * 2 + c % 2];
      const float probability = exp2_fast(score - origin);
      tile_sum += probability;
      if constexpr (F::V::kHasMidpoint) tile_middle += probability * scale_of(v_middles, i);
      score = probability * v_factors[i];
    }
    float& total = row_sum(part * kPartColumns + c);
    total = total * decay + tile_sum;
    if constexpr (F::V::kHasMidpoint) {
      float& middle = row_middle(part * kPartColumns + c);
      middle = middle * decay + tile_middle;
    }
    return decay;
  }

  INT8KV_DEVICE void rescale_out(int part, const float (&rescale)[kPartColumns]) {
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
#pragma unroll
        for (int c = 0; c < kPartColumns; ++c) {
          float (&x)[4] = out[span][v][part * kPartTiles + c / 2];
          x[c % 2] *= rescale[c];
          x[c % 2 + 2] *= rescale[c];
        }
      }
    }
  }

  // Lane (g, t) has keys by g and rows by t; the operand wants keys by t and rows by g.
  INT8KV_DEVICE void transpose_weights(int part, const Scores& scores, Weights& weights) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
#pragma unroll
      for (int n = 0; n < kPartTiles; ++n) {
        const uint32_t even = transpose_8x8(pack_half2(scores[w][n][0], scores[w][n][1]));
        const uint32_t odd = transpose_8x8(pack_half2(scores[w][n][2], scores[w][n][3]));
        weights[w][part * kPartTiles + n][0] = byte_permute(even, odd, 0x5410);
        weights[w][part * kPartTiles + n][1] = byte_permute(even, odd, 0x7632);
      }
    }
  }

  const AttentionParams& p;
  const int lane =
      (kHoldsLane<F, kRowTiles> ? threadIdx.x : static_cast<unsigned>(opaque(threadIdx.x))) % 32;
  const int warp = kHoldsWarp<F, kRowTiles> ? threadIdx.x / 32 : opaque(threadIdx.x / 32);
  Stream stream;
  int32_t first_tile;  // of this warp
  uint32_t* query;
  TileRows<kRows>* rows;
  WarpStates<kRows>* states;

  int weight_exponent = kMinWeightExponent;
  float state[kParts == 1 ? Layout::kColumnStates * kColumns : 1];
  float out[kSpans][4][kRowTiles][4] = {};
};

}  // namespace int8kv
