// dot_pairs.h for codes below 8 bits: the same sums, whose b is unpacked on the way into the
// multiply-adds.
//
//   c[r][16 g + l] (+)= sum_p sum_{j < 2} a[r][2 p + j] * b[g][p][l][j]      int16 * uint -> int32
//
// A line holds a field of bits of several lines b[g][p]. Of K these are pairs p of one group, which
// meet other elements of a; of V they are groups g of one pair, which share a broadcast. The unit
// is sixteen dims: of K eight pairs from four lines of two fields, of V one group of every field.
#pragma once

#include "cpu/simd/dot_pairs.h"

namespace int8kv::cpu::INT8KV_ISA {

struct DotFields {
  const int16_t* a;   // [num_rows][a_stride]
  int64_t a_stride;   // elements
  const int8_t* low;  // the planes of the codes at the first group, see codes.h
  const int8_t* high;
  int64_t low_stride;  // bytes from one group to the next: of K slots, of V the plane's kVDims dims
  int64_t high_stride;
  const char* prefetch;  // what will be needed next, or null
  int32_t prefetch_bytes;
  int32_t* c;        // [num_rows][c_stride]
  int64_t c_stride;  // elements
  int32_t num_rows;
  int32_t num_groups;  // of 16 outputs
  int32_t num_pairs;
  bool accumulate;
  int8_t* scratch;  // [num_groups][num_pairs][kLineBytes]
};

// GCC 12 adds up the products of unrolled steps among themselves before it adds them to a sum, runs
// out of AVX2's sixteen registers and takes 1.65 times as long.
INT8KV_INLINE void add_in_order(IntRegister& sum, IntRegister a, IntRegister b) {
  sum = add_products(sum, a, b);
  if constexpr (kNumRegisters > 1) asm("" : "+x"(sum));
}

typedef uint16_t Words __attribute__((vector_size(sizeof(IntRegister))));

// Field `field` of register `part` of a line, as 16-bit integers.
template <typename Plane>
INT8KV_INLINE Words load_field(const int8_t* line, int part, int field) {
  constexpr int kBits = 8 / Plane::kFields;
  const Words bytes = reinterpret_cast<Words>(widen_bytes(line, part));
  if (field == 0) return bytes & static_cast<uint16_t>(Plane::kMask);
  const Words shifted = bytes >> static_cast<uint16_t>(field * kBits);
  // The uppermost field has nothing above it.
  return field == Plane::kFields - 1 ? shifted : shifted & static_cast<uint16_t>(Plane::kMask);
}

// Register `part` of a line of codes: field `low_field` of a line of the lower plane and, where
// there is one, `high_field` of one of the upper plane.
template <typename C>
INT8KV_INLINE IntRegister load_codes(const int8_t* low, int low_field,
                                     [[maybe_unused]] const int8_t* high,
                                     [[maybe_unused]] int high_field, int part) {
  Words codes = load_field<typename C::Low>(low, part, low_field);
  if constexpr (C::kBits > C::kLowBits) {
    using High = typename C::High;
    constexpr int kBits = 8 / High::kFields;
    // Straight to where the field belongs, by one shift.
    const int shift = high_field * kBits - C::kLowBits;
    const Words bytes = reinterpret_cast<Words>(widen_bytes(high, part));
    const Words moved = shift > 0   ? bytes >> static_cast<uint16_t>(shift)
                        : shift < 0 ? bytes << static_cast<uint16_t>(-shift)
                                    : bytes;
    codes |= moved & static_cast<uint16_t>(High::kMask << C::kLowBits);
  }
  return reinterpret_cast<IntRegister>(codes);
}

// Reads ahead evenly while `steps` steps of work are done; without a target it touches what is at
// hand, which costs less than to ask.
struct Prefetcher {
  const char* next;
  int64_t step;

  Prefetcher(const DotFields& d, int64_t steps)
      : next(d.prefetch == nullptr ? reinterpret_cast<const char*>(d.a) : d.prefetch),
        step(d.prefetch == nullptr ? 0 : d.prefetch_bytes / steps) {}

  INT8KV_MEMBER void advance() {
    _mm_prefetch(next, _MM_HINT_T0);
    next += step;
  }
};

// Units that begin at the start of a line of every plane.
template <typename C>
constexpr int units_per_line() {
  if constexpr (C::kBits > C::kLowBits) return C::High::kFields / 2;
  return C::Low::kFields / 2;
}

// Rows [row, row + kRows) of one group of K.
template <typename C, int kRows>
INT8KV_INLINE void dot_k_group(const DotFields& d, int32_t row, int32_t group,
                               Prefetcher& prefetcher) {
  constexpr int kUnits = units_per_line<C>();
  // Independent sums, as one waits for the one before.
  constexpr int kSums = pairs_per_pass(kRows, true) < 8 ? pairs_per_pass(kRows, true) : 8;
  const int16_t* a = d.a + row * d.a_stride;
  const int8_t* low = d.low + group * d.low_stride;
  const int8_t* high = d.high + group * d.high_stride;
  int32_t* c = d.c + row * d.c_stride + group * kLanes;
  IntRegister sum[kSums][kRows][kNumRegisters] = {};
  const auto add_unit = [&](int32_t unit, auto in_line) __attribute__((always_inline)) {
    constexpr int kInLine = decltype(in_line)::value;
    constexpr int kLowField = kInLine % (C::Low::kFields / 2) * 2;
    const int8_t* low_lines = low + unit / (C::Low::kFields / 2) * (4 * kLineBytes);
    const int8_t* high_lines = high;
    int high_field = 0;
    if constexpr (C::kBits > C::kLowBits) {
      high_field = kInLine % (C::High::kFields / 2) * 2;
      high_lines = high + unit / (C::High::kFields / 2) * (4 * kLineBytes);
    }
    for (int line = 0; line < 4; ++line) {
      for (int field = 0; field < 2; ++field) {
        IntRegister codes[kNumRegisters];
        for (int i = 0; i < kNumRegisters; ++i) {
          codes[i] = load_codes<C>(low_lines + line * kLineBytes, kLowField + field,
                                   high_lines + line * kLineBytes, high_field + field, i);
        }
        const int16_t* pair = a + 2 * (8 * unit + 4 * field + line);
        auto& sums = sum[(2 * line + field) % kSums];
        for (int r = 0; r < kRows; ++r) {
          const IntRegister broadcast = broadcast_pair(load<int32_t>(pair + r * d.a_stride));
          for (int i = 0; i < kNumRegisters; ++i) {
            add_in_order(sums[r][i], codes[i], broadcast);
          }
        }
      }
      prefetcher.advance();
    }
  };
  const int32_t num_units = d.num_pairs / 8;
  int32_t unit = 0;
  for (; unit + kUnits <= num_units; unit += kUnits) {
    [&]<int... u>(std::integer_sequence<int, u...>) __attribute__((always_inline)) {
      (add_unit(unit + u, std::integral_constant<int, u>{}), ...);
    }(std::make_integer_sequence<int, kUnits>{});
  }
  if constexpr (kUnits > 1) {
    const int32_t rest = num_units - unit;
    [&]<int... u>(std::integer_sequence<int, u...>) __attribute__((always_inline)) {
      ((u < rest ? add_unit(unit + u, std::integral_constant<int, u>{}) : void()), ...);
    }(std::make_integer_sequence<int, kUnits - 1>{});
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kNumRegisters; ++i) {
      for (int s = 1; s < kSums; ++s) sum[0][r][i] = add(sum[0][r][i], sum[s][r][i]);
      int32_t* to = c + r * d.c_stride + i * kRegisterLanes;
      if (d.accumulate) sum[0][r][i] = add(sum[0][r][i], load<IntRegister>(to));
      store(to, sum[0][r][i]);
    }
  }
}

// Rows [row, row + kRows) of kGroups groups of V that are fields of one line of the lower plane,
// parts [part, part + kParts) of their registers. Field `field` of the lower plane is the first.
template <typename C, int kRows, int kGroups, int kParts>
INT8KV_INLINE void dot_v_groups(const DotFields& d, int32_t row, int32_t group, int field,
                                int high_field, int part, Prefetcher& prefetcher) {
  constexpr int kSums = pairs_per_pass(kRows, true) < 2 ? 1 : pairs_per_pass(kRows, true) / 2;
  const int16_t* a = d.a + row * d.a_stride;
  const int8_t* low = d.low + group / C::Low::kFields * d.low_stride;
  const int8_t* high = d.high;
  if constexpr (C::kBits > C::kLowBits) high += group / C::High::kFields * d.high_stride;
  int32_t* c = d.c + row * d.c_stride + group * kLanes + part * kRegisterLanes;
  IntRegister sum[kSums][kRows][kGroups][kParts] = {};
  const auto add_pair = [&](int32_t pair, auto& sums) __attribute__((always_inline)) {
    IntRegister codes[kGroups][kParts];
    for (int g = 0; g < kGroups; ++g) {
      for (int i = 0; i < kParts; ++i) {
        codes[g][i] = load_codes<C>(low + pair * kLineBytes, field + g, high + pair * kLineBytes,
                                    high_field + g, part + i);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const IntRegister broadcast = broadcast_pair(load<int32_t>(a + r * d.a_stride + 2 * pair));
      for (int g = 0; g < kGroups; ++g) {
        for (int i = 0; i < kParts; ++i) {
          sums[r][g][i] = add_products(sums[r][g][i], codes[g][i], broadcast);
        }
      }
    }
    prefetcher.advance();
  };
  int32_t pair = 0;
  for (; pair + kSums <= d.num_pairs; pair += kSums) {
    for (int s = 0; s < kSums; ++s) add_pair(pair + s, sum[s]);
  }
  for (; kSums > 1 && pair < d.num_pairs; ++pair) add_pair(pair, sum[0]);
  for (int r = 0; r < kRows; ++r) {
    for (int g = 0; g < kGroups; ++g) {
      for (int i = 0; i < kParts; ++i) {
        IntRegister total = sum[0][r][g][i];
        for (int s = 1; s < kSums; ++s) total = add(total, sum[s][r][g][i]);
        int32_t* to = c + r * d.c_stride + g * kLanes + i * kRegisterLanes;
        if (d.accumulate) total = add(total, load<IntRegister>(to));
        store(to, total);
      }
    }
  }
}

template <typename C, int kRows>
__attribute__((noinline)) static void dot_k_rows(const DotFields& shared, int32_t row) {
  const DotFields d = shared;  // a copy that no store of a sum can change stays in registers
  Prefetcher prefetcher(d, static_cast<int64_t>(d.num_groups) * (d.num_pairs / 2));
  for (int32_t group = 0; group < d.num_groups; ++group) {
    dot_k_group<C, kRows>(d, row, group, prefetcher);
  }
}

// Two groups share a line of the lower plane, and their position in it is a constant.
template <typename C, int kRows>
__attribute__((noinline)) static void dot_v_rows(const DotFields& shared, int32_t row) {
  const DotFields d = shared;
  // As many sums as registers hold beside the codes.
  constexpr int kParts = kNumRegisters > 1 && kRows * kNumRegisters > 4 ? 1 : kNumRegisters;
  constexpr int kUnits = units_per_line<C>();
  Prefetcher prefetcher(
      d, static_cast<int64_t>((d.num_groups + 1) / 2) * d.num_pairs * (kNumRegisters / kParts));
  const auto add_groups = [&](int32_t group, auto in_line) __attribute__((always_inline)) {
    constexpr int kInLine = decltype(in_line)::value;
    constexpr int kField = kInLine % (C::Low::kFields / 2) * 2;
    constexpr int kHighField = kInLine * 2;
    for (int part = 0; part < kNumRegisters; part += kParts) {
      if (group + 1 < d.num_groups) {
        dot_v_groups<C, kRows, 2, kParts>(d, row, group, kField, kHighField, part, prefetcher);
      } else {
        dot_v_groups<C, kRows, 1, kParts>(d, row, group, kField, kHighField, part, prefetcher);
      }
    }
  };
  for (int32_t group = 0; group < d.num_groups; group += 2 * kUnits) {
    [&]<int... u>(std::integer_sequence<int, u...>) __attribute__((always_inline)) {
      ((group + 2 * u < d.num_groups ? add_groups(group + 2 * u, std::integral_constant<int, u>{})
                                     : void()),
       ...);
    }(std::make_integer_sequence<int, kUnits>{});
  }
}

// The template for a number of rows from 1 to kBlockRows.
template <typename C, bool kIsKey, int kRows = 1>
INT8KV_INLINE void dot_fields_rows_of(int32_t rows, const DotFields& d, int32_t row) {
  if (rows == kRows) {
    if constexpr (kIsKey) {
      dot_k_rows<C, kRows>(d, row);
    } else {
      dot_v_rows<C, kRows>(d, row);
    }
  } else if constexpr (kRows < kBlockRows) {
    dot_fields_rows_of<C, kIsKey, kRows + 1>(rows, d, row);
  }
}

typedef uint8_t LineBytes __attribute__((vector_size(kLineBytes)));

// Field `low_field` of a line of the lower plane and, where there is one, `high_field` of one of
// the upper plane, a byte per code.
template <typename C>
INT8KV_INLINE void unpack_line(const int8_t* low, int low_field,
                               [[maybe_unused]] const int8_t* high, [[maybe_unused]] int high_field,
                               int8_t* to) {
  LineBytes codes;
  std::memcpy(&codes, low, sizeof(codes));
  codes = codes >> static_cast<uint8_t>(low_field * 8 / C::Low::kFields) &
          static_cast<uint8_t>(C::Low::kMask);
  if constexpr (C::kBits > C::kLowBits) {
    LineBytes rest;
    std::memcpy(&rest, high, sizeof(rest));
    rest = rest >> static_cast<uint8_t>(high_field * 8 / C::High::kFields) &
           static_cast<uint8_t>(C::High::kMask);
    codes |= rest << static_cast<uint8_t>(C::kLowBits);
  }
  std::memcpy(to, &codes, sizeof(codes));
}

// All of b as lines of Codes<8>: codes of six bits are the same as signed bytes. Fields of a line
// are constants in the inner loops.
template <typename C>
INT8KV_INLINE void unpack_k(const DotFields& d) {
  constexpr int kUnits = units_per_line<C>();
  const int32_t num_units = d.num_pairs / 8;
  for (int32_t group = 0; group < d.num_groups; ++group) {
    const int8_t* low = d.low + group * d.low_stride;
    const int8_t* high = d.high + group * d.high_stride;
    int8_t* to = d.scratch + static_cast<int64_t>(group) * d.num_pairs * kLineBytes;
    const auto unpack_unit = [&](int32_t unit, auto in_line) __attribute__((always_inline)) {
      constexpr int kInLine = decltype(in_line)::value;
      constexpr int kLowField = kInLine % (C::Low::kFields / 2) * 2;
      const int8_t* low_lines = low + unit / (C::Low::kFields / 2) * (4 * kLineBytes);
      const int8_t* high_lines = high + unit / kUnits * (4 * kLineBytes);
      for (int line = 0; line < 4; ++line) {
        for (int field = 0; field < 2; ++field) {
          unpack_line<C>(low_lines + line * kLineBytes, kLowField + field,
                         high_lines + line * kLineBytes, 2 * kInLine + field,
                         to + (8 * unit + 4 * field + line) * kLineBytes);
        }
      }
    };
    for (int32_t unit = 0; unit < num_units; unit += kUnits) {
      [&]<int... u>(std::integer_sequence<int, u...>) __attribute__((always_inline)) {
        ((unit + u < num_units ? unpack_unit(unit + u, std::integral_constant<int, u>{}) : void()),
         ...);
      }(std::make_integer_sequence<int, kUnits>{});
    }
  }
}

template <typename C>
INT8KV_INLINE void unpack_v(const DotFields& d) {
  constexpr int kFields = 2 * units_per_line<C>();
  const int64_t group_bytes = static_cast<int64_t>(d.num_pairs) * kLineBytes;
  for (int32_t first = 0; first < d.num_groups; first += kFields) {
    const int8_t* high = d.high + first / kFields * d.high_stride;
    const auto unpack_group = [&](auto in_line) __attribute__((always_inline)) {
      constexpr int kInLine = decltype(in_line)::value;
      if (first + kInLine >= d.num_groups) return;
      const int8_t* low = d.low + (first + kInLine) / C::Low::kFields * d.low_stride;
      int8_t* to = d.scratch + (first + kInLine) * group_bytes;
      for (int32_t pair = 0; pair < d.num_pairs; ++pair) {
        unpack_line<C>(low + pair * kLineBytes, kInLine % C::Low::kFields, high + pair * kLineBytes,
                       kInLine, to + pair * kLineBytes);
      }
    };
    [&]<int... u>(std::integer_sequence<int, u...>) __attribute__((always_inline)) {
      (unpack_group(std::integral_constant<int, u>{}), ...);
    }(std::make_integer_sequence<int, kFields>{});
  }
}

template <typename C, bool kIsKey>
static void dot_fields(const DotFields& d) {
  if (d.num_rows <= kBlockRows) {
    dot_fields_rows_of<C, kIsKey>(d.num_rows, d, 0);
    return;
  }
  // More rows than one pass has, as prompts have them, would unpack everything again in each.
  if constexpr (kIsKey) {
    unpack_k<C>(d);
  } else {
    unpack_v<C>(d);
  }
  dot_pairs<Codes<8>>({.a = d.a,
                       .a_stride = d.a_stride,
                       .b = d.scratch,
                       .group_stride = static_cast<int64_t>(d.num_pairs) * kLineBytes,
                       .prefetch_ahead = 0,
                       .c = d.c,
                       .c_stride = d.c_stride,
                       .num_rows = d.num_rows,
                       .num_groups = d.num_groups,
                       .num_pairs = d.num_pairs,
                       .accumulate = d.accumulate});
}

}  // namespace int8kv::cpu::INT8KV_ISA
