// Attention of up to kMaxRows query rows over a range of keys. Compiled once per instruction set.
//
//   s_i = softmax_scale * (k_scale_i * (q . k_i) + k_middle_i * sum(q))
//   out = sum_i exp(s_i - lse) * (v_scale_i * v_i + v_middle_i)
//
// where k_i and v_i are codes, less levels / 2 below 8 bits, and only formats below 8 bits have
// midpoints: a midpoint costs one multiplication per key or row, not one per element.
//
// Both products run on integers (dot_pairs.h): queries as 15 bits and a sign relative to the row's
// maximum, and exp(s_i - max) * v_scale_i likewise relative to the tile's maximum. fp32 queries get
// two such terms, the second for the rounding error of the first. K scales multiply scores and V
// scales probabilities, so no code is ever turned into a float.
//
// Tiles start at multiples of kTileSlots and splits at multiples of kSplitSlots, whatever the
// batch, and splits merge in order: the bits of a row depend on nothing but the row and its keys.
#include "cpu/simd/attention_unit.h"
#include "cpu/simd/dot_fields.h"
#include "cpu/simd/dot_pairs.h"
#include "cpu/simd/kernels.h"
#include "format/softmax_state.h"

namespace int8kv::cpu::INT8KV_ISA {

namespace {

// Where no weight of a tile exceeds this, kMaxTerm divided by the largest could overflow: such a
// tile adds nothing to the output.
constexpr float kMinWeight = 1e-34f;

// The parts of a tile that lie in one block each, in order: f(first slot, relative to the tile;
// first slot, relative to the block; number of slots; chunk).
template <typename F>
INT8KV_INLINE void for_each_block(const Unit& u, int32_t unit_head, int32_t tile_begin,
                                  int32_t tile_end, const F& f) {
  for (int32_t slot = tile_begin; slot < tile_end;) {
    const int32_t offset = slot % u.block_size;
    int32_t count = u.block_size - offset;
    count = count < tile_end - slot ? count : tile_end - slot;
    f(slot - tile_begin, offset, count, u.chunk(slot, unit_head));
    slot += count;
  }
}

// The chunk whose keys follow the values of `slot`: that of the unit's next head, or of its first
// head kTileSlots on; null if there is none. Blocks lie anywhere, so that no hardware finds the
// next one; one plane ahead fits the L1 cache.
const int8_t* next_chunk(const Unit& u, int32_t unit_head, int32_t slot) {
  if (unit_head + 1 < u.num_unit_heads) return u.chunk(slot, unit_head + 1);
  return slot + kTileSlots < u.seq_len ? u.chunk(slot + kTileSlots, 0) : nullptr;
}

// `count` scales or midpoints from `bytes` on, 0 up to the end of their last slot group.
INT8KV_INLINE void load_params(float* to, const int8_t* bytes, int32_t count) {
  const int32_t padded = round_up(count, kSlotGroup);
  for (int32_t i = 0; i < padded; i += kLanes) {
    store(to + i, bf16_to_floats(load<u16x16>(bytes + i * sizeof(uint16_t))));
  }
  for (int32_t i = count; i < padded; ++i) to[i] = 0.0f;
}

// The scales and midpoints of `count` slots of a tile from slot `at` on.
template <typename F>
INT8KV_INLINE void load_scales(Scratch& s, const KVCache& cache, const int8_t* chunk,
                               int32_t offset, int32_t at, int32_t count) {
  const int8_t* k_scales = chunk + cache.k_scale<F>(offset);
  const int8_t* v_scales = chunk + cache.v_scale<F>(offset);
  load_params(s.k_scales + at, k_scales, count);
  load_params(s.v_scales + at, v_scales, count);
  if (F::K::kHasMidpoint) load_params(s.k_middles + at, k_scales + cache.midpoint_offset(), count);
  if (F::V::kHasMidpoint) load_params(s.v_middles + at, v_scales + cache.midpoint_offset(), count);
}

// The part of a prefetch of `bytes` of a block's plane that belongs to `count` of its slots.
INT8KV_INLINE int32_t share_of(int32_t bytes, int32_t count, int32_t block_size) {
  return static_cast<int32_t>(static_cast<int64_t>(bytes) * count / block_size);
}

// The shape, the terms and the products of a multiplication with `count` slots of K, or of V; the
// codes are the caller's to fill in.
template <typename Dot>
INT8KV_INLINE Dot dot_of_keys(Unit& u, int32_t unit_head, int32_t at, int32_t count) {
  Dot d;
  d.a = u.query_terms(unit_head, 0);
  d.a_stride = u.head_size;
  d.c = u.s.products + at;
  d.c_stride = kTileSlots;
  d.num_rows = u.num_terms * u.num_rows;
  d.num_groups = (count + kSlotGroup - 1) / kSlotGroup;
  d.num_pairs = u.head_size / 2;
  d.accumulate = false;
  return d;
}

template <typename Dot>
INT8KV_INLINE Dot dot_of_values(Unit& u, int32_t at, int32_t count) {
  Dot d;
  d.a = u.s.weights + at;
  d.a_stride = kTileSlots;
  d.c = u.s.products;
  d.c_stride = u.head_size;
  d.num_rows = u.num_terms * u.num_rows;
  d.num_groups = u.head_size / kDimGroup;
  d.num_pairs = (count + 1) / 2;
  d.accumulate = at > 0;
  return d;
}

// Products of the terms of a head's queries with `count` keys from slot `offset` of a chunk on.
template <typename F>
INT8KV_INLINE void multiply_keys(Unit& u, int32_t unit_head, const int8_t* chunk, int32_t offset,
                                 int32_t at, int32_t count) {
  using K = typename F::K;
  const KVCache& cache = u.p.cache;
  if constexpr (!K::kHasMidpoint) {
    auto d = dot_of_keys<DotPairs>(u, unit_head, at, count);
    d.b = chunk + cache.k_code<F>(offset, 0);
    d.group_stride = cache.k_group_stride<F>();
    d.prefetch_ahead = cache.v_codes<F>();  // these slots' V codes are next
    dot_pairs<K>(d);
  } else {
    auto d = dot_of_keys<DotFields>(u, unit_head, at, count);
    d.scratch = u.s.codes;
    d.low = chunk + K::Low::k_byte(u.head_size, offset, 0);
    d.low_stride = K::Low::k_group_bytes(u.head_size);
    d.high = nullptr;
    d.high_stride = 0;
    if constexpr (K::kBits > K::kLowBits) {
      d.high = chunk + K::Low::k_bytes(u.block_size, u.head_size) +
               K::High::k_byte(u.head_size, offset, 0);
      d.high_stride = K::High::k_group_bytes(u.head_size);
    }
    const int32_t v_bytes = F::V::v_bytes(u.block_size, u.head_size);
    d.prefetch_bytes = share_of(v_bytes, count, u.block_size);
    d.prefetch = reinterpret_cast<const char*>(chunk) + cache.v_codes<F>() +
                 share_of(v_bytes, offset, u.block_size);
    dot_fields<K, true>(d);
  }
}

// Products of the terms of a head's weights with `count` values; `next` is the chunk to read next.
template <typename F>
INT8KV_INLINE void multiply_values(Unit& u, const int8_t* chunk, const int8_t* next, int32_t offset,
                                   int32_t at, int32_t count) {
  using V = typename F::V;
  const KVCache& cache = u.p.cache;
  if constexpr (!V::kHasMidpoint) {
    auto d = dot_of_values<DotPairs>(u, at, count);
    d.b = chunk + cache.v_code<F>(offset, 0);
    d.group_stride = cache.v_group_stride<F>();
    d.prefetch_ahead = next ? next - chunk - cache.v_codes<F>() : 0;
    dot_pairs<V>(d);
  } else {
    auto d = dot_of_values<DotFields>(u, at, count);
    d.scratch = u.s.codes;
    const int8_t* codes = chunk + cache.v_codes<F>();
    d.low = codes + V::Low::v_byte(u.block_size, offset, 0);
    d.low_stride = V::Low::v_group_bytes(u.block_size);
    d.high = nullptr;
    d.high_stride = 0;
    if constexpr (V::kBits > V::kLowBits) {
      d.high = codes + V::Low::v_bytes(u.block_size, u.head_size) +
               V::High::v_byte(u.block_size, offset, 0);
      d.high_stride = V::High::v_group_bytes(u.block_size);
    }
    d.prefetch = reinterpret_cast<const char*>(next);
    d.prefetch_bytes = share_of(cache.v_codes<F>(), count, u.block_size);
    dot_fields<V, false>(d);
  }
}

// Products with codes less half the levels: 2 * sum(a * code) - levels * sum(a), which is exact in
// 32 bits and stands for twice the sum. With 8 bits the products are left as they are.
template <typename C>
INT8KV_INLINE f32x16 centered(i32x16 products, [[maybe_unused]] int32_t sum_of_terms) {
  if constexpr (!C::kHasMidpoint) {
    return to_floats(products);
  } else {
    return to_floats(products + products - C::kLevels * sum_of_terms) * 0.5f;
  }
}

// products[term][row][slot] of one head's rows in the tile, and its scales.
template <typename F>
void score_tile(Unit& u, int32_t unit_head, int32_t tile_begin, int32_t tile_end) {
  for_each_block(u, unit_head, tile_begin, tile_end,
                 [&](int32_t at, int32_t offset, int32_t count, const int8_t* chunk) {
                   multiply_keys<F>(u, unit_head, chunk, offset, at, count);
                   load_scales<F>(u.s, u.p.cache, chunk, offset, at, count);
                 });
}

// A row of the head in hand, in one tile.
struct TileRow {
  int32_t row;            // of the unit
  int32_t* products;      // [kTileSlots] of the first term; then the scores, then the weights
  const int32_t* second;  // products of the second term, if there is one
  int32_t tile_begin;
  int32_t tile_slots;
};

// Scores of a row in place of its products, -inf where it sees no key. Returns the maximum, lane by
// lane. kPlain: one term, all keys in sight, nothing but the scales.
template <typename K, bool kPlain>
INT8KV_INLINE f32x16 score_row(const Unit& u, const TileRow& t) {
  const PagedAttentionParams& p = u.p;
  const float* k_scales = u.s.k_scales;
  const float row_scale = u.s.row_scales[t.row];
  const int32_t first_sum = u.s.query_sums[0][t.row], second_sum = u.s.query_sums[1][t.row];
  [[maybe_unused]] float query_sum = static_cast<float>(first_sum);
  if (!kPlain && u.num_terms == 2) query_sum += static_cast<float>(second_sum) / kSecondTerm;
  int32_t begin = 0, end = 0;
  if (!kPlain) {
    begin = u.key_begin(t.row) - t.tile_begin;
    end = u.key_end(t.row) - t.tile_begin;
  }
  const i32x16 lane = iota();
  f32x16 max_score = splat(kMinusInfinity);
  for (int32_t i = 0; i < t.tile_slots; i += kLanes) {
    f32x16 x = centered<K>(load<i32x16>(t.products + i), first_sum);
    if (!kPlain && u.num_terms == 2) {
      x += centered<K>(load<i32x16>(t.second + i), second_sum) * (1.0f / kSecondTerm);
    }
    if constexpr (K::kHasMidpoint) {
      x = (x * load<f32x16>(k_scales + i) + load<f32x16>(u.s.k_middles + i) * query_sum) *
          row_scale;
    } else {
      x = x * row_scale * load<f32x16>(k_scales + i);
    }
    if (!kPlain && p.softcap > 0.0f) x = tanh(x / p.softcap) * p.softcap;
    if (!kPlain && p.alibi_slopes) {
      const i32x16 distance = lane + (t.tile_begin + i - u.position(t.row));
      x += to_floats(distance) * p.alibi_slopes[u.head(t.row)];
    }
    if (!kPlain && (i < begin || i + kLanes > end)) {
      const f32x16 slot = to_floats(lane + i);
      x = select(less(slot, splat(begin)), splat(kMinusInfinity), x);
      x = select(less(slot, splat(end)), x, splat(kMinusInfinity));
    }
    max_score = max(max_score, x);
    store(t.products + i, x);
  }
  return max_score;
}

// exp(score - shift) * v_scale of a row in place of its scores. Returns the sums of the
// probabilities and leaves the largest weight and the sums of the midpoints, lane by lane.
template <typename V>
INT8KV_INLINE f32x16 weigh_row(const Scratch& s, const TileRow& t, float shift, f32x16& max_weight,
                               f32x16& middle_sum) {
  f32x16 sum = {}, largest = {}, middles = {};
  for (int32_t i = 0; i < t.tile_slots; i += kLanes) {
    const f32x16 probability = exp_negative(load<f32x16>(t.products + i) - shift);
    sum += probability;
    // By select, not by the product: keys out of sight may lie in a block that was given back, and
    // their scales may be NaN.
    const auto in_sight = less(f32x16{}, probability);
    const f32x16 weight = select(in_sight, probability * load<f32x16>(s.v_scales + i), f32x16{});
    largest = max(largest, weight);
    store(t.products + i, weight);
    if constexpr (V::kHasMidpoint) {
      middles += select(in_sight, probability * load<f32x16>(s.v_middles + i), f32x16{});
    }
  }
  max_weight = largest;
  middle_sum = middles;
  return sum;
}

// The weights of a row as integer terms relative to `to_term`; `second` is null if one term is all.
// Leaves the sums of the terms where codes are centered by them: whole numbers, exact in fp32.
template <typename V>
INT8KV_INLINE void quantize_weights(const TileRow& t, float to_term, int16_t* first,
                                    int16_t* second, int32_t* first_sum, int32_t* second_sum) {
  f32x16 sums[kMaxTerms] = {};
  for (int32_t i = 0; i < t.tile_slots; i += kLanes) {
    const f32x16 x = load<f32x16>(t.products + i) * to_term;
    const f32x16 rounded = round_even(x), rest = (x - rounded) * kSecondTerm;
    store(first + i, round_to_16(x));
    if (second) store(second + i, round_to_16(rest));
    if constexpr (V::kHasMidpoint) {
      sums[0] += rounded;
      if (second) sums[1] += round_even(rest);
    }
  }
  if constexpr (V::kHasMidpoint) {
    *first_sum = static_cast<int32_t>(reduce_add(sums[0]));
    *second_sum = static_cast<int32_t>(reduce_add(sums[1]));
  }
}

// Turns the products of one head's rows into scores, masks them and updates the rows' softmax;
// leaves the weights exp(s - max) * v_scale as integer terms. Every step goes over all rows before
// the next: a row is a chain of three reductions, and only other rows can hide their latency.
template <typename F>
void weigh_tile(Unit& u, int32_t unit_head, int32_t tile_begin, int32_t tile_slots) {
  Scratch& s = u.s;
  const int32_t first = unit_head * u.num_rows, num_rows = u.num_rows;
  const auto row_of = [&](int32_t i) {
    return TileRow{first + i, u.products(i, 0), u.products(i, 1), tile_begin, tile_slots};
  };
  // Rows are ordered by position: the last one's window and the first one's end bound all.
  const int32_t padded_end = tile_begin + (tile_slots + kLanes - 1) / kLanes * kLanes;
  const bool is_plain = u.num_terms == 1 && u.p.softcap == 0.0f && u.p.alibi_slopes == nullptr &&
                        u.key_begin(num_rows - 1) <= tile_begin && u.key_end(0) >= padded_end;
  float tile_max[kMaxRows + kLanes] = {}, shifts[kMaxRows + kLanes], to_terms[kMaxRows];
  for (int32_t i = 0; i < num_rows; ++i) {
    const TileRow t = row_of(i);
    using K = typename F::K;
    tile_max[i] = reduce_max(is_plain ? score_row<K, true>(u, t) : score_row<K, false>(u, t));
  }
  for (int32_t i = 0; i < num_rows; i += kLanes) {
    const f32x16 old_max = load<f32x16>(s.maxes + first + i);
    const f32x16 new_max = max(load<f32x16>(tile_max + i), old_max);
    // A row that has seen no key at all shifts by 0: exp(-inf) is 0, exp(-inf + inf) is not.
    const f32x16 shift = select(less(splat(kMinusInfinity), new_max), new_max, f32x16{});
    store(tile_max + i, new_max);
    store(shifts + i, shift);
    store(s.rescales + i, exp_negative(old_max - shift));
  }
  for (int32_t i = 0; i < num_rows; ++i) {
    const int32_t row = first + i;
    f32x16 max_weight, middle_sum;
    const float sum =
        reduce_add(weigh_row<typename F::V>(s, row_of(i), shifts[i], max_weight, middle_sum));
    const float weight_max = reduce_max(max_weight);
    if (F::V::kHasMidpoint) s.middle_sums[i] = reduce_add(middle_sum);
    s.maxes[row] = tile_max[i];
    s.sums[row] = s.sums[row] * s.rescales[i] + sum;
    s.weight_scales[i] = weight_max / kMaxTerm;
    to_terms[i] = weight_max > kMinWeight ? kMaxTerm / weight_max : 0.0f;
  }
  for (int32_t i = 0; i < num_rows; ++i) {
    int16_t* second = u.num_terms == 2 ? u.weights(i, 1) : nullptr;
    quantize_weights<typename F::V>(row_of(i), to_terms[i], u.weights(i, 0), second,
                                    &s.weight_sums[0][i], &s.weight_sums[1][i]);
  }
}

// out = out * rescale + weights * V for the rows of one head.
template <typename F>
void add_values(Unit& u, int32_t unit_head, int32_t tile_begin, int32_t tile_end) {
  using V = typename F::V;
  Scratch& s = u.s;
  for_each_block(u, unit_head, tile_begin, tile_end,
                 [&](int32_t at, int32_t offset, int32_t count, const int8_t* chunk) {
                   const int8_t* next = next_chunk(u, unit_head, tile_begin + at);
                   multiply_values<F>(u, chunk, next, offset, at, count);
                 });
  for (int32_t i = 0; i < u.num_rows; ++i) {
    const int32_t row = unit_head * u.num_rows + i;
    float* out = u.out + row * partial_size(u.head_size) + kPartialHeader;
    const int32_t* first = s.products + static_cast<int64_t>(i) * u.head_size;
    const int32_t* second = first + static_cast<int64_t>(u.num_rows) * u.head_size;
    const float rescale = s.rescales[i], scale = s.weight_scales[i];
    for (int32_t dim = 0; dim < u.head_size; dim += kLanes) {
      f32x16 x = centered<V>(load<i32x16>(first + dim), s.weight_sums[0][i]);
      if (u.num_terms == 2) {
        x += centered<V>(load<i32x16>(second + dim), s.weight_sums[1][i]) * (1.0f / kSecondTerm);
      }
      x = load<f32x16>(out + dim) * rescale + x * scale;
      if constexpr (V::kHasMidpoint) x += s.middle_sums[i];
      store(out + dim, x);
    }
  }
}

// Leaves the partial result of one split in u.out: the state, whether the query is finite, then the
// values.
template <typename F>
void attend_split(Unit& u, int32_t split) {
  Scratch& s = u.s;
  std::memset(u.out, 0, sizeof(float) * u.total_rows() * partial_size(u.head_size));
  for (int32_t row = 0; row < u.total_rows(); ++row) {
    s.maxes[row] = kMinusInfinity;
    s.sums[row] = 0.0f;
  }
  // A head's rows are ordered by position: the first one's window and the last one's end bound all.
  const int32_t split_begin = split * kSplitSlots;
  const int32_t key_begin = u.key_begin(0), key_end = u.key_end(u.num_rows - 1);
  for (int32_t tile = split_begin; tile < split_begin + kSplitSlots; tile += kTileSlots) {
    const int32_t tile_end = tile + kTileSlots < key_end ? tile + kTileSlots : key_end;
    if (tile >= tile_end || tile + kTileSlots <= key_begin) continue;
    for (int32_t unit_head = 0; unit_head < u.num_unit_heads; ++unit_head) {
      score_tile<F>(u, unit_head, tile, tile_end);
      weigh_tile<F>(u, unit_head, tile, tile_end - tile);
      add_values<F>(u, unit_head, tile, tile_end);
    }
  }
  for (int32_t row = 0; row < u.total_rows(); ++row) {
    float* header = u.out + row * partial_size(u.head_size);
    header[0] = s.maxes[row];
    header[1] = s.sums[row];
    header[2] = s.is_finite[row];
  }
}

// Merges one row of a split into the row of the splits before it.
void merge_row(float* total, const float* part, int32_t head_size) {
  SoftmaxState state{total[0], total[1]};
  const MergeFactors factors = merge(state, SoftmaxState{part[0], part[1]});
  total[0] = state.max;
  total[1] = state.sum;
  for (int32_t dim = kPartialHeader; dim < kPartialHeader + head_size; dim += kLanes) {
    store(total + dim,
          load<f32x16>(total + dim) * factors.left + load<f32x16>(part + dim) * factors.right);
  }
}

// The rows [begin, end) of a unit.
struct Rows {
  int32_t begin;
  int32_t end;
};

void clear_total(Unit& u, Rows rows) {
  for (int32_t row = rows.begin; row < rows.end; ++row) {
    float* total = u.s.total + row * partial_size(u.head_size);
    std::memset(total, 0, sizeof(float) * partial_size(u.head_size));
    total[0] = kMinusInfinity;
  }
}

void merge_split(Unit& u, Rows rows, const float* part) {
  for (int32_t row = rows.begin; row < rows.end; ++row) {
    const int64_t offset = row * partial_size(u.head_size);
    merge_row(u.s.total + offset, part + offset, u.head_size);
  }
}

// Rotates the values of rows of scratch.total back, sixteen rows at a time.
void rotate_back(Unit& u, Rows rows) {
  LaneBlock& block = u.s.lane_block;
  for (int32_t first = rows.begin; first < rows.end; first += kLanes) {
    const int32_t lanes = rows.end - first < kLanes ? rows.end - first : kLanes;
    const auto values = [&](int32_t lane) {
      return u.s.total + (first + lane) * partial_size(u.head_size) + kPartialHeader;
    };
    const void* vectors[kLanes];
    for (int32_t lane = 0; lane < lanes; ++lane) vectors[lane] = values(lane);
    load_lanes(block, vectors, lanes, DType::kFloat32, u.head_size,
               [](f32x16 x, int, int32_t) { return x; });
    hadamard_rotate(block, u.head_size);
    for (int32_t dim = 0; dim < u.head_size; dim += kLanes) {
      f32x16 x[kLanes];
      for (int32_t d = 0; d < kLanes; ++d) x[d] = load<f32x16>(block.x + (dim + d) * kLanes);
      transpose(x);
      for (int32_t lane = 0; lane < lanes; ++lane) store(values(lane) + dim, x[lane]);
    }
  }
}

// Writes out = values / sum and lse for rows of scratch.total.
template <typename F>
void write_out(Unit& u, Rows rows) {
  const PagedAttentionParams& p = u.p;
  if (F::kRotatesValues) rotate_back(u, rows);
  for (int32_t row = rows.begin; row < rows.end; ++row) {
    const float* total = u.s.total + row * partial_size(u.head_size);
    SoftmaxState state{total[0], total[1]};
    float factor = 1.0f;
    if (p.sinks) factor = merge_sink(state, p.sinks[u.head(row)]);
    factor = state.sum > 0.0f ? factor / state.sum : 0.0f;
    const int64_t offset = u.token(row) * p.out_token_stride + u.head(row) * p.out_head_stride;
    char* out = static_cast<char*>(p.out) + offset * element_size(p.dtype);
    const bool is_finite = u.s.is_finite[row];
    for (int32_t dim = 0; dim < u.head_size; dim += kLanes) {
      const f32x16 x = load<f32x16>(total + kPartialHeader + dim) * factor;
      store_floats(out, p.dtype, dim, is_finite ? x : splat(__builtin_nanf("")));
    }
    if (p.lse) {
      p.lse[u.head(row) * p.num_tokens + u.token(row)] =
          is_finite ? log_sum_exp(state) : __builtin_nanf("");
    }
  }
}

template <typename F>
void attend(const PagedAttentionParams& params, const AttentionUnit& unit, int32_t split_begin,
            int32_t split_end, float* partials, char* scratch) {
  Unit u(params, unit, scratch);
  const int64_t size = u.total_rows() * partial_size(u.head_size);
  const Rows all{0, u.total_rows()};
  if (!partials) clear_total(u, all);
  for (int32_t split = split_begin; split < split_end; ++split) {
    if (partials) u.out = partials + (split - split_begin) * size;
    attend_split<F>(u, split);
    if (!partials) merge_split(u, all, u.out);
  }
  if (!partials) write_out<F>(u, all);
}

template <typename F>
void combine(const PagedAttentionParams& params, const AttentionUnit& unit, int32_t unit_head,
             int32_t num_splits, const float* partials, char* scratch) {
  Unit u(params, unit, scratch);
  const Rows rows{unit_head * u.num_rows, (unit_head + 1) * u.num_rows};
  clear_total(u, rows);
  for (int32_t row = rows.begin; row < rows.end; ++row) {
    u.s.is_finite[row] = partials[row * partial_size(u.head_size) + 2] != 0.0f;
  }
  const int64_t size = u.total_rows() * partial_size(u.head_size);
  for (int32_t split = 0; split < num_splits; ++split)
    merge_split(u, rows, partials + split * size);
  write_out<F>(u, rows);
}

size_t scratch_bytes() { return sizeof(Scratch); }

}  // namespace

const Kernels& kernels_for(CacheFormat format) {
  return with_format(format, []<typename F>() -> const Kernels& {
    static constexpr Kernels kernels{quantize_tokens<F>, gather_slots<F>, load_queries,
                                     attend<F>,          combine<F>,      scratch_bytes};
    return kernels;
  });
}

}  // namespace int8kv::cpu::INT8KV_ISA
