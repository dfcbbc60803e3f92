// The CUDA kernels on the cache in a program without PyTorch, against plain code on the host: what
// compute-sanitizer and ncu are given, because racecheck ends with an internal error under PyTorch.
//
//   cuda_driver                                every batch below; exits with 1 if a result is wrong
//   cuda_driver NUM_SEQS SEQ_LEN QUERY_LEN     a cache write and attention of Llama-3.1-8B's shape,
//                                              once and unchecked, for a profiler
//
// Tokens are written, the bytes of the cache are read back and dequantized here, and what gather
// and attention make of them is compared with that. In tests the same program runs on the emulated
// kernels (tests/builds/emulated_runtime.h).
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "format/half.h"
#include "format/quantizer.h"
#include "format/rotation.h"

using namespace int8kv;

namespace {

constexpr int kNumPadding = 2;  // tokens that belong to no sequence
constexpr int kPoison = 0xff;   // NaN in every type
constexpr float kNaN = __builtin_nanf("");

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Device memory. Its contents are arbitrary at first, so that initcheck sees what reads them.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    void* data = nullptr;
    require(cudaMalloc(&data, std::max<size_t>(bytes(), 16)), "cudaMalloc");
    data_ = static_cast<T*>(data);
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) {
    require(cudaMemcpy(data_, host.data(), bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  DeviceArray(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }

  void fill(int byte) { require(cudaMemset(data_, byte, bytes()), "cudaMemset"); }
  T* data() const { return data_; }
  std::vector<T> host() const {
    std::vector<T> copy(count_);
    require(cudaMemcpy(copy.data(), data_, bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return copy;
  }

 private:
  size_t bytes() const { return count_ * sizeof(T); }
  size_t count_;
  T* data_;
};

// --- numbers -------------------------------------------------------------------------------------

std::vector<unsigned char> encode(const std::vector<float>& values, DType dtype) {
  const size_t size = dtype == DType::kFloat32 ? 4 : 2;
  std::vector<unsigned char> bytes(values.size() * size);
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t narrow = dtype == DType::kFloat16 ? float_to_half(values[i])
                            : std::isnan(values[i])  ? uint16_t{0x7fc0}
                                                     : float_to_bf16_bits(values[i]);
    const void* from = size == 4 ? static_cast<const void*>(&values[i]) : &narrow;
    std::memcpy(bytes.data() + i * size, from, size);
  }
  return bytes;
}

std::vector<float> decode(const std::vector<unsigned char>& bytes, DType dtype) {
  const size_t size = dtype == DType::kFloat32 ? 4 : 2;
  std::vector<float> values(bytes.size() / size);
  for (size_t i = 0; i < values.size(); ++i) {
    uint16_t narrow = 0;
    std::memcpy(size == 4 ? static_cast<void*>(&values[i]) : &narrow, bytes.data() + i * size,
                size);
    if (dtype == DType::kFloat16) values[i] = half_to_float(narrow);
    if (dtype == DType::kBFloat16) values[i] = bf16_bits_to_float(narrow);
  }
  return values;
}

using Vector = std::vector<double>;

// The product with the Hadamard matrix (format/rotation.h), which is its own inverse.
void rotate(Vector& x) {
  const int block = rotation_block(static_cast<int32_t>(x.size()));
  for (size_t first = 0; first < x.size(); first += static_cast<size_t>(block)) {
    for (int half = 1; half < block; half *= 2) {
      for (int i = 0; i < block; ++i) {
        if (i & half) continue;
        double &a = x[first + static_cast<size_t>(i)],
               &b = x[first + static_cast<size_t>(i + half)];
        a += b;
        b = a - 2 * b;
      }
    }
  }
  for (double& value : x) value /= std::sqrt(block);
}

double norm(const Vector& x) {
  return std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0));
}

// --- a batch -------------------------------------------------------------------------------------

struct Sequence {
  int query_len, seq_len;
};

struct Shape {
  const char* name;
  DType dtype;
  int head_size, num_heads, num_kv_heads, block_size;
  std::vector<Sequence> sequences;

  // Of |result - expected| / |expected|, and of the log-sum-exp; several times what was seen.
  double tolerance() const { return dtype == DType::kFloat32 ? 2e-5 : 1.5e-2; }
  double lse_tolerance() const { return dtype == DType::kFloat32 ? 1e-5 : 5e-3; }
};

// Lengths around the 64 keys of a tile and the slots of a block. Few thread blocks get a share of
// so little work, but longer sequences are cut and merged on every GPU.
const std::vector<Shape> kShapes = {
    {"decode",
     DType::kBFloat16,
     128,
     8,
     2,
     16,
     {{1, 1}, {1, 63}, {1, 64}, {0, 0}, {1, 65}, {1, 700}}},
    {"decode-d64", DType::kFloat16, 64, 9, 3, 32, {{1, 33}, {1, 460}, {1, 2}}},
    {"verify-2-row-tiles", DType::kBFloat16, 128, 8, 2, 16, {{4, 4}, {4, 330}, {1, 130}, {3, 65}}},
    {"verify-4-row-tiles", DType::kFloat16, 64, 8, 2, 16, {{8, 300}, {8, 8}, {8, 130}}},
    {"plain", DType::kFloat32, 80, 4, 2, 48, {{1, 300}, {3, 70}, {1, 1}}},
};

struct Layout {
  std::vector<int32_t> block_table;  // [num_seqs, max_blocks], past the end 2^31 - 1
  std::vector<int32_t> seq_lens, query_start_loc{0}, cu_seq_lens{0};
  std::vector<int64_t> slots;  // of all tokens, then of the padding
  int max_blocks = 0, num_blocks = 0;

  int64_t num_tokens() const { return cu_seq_lens.back(); }
};

// Blocks lie backwards, with an unused one before each.
Layout make_layout(const Shape& shape) {
  Layout layout;
  for (const Sequence& s : shape.sequences) {
    layout.seq_lens.push_back(s.seq_len);
    layout.query_start_loc.push_back(layout.query_start_loc.back() + s.query_len);
    layout.cu_seq_lens.push_back(layout.cu_seq_lens.back() + s.seq_len);
    const int blocks = (s.seq_len + shape.block_size - 1) / shape.block_size;
    layout.max_blocks = std::max(layout.max_blocks, blocks + 1);
    layout.num_blocks += 2 * blocks;
  }
  int next = layout.num_blocks - 1;
  for (const Sequence& s : shape.sequences) {
    const size_t row = layout.block_table.size();
    layout.block_table.resize(row + static_cast<size_t>(layout.max_blocks), INT32_MAX);
    for (int token = 0; token < s.seq_len; ++token) {
      int32_t& block = layout.block_table[row + static_cast<size_t>(token / shape.block_size)];
      if (token % shape.block_size == 0) {
        block = next;
        next -= 2;
      }
      layout.slots.push_back(int64_t{block} * shape.block_size + token % shape.block_size);
    }
  }
  layout.slots.insert(layout.slots.end(), kNumPadding, -1);
  return layout;
}

// Normal numbers with one dimension of outliers, as keys have them, in the shape's dtype; padding
// tokens are NaN.
std::vector<float> random_rows(const Shape& shape, int64_t num_tokens, int heads, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(static_cast<size_t>(num_tokens + kNumPadding) *
                          static_cast<size_t>(heads) * static_cast<size_t>(shape.head_size));
  const size_t real = rows.size() - static_cast<size_t>(kNumPadding * heads * shape.head_size);
  for (size_t i = 0; i < rows.size(); ++i) {
    const float outlier = i % static_cast<size_t>(shape.head_size) == 5 ? 8.0f : 1.0f;
    rows[i] = i < real ? normal(generator) * outlier : kNaN;
  }
  return decode(encode(rows, shape.dtype), shape.dtype);
}

Vector row_of(const std::vector<float>& rows, int64_t index, int head_size) {
  const auto begin = rows.begin() + index * head_size;
  return Vector(begin, begin + head_size);
}

// --- kernels and what they should give -----------------------------------------------------------

KVCache view_cache(const Shape& shape, CacheFormat format, int num_blocks, int8_t* data) {
  KVCache cache{};
  cache.head_stride = int64_t{shape.block_size} * content_bytes(format, shape.head_size);
  cache.block_stride = cache.head_stride * shape.num_kv_heads;
  cache.data = data;
  cache.num_blocks = num_blocks;
  cache.num_kv_heads = shape.num_kv_heads;
  cache.block_size = shape.block_size;
  cache.head_size = shape.head_size;
  cache.format = format;
  return cache;
}

ReshapeAndCacheParams make_write(const Shape& shape, const KVCache& cache, const void* key,
                                 const void* value, const int64_t* slot_mapping,
                                 const KeyTransform& key_transform, int64_t num_tokens) {
  ReshapeAndCacheParams params{};
  params.cache = cache;
  params.key = key;
  params.value = value;
  params.key_token_stride = params.value_token_stride =
      int64_t{cache.num_kv_heads} * cache.head_size;
  params.key_head_stride = params.value_head_stride = cache.head_size;
  params.slot_mapping = slot_mapping;
  params.key_transform = key_transform;
  params.num_tokens = num_tokens;
  params.dtype = shape.dtype;
  return params;
}

// Without the sequences.
PagedAttentionParams make_attention(const Shape& shape, const KVCache& cache, const void* query,
                                    void* out, const KeyTransform& key_transform,
                                    int64_t num_tokens) {
  PagedAttentionParams params{};
  params.cache = cache;
  params.query = query;
  params.out = out;
  params.query_token_stride = params.out_token_stride = int64_t{shape.num_heads} * shape.head_size;
  params.query_head_stride = params.out_head_stride = shape.head_size;
  params.key_transform = key_transform;
  params.num_tokens = num_tokens;
  params.num_seqs = static_cast<int32_t>(shape.sequences.size());
  params.num_heads = shape.num_heads;
  params.softmax_scale = 1.0f / std::sqrt(static_cast<float>(shape.head_size));
  params.dtype = shape.dtype;
  params.causal = true;
  return params;
}

void write_tokens(const ReshapeAndCacheParams& params) {
  require(launch_reshape_and_cache(params, nullptr), "reshape_and_cache");
  require(cudaDeviceSynchronize(), "reshape_and_cache");
}

// The one place that launches attention: whatever a launch needs beside its parameters is made
// here. Once with counters that the launch zeroes itself, then twice with the same ones, which
// every launch must leave as it found them.
void attend(const PagedAttentionParams& params) {
  size_t bytes = 0;
  require(paged_attention_workspace_bytes(params, &bytes), "paged_attention_workspace_bytes");
  const DeviceArray<unsigned char> workspace(bytes);
  int64_t count = 0;
  require(prepare_paged_attention(params, &count), "prepare_paged_attention");
  const DeviceArray<uint32_t> arrivals(std::vector<uint32_t>(static_cast<size_t>(count)));
  for (uint32_t* counters : {static_cast<uint32_t*>(nullptr), arrivals.data(), arrivals.data()}) {
    require(launch_paged_attention(params, workspace.data(), bytes, counters, count, nullptr),
            "paged_attention");
  }
  require(cudaDeviceSynchronize(), "paged_attention");
  for (const uint32_t counter : arrivals.host()) {
    if (counter == 0) continue;
    std::printf("paged_attention left a counter at %u, not 0\n", counter);
    std::exit(1);
  }
}

// What became of a batch; names the first results that are wrong.
class Report {
 public:
  Report(const Shape& shape, const char* format) : name_(std::string(format) + " " + shape.name) {}

  void expect(const char* what, double error, double tolerance) {
    if (error <= tolerance) return;  // not for NaN
    if (num_wrong_++ < 3) {
      std::printf("%s: %s is off by %g, allowed are %g\n", name_.c_str(), what, error, tolerance);
    }
  }
  bool finish() const {
    std::printf("%-24s %s\n", name_.c_str(), num_wrong_ == 0 ? "right" : "WRONG");
    return num_wrong_ == 0;
  }

 private:
  std::string name_;
  int num_wrong_ = 0;
};

void expect_rows(Report& report, const char* what, const Vector& got, const Vector& want,
                 double tolerance) {
  Vector difference(got.size());
  std::transform(got.begin(), got.end(), want.begin(), difference.begin(), std::minus<>());
  report.expect(what, norm(difference) / norm(want), tolerance);
}

// Keys and values of all tokens as the cache has them, [token, KV head][head_size].
struct Stored {
  std::vector<Vector> keys, values;
};

// Reads the bytes of the cache with the offsets of csrc/format, and checks that every code is the
// nearest to what it stands for.
template <typename F>
Stored read_cache(Report& report, const Shape& shape, const Layout& layout, KVCache cache,
                  const std::vector<float>& key, const std::vector<float>& value,
                  const std::vector<float>& equalizer) {
  const int size = shape.head_size;
  const auto bf16_at = [](const int8_t* bytes) {
    uint16_t bits;
    std::memcpy(&bits, bytes, 2);
    return bf16_bits_to_float(bits);
  };
  const auto expect_codes = [&]<typename C>(const C*, const char* what, const Vector& got,
                                            const Vector& want, float scale) {
    double error = 0;
    for (size_t i = 0; i < got.size(); ++i) error = std::max(error, std::abs(got[i] - want[i]));
    double steps = 0.5;  // format/quantizer.h
    if constexpr (C::kHasMidpoint) steps += C::kLevels / 1024.0;
    report.expect(what, error, steps * scale * (1 + 1e-3));  // the kernels rotate in fp32
  };
  Stored stored;
  for (int64_t token = 0; token < layout.num_tokens(); ++token) {
    const int64_t slot = layout.slots[static_cast<size_t>(token)];
    const auto in_block = static_cast<int32_t>(slot % shape.block_size);
    for (int head = 0; head < shape.num_kv_heads; ++head) {
      const int8_t* chunk = cache.chunk(slot / shape.block_size, head);
      const int8_t* k_scale = chunk + cache.k_scale<F>(in_block);
      const int8_t* v_scale = chunk + cache.v_scale<F>(in_block);
      const int64_t row = token * shape.num_kv_heads + head;
      Vector k, v, want_k = row_of(key, row, size), want_v = row_of(value, row, size);
      for (int dim = 0; dim < size; ++dim) {
        const int32_t k_code = F::K::load_k(chunk, shape.block_size, size, in_block, dim);
        const int32_t v_code =
            F::V::load_v(chunk + cache.v_codes<F>(), shape.block_size, size, in_block, dim);
        const int offset = cache.midpoint_offset();
        k.push_back(dequantize<typename F::K>(
            k_code, bf16_at(k_scale), F::K::kHasMidpoint ? bf16_at(k_scale + offset) : 0.0f));
        v.push_back(dequantize<typename F::V>(
            v_code, bf16_at(v_scale), F::V::kHasMidpoint ? bf16_at(v_scale + offset) : 0.0f));
        want_k[static_cast<size_t>(dim)] /= equalizer[static_cast<size_t>(head * size + dim)];
      }
      rotate(want_k);
      if (F::kRotatesValues) rotate(want_v);
      expect_codes(static_cast<typename F::K*>(nullptr), "a code of K", k, want_k,
                   bf16_at(k_scale));
      expect_codes(static_cast<typename F::V*>(nullptr), "a code of V", v, want_v,
                   bf16_at(v_scale));
      rotate(k);
      if (F::kRotatesValues) rotate(v);
      for (int dim = 0; dim < size; ++dim) {
        k[static_cast<size_t>(dim)] *= equalizer[static_cast<size_t>(head * size + dim)];
      }
      stored.keys.push_back(k);
      stored.values.push_back(v);
    }
  }
  return stored;
}

// Attention of one query row over the first `num_keys` tokens of a sequence; returns log-sum-exp.
double reference_attention(const Shape& shape, const Stored& stored, int64_t first_token,
                           int num_keys, int kv_head, const Vector& query, Vector& out) {
  Vector scores;
  const auto row = [&](int i) {
    return static_cast<size_t>((first_token + i) * shape.num_kv_heads + kv_head);
  };
  for (int i = 0; i < num_keys; ++i) {
    const Vector& key = stored.keys[row(i)];
    const double product = std::inner_product(query.begin(), query.end(), key.begin(), 0.0);
    scores.push_back(product / std::sqrt(shape.head_size));
  }
  const double largest = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  out.assign(query.size(), 0.0);
  for (int i = 0; i < num_keys; ++i) {
    const double weight = std::exp(scores[static_cast<size_t>(i)] - largest);
    sum += weight;
    for (size_t dim = 0; dim < out.size(); ++dim) out[dim] += weight * stored.values[row(i)][dim];
  }
  for (double& x : out) x /= sum;
  return largest + std::log(sum);
}

bool check_shape(const Shape& shape, const char* format_name, CacheFormat format) {
  Report report(shape, format_name);
  const Layout layout = make_layout(shape);
  const int size = shape.head_size, num_kv_heads = shape.num_kv_heads;
  const int64_t num_rows = layout.num_tokens(), num_queries = layout.query_start_loc.back();
  const std::vector<float> key = random_rows(shape, num_rows, num_kv_heads, 1);
  const std::vector<float> value = random_rows(shape, num_rows, num_kv_heads, 2);
  const std::vector<float> query = random_rows(shape, num_queries, shape.num_heads, 3);
  std::vector<float> equalizer(static_cast<size_t>(num_kv_heads * size), 1.0f);
  for (size_t i = 5; i < equalizer.size(); i += static_cast<size_t>(size)) equalizer[i] = 4.0f;

  const DeviceArray<unsigned char> device_key(encode(key, shape.dtype));
  const DeviceArray<unsigned char> device_value(encode(value, shape.dtype));
  const DeviceArray<unsigned char> device_query(encode(query, shape.dtype));
  const DeviceArray<float> device_equalizer(equalizer);
  const DeviceArray<int64_t> slots(layout.slots);
  const DeviceArray<int32_t> block_table(layout.block_table), seq_lens(layout.seq_lens);
  const DeviceArray<int32_t> query_start_loc(layout.query_start_loc);
  const DeviceArray<int32_t> cu_seq_lens(layout.cu_seq_lens);
  const DeviceArray<int32_t> seq_starts(std::vector<int32_t>(shape.sequences.size(), 0));
  KVCache cache = view_cache(shape, format, layout.num_blocks, nullptr);
  DeviceArray<int8_t> cache_bytes(static_cast<size_t>(cache.block_stride * cache.num_blocks));
  cache_bytes.fill(kPoison);
  cache.data = cache_bytes.data();
  const KeyTransform key_transform{device_equalizer.data(), true};
  const int64_t token_stride = int64_t{num_kv_heads} * size;

  write_tokens(make_write(shape, cache, device_key.data(), device_value.data(), slots.data(),
                          key_transform, num_rows + kNumPadding));
  std::vector<int8_t> bytes = cache_bytes.host();
  KVCache on_host = cache;
  on_host.data = bytes.data();
  for (int block = 0; block < layout.num_blocks; block += 2) {
    const int8_t* unused = on_host.chunk(block, 0);
    const bool is_intact = std::all_of(unused, unused + cache.block_stride,
                                       [](int8_t byte) { return byte == int8_t(kPoison); });
    report.expect("a block that belongs to nobody", is_intact ? 0 : 1, 0.5);
  }
  const Stored stored = with_format(format, [&]<typename F>() {
    return read_cache<F>(report, shape, layout, on_host, key, value, equalizer);
  });

  const auto gathered = static_cast<size_t>(num_rows * token_stride) * sizeof(float);
  DeviceArray<unsigned char> gathered_key(gathered), gathered_value(gathered);
  gathered_key.fill(kPoison);
  gathered_value.fill(kPoison);
  GatherCacheParams gather{};
  gather.cache = cache;
  gather.key = gathered_key.data();
  gather.value = gathered_value.data();
  gather.key_token_stride = gather.value_token_stride = token_stride;
  gather.key_head_stride = gather.value_head_stride = size;
  gather.block_table = block_table.data();
  gather.block_table_stride = layout.max_blocks;
  gather.cu_seq_lens = cu_seq_lens.data();
  gather.seq_starts = seq_starts.data();
  gather.key_transform = key_transform;
  gather.num_rows = num_rows;
  gather.num_seqs = static_cast<int32_t>(shape.sequences.size());
  gather.dtype = DType::kFloat32;
  require(launch_gather_cache(gather, nullptr), "gather_cache");
  require(cudaDeviceSynchronize(), "gather_cache");
  const std::vector<float> got_key = decode(gathered_key.host(), DType::kFloat32);
  const std::vector<float> got_value = decode(gathered_value.host(), DType::kFloat32);
  for (int64_t row = 0; row < num_rows * num_kv_heads; ++row) {
    const auto i = static_cast<size_t>(row);
    expect_rows(report, "a gathered key", row_of(got_key, row, size), stored.keys[i], 1e-5);
    expect_rows(report, "a gathered value", row_of(got_value, row, size), stored.values[i], 1e-5);
  }

  DeviceArray<unsigned char> device_out(encode(query, shape.dtype).size());
  device_out.fill(kPoison);
  const int64_t num_tokens = num_queries + kNumPadding;
  DeviceArray<float> device_lse(static_cast<size_t>(num_tokens * shape.num_heads));
  device_lse.fill(kPoison);
  PagedAttentionParams attention = make_attention(shape, cache, device_query.data(),
                                                  device_out.data(), key_transform, num_tokens);
  attention.lse = device_lse.data();
  attention.block_table = block_table.data();
  attention.block_table_stride = layout.max_blocks;
  attention.seq_lens = seq_lens.data();
  attention.query_start_loc = query_start_loc.data();
  attend(attention);
  const std::vector<float> out = decode(device_out.host(), shape.dtype), lse = device_lse.host();
  for (size_t seq = 0; seq < shape.sequences.size(); ++seq) {
    const auto [query_len, seq_len] = shape.sequences[seq];
    for (int i = 0; i < query_len * shape.num_heads; ++i) {
      const int64_t token = layout.query_start_loc[seq] + i / shape.num_heads;
      const int head = i % shape.num_heads;
      const int num_keys = seq_len - query_len + i / shape.num_heads + 1;
      const int64_t row = token * shape.num_heads + head;
      Vector want;
      const double want_lse = reference_attention(shape, stored, layout.cu_seq_lens[seq], num_keys,
                                                  head / (shape.num_heads / num_kv_heads),
                                                  row_of(query, row, size), want);
      expect_rows(report, "an output", row_of(out, row, size), want, shape.tolerance());
      const auto lse_index = static_cast<size_t>(head * num_tokens + token);
      report.expect("a log-sum-exp", std::abs(lse[lse_index] - want_lse), shape.lse_tolerance());
    }
  }
  return report.finish();
}

// One step of a layer with equal sequences, whose contents do not matter.
void run_once(int num_seqs, int seq_len, int query_len) {
  constexpr int kByte = 0x3f;  // bf16 numbers around 0.75
  const Shape shape{"",
                    DType::kBFloat16,
                    128,
                    32,
                    8,
                    16,
                    std::vector<Sequence>(static_cast<size_t>(num_seqs), {query_len, seq_len})};
  const int max_blocks = (seq_len + shape.block_size - 1) / shape.block_size;
  std::vector<int32_t> table(static_cast<size_t>(num_seqs * max_blocks));
  std::iota(table.begin(), table.end(), 0);
  std::vector<int32_t> starts{0};
  std::vector<int64_t> slot_mapping;
  for (int64_t seq = 0; seq < num_seqs; ++seq) {
    starts.push_back(starts.back() + query_len);
    for (int i = seq_len - query_len; i < seq_len; ++i) {
      slot_mapping.push_back(seq * max_blocks * shape.block_size + i);
    }
  }
  const DeviceArray<int32_t> block_table(table), query_start_loc(starts);
  const DeviceArray<int32_t> seq_lens(std::vector<int32_t>(static_cast<size_t>(num_seqs), seq_len));
  const DeviceArray<int64_t> slots(slot_mapping);
  KVCache cache = view_cache(shape, CacheFormat::kK8V8, num_seqs * max_blocks, nullptr);
  DeviceArray<int8_t> cache_bytes(static_cast<size_t>(cache.block_stride * cache.num_blocks));
  DeviceArray<uint16_t> rows(slot_mapping.size() * static_cast<size_t>(shape.num_heads) * 128);
  DeviceArray<uint16_t> out(slot_mapping.size() * static_cast<size_t>(shape.num_heads) * 128);
  cache_bytes.fill(kByte);
  rows.fill(kByte);
  cache.data = cache_bytes.data();
  const KeyTransform key_transform{nullptr, true};
  write_tokens(make_write(shape, cache, rows.data(), rows.data(), slots.data(), key_transform,
                          static_cast<int64_t>(slot_mapping.size())));
  PagedAttentionParams params =
      make_attention(shape, cache, rows.data(), out.data(), key_transform, starts.back());
  params.block_table = block_table.data();
  params.block_table_stride = max_blocks;
  params.seq_lens = seq_lens.data();
  params.query_start_loc = query_start_loc.data();
  attend(params);
}

int usage() {
  std::fprintf(stderr, "usage: cuda_driver [NUM_SEQS SEQ_LEN QUERY_LEN]\n");
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 4) {
    const int num_seqs = std::atoi(argv[1]), seq_len = std::atoi(argv[2]);
    const int query_len = std::atoi(argv[3]);
    if (num_seqs < 1 || query_len < 1 || seq_len < query_len) return usage();
    run_once(num_seqs, seq_len, query_len);
    return 0;
  }
  if (argc != 1) return usage();
  bool is_right = true;
  for (const auto& [name, format] : kCacheFormats) {
    if (format != CacheFormat::kK8V8 && format != CacheFormat::kK6V4) continue;
    for (const Shape& shape : kShapes) is_right &= check_shape(shape, name, format);
  }
  return is_right ? 0 : 1;
}
