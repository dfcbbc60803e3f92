// The cache format: which planes a chunk has, and where each plane begins.
//
// A chunk is what one (block, KV head) pair owns. Its bytes are contiguous, in planes that each
// start on a 16-byte boundary, because block_size and head_size are multiples of 16:
//
//   K codes | V codes | K scales [block_size] | K midpoints [block_size] | V scales | V midpoints
//
// Codes of 8 bits have no midpoints. codes.h has the trait Codes<bits> of the codes of K or V,
// Format<K, V> is the pair that a layer has, and CacheFormat its name at run time. A kernel is a
// template of a Format and is chosen once per launch by with_format(), so that offsets are made of
// constants where the format is one. No other file computes an offset within a chunk; formats.py
// states the same and the tests compare both.
#pragma once

#include <cstdint>
#include <utility>

#include "format/codes.h"
#include "format/host_device.h"

namespace int8kv {

// Every kernel serves these; `SUPPORTED_HEAD_SIZES` in formats.py is the same list.
constexpr bool is_supported_head_size(int64_t head_size) {
  return (head_size >= 32 && head_size <= 256 && head_size % kDimGroup == 0) ||
         head_size == kMaxHeadSize;
}
constexpr const char* kSupportedHeadSizes = "32 to 256 in steps of 16, and 512";

template <typename K_, typename V_>
struct Format {
  using K = K_;
  using V = V_;
  // Values below 8 bits are rotated as keys are (rotation.h), and the output is rotated back.
  static constexpr bool kRotatesValues = V::kBits < 8;
  // The CUDA kernels have every head size with 8 bits, with fewer those of nearly all models.
  static constexpr int32_t kMaxCudaHeadSize = K::kBits == 8 && V::kBits == 8 ? kMaxHeadSize : 128;

  // Bytes per slot and KV head.
  static INT8KV_HD constexpr int32_t content_bytes(int32_t head_size) {
    return (K::k_bytes(kSlotGroup, head_size) + V::v_bytes(kSlotGroup, head_size)) / kSlotGroup +
           K::kParamBytes + V::kParamBytes;
  }
};

template <int kKBits, int kVBits>
using FormatOf = Format<Codes<kKBits>, Codes<kVBits>>;
using K8V8 = FormatOf<8, 8>;

// Bits of K and V of every format. Kernels are instantiated for each of these.
// clang-format off
#define INT8KV_FOR_EACH_FORMAT(CALL)                     \
  CALL(8, 8) CALL(8, 6) CALL(8, 5) CALL(8, 4) CALL(8, 2) \
  CALL(6, 8) CALL(6, 6) CALL(6, 5) CALL(6, 4) CALL(6, 2) \
  CALL(5, 8) CALL(5, 6) CALL(5, 5) CALL(5, 4) CALL(5, 2) \
  CALL(4, 8) CALL(4, 6) CALL(4, 5) CALL(4, 4) CALL(4, 2) \
  CALL(2, 8) CALL(2, 6) CALL(2, 5) CALL(2, 4) CALL(2, 2)
// clang-format on

#define INT8KV_ENUMERATOR(k, v) kK##k##V##v,
enum class CacheFormat : int32_t { INT8KV_FOR_EACH_FORMAT(INT8KV_ENUMERATOR) };
#undef INT8KV_ENUMERATOR

// As users and operators name them.
#define INT8KV_NAME(k, v) {"k" #k "v" #v, CacheFormat::kK##k##V##v},
constexpr std::pair<const char*, CacheFormat> kCacheFormats[] = {
    INT8KV_FOR_EACH_FORMAT(INT8KV_NAME)};
#undef INT8KV_NAME

// Calls f.operator()<F>() with the Format that a name stands for.
template <typename Call>
decltype(auto) with_format(CacheFormat format, Call&& f) {
#define INT8KV_CASE(k, v)        \
  case CacheFormat::kK##k##V##v: \
    return f.template operator()<FormatOf<k, v>>();
  switch (format) { INT8KV_FOR_EACH_FORMAT(INT8KV_CASE) }
#undef INT8KV_CASE
  __builtin_unreachable();
}

inline int32_t content_bytes(CacheFormat format, int32_t head_size) {
  return with_format(format, [&]<typename F>() { return F::content_bytes(head_size); });
}

// Up to which head size there are CUDA kernels; the operators refuse larger ones on a GPU.
inline int32_t max_cuda_head_size(CacheFormat format) {
  return with_format(format, [&]<typename F>() { return F::kMaxCudaHeadSize; });
}

// A paged cache of one layer, seen by a kernel. Offsets are bytes from the start of a chunk; they
// fit 32 bits, which the operators check.
struct KVCache {
  int8_t* data;          // start of block 0
  int64_t block_stride;  // bytes from one block to the next
  int64_t head_stride;   // bytes from one KV head's chunk to the next within a block
  int64_t num_blocks;
  int32_t num_kv_heads;
  int32_t block_size;  // slots, a multiple of kSlotGroup
  int32_t head_size;   // a multiple of kDimGroup
  CacheFormat format;

  INT8KV_HD int8_t* chunk(int64_t block, int64_t kv_head) const {
    return data + block * block_stride + kv_head * head_stride;
  }

  // The byte that holds a code, below 8 bits its lower bits.
  template <typename F>
  INT8KV_HD int32_t k_code(int32_t slot, int32_t dim) const {
    return F::K::k_byte(head_size, slot, dim);
  }
  template <typename F>
  INT8KV_HD int32_t v_code(int32_t slot, int32_t dim) const {
    return v_codes<F>() + F::V::v_byte(block_size, slot, dim);
  }

  // From one slot group's K codes to the next one's, and from one dim group's V codes to the next;
  // of 8 bits.
  template <typename F>
  INT8KV_HD int32_t k_group_stride() const {
    return F::K::bytes(head_size * kSlotGroup);
  }
  template <typename F>
  INT8KV_HD int32_t v_group_stride() const {
    return F::V::bytes(block_size * kDimGroup);
  }

  // The first byte of the planes behind the K codes.
  template <typename F>
  INT8KV_HD int32_t v_codes() const {
    return F::K::k_bytes(block_size, head_size);
  }
  template <typename F>
  INT8KV_HD int32_t k_scales() const {
    return v_codes<F>() + F::V::v_bytes(block_size, head_size);
  }
  template <typename F>
  INT8KV_HD int32_t v_scales() const {
    return k_scales<F>() + F::K::kParamBytes * block_size;
  }

  template <typename F>
  INT8KV_HD int32_t k_scale(int32_t slot) const {
    return k_scales<F>() + F::K::kScaleBytes * slot;
  }
  template <typename F>
  INT8KV_HD int32_t v_scale(int32_t slot) const {
    return v_scales<F>() + F::V::kScaleBytes * slot;
  }
  // From a scale to the midpoint of its slot.
  INT8KV_HD int32_t midpoint_offset() const { return 2 * block_size; }
};

}  // namespace int8kv
