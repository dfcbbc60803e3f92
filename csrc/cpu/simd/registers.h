// Sixteen lanes at a time: one register with AVX-512, two with AVX2, four with SSE2. With AVX-512
// these are the compiler's own vector types. GCC 12 takes vectors of several registers apart lane
// by lane (comparisons, conversions, shuffles) and copies them through memory in pieces, so there
// they are arrays of registers: AVX2 code is ten times as fast for it.
//
// Included by the files that are compiled once per instruction set (INT8KV_ISA names it);
// everything is inlined, so that no object shares a function with another.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define INT8KV_MEMBER inline __attribute__((always_inline))
#define INT8KV_INLINE static INT8KV_MEMBER

namespace int8kv::cpu::INT8KV_ISA {

constexpr int kLanes = 16;

#if defined(__AVX512F__)
typedef __m512 Register;
typedef __m512i IntRegister;
#define INT8KV_MM(name) _mm512_##name
#elif defined(__AVX2__)
typedef __m256 Register;
typedef __m256i IntRegister;
#define INT8KV_MM(name) _mm256_##name
#else
typedef __m128 Register;
typedef __m128i IntRegister;
#define INT8KV_MM(name) _mm_##name
#endif

constexpr int kRegisterLanes = sizeof(Register) / sizeof(float);
constexpr int kNumRegisters = kLanes / kRegisterLanes;
typedef int32_t RegisterIndex __attribute__((vector_size(sizeof(Register))));

// Calls f(i) for every register of a vector.
template <typename F>
INT8KV_INLINE void for_each_register(const F& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, kNumRegisters>{});
}

#if defined(__AVX512F__)
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef __mmask16 Mask;
constexpr Mask kAllLanes = 0xffff;  // without a mask, GCC 12 warns of some instructions
#else
template <typename T>
struct Lanes {
  typedef T Part __attribute__((vector_size(sizeof(Register))));
  Part part[kNumRegisters];

  T operator[](int i) const { return part[i / kRegisterLanes][i % kRegisterLanes]; }

#define INT8KV_OPERATOR(op)                                                 \
  friend INT8KV_MEMBER Lanes operator op(const Lanes& a, const Lanes& b) {  \
    Lanes c;                                                                \
    for_each_register([&](auto i) { c.part[i] = a.part[i] op b.part[i]; }); \
    return c;                                                               \
  }                                                                         \
  friend INT8KV_MEMBER Lanes operator op(const Lanes& a, T b) {             \
    Lanes c;                                                                \
    for_each_register([&](auto i) { c.part[i] = a.part[i] op b; });         \
    return c;                                                               \
  }                                                                         \
  friend INT8KV_MEMBER Lanes operator op(T a, const Lanes& b) {             \
    Lanes c;                                                                \
    for_each_register([&](auto i) { c.part[i] = a op b.part[i]; });         \
    return c;                                                               \
  }                                                                         \
  template <typename U>                                                     \
  INT8KV_MEMBER Lanes& operator op##=(const U & b) {                        \
    return *this = *this op b;                                              \
  }
  INT8KV_OPERATOR(+)
  INT8KV_OPERATOR(-)
  INT8KV_OPERATOR(*)
  INT8KV_OPERATOR(/)
  INT8KV_OPERATOR(&)
  INT8KV_OPERATOR(|)
  INT8KV_OPERATOR(<<)
  INT8KV_OPERATOR(>>)
#undef INT8KV_OPERATOR

  INT8KV_MEMBER Lanes operator-() const {
    Lanes c;
    for_each_register([&](auto i) { c.part[i] = -part[i]; });
    return c;
  }
  INT8KV_MEMBER Lanes operator~() const {
    Lanes c;
    for_each_register([&](auto i) { c.part[i] = ~part[i]; });
    return c;
  }
};
typedef Lanes<float> f32x16;
typedef Lanes<int32_t> i32x16;
typedef Lanes<uint32_t> u32x16;
typedef i32x16 Mask;
#endif
typedef int16_t i16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

// Register by register, or GCC copies an array of them in pieces that it then cannot keep in
// registers.
template <typename V>
INT8KV_INLINE V load(const void* from) {
  V v;
  if constexpr (requires { v.part; }) {
    for_each_register([&](auto i) {
      std::memcpy(&v.part[i], static_cast<const Register*>(from) + i, sizeof(Register));
    });
  } else {
    std::memcpy(&v, from, sizeof(V));
  }
  return v;
}

template <typename V>
INT8KV_INLINE void store(void* to, V v) {
  if constexpr (requires { v.part; }) {
    for_each_register(
        [&](auto i) { std::memcpy(static_cast<Register*>(to) + i, &v.part[i], sizeof(Register)); });
  } else {
    std::memcpy(to, &v, sizeof(V));
  }
}

INT8KV_INLINE f32x16 splat(float x) { return f32x16{} + x; }

// The bits of a vector as another type.
template <typename To, typename From>
INT8KV_INLINE To as(const From& x) {
#if defined(__AVX512F__)
  return reinterpret_cast<To>(x);
#else
  To y;
  for_each_register([&](auto i) {
    y.part[i] = reinterpret_cast<std::remove_reference_t<decltype(y.part[0])> >(x.part[i]);
  });
  return y;
#endif
}

// Register i of a vector.
template <typename R = Register, typename V>
INT8KV_INLINE R get(const V& x, [[maybe_unused]] int i) {
#if defined(__AVX512F__)
  return reinterpret_cast<R>(x);
#else
  return reinterpret_cast<R>(x.part[i]);
#endif
}

template <typename V, typename R>
INT8KV_INLINE void set(V& x, [[maybe_unused]] int i, R r) {
#if defined(__AVX512F__)
  x = reinterpret_cast<V>(r);
#else
  x.part[i] = reinterpret_cast<std::remove_reference_t<decltype(x.part[0])> >(r);
#endif
}

INT8KV_INLINE i32x16 iota() {
  constexpr int32_t kIndex[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load<i32x16>(kIndex);
}

// a > b ? a : b and a < b ? a : b: the second operand if one is NaN.
INT8KV_INLINE f32x16 max(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
  return as<f32x16>(_mm512_maskz_max_ps(kAllLanes, get(a, 0), get(b, 0)));
#else
  for_each_register([&](auto i) { set(b, i, INT8KV_MM(max_ps)(get(a, i), get(b, i))); });
  return b;
#endif
}
INT8KV_INLINE f32x16 min(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
  return as<f32x16>(_mm512_maskz_min_ps(kAllLanes, get(a, 0), get(b, 0)));
#else
  for_each_register([&](auto i) { set(b, i, INT8KV_MM(min_ps)(get(a, i), get(b, i))); });
  return b;
#endif
}

#if defined(__FMA__)
// a * b + c, rounded once.
INT8KV_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  for_each_register(
      [&](auto i) { set(c, i, INT8KV_MM(fmadd_ps)(get(a, i), get(b, i), get(c, i))); });
  return c;
}
#endif

// a < b; false if one is NaN.
INT8KV_INLINE Mask less(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(get(a, 0), get(b, 0), _CMP_LT_OQ);
#else
  Mask mask;
  for_each_register([&](auto i) { mask.part[i] = a.part[i] < b.part[i]; });
  return mask;
#endif
}

INT8KV_INLINE Mask is_nan(f32x16 x) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(get(x, 0), get(x, 0), _CMP_UNORD_Q);
#else
  Mask mask;
  for_each_register([&](auto i) { mask.part[i] = x.part[i] != x.part[i]; });
  return mask;
#endif
}

// mask ? a : b
template <typename V>
INT8KV_INLINE V select(Mask mask, V a, V b) {
#if defined(__AVX512F__)
  return as<V>(_mm512_mask_blend_epi32(mask, get<__m512i>(b, 0), get<__m512i>(a, 0)));
#else
  return as<V>((as<i32x16>(a) & mask) | (as<i32x16>(b) & ~mask));
#endif
}

INT8KV_INLINE f32x16 to_floats(i32x16 x) {
#if defined(__AVX512F__)
  return __builtin_convertvector(x, f32x16);
#else
  f32x16 y;
  for_each_register([&](auto i) { set(y, i, INT8KV_MM(cvtepi32_ps)(get<IntRegister>(x, i))); });
  return y;
#endif
}

// Toward zero.
INT8KV_INLINE i32x16 to_ints(f32x16 x) {
#if defined(__AVX512F__)
  return __builtin_convertvector(x, i32x16);
#else
  i32x16 y;
  for_each_register([&](auto i) { set(y, i, INT8KV_MM(cvttps_epi32)(get(x, i))); });
  return y;
#endif
}

#if defined(__AVX512F__)
// x * 2^n for whole n <= 0 and x near 1; below the normal range 0 or subnormal.
INT8KV_INLINE f32x16 scale_by_power_of_two(f32x16 x, f32x16 n) {
  return as<f32x16>(_mm512_maskz_scalef_ps(kAllLanes, get(x, 0), get(n, 0)));
}
#endif

INT8KV_INLINE u32x16 widen(u16x16 x) {
#if defined(__AVX512F__)
  return __builtin_convertvector(x, u32x16);
#else
  __m128i half[2];
  std::memcpy(half, &x, sizeof(half));
#if defined(__AVX2__)
  const __m256i wide[2] = {_mm256_cvtepu16_epi32(half[0]), _mm256_cvtepu16_epi32(half[1])};
#else
  const __m128i zero = _mm_setzero_si128();
  const __m128i wide[4] = {_mm_unpacklo_epi16(half[0], zero), _mm_unpackhi_epi16(half[0], zero),
                           _mm_unpacklo_epi16(half[1], zero), _mm_unpackhi_epi16(half[1], zero)};
#endif
  return load<u32x16>(wide);
#endif
}

// Values outside of the range of int16 are not allowed; with AVX-512 their low bits are taken.
INT8KV_INLINE i16x16 narrow_to_16(i32x16 values) {
#if defined(__AVX512F__)
  return __builtin_convertvector(values, i16x16);
#elif defined(__AVX2__)
  const __m256i packed =
      _mm256_packs_epi32(get<__m256i>(values, 0), get<__m256i>(values, 1));  // 128 bits in turn
  return reinterpret_cast<i16x16>(_mm256_permute4x64_epi64(packed, 0b11011000));
#else
  const __m128i halves[2] = {
      _mm_packs_epi32(get<__m128i>(values, 0), get<__m128i>(values, 1)),
      _mm_packs_epi32(get<__m128i>(values, 2), get<__m128i>(values, 3)),
  };
  return load<i16x16>(halves);
#endif
}

// The lower 16 bits.
INT8KV_INLINE u16x16 low_16(u32x16 bits) {
  // Sign extension makes them fit.
  return reinterpret_cast<u16x16>(narrow_to_16(as<i32x16>(bits << 16) >> 16));
}

// Values outside of the range of int8 are not allowed.
INT8KV_INLINE i8x16 narrow_to_8(i32x16 values) {
#if defined(__AVX512F__)
  return reinterpret_cast<i8x16>(_mm512_maskz_cvtepi32_epi8(kAllLanes, get<__m512i>(values, 0)));
#else
  __m128i half[2];
  const i16x16 words = narrow_to_16(values);
  std::memcpy(half, &words, sizeof(half));
  return reinterpret_cast<i8x16>(_mm_packs_epi16(half[0], half[1]));
#endif
}

// Lane i of the result is lane i ^ kDistance.
template <int kDistance>
INT8KV_INLINE f32x16 exchange(f32x16 v) {
  f32x16 exchanged;
  RegisterIndex from;
  for (int i = 0; i < kRegisterLanes; ++i) from[i] = i ^ kDistance % kRegisterLanes;
  for_each_register([&](auto i) {
    set(exchanged, i, __builtin_shuffle(get(v, i ^ kDistance / kRegisterLanes), from));
  });
  return exchanged;
}

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
