// Cache write: rotate, scale, round and store. Compiled once per instruction set.
//
// Sixteen (token, KV head) vectors are handled side by side, one per lane, so that the rotation,
// the maximum and the rounding are vertical and need no shuffles. When the lanes are the 16
// consecutive slots of a slot group, their codes are whole 32-byte lines of the cache; else they
// are stored one by one.
#include <initializer_list>

#include "kernels.h"
#include "vectors.h"

namespace int8kv::cpu::INT8KV_ISA {

namespace {

struct Lane {
  int64_t token;
  int32_t kv_head;
  int64_t slot;
};

struct LaneGroup {
  Lane lanes[kLanes];
  int32_t count = 0;

  // Whether the lanes are one whole slot group of one KV head, in order.
  bool is_slot_group() const {
    if (count != kLanes || lanes[0].slot % kSlotGroup != 0) return false;
    for (int i = 1; i < kLanes; ++i) {
      if (lanes[i].slot != lanes[0].slot + i || lanes[i].kv_head != lanes[0].kv_head) return false;
    }
    return true;
  }
};

// Where the codes of a lane go.
struct Target {
  int8_t* chunk;
  int32_t slot;
};

// The bytes of two int32 vectors of codes, alternating: 16 pairs.
i16x16 interleave(i32x16 even, i32x16 odd) {
  return __builtin_convertvector((even & 0xff) | (odd << 8), i16x16);
}

// Quantizes the block and stores its codes and scales. A whole slot group gets full 32-byte lines:
// for K pairs of dims as they come, for V pairs of slots after a transposition.
void quantize_and_store(const KVCache& cache, const LaneGroup& group, const LaneBlock& block,
                        bool is_key) {
  Target targets[kLanes];
  float scales[kLanes];
  f32x16 amax = {};
  for (int32_t dim = 0; dim < cache.head_size; ++dim) {
    amax = max(amax, abs(load<f32x16>(block.x + dim * kLanes)));
  }
  for (int i = 0; i < kLanes; ++i) {
    const uint16_t scale_bits = scale_bits_from_amax(amax[i]);
    scales[i] = bf16_bits_to_float(scale_bits);
    if (i >= group.count) continue;
    const Lane& lane = group.lanes[i];
    targets[i] = {cache.chunk(lane.slot / cache.block_size, lane.kv_head),
                  static_cast<int32_t>(lane.slot % cache.block_size)};
    const int64_t plane = is_key ? cache.k_scales() : cache.v_scales();
    std::memcpy(targets[i].chunk + plane + 2 * targets[i].slot, &scale_bits, 2);
  }
  const f32x16 scale = load<f32x16>(scales);
  const bool is_slot_group = group.is_slot_group();
  for (int32_t dim = 0; dim < cache.head_size; dim += kDimGroup) {
    i32x16 codes[kDimGroup];  // of one dim each, lane by lane
    for (int32_t d = 0; d < kDimGroup; ++d) {
      const f32x16 x = load<f32x16>(block.x + (dim + d) * kLanes);
      codes[d] = __builtin_convertvector(round_even(x / scale), i32x16);
    }
    if (is_slot_group && is_key) {
      int8_t* lines = targets[0].chunk + cache.k_code(targets[0].slot, dim);
      for (int32_t d = 0; d < kDimGroup; d += 2) {
        store(lines + d * kSlotGroup, interleave(codes[d], codes[d + 1]));
      }
      continue;
    }
    transpose(codes);  // of one lane each, dim by dim
    if (is_slot_group) {
      int8_t* lines = targets[0].chunk + cache.v_code(targets[0].slot, dim);
      for (int32_t slot = 0; slot < kSlotGroup; slot += 2) {
        store(lines + slot * kDimGroup, interleave(codes[slot], codes[slot + 1]));
      }
      continue;
    }
    for (int i = 0; i < group.count; ++i) {
      int8_t bytes[kDimGroup];
      store(bytes, __builtin_convertvector(codes[i], i8x16));
      if (is_key) {
        int8_t* to = targets[i].chunk + cache.k_code(targets[i].slot, dim);
        for (int32_t d = 0; d < kDimGroup; d += 2) std::memcpy(to + d * kSlotGroup, bytes + d, 2);
      } else {
        int8_t* to = targets[i].chunk + cache.v_code(targets[i].slot, dim);
        for (int32_t d = 0; d < kDimGroup; ++d) to[2 * d] = bytes[d];
      }
    }
  }
}

void write_group(const ReshapeAndCacheParams& p, const LaneGroup& group) {
  const int32_t head_size = p.cache.head_size;
  const int64_t bytes = element_size(p.dtype);
  LaneBlock block;
  for (const bool is_key : {true, false}) {
    const char* data = static_cast<const char*>(is_key ? p.key : p.value);
    const int64_t token_stride = is_key ? p.key_token_stride : p.value_token_stride;
    const int64_t head_stride = is_key ? p.key_head_stride : p.value_head_stride;
    const void* vectors[kLanes];
    for (int i = 0; i < group.count; ++i) {
      const Lane& lane = group.lanes[i];
      vectors[i] = data + (lane.token * token_stride + lane.kv_head * head_stride) * bytes;
    }
    load_lanes(block, vectors, group.count, p.dtype, head_size);
    for (int32_t dim = 0; dim < head_size; ++dim) {
      float* x = block.x + dim * kLanes;
      store(x, sanitize(load<f32x16>(x)));
    }
    if (is_key && p.key_equalizer) {
      for (int i = 0; i < group.count; ++i) {
        const float* equalizer =
            p.key_equalizer + static_cast<int64_t>(group.lanes[i].kv_head) * head_size;
        for (int32_t dim = 0; dim < head_size; ++dim) {
          float& x = block.x[dim * kLanes + i];
          x = int8kv::sanitize(x / equalizer[dim]);
        }
      }
    }
    if (is_key && p.rotate_keys) hadamard_rotate(block, head_size);
    quantize_and_store(p.cache, group, block, is_key);
  }
}

}  // namespace

// Lanes run over tokens first, so that prefill fills slot groups, and a group is closed where a
// slot group ends, so that an unaligned start costs one group and not every group.
void quantize_tokens(const ReshapeAndCacheParams& p, int64_t token_begin, int64_t token_end,
                     int32_t head_begin, int32_t head_end) {
  LaneGroup group;
  for (int32_t kv_head = head_begin; kv_head < head_end; ++kv_head) {
    for (int64_t token = token_begin; token < token_end; ++token) {
      const int64_t slot = p.slot_mapping[token];
      if (slot < 0) continue;
      group.lanes[group.count++] = {token, kv_head, slot};
      const bool closes = slot % kSlotGroup == kSlotGroup - 1 && token_end - token > kLanes;
      if (group.count == kLanes || closes) {
        write_group(p, group);
        group.count = 0;
      }
    }
  }
  if (group.count > 0) write_group(p, group);
}

}  // namespace int8kv::cpu::INT8KV_ISA
