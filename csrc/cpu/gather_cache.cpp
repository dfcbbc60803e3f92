// The way back from the cache to floats, one row at a time: for tools, and what the CUDA kernel is
// compared with. Attention on CPU never turns a code into a float.
#include <cstring>

#include "cpu/kernels.h"
#include "format/half.h"
#include "format/quantizer.h"
#include "format/rotation.h"

namespace int8kv::cpu {

namespace {

void hadamard_rotate(float* x, int32_t head_size) {
  const int32_t block = rotation_block(head_size);
  const float norm = rotation_norm(block);
  for (int32_t half = 1; half < block; half *= 2) {
    for (int32_t i = 0; i < head_size; i += 2 * half) {
      for (int32_t j = i; j < i + half; ++j) {
        const float a = x[j], b = x[j + half];
        x[j] = a + b;
        x[j + half] = a - b;
      }
    }
  }
  for (int32_t i = 0; i < head_size; ++i) x[i] *= norm;
}

void store_row(void* base, int64_t offset, const float* x, int32_t head_size, DType dtype) {
  for (int32_t i = 0; i < head_size; ++i) {
    if (dtype == DType::kFloat32) {
      static_cast<float*>(base)[offset + i] = x[i];
    } else if (dtype == DType::kFloat16) {
      static_cast<uint16_t*>(base)[offset + i] = float_to_half(x[i]);
    } else {
      static_cast<uint16_t*>(base)[offset + i] = float_to_bf16_bits(x[i]);
    }
  }
}

float float_at(const int8_t* bytes) {
  uint16_t bits;
  std::memcpy(&bits, bytes, sizeof(bits));
  return bf16_bits_to_float(bits);
}

template <typename F>
void gather_key(const GatherCacheParams& p, const int8_t* chunk, int32_t slot, int64_t row,
                int32_t kv_head) {
  const KVCache& cache = p.cache;
  float x[kMaxHeadSize];
  const int8_t* params = chunk + cache.k_scale<F>(slot);
  const float scale = float_at(params);
  const float middle = F::K::kHasMidpoint ? float_at(params + cache.midpoint_offset()) : 0.0f;
  for (int32_t dim = 0; dim < cache.head_size; ++dim) {
    const int32_t code = F::K::load_k(chunk, cache.block_size, cache.head_size, slot, dim);
    x[dim] = dequantize<typename F::K>(code, scale, middle);
  }
  if (p.key_transform.rotate) hadamard_rotate(x, cache.head_size);
  if (const float* factors = p.key_transform.factors(kv_head, cache.head_size)) {
    for (int32_t dim = 0; dim < cache.head_size; ++dim) x[dim] *= factors[dim];
  }
  store_row(p.key, row * p.key_token_stride + kv_head * p.key_head_stride, x, cache.head_size,
            p.dtype);
}

template <typename F>
void gather_value(const GatherCacheParams& p, const int8_t* chunk, int32_t slot, int64_t row,
                  int32_t kv_head) {
  const KVCache& cache = p.cache;
  float x[kMaxHeadSize];
  const int8_t* params = chunk + cache.v_scale<F>(slot);
  const float scale = float_at(params);
  const float middle = F::V::kHasMidpoint ? float_at(params + cache.midpoint_offset()) : 0.0f;
  const int8_t* codes = chunk + cache.v_codes<F>();
  for (int32_t dim = 0; dim < cache.head_size; ++dim) {
    const int32_t code = F::V::load_v(codes, cache.block_size, cache.head_size, slot, dim);
    x[dim] = dequantize<typename F::V>(code, scale, middle);
  }
  if (F::kRotatesValues) hadamard_rotate(x, cache.head_size);
  store_row(p.value, row * p.value_token_stride + kv_head * p.value_head_stride, x, cache.head_size,
            p.dtype);
}

template <typename F>
void gather_row(const GatherCacheParams& p, int64_t row) {
  const KVCache& cache = p.cache;
  const int32_t seq = p.seq_of(row);
  const int64_t position = p.seq_starts[seq] + row - p.cu_seq_lens[seq];
  const int64_t block = p.block_table[seq * p.block_table_stride + position / cache.block_size];
  const auto slot = static_cast<int32_t>(position % cache.block_size);
  for (int32_t kv_head = 0; kv_head < cache.num_kv_heads; ++kv_head) {
    const int8_t* chunk = cache.chunk(block, kv_head);
    gather_key<F>(p, chunk, slot, row, kv_head);
    gather_value<F>(p, chunk, slot, row, kv_head);
  }
}

}  // namespace

void gather_cache(const GatherCacheParams& p, const ParallelFor& pool) {
  if (p.num_seqs == 0) return;
  with_format(p.cache.format, [&]<typename F>() {
    parallel_for(pool, p.cu_seq_lens[p.num_seqs], [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) gather_row<F>(p, row);
    });
  });
}

}  // namespace int8kv::cpu
