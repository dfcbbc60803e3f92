// The codes of a vector in the registers of a warp, lane by lane as a HeadVector's pairs of dims,
// on their way into the planes of the cache and back.
//
// A byte of a plane holds fields of dims that lie 8 (K) or 16 (V) apart, so that lanes which differ
// in one bit of their number have the fields of the same bytes: they meet by shuffles, and the lane
// of field 0 stores. A byte belongs to one slot, so nothing is read before it is written.
#pragma once

#include "cuda/cache/format_planes.h"
#include "cuda/head_vector.cuh"

namespace int8kv {

// Two codes of eight bits, of an even dim and the next.
template <int kPairs>
using CodePairs = uint32_t[kPairs];

// Lanes whose numbers differ by this bit or a higher one below kFieldLanesEnd have other fields of
// the same bytes.
template <bool kIsKey>
constexpr int kFieldLanes = kIsKey ? 4 : 8;
template <typename Plane, bool kIsKey>
constexpr int kFieldLanesEnd =
    kFieldLanes<kIsKey> * Plane::kFields < 32 ? kFieldLanes<kIsKey> * Plane::kFields : 32;

// Lowest bit of a pair's codes in their bytes.
template <typename Plane, bool kIsKey>
INT8KV_DEVICE int field_shift(int pair) {
  return kIsKey ? Plane::k_shift(2 * pair) : Plane::v_shift(2 * pair);
}

// Stores a slot's codes; those of pairs past head_size are 0. All lanes of the warp call.
template <typename C, bool kIsKey, int kPairs>
INT8KV_DEVICE void store_codes(const PlaneMap<C, kIsKey>& map, int slot, int lane,
                               const CodePairs<kPairs>& codes) {
  map.for_each([&]<typename Plane>(int8_t* plane, int lowest) {
    constexpr uint32_t kMask = Plane::kMask * 0x101u;
    CodePairs<kPairs> bytes;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int pair = head_pair(lane, i);
      bytes[i] = (codes[i] >> lowest & kMask) << field_shift<Plane, kIsKey>(pair);
    }
    // 128 dims share a byte of V in a plane of one bit: those of two pairs of a lane.
    constexpr int kStep = !kIsKey && Plane::kVDims > 64 ? 2 : 1;
    if constexpr (kStep == 2 && kPairs == 2) bytes[0] |= bytes[1];
#pragma unroll
    for (int i = 0; i < kPairs; i += kStep) {
#pragma unroll
      for (int mask = kFieldLanes<kIsKey>; mask < kFieldLanesEnd<Plane, kIsKey>; mask *= 2) {
        bytes[i] |= shuffle_xor(bytes[i], mask);
      }
      const int dim = 2 * head_pair(lane, i);
      if (field_shift<Plane, kIsKey>(dim / 2) != 0 || dim >= map.head_size) continue;
      int8_t* to = plane + map.template byte<Plane>(slot, dim);
      if constexpr (kIsKey) {
        *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(bytes[i]);
      } else {
        to[0] = static_cast<int8_t>(bytes[i]);
        to[2] = static_cast<int8_t>(bytes[i] >> 8);
      }
    }
  });
}

struct TwoCodes {
  int32_t first, second;
};

// The codes of an even dim of a slot and of the next; signed where they have eight bits.
template <typename C, bool kIsKey>
INT8KV_DEVICE TwoCodes load_codes(const PlaneMap<C, kIsKey>& map, int slot, int dim) {
  uint32_t codes = 0;  // in the lower bytes of both halves
  map.for_each([&]<typename Plane>(const int8_t* plane, int lowest) {
    uint32_t bytes;
    if constexpr (kIsKey) {
      const uint32_t two =
          *reinterpret_cast<const uint16_t*>(plane + map.template byte<Plane>(slot, dim));
      bytes = (two | two << 8) & 0x00ff00ffu;
    } else {  // both dims of an even slot and of the next
      bytes =
          *reinterpret_cast<const uint32_t*>(plane + map.template byte<Plane>(slot / 2 * 2, dim)) >>
          (slot % 2 * 8);
    }
    constexpr uint32_t kMask = Plane::kMask * 0x10001u;
    codes |= (bytes >> field_shift<Plane, kIsKey>(dim / 2) & kMask) << lowest;
  });
  if constexpr (!C::kHasMidpoint) {
    return {static_cast<int8_t>(codes & 0xffu), static_cast<int8_t>(codes >> 16)};
  }
  return {static_cast<int32_t>(codes & 0xffffu), static_cast<int32_t>(codes >> 16)};
}

}  // namespace int8kv
