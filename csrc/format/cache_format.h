// The cache format: which planes a chunk has, how codes lie in a plane, and where each plane
// begins.
//
// A chunk is what one (block, KV head) pair owns. Its bytes are contiguous, in four planes, each of
// which starts on a 16-byte boundary because block_size and head_size are multiples of 16:
//
//   K codes | V codes | K scales [block_size] | V scales [block_size]
//
// Codes<bits> is the trait of one plane of codes, Format<K, V> the pair that a layer has, and
// CacheFormat its name at run time. A kernel is a template of a Format and is chosen once per
// launch by with_format(), so that offsets are made of constants where the format is one. No other
// file computes an offset within a chunk; formats.py states the same and the tests compare both.
#pragma once

#include <cstdint>
#include <utility>

#include "format/host_device.h"

namespace int8kv {

constexpr int kSlotGroup = 16;  // slots that share a line of K codes; block_size is a multiple
constexpr int kDimGroup = 16;   // dims that share a line of V codes; head_size is a multiple
constexpr int kMaxHeadSize = 512;

// Every kernel serves these; `SUPPORTED_HEAD_SIZES` in formats.py is the same list.
constexpr bool is_supported_head_size(int64_t head_size) {
  return (head_size >= 32 && head_size <= 256 && head_size % kDimGroup == 0) ||
         head_size == kMaxHeadSize;
}
constexpr const char* kSupportedHeadSizes = "32 to 256 in steps of 16, and 512";

template <int kBits>
struct Codes;

// One signed byte per code. A line of 32 bytes holds two steps of a dot product for 16 outputs,
// which is one 16-bit multiply-add of AVX-512 and one pair of fragment registers of a tensor core:
//
//   K codes  [block_size / 16][head_size / 2][16 slots][2 dims]
//   V codes  [head_size / 16][block_size / 2][16 dims][2 slots]
template <>
struct Codes<8> {
  static constexpr int kBits = 8;
  static constexpr float kMax = 127.0f;  // -128 is unused, so that negation stays exact
  static constexpr int kLineBytes = 32;
  static constexpr int kScaleBytes = 2;  // bf16

  // Bytes of `count` codes, a multiple of a line's.
  static INT8KV_HD constexpr int32_t bytes(int32_t count) { return count; }

  // Byte of a code within its plane.
  static INT8KV_HD constexpr int32_t k_byte(int32_t head_size, int32_t slot, int32_t dim) {
    return slot / kSlotGroup * head_size * kSlotGroup + dim / 2 * kLineBytes +
           slot % kSlotGroup * 2 + dim % 2;
  }
  static INT8KV_HD constexpr int32_t v_byte(int32_t block_size, int32_t slot, int32_t dim) {
    return dim / kDimGroup * block_size * kDimGroup + slot / 2 * kLineBytes + dim % kDimGroup * 2 +
           slot % 2;
  }
};

template <typename K_, typename V_>
struct Format {
  using K = K_;
  using V = V_;

  // Bytes per slot and KV head.
  static INT8KV_HD constexpr int32_t content_bytes(int32_t head_size) {
    return K::bytes(head_size) + V::bytes(head_size) + K::kScaleBytes + V::kScaleBytes;
  }
};

using K8V8 = Format<Codes<8>, Codes<8>>;

enum class CacheFormat : int32_t { kK8V8 };

// Kernels are instantiated for each of these.
#define INT8KV_FOR_EACH_FORMAT(CALL) CALL(K8V8)

// As users and operators name them.
constexpr std::pair<const char*, CacheFormat> kCacheFormats[] = {{"k8v8", CacheFormat::kK8V8}};

// Calls f.operator()<F>() with the Format that a name stands for.
template <typename Call>
decltype(auto) with_format(CacheFormat format, Call&& f) {
  switch (format) {
    case CacheFormat::kK8V8:
      return f.template operator()<K8V8>();
  }
  __builtin_unreachable();
}

inline int32_t content_bytes(CacheFormat format, int32_t head_size) {
  return with_format(format, [&]<typename F>() { return F::content_bytes(head_size); });
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

  // The byte that holds a code.
  template <typename F>
  INT8KV_HD int32_t k_code(int32_t slot, int32_t dim) const {
    return F::K::k_byte(head_size, slot, dim);
  }
  template <typename F>
  INT8KV_HD int32_t v_code(int32_t slot, int32_t dim) const {
    return v_codes<F>() + F::V::v_byte(block_size, slot, dim);
  }

  // From one slot group's K codes to the next one's, and from one dim group's V codes to the next.
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
    return F::K::bytes(block_size * head_size);
  }
  template <typename F>
  INT8KV_HD int32_t k_scales() const {
    return v_codes<F>() + F::V::bytes(block_size * head_size);
  }
  template <typename F>
  INT8KV_HD int32_t v_scales() const {
    return k_scales<F>() + F::K::kScaleBytes * block_size;
  }

  template <typename F>
  INT8KV_HD int32_t k_scale(int32_t slot) const {
    return k_scales<F>() + F::K::kScaleBytes * slot;
  }
  template <typename F>
  INT8KV_HD int32_t v_scale(int32_t slot) const {
    return v_scales<F>() + F::V::kScaleBytes * slot;
  }
};

}  // namespace int8kv
