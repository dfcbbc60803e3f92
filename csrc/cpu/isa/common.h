// What every header of an instruction set starts from. <name>.h then defines, inside
// int8kv::cpu::<name>, everything that the files of this folder call and that is not plain C++:
//
//   f32x16, i32x16, u32x16, Mask    sixteen lanes, with operators
//   load, store, stream_line        memory, the last one past the caches
//   as, get, set, for_each_register bits as another type, single registers
//   max, min, less, is_nan, select  comparisons; max and min give their second operand for NaN
//   fma, kHasFma                    a * b + c, rounded once
//   to_floats, to_ints              conversions, the latter toward zero
//   widen, narrow_to_16, narrow_to_8, narrow_rounding_sum  of values that fit the narrower type
//   times_power_of_two, kZeroExponent                                           for exp_negative()
//   exchange                                                                    lane i ^ k of each
//   lane load_pairs                      codes of a plane's trait as 16-bit integers add,
//   add_products, broadcast_pair                                           for dot_pairs.h
//   kBlockRows, groups_per_pass, pairs_per_pass, kHasDot                        its loop sizes
//
// Another instruction set is another such header, a line in CMakeLists.txt and one in dispatch.cpp.
// Everything is inlined, so that no object shares a function with another.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "format/cache_format.h"

#define INT8KV_MEMBER inline __attribute__((always_inline))
#define INT8KV_INLINE static INT8KV_MEMBER

namespace int8kv::cpu::INT8KV_ISA {

constexpr int kLanes = 16;

typedef int16_t i16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

// A sum with it has no bits left for a fraction where |x| < 2^22.
constexpr float kRoundingSum = 12582912.0f;  // 1.5 * 2^23
constexpr int32_t kRoundingSumBits = 0x4b400000;

}  // namespace int8kv::cpu::INT8KV_ISA
