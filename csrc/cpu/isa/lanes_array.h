// Sixteen lanes as an array of registers, for instruction sets whose registers are shorter.
//
// GCC 12 takes its own vectors of several registers apart lane by lane (comparisons, conversions,
// shuffles) and copies them through memory in pieces; as arrays of registers AVX2 code is ten times
// as fast. The header of the instruction set defines Register, IntRegister and the functions on one
// register that are called here (reg_max, reg_min, reg_to_floats, reg_to_ints), then includes this.
#pragma once

#include <cstring>
#include <utility>

namespace int8kv::cpu::INT8KV_ISA {

constexpr int kRegisterLanes = sizeof(Register) / sizeof(float);
constexpr int kNumRegisters = kLanes / kRegisterLanes;
typedef int32_t RegisterIndex __attribute__((vector_size(sizeof(Register))));

// Calls f(i) for every register of a vector.
template <typename F>
INT8KV_INLINE void for_each_register(const F& f) {
  unrolled<kNumRegisters>(f);
}

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

// 64 bytes past the caches.
INT8KV_INLINE void stream_line(void* to, const void* line) {
  for (int i = 0; i < 4; ++i) {
    _mm_stream_si128(static_cast<__m128i*>(to) + i,
                     load<__m128i>(static_cast<const char*>(line) + 16 * i));
  }
}

// The bits of a vector as another type.
template <typename To, typename From>
INT8KV_INLINE To as(const From& x) {
  To y;
  for_each_register([&](auto i) {
    y.part[i] = reinterpret_cast<std::remove_reference_t<decltype(y.part[0])> >(x.part[i]);
  });
  return y;
}

// Register i of a vector.
template <typename R = Register, typename V>
INT8KV_INLINE R get(const V& x, int i) {
  return reinterpret_cast<R>(x.part[i]);
}

template <typename V, typename R>
INT8KV_INLINE void set(V& x, int i, R r) {
  x.part[i] = reinterpret_cast<std::remove_reference_t<decltype(x.part[0])> >(r);
}

INT8KV_INLINE f32x16 max(f32x16 a, f32x16 b) {
  for_each_register([&](auto i) { set(b, i, reg_max(get(a, i), get(b, i))); });
  return b;
}
INT8KV_INLINE f32x16 min(f32x16 a, f32x16 b) {
  for_each_register([&](auto i) { set(b, i, reg_min(get(a, i), get(b, i))); });
  return b;
}

INT8KV_INLINE Mask less(f32x16 a, f32x16 b) {
  Mask mask;
  for_each_register([&](auto i) { mask.part[i] = a.part[i] < b.part[i]; });
  return mask;
}

INT8KV_INLINE Mask is_nan(f32x16 x) {
  Mask mask;
  for_each_register([&](auto i) { mask.part[i] = x.part[i] != x.part[i]; });
  return mask;
}

template <typename V>
INT8KV_INLINE V select(Mask mask, V a, V b) {
  return as<V>((as<i32x16>(a) & mask) | (as<i32x16>(b) & ~mask));
}

INT8KV_INLINE f32x16 to_floats(i32x16 x) {
  f32x16 y;
  for_each_register([&](auto i) { set(y, i, reg_to_floats(get<IntRegister>(x, i))); });
  return y;
}

INT8KV_INLINE i32x16 to_ints(f32x16 x) {
  i32x16 y;
  for_each_register([&](auto i) { set(y, i, reg_to_ints(get(x, i))); });
  return y;
}

INT8KV_INLINE f32x16 to_floats(i8x16 codes) {
  const auto bytes = reinterpret_cast<__m128i>(codes);
  const __m128i sign = _mm_cmpgt_epi8(_mm_setzero_si128(), bytes);
  const __m128i low = _mm_unpacklo_epi8(bytes, sign), high = _mm_unpackhi_epi8(bytes, sign);
  const __m128i parts[4] = {
      _mm_srai_epi32(_mm_unpacklo_epi16(low, low), 16),
      _mm_srai_epi32(_mm_unpackhi_epi16(low, low), 16),
      _mm_srai_epi32(_mm_unpacklo_epi16(high, high), 16),
      _mm_srai_epi32(_mm_unpackhi_epi16(high, high), 16),
  };
  return to_floats(load<i32x16>(parts));
}

// 16 to 8 bits; values outside of the range of int8 are not allowed.
INT8KV_INLINE i8x16 narrow_words_to_8(i16x16 words) {
  __m128i half[2];
  std::memcpy(half, &words, sizeof(half));
  return reinterpret_cast<i8x16>(_mm_packs_epi16(half[0], half[1]));
}

// 2^n is put together from the bits of n + 127: at n = -127 these are the bits of 0, below they
// would wrap, so that exp_negative() is 0 from here down.
constexpr float kZeroExponent = -88.029692f;  // -127 / log2(e)

// y * 2^n, where rounding_sum = n + kRoundingSum. The bits above n's are shifted out.
INT8KV_INLINE f32x16 times_power_of_two(f32x16 y, [[maybe_unused]] f32x16 n, f32x16 rounding_sum) {
  return y * as<f32x16>((as<i32x16>(rounding_sum) + 127) << 23);
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

}  // namespace int8kv::cpu::INT8KV_ISA
