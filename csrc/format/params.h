// The parameter structs of every kernel and the byte offsets inside the cache.
//
// One chunk is what a (block, KV head) pair owns. Its bytes are contiguous:
//
//   K codes [block_size * head_size] | V codes [block_size * head_size]
//   | K scales [block_size] bf16     | V scales [block_size] bf16
//
// Codes are interleaved so that 32 bytes hold two steps of a dot product for 16 outputs, which is
// one 16-bit multiply-add of AVX-512 and one fragment register pair of a tensor core:
//
//   K codes  [block_size / 16][head_size / 2][16 slots][2 dims]
//   V codes  [head_size / 16][block_size / 2][16 dims][2 slots]
//
// `cache_layout.py` states the same and the tests compare both. No Torch below this line.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define INT8KV_HD __host__ __device__ __forceinline__
#else
// Always inlined: the CPU kernels are compiled once per instruction set, and an out-of-line copy of
// a shared function could be taken from the AVX-512 object and run on a CPU without it.
#define INT8KV_HD inline __attribute__((always_inline))
#endif

namespace int8kv {

constexpr int kSlotGroup = 16;  // slots that share a 32-byte line of K; block_size is a multiple
constexpr int kDimGroup = 16;   // dims that share a 32-byte line of V; head_size is a multiple
constexpr int kMaxHeadSize = 512;

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// A paged INT8 cache of one layer, seen by a kernel.
struct KVCache {
  int8_t* data;          // start of block 0
  int64_t block_stride;  // bytes from one block to the next
  int64_t head_stride;   // bytes from one KV head's chunk to the next within a block
  int64_t num_blocks;
  int32_t num_kv_heads;
  int32_t block_size;  // slots, a multiple of kSlotGroup
  int32_t head_size;   // a multiple of kDimGroup

  INT8KV_HD int8_t* chunk(int64_t block, int64_t kv_head) const {
    return data + block * block_stride + kv_head * head_stride;
  }
  INT8KV_HD int64_t k_code(int32_t slot, int32_t dim) const {
    return static_cast<int64_t>(slot / kSlotGroup) * head_size * kSlotGroup +
           dim / 2 * (2 * kSlotGroup) + slot % kSlotGroup * 2 + dim % 2;
  }
  INT8KV_HD int64_t v_code(int32_t slot, int32_t dim) const {
    return v_codes() + static_cast<int64_t>(dim / kDimGroup) * block_size * kDimGroup +
           slot / 2 * (2 * kDimGroup) + dim % kDimGroup * 2 + slot % 2;
  }
  INT8KV_HD int64_t v_codes() const { return static_cast<int64_t>(block_size) * head_size; }
  INT8KV_HD int64_t k_scales() const { return 2 * v_codes(); }
  INT8KV_HD int64_t v_scales() const { return 2 * v_codes() + 2 * block_size; }
};

struct ReshapeAndCacheParams {
  KVCache cache;
  const void* key;    // [num_tokens, num_kv_heads, head_size], strides below, last one 1
  const void* value;  // same shape and dtype as key
  int64_t key_token_stride, key_head_stride;      // elements
  int64_t value_token_stride, value_head_stride;  // elements
  const int64_t* slot_mapping;  // [num_tokens]; negative: the token is padding and is skipped
  const float* key_equalizer;   // [num_kv_heads, head_size] or null; K is divided by it
  int64_t num_tokens;
  DType dtype;
  bool rotate_keys;
};

// Keys and values of stretches of sequences, as floats.
struct GatherCacheParams {
  KVCache cache;
  void* key;    // [num_rows, num_kv_heads, head_size], strides below, last one 1
  void* value;  // same shape and dtype as key
  int64_t key_token_stride, key_head_stride;      // elements
  int64_t value_token_stride, value_head_stride;  // elements
  const int32_t* block_table;  // [num_seqs, max_blocks_per_seq], row stride below
  int64_t block_table_stride;  // elements
  const int32_t* cu_seq_lens;  // [num_seqs + 1], the rows of a sequence; later rows are left alone
  const int32_t* seq_starts;   // [num_seqs], position of a sequence's first row
  const float* key_equalizer;  // [num_kv_heads, head_size] or null; K is multiplied by it
  int64_t num_rows;
  int32_t num_seqs;
  DType dtype;
  bool rotate_keys;  // undo the rotation

  // The sequence of a row below cu_seq_lens[num_seqs].
  INT8KV_HD int32_t seq_of(int64_t row) const {
    int32_t low = 0, high = num_seqs - 1;
    while (low < high) {
      const int32_t middle = (low + high + 1) / 2;
      if (cu_seq_lens[middle] <= row) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

// The rungs of the ladder from plain to fast: quantize_per_channel.cpp and quantize_per_channel.cu.
enum class CpuVariant : int32_t { kColumnStrided, kRowMajor, kTiled, kSimd, kVectorized };
enum class CudaVariant : int32_t { kNaive, kTiled, kCoarsened, kVectorized, kFused };

struct QuantizePerChannelParams {
  const void* x;           // [num_tokens, num_channels], last stride 1
  int64_t x_token_stride;  // elements
  int8_t* codes;           // [num_tokens, num_channels] contiguous
  float* scales;           // [num_channels]
  int64_t num_tokens;
  int64_t num_channels;
  DType dtype;          // of x
  bool compute_scales;  // write scales from x first; else they are read as they are
};

struct DequantizePerChannelParams {
  const int8_t* codes;  // [num_tokens, num_channels] contiguous
  const float* scales;  // [num_channels]
  void* x;              // [num_tokens, num_channels] contiguous
  int64_t num_tokens;
  int64_t num_channels;
  DType dtype;  // of x
};

struct PagedAttentionParams {
  KVCache cache;
  const void* query;  // [num_tokens, num_heads, head_size], strides below, last one 1
  void* out;          // same shape and dtype as query
  int64_t query_token_stride, query_head_stride;  // elements
  int64_t out_token_stride, out_head_stride;      // elements
  float* lse;                                     // [num_heads, num_tokens] natural log, or null
  const int32_t* block_table;      // [num_seqs, max_blocks_per_seq], row stride below
  int64_t block_table_stride;      // elements
  const int32_t* seq_lens;         // [num_seqs], tokens in the cache including this step's
  const int32_t* query_start_loc;  // [num_seqs + 1], prefix sum of the query lengths
  const float* alibi_slopes;       // [num_heads] or null
  const float* sinks;              // [num_heads] or null; a score that attends to nothing
  const float* key_equalizer;      // [num_kv_heads, head_size] or null; Q is multiplied by it
  int64_t num_tokens;
  int32_t num_seqs;
  int32_t num_heads;
  float softmax_scale;
  float softcap;           // 0: none
  int32_t sliding_window;  // keys with |query position - key position| < window; 0: all
  DType dtype;
  bool causal;
  bool rotate_keys;
};

}  // namespace int8kv
