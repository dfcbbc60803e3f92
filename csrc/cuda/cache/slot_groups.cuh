// Which tokens of a window of 16 are stored together, as the slots of one slot group, and which by
// themselves. For the cache write.
//
// At 8 bits one slot owns 2 bytes of every 32-byte line of K and every second byte of a line of V.
// A prompt fills lines together: where 16 tokens in a row go to the 16 slots of one slot group, the
// block whose window holds the first of them takes all. Every other token is stored by itself.
#pragma once

#include "cuda/ptx.cuh"
#include "format/params.h"

namespace int8kv {

constexpr int kReach = kSlotGroup - 1;  // a group begins at most this far before its last token
constexpr int kSeen = 64;               // slots looked at, from `window - kReach`; 46 are used

using SeenSlots = int64_t[kSeen + 1];

// Bit j of `runs`: token j + 1 has the slot after token j's. True if tokens j to j + 15 are a run.
INT8KV_DEVICE bool group_runs(uint64_t runs, int j) { return (runs >> j & 0x7fff) == 0x7fff; }

// The token, counted from 15 before the window of 16, that starts a group in the window, or -1.
// There is at most one: a group is as long as the window.
INT8KV_DEVICE int group_start_in_window(uint64_t starts) {
  for (int j = kSlotGroup - 1; j < 2 * kSlotGroup - 1; ++j) {
    if (starts >> j & 1) return j;
  }
  return -1;
}

// Bit j of `starts` says that tokens j to j + 15, counted from kReach before the window, fill a
// slot group.
struct SlotGroups {
  uint64_t starts;
  int start;  // of the group that begins in the window, or -1

  INT8KV_DEVICE bool has_group() const { return start >= 0; }
  INT8KV_DEVICE int64_t first_token(int64_t window) const { return window - kReach + start; }
  INT8KV_DEVICE int64_t first_slot(const SeenSlots& slots) const {
    return has_group() ? slots[start] : -1;
  }
  // The slot of token `row` of the window if no group has it, else -1.
  INT8KV_DEVICE int64_t slot_alone(const SeenSlots& slots, int row) const {
    const int64_t slot = slots[kReach + row];
    const int in_group = static_cast<int>(static_cast<uint32_t>(slot) % kSlotGroup);
    return slot >= 0 && !(starts >> (kReach + row - in_group) & 1) ? slot : -1;
  }
};

// By all threads of a block, of which there are more than kSeen; a barrier.
INT8KV_DEVICE SlotGroups look_at_slots(const ReshapeAndCacheParams& p, int64_t window,
                                       SeenSlots& slots, int lane) {
  if (threadIdx.x <= kSeen) {
    const int64_t token = window - kReach + threadIdx.x;
    const bool exists = threadIdx.x < kSlotGroup + 2 * kReach && token >= 0 && token < p.num_tokens;
    slots[threadIdx.x] = exists ? p.slot_mapping[token] : -1;
  }
  __syncthreads();
  uint64_t runs = 0, starts = 0;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int64_t slot = slots[lane + 32 * part];
    const bool goes_on = slot >= 0 && slots[lane + 32 * part + 1] == slot + 1;
    runs |= static_cast<uint64_t>(ballot(goes_on)) << (32 * part);
  }
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int64_t slot = slots[lane + 32 * part];
    const bool is_start = slot >= 0 && static_cast<uint32_t>(slot) % kSlotGroup == 0 &&
                          group_runs(runs, lane + 32 * part);
    starts |= static_cast<uint64_t>(ballot(is_start)) << (32 * part);
  }
  return {starts, group_start_in_window(starts)};
}

}  // namespace int8kv
