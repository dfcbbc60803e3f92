// Per-channel quantization of [num_tokens, num_channels], rung by rung. Compiled once per
// instruction set.
//
//   scales[c]   = max_t |x[t][c]| / 127
//   codes[t][c] = round_half_even(x[t][c] / scales[c]), saturated at +-127; NaN becomes 0
//
// The rungs differ in the order of the loops and in who vectorizes, never in the result:
//
//   column_strided  channels outside, tokens inside, as the paper's CPU baseline has it: every
//                   element comes from another cache line
//   row_major       the loops the other way round, left to the compiler
//   tiled           row_major in tiles of 64 x 64: nothing is used twice, so it gains nothing
//   simd            vectors of 16 by hand, and streaming stores of large results, which save the
//                   read that an ordinary store of a cache line begins with
//   vectorized      simd on every thread; the loop is the same
#include "ladder/quantize_per_channel.h"

#include "cpu/simd/vectors.h"
#include "format/half.h"

namespace int8kv::cpu::INT8KV_ISA {

namespace {

constexpr int64_t kTile = 64;
constexpr int64_t kLineBytes = 64;

// Results of this size go past the caches: a later reader would not find them there anyhow.
constexpr int64_t kStreamBytes = 8 << 20;

template <DType kDType>
INT8KV_INLINE float load_float(const void* data, int64_t i) {
  if constexpr (kDType == DType::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return kDType == DType::kFloat16 ? int8kv::half_to_float(bits) : bf16_bits_to_float(bits);
}

template <DType kDType>
INT8KV_INLINE void store_float(void* data, int64_t i, float x) {
  if constexpr (kDType == DType::kFloat32) {
    static_cast<float*>(data)[i] = x;
  } else {
    static_cast<uint16_t*>(data)[i] =
        kDType == DType::kFloat16 ? int8kv::float_to_half(x) : float_to_bf16_bits(x);
  }
}

INT8KV_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <DType kDType>
INT8KV_INLINE const char* row_of(const QuantizePerChannelParams& p, int64_t token) {
  return static_cast<const char*>(p.x) + token * p.x_token_stride * element_size(kDType);
}

// Writes kCount vectors to a whole line of the cache at once, past it if kStream.
template <bool kStream, typename V>
INT8KV_INLINE void store_line(void* to, const V& line) {
  static_assert(sizeof(V) == kLineBytes);
  if constexpr (kStream) {
    stream_line(to, &line);
  } else {
    store(to, line);
  }
}

bool is_streamed(const void* to, int64_t row_bytes, int64_t num_rows) {
  return row_bytes * num_rows >= kStreamBytes && row_bytes % kLineBytes == 0 &&
         reinterpret_cast<uintptr_t>(to) % kLineBytes == 0;
}

// quantize_saturated() of 16 values.
INT8KV_INLINE i8x16 quantize_lanes(f32x16 x, f32x16 scale) {
  f32x16 steps = x / scale;
  steps = select(is_nan(steps), f32x16{}, steps);
  steps = max(splat(-Codes<8>::kMax), min(splat(Codes<8>::kMax), steps));
  return narrow_to_8(to_ints(round_even(steps)));
}

struct CodeLine {
  i8x16 codes[4];
};

template <DType kDType, bool kStream>
void quantize_simd(const QuantizePerChannelParams& p, int64_t token_begin, int64_t token_end) {
  for (int64_t token = token_begin; token < token_end; ++token) {
    const char* x = row_of<kDType>(p, token);
    int8_t* codes = p.codes + token * p.num_channels;
    int64_t c = 0;
    for (; c + kLineBytes <= p.num_channels; c += kLineBytes) {
      CodeLine line;
      for (int i = 0; i < 4; ++i) {
        const int64_t at = c + i * kLanes;
        line.codes[i] = quantize_lanes(load_floats(x, kDType, at), load<f32x16>(p.scales + at));
      }
      store_line<kStream>(codes + c, line);
    }
    for (; c + kLanes <= p.num_channels; c += kLanes) {
      store(codes + c, quantize_lanes(load_floats(x, kDType, c), load<f32x16>(p.scales + c)));
    }
    for (; c < p.num_channels; ++c) {
      codes[c] = quantize_saturated(load_float<kDType>(x, c), p.scales[c]);
    }
  }
  if constexpr (kStream) _mm_sfence();
}

template <DType kDType>
void quantize_tile(const QuantizePerChannelParams& p, int64_t token_begin, int64_t token_end,
                   int64_t channel_begin, int64_t channel_end) {
  for (int64_t token = token_begin; token < token_end; ++token) {
    const char* x = row_of<kDType>(p, token);
    int8_t* codes = p.codes + token * p.num_channels;
    const float* scales = p.scales;
#pragma GCC ivdep
    for (int64_t c = channel_begin; c < channel_end; ++c) {
      codes[c] = quantize_saturated(load_float<kDType>(x, c), scales[c]);
    }
  }
}

template <DType kDType>
void quantize_as(const QuantizePerChannelParams& p, CpuVariant variant, int64_t begin,
                 int64_t end) {
  switch (variant) {
    case CpuVariant::kColumnStrided:
      for (int64_t c = 0; c < p.num_channels; ++c) {
        for (int64_t token = begin; token < end; ++token) {
          p.codes[token * p.num_channels + c] =
              quantize_saturated(load_float<kDType>(row_of<kDType>(p, token), c), p.scales[c]);
        }
      }
      return;
    case CpuVariant::kRowMajor:
      quantize_tile<kDType>(p, begin, end, 0, p.num_channels);
      return;
    case CpuVariant::kTiled:
      for (int64_t token = begin; token < end; token += kTile) {
        for (int64_t c = 0; c < p.num_channels; c += kTile) {
          quantize_tile<kDType>(p, token, smaller(token + kTile, end), c,
                                smaller(c + kTile, p.num_channels));
        }
      }
      return;
    default:
      if (is_streamed(p.codes, p.num_channels, p.num_tokens)) {
        quantize_simd<kDType, true>(p, begin, end);
      } else {
        quantize_simd<kDType, false>(p, begin, end);
      }
  }
}

// A NaN compares false and is left out. Vectors of 16 by hand would be slower than what GCC makes
// of the plain loop: 17 GB/s against 30 at 131072 x 1024.
template <DType kDType>
void channel_amax_as(const QuantizePerChannelParams& p, CpuVariant variant, int64_t begin,
                     int64_t end, float* amax) {
  for (int64_t c = 0; c < p.num_channels; ++c) amax[c] = 0.0f;
  if (variant == CpuVariant::kColumnStrided) {
    for (int64_t c = 0; c < p.num_channels; ++c) {
      float largest = 0.0f;
      for (int64_t token = begin; token < end; ++token) {
        const float magnitude = __builtin_fabsf(load_float<kDType>(row_of<kDType>(p, token), c));
        largest = magnitude > largest ? magnitude : largest;
      }
      amax[c] = largest;
    }
  } else {
    for (int64_t token = begin; token < end; ++token) {
      const char* x = row_of<kDType>(p, token);
#pragma GCC ivdep
      for (int64_t c = 0; c < p.num_channels; ++c) {
        const float magnitude = __builtin_fabsf(load_float<kDType>(x, c));
        amax[c] = magnitude > amax[c] ? magnitude : amax[c];
      }
    }
  }
  for (int64_t c = 0; c < p.num_channels; ++c) {
    amax[c] = amax[c] > kMaxMagnitude ? kMaxMagnitude : amax[c];
  }
}

struct FloatLine {
  f32x16 x;
};
struct HalfLine {
  u16x16 x[2];
};

template <DType kDType, bool kStream>
void dequantize_simd(const DequantizePerChannelParams& p, int64_t token_begin, int64_t token_end) {
  constexpr int64_t kLine = kLineBytes / (kDType == DType::kFloat32 ? 4 : 2);
  const auto product = [&](const int8_t* codes, int64_t c) {
    return to_floats(load<i8x16>(codes + c)) * load<f32x16>(p.scales + c);
  };
  for (int64_t token = token_begin; token < token_end; ++token) {
    const int8_t* codes = p.codes + token * p.num_channels;
    char* x = static_cast<char*>(p.x) + token * p.num_channels * element_size(kDType);
    int64_t c = 0;
    for (; c + kLine <= p.num_channels; c += kLine) {
      char* to = x + c / kLine * kLineBytes;
      if constexpr (kDType == DType::kFloat32) {
        store_line<kStream>(to, FloatLine{product(codes, c)});
      } else {
        HalfLine line;
        for (int i = 0; i < 2; ++i) {
          const f32x16 wide = product(codes, c + i * kLanes);
          line.x[i] = kDType == DType::kFloat16 ? float_to_half(wide) : float_to_bf16(wide);
        }
        store_line<kStream>(to, line);
      }
    }
    for (; c + kLanes <= p.num_channels; c += kLanes) store_floats(x, kDType, c, product(codes, c));
    for (; c < p.num_channels; ++c) store_float<kDType>(x, c, codes[c] * p.scales[c]);
  }
  if constexpr (kStream) _mm_sfence();
}

template <DType kDType>
void dequantize_tile(const DequantizePerChannelParams& p, int64_t token_begin, int64_t token_end,
                     int64_t channel_begin, int64_t channel_end) {
  for (int64_t token = token_begin; token < token_end; ++token) {
    const int64_t row = token * p.num_channels;
#pragma GCC ivdep
    for (int64_t c = channel_begin; c < channel_end; ++c) {
      store_float<kDType>(p.x, row + c, p.codes[row + c] * p.scales[c]);
    }
  }
}

template <DType kDType>
void dequantize_as(const DequantizePerChannelParams& p, CpuVariant variant, int64_t begin,
                   int64_t end) {
  switch (variant) {
    case CpuVariant::kColumnStrided:
      for (int64_t c = 0; c < p.num_channels; ++c) {
        dequantize_tile<kDType>(p, begin, end, c, c + 1);
      }
      return;
    case CpuVariant::kRowMajor:
      dequantize_tile<kDType>(p, begin, end, 0, p.num_channels);
      return;
    case CpuVariant::kTiled:
      for (int64_t token = begin; token < end; token += kTile) {
        for (int64_t c = 0; c < p.num_channels; c += kTile) {
          dequantize_tile<kDType>(p, token, smaller(token + kTile, end), c,
                                  smaller(c + kTile, p.num_channels));
        }
      }
      return;
    default:
      if (is_streamed(p.x, p.num_channels * element_size(kDType), p.num_tokens)) {
        dequantize_simd<kDType, true>(p, begin, end);
      } else {
        dequantize_simd<kDType, false>(p, begin, end);
      }
  }
}

// Calls f with the dtype as a compile-time constant.
template <typename F>
void with_dtype(DType dtype, const F& f) {
  if (dtype == DType::kFloat32) return f.template operator()<DType::kFloat32>();
  if (dtype == DType::kFloat16) return f.template operator()<DType::kFloat16>();
  f.template operator()<DType::kBFloat16>();
}

void channel_amax(const QuantizePerChannelParams& p, CpuVariant variant, int64_t token_begin,
                  int64_t token_end, float* amax) {
  with_dtype(p.dtype, [&]<DType kDType>() {
    channel_amax_as<kDType>(p, variant, token_begin, token_end, amax);
  });
}

void quantize(const QuantizePerChannelParams& p, CpuVariant variant, int64_t token_begin,
              int64_t token_end) {
  with_dtype(p.dtype,
             [&]<DType kDType>() { quantize_as<kDType>(p, variant, token_begin, token_end); });
}

void dequantize(const DequantizePerChannelParams& p, CpuVariant variant, int64_t token_begin,
                int64_t token_end) {
  with_dtype(p.dtype,
             [&]<DType kDType>() { dequantize_as<kDType>(p, variant, token_begin, token_end); });
}

}  // namespace

const PerChannelKernels& per_channel_kernels() {
  static constexpr PerChannelKernels kernels{channel_amax, quantize, dequantize};
  return kernels;
}

}  // namespace int8kv::cpu::INT8KV_ISA
