// Transposition of sixteen vectors of sixteen lanes. Included by vectors.h.
#pragma once

namespace int8kv::cpu::INT8KV_ISA {

// One step of a transposition: swaps the upper right and lower left quarters of the blocks of
// 2 * kHalf lanes in the rows i and i + kHalf.
template <int kHalf, typename V>
INT8KV_INLINE void swap_quarters(V& upper, V& lower) {
  const V a = upper, b = lower;
  if constexpr (kHalf >= kRegisterLanes) {
    constexpr int kRegisters = kHalf / kRegisterLanes;
    for_each_register([&](auto i) {
      if (i & kRegisters) {
        set(upper, i, get(b, i - kRegisters));
      } else {
        set(lower, i, get(a, i + kRegisters));
      }
    });
  } else {
    RegisterIndex from_upper, from_lower;
    for (int i = 0; i < kRegisterLanes; ++i) {
      from_upper[i] = i & kHalf ? i - kHalf + kRegisterLanes : i;
      from_lower[i] = i & kHalf ? i + kRegisterLanes : i + kHalf;
    }
    for_each_register([&](auto i) {
      set(upper, i, __builtin_shuffle(get(a, i), get(b, i), from_upper));
      set(lower, i, __builtin_shuffle(get(a, i), get(b, i), from_lower));
    });
  }
}

template <int kHalf, typename V>
INT8KV_INLINE void transpose_step(V* rows) {
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & kHalf)) swap_quarters<kHalf>(rows[i], rows[i + kHalf]);
  }
}

// Transposes rows[16] of 16 lanes in place.
template <typename V>
INT8KV_INLINE void transpose(V* rows) {
  transpose_step<8>(rows);
  transpose_step<4>(rows);
  transpose_step<2>(rows);
  transpose_step<1>(rows);
}

}  // namespace int8kv::cpu::INT8KV_ISA
