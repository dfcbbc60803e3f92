// What every header of an instruction set starts from. <name>.h then defines, inside
// int8kv::cpu::<name>, everything that csrc/cpu/simd and csrc/ladder/simd call and that is not
// plain C++:
//
//   f32x16, i32x16, u32x16, Mask     sixteen lanes, with operators
//   load, store, stream_line         memory, the last one past the caches
//   as, get, set, for_each_register  bits as another type, single registers
//   max, min                         of each lane; the second operand where one is NaN
//   less, is_nan, select             comparisons
//   fma, kHasFma                     a * b + c, rounded once
//   to_floats, to_ints               conversions, the latter toward zero
//   widen                            16 to 32 bits
//   narrow_to_16, narrow_to_8        of values that fit
//   narrow_rounding_sum              the integers that a sum with kRoundingSum has rounded to
//   times_power_of_two               for exp_negative(), with kZeroExponent
//   exchange                         lane i ^ k of each lane i
//   load_pairs, widen_bytes          signed codes and bytes of a line as 16-bit integers
//   interleave_zeros, order_halves   all bytes of a line at once; where it has two registers only
//   add, add_products                sums of integers and of products of pairs
//   broadcast_pair                   two 16-bit integers to all lanes
//   kBlockRows, groups_per_pass, pairs_per_pass, kHasDot   loop sizes of dot_pairs.h
//   max_unpacking_rows               that of dot_fields.h
//
// Another instruction set is another such header, a line in CMakeLists.txt, one in kernels.h and
// one in dispatch.cpp. Everything is inlined, so that no object shares a function with another.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "format/cache_format.h"

#define INT8KV_MEMBER inline __attribute__((always_inline))
#define INT8KV_INLINE static INT8KV_MEMBER

namespace int8kv::cpu::INT8KV_ISA {

constexpr int kLanes = 16;

// Calls f(0), f(1), ... with constants.
template <int kCount, typename F>
INT8KV_INLINE void unrolled(const F& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

typedef int16_t i16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

// A sum with it has no bits left for a fraction where |x| < 2^22.
constexpr float kRoundingSum = 12582912.0f;  // 1.5 * 2^23
constexpr int32_t kRoundingSumBits = 0x4b400000;

}  // namespace int8kv::cpu::INT8KV_ISA
