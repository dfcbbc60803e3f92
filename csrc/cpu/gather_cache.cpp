// The way back from the cache to floats, one row at a time: for tools, and what the CUDA kernel is
// compared with. Attention on CPU never turns a code into a float.
#include "format/quantizer.h"
#include "cpu/kernels.h"

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

// Rounded half to even. As float_to_half in vectors.h does it; GCC 11 has no _Float16 here.
uint16_t float_to_half_bits(float x) {
  const uint32_t bits = float_bits(x), abs_bits = bits & 0x7fffffffu;
  const auto sign = static_cast<uint16_t>((bits & 0x80000000u) >> 16);
  if (abs_bits > 0x7f800000u) return sign | 0x7e00u;  // NaN
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return sign | 0x7c00u;
  // Subnormal: adding 0.5 leaves the result, rounded, in the low bits.
  if (magnitude < 6.103515625e-05f) return sign | (float_bits(magnitude + 0.5f) - 0x3f000000u);
  return sign | ((abs_bits - (112u << 23) + 0xfffu + ((abs_bits >> 13) & 1u)) >> 13);
}

void store_row(void* base, int64_t offset, const float* x, int32_t head_size, DType dtype) {
  for (int32_t i = 0; i < head_size; ++i) {
    if (dtype == DType::kFloat32) {
      static_cast<float*>(base)[offset + i] = x[i];
    } else if (dtype == DType::kFloat16) {
      static_cast<uint16_t*>(base)[offset + i] = float_to_half_bits(x[i]);
    } else {
      static_cast<uint16_t*>(base)[offset + i] = float_to_bf16_bits(x[i]);
    }
  }
}

float scale_at(const int8_t* chunk, int64_t plane, int32_t slot) {
  uint16_t bits;
  std::memcpy(&bits, chunk + plane + 2 * slot, 2);
  return bf16_bits_to_float(bits);
}

void gather_row(const GatherCacheParams& p, int64_t row) {
  const KVCache& cache = p.cache;
  const int32_t seq = p.seq_of(row);
  const int64_t position = p.seq_starts[seq] + row - p.cu_seq_lens[seq];
  const int64_t block = p.block_table[seq * p.block_table_stride + position / cache.block_size];
  const auto slot = static_cast<int32_t>(position % cache.block_size);
  float x[kMaxHeadSize];
  for (int32_t head = 0; head < cache.num_kv_heads; ++head) {
    const int8_t* chunk = cache.chunk(block, head);
    const float k_scale = scale_at(chunk, cache.k_scales(), slot);
    for (int32_t dim = 0; dim < cache.head_size; ++dim) {
      x[dim] = chunk[cache.k_code(slot, dim)] * k_scale;
    }
    if (p.rotate_keys) hadamard_rotate(x, cache.head_size);
    if (p.key_equalizer != nullptr) {
      const float* equalizer = p.key_equalizer + int64_t{head} * cache.head_size;
      for (int32_t dim = 0; dim < cache.head_size; ++dim) x[dim] *= equalizer[dim];
    }
    store_row(p.key, row * p.key_token_stride + head * p.key_head_stride, x, cache.head_size,
              p.dtype);
    const float v_scale = scale_at(chunk, cache.v_scales(), slot);
    for (int32_t dim = 0; dim < cache.head_size; ++dim) {
      x[dim] = chunk[cache.v_code(slot, dim)] * v_scale;
    }
    store_row(p.value, row * p.value_token_stride + head * p.value_head_stride, x, cache.head_size,
              p.dtype);
  }
}

}  // namespace

void gather_cache(const GatherCacheParams& p, const ParallelFor& pool) {
  if (p.num_seqs == 0) return;
  parallel_for(pool, p.cu_seq_lens[p.num_seqs], [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) gather_row(p, row);
  });
}

}  // namespace int8kv::cpu
