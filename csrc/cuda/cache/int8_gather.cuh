// The way back from codes of eight bits to floats.
//
//   grid   (slot groups, num_kv_heads); block = 16 rows of head_rows.cuh
//
// A block takes what a stretch of a sequence has of one slot group: it reads the group's lines 16
// bytes at a time, turns them into a row of bytes per slot in shared memory, and writes rows 16
// bytes at a time.
#pragma once

#include "cuda/cache/head_rows.cuh"
#include "cuda/cache/line_maps.h"

namespace int8kv {

struct Int8GatherParams : GatherCacheParams {
  bool rows_are_aligned;  // every row of key and value starts on 16 bytes
};

// Slot groups are numbered without a sum over the sequences: those of a sequence from its first row
// / 16 + 2 * its index on. A stretch of n rows is in at most n / 16 + 2 groups, so that no two
// sequences share a number, and some numbers have no group.
INT8KV_HD int64_t first_window(int64_t first_row, int32_t seq) {
  return first_row / kSlotGroup + int64_t{2} * seq;
}

// The slots [begin, end) of a slot group that a stretch has, and the rows they become.
struct GatherWindow {
  int64_t row;    // that slot 0 of the group would be
  int64_t block;  // of the cache
  int32_t slot;   // the group's first, in the block
  int32_t begin, end;
};

INT8KV_DEVICE GatherWindow gather_window(const GatherCacheParams& p, int64_t number) {
  const int32_t seq =
      p.last_seq(number, [&](int32_t i) { return first_window(p.cu_seq_lens[i], i); });
  const int64_t first_row = p.cu_seq_lens[seq];
  const int64_t end_row = min(int64_t{p.cu_seq_lens[seq + 1]}, p.num_rows);
  const int64_t start = p.seq_starts[seq];
  const int64_t group = start / kSlotGroup + number - first_window(first_row, seq);
  const int64_t row = first_row + group * kSlotGroup - start;
  GatherWindow window{
      row, 0, 0, static_cast<int32_t>(max(first_row - row, int64_t{0})),
      static_cast<int32_t>(min(max(end_row - row, int64_t{0}), int64_t{kSlotGroup}))};
  if (window.begin < window.end) {
    const int64_t index = group * kSlotGroup / p.cache.block_size;
    window.block = p.block_table[seq * p.block_table_stride + index];
    window.slot = static_cast<int32_t>(group * kSlotGroup - index * p.cache.block_size);
  }
  return window;
}

template <typename Shape>
struct Int8Gather {
  using Rows = HeadRows<Shape>;
  using Tile = GroupTile<Shape>;
  static constexpr int kThreads = kSlotGroup * Shape::kLanes;

  const Int8GatherParams& p;
  int lane;

  // The lines of the slot group from slot `first` on, into the tile.
  INT8KV_DEVICE void load_group(const int8_t* chunk, int first, int8_t* tile) const {
    for_each_vector<kThreads>(p.cache, first, [&](bool is_key, int vector, int32_t byte) {
      const uint4 codes = *reinterpret_cast<const uint4*>(chunk + byte);
      if (is_key) {
        store_key_vector(vector, codes, tile);
      } else {
        store_value_vector(vector, codes, tile);
      }
    });
  }

  // Slot `member` of the group as floats: codes times the scale.
  INT8KV_DEVICE Rows load_row(bool is_key, const int8_t* tile, int member, float scale) const {
    Rows rows;
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
      const int dim = row_dim<Shape>(lane, c);
      uint2 codes{};
      if (dim < p.cache.head_size) {
        codes = *reinterpret_cast<const uint2*>(tile + Tile::byte(is_key, member, dim));
      }
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) {
        // 2^23 + 128 + code, by its bits.
        const uint32_t word = (i < 4 ? codes.x : codes.y) ^ 0x80808080u;
        const uint32_t bits = byte_permute(word, 0x4b000000u, 0x7650u | (i % 4));
        rows.x[c][i] = (bits_to_float(bits) - 8388736.0f) * scale;
      }
    }
    return rows;
  }

  // Undoes the key transform; the rotation is its own inverse.
  INT8KV_DEVICE void restore_key(Rows& rows, int kv_head) const {
    const int head_size = p.cache.head_size;
    const float* factors = p.key_transform.factors(kv_head, head_size);
    const int block = rotation_block(head_size);
    if (p.key_transform.rotate) rotate_rows(rows, block, lane);
    const float norm = p.key_transform.rotate ? rotation_norm(block) : 1.0f;
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
      const int dim = row_dim<Shape>(lane, c);
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) {
        rows.x[c][i] *= norm;
        if (factors != nullptr && dim < head_size) rows.x[c][i] *= factors[dim + i];
      }
    }
  }

 private:
  INT8KV_DEVICE void store_key_vector(int vector, const uint4& codes, int8_t* tile) const {
    const int slot = Tile::key_slot(vector), dim = Tile::key_dim(vector);
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      *reinterpret_cast<uint16_t*>(tile + Tile::byte(true, slot + i, dim)) =
          static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
    }
  }

  INT8KV_DEVICE void store_value_vector(int vector, const uint4& codes, int8_t* tile) const {
    const int slot = Tile::value_slot(vector), dim = Tile::value_dim(vector);
    *reinterpret_cast<uint2*>(tile + Tile::byte(false, slot, dim)) = {
        byte_permute(codes.x, codes.y, 0x6420), byte_permute(codes.z, codes.w, 0x6420)};
    *reinterpret_cast<uint2*>(tile + Tile::byte(false, slot + 1, dim)) = {
        byte_permute(codes.x, codes.y, 0x7531), byte_permute(codes.z, codes.w, 0x7531)};
  }
};

template <typename Shape, DType kDType>
__global__ void __launch_bounds__(Int8Gather<Shape>::kThreads)
    gather_cache_int8_kernel(const __grid_constant__ Int8GatherParams p) {
  using Raw = RawRows<Shape, kDType>;
  alignas(kVectorBytes) __shared__ int8_t tile[GroupTile<Shape>::kBytes];
  const KVCache& cache = p.cache;
  const int lane = threadIdx.x % 32;
  const int member = threadIdx.x / Shape::kLanes;  // of the slot group
  const int kv_head = blockIdx.y;
  const Int8Gather<Shape> gather{p, lane};
  const int64_t num_windows = first_window(p.num_rows, p.num_seqs);
  for (int64_t number = blockIdx.x; number < num_windows; number += gridDim.x) {
    const GatherWindow window = gather_window(p, number);
    if (window.begin >= window.end) continue;
    const int8_t* chunk = cache.chunk(window.block, kv_head);
    gather.load_group(chunk, window.slot, tile);
    const auto scale_at = [&](int32_t byte) {
      return bf16_bits_to_float(*reinterpret_cast<const uint16_t*>(chunk + byte));
    };
    const float k_scale = scale_at(cache.k_scale<K8V8>(window.slot + member));
    const float v_scale = scale_at(cache.v_scale<K8V8>(window.slot + member));
    __syncthreads();
    auto key = gather.load_row(true, tile, member, k_scale);
    const auto value = gather.load_row(false, tile, member, v_scale);
    __syncthreads();  // the tile has been read
    gather.restore_key(key, kv_head);
    if (member < window.begin || member >= window.end) continue;
    const int64_t row = window.row + member;
    const auto store = [&](void* to, int64_t offset, const HeadRows<Shape>& rows) {
      Raw::from_floats(rows).store(to, offset, cache.head_size, lane, p.rows_are_aligned);
    };
    store(p.key, row * p.key_token_stride + kv_head * p.key_head_stride, key);
    store(p.value, row * p.value_token_stride + kv_head * p.value_head_stride, value);
  }
}

}  // namespace int8kv
