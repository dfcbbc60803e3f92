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

// Codes of all lanes, [head_size][lane], and the stored scales.
struct Quantized {
  alignas(64) int8_t codes[kMaxHeadSize * kLanes];
  uint16_t scale_bits[kLanes];
};

void quantize(const LaneBlock& block, int32_t head_size, Quantized& q) {
  f32x16 amax = {};
  for (int32_t dim = 0; dim < head_size; ++dim) {
    amax = max(amax, abs(load<f32x16>(block.x + dim * kLanes)));
  }
  float scales[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    q.scale_bits[lane] = scale_bits_from_amax(amax[lane]);
    scales[lane] = bf16_bits_to_float(q.scale_bits[lane]);
  }
  const f32x16 scale = load<f32x16>(scales);
  for (int32_t dim = 0; dim < head_size; ++dim) {
    const f32x16 code = round_even(load<f32x16>(block.x + dim * kLanes) / scale);
    store(q.codes + dim * kLanes,
          __builtin_convertvector(__builtin_convertvector(code, i32x16), i8x16));
  }
}

void store_scale(int8_t* chunk, int64_t plane, int32_t slot, uint16_t bits) {
  std::memcpy(chunk + plane + 2 * slot, &bits, 2);
}

void store_codes(const KVCache& cache, const LaneGroup& group, const Quantized& q, bool is_key) {
  const int32_t head_size = cache.head_size;
  const Lane& first = group.lanes[0];
  const bool whole = group.is_slot_group();
  for (int i = 0; i < group.count; ++i) {
    const Lane& lane = group.lanes[i];
    int8_t* chunk = cache.chunk(lane.slot / cache.block_size, lane.kv_head);
    const int32_t slot = static_cast<int32_t>(lane.slot % cache.block_size);
    store_scale(chunk, is_key ? cache.k_scales() : cache.v_scales(), slot, q.scale_bits[i]);
    if (whole) continue;
    for (int32_t dim = 0; dim < head_size; ++dim) {
      const int64_t offset = is_key ? cache.k_code(slot, dim) : cache.v_code(slot, dim);
      chunk[offset] = q.codes[dim * kLanes + i];
    }
  }
  if (!whole) return;
  int8_t* chunk = cache.chunk(first.slot / cache.block_size, first.kv_head);
  const int32_t slot = static_cast<int32_t>(first.slot % cache.block_size);
  if (is_key) {
    int8_t* line = chunk + cache.k_code(slot, 0);
    for (int32_t dim = 0; dim < head_size; dim += 2, line += 2 * kSlotGroup) {
      const i16x16 even = __builtin_convertvector(load<i8x16>(q.codes + dim * kLanes), i16x16);
      const i16x16 odd = __builtin_convertvector(load<i8x16>(q.codes + (dim + 1) * kLanes), i16x16);
      store(line, static_cast<i16x16>((even & 0xff) | (odd << 8)));
    }
  } else {
    for (int32_t dim = 0; dim < head_size; dim += kDimGroup) {
      int8_t* lines = chunk + cache.v_code(slot, dim);
      for (int32_t d = 0; d < kDimGroup; ++d) {
        for (int32_t pair = 0; pair < kSlotGroup / 2; ++pair) {
          std::memcpy(lines + pair * 2 * kDimGroup + 2 * d, q.codes + (dim + d) * kLanes + 2 * pair,
                      2);
        }
      }
    }
  }
}

void write_group(const ReshapeAndCacheParams& p, const LaneGroup& group) {
  const int32_t head_size = p.cache.head_size;
  const int64_t bytes = element_size(p.dtype);
  LaneBlock block;
  Quantized q;
  if (group.count < kLanes) std::memset(block.x, 0, sizeof(float) * head_size * kLanes);
  for (const bool is_key : {true, false}) {
    const char* data = static_cast<const char*>(is_key ? p.key : p.value);
    const int64_t token_stride = is_key ? p.key_token_stride : p.value_token_stride;
    const int64_t head_stride = is_key ? p.key_head_stride : p.value_head_stride;
    for (int i = 0; i < group.count; ++i) {
      const Lane& lane = group.lanes[i];
      const int64_t offset = lane.token * token_stride + lane.kv_head * head_stride;
      load_lane(block, i, data + offset * bytes, p.dtype, head_size);
    }
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
    quantize(block, head_size, q);
    store_codes(p.cache, group, q, is_key);
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
