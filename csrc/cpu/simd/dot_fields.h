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

// To lower bits, or to higher ones where `bits` is negative.
INT8KV_INLINE Words shift_down(Words x, int bits) {
  return bits > 0   ? x >> static_cast<uint16_t>(bits)
         : bits < 0 ? x << static_cast<uint16_t>(-bits)
                    : x;
}

// Register `part` of a line of codes: field `low_field` of a line of the lower plane and, where
// there is one, `high_field` of one of the upper plane.
template <typename C>
INT8KV_INLINE IntRegister load_codes(const int8_t* low, int low_field,
                                     [[maybe_unused]] const int8_t* high,
                                     [[maybe_unused]] int high_field, int part) {
  Words codes = load_field<typename C::Low>(low, part, low_field);
  if constexpr (C::kBits > C::kLowBits) {
    constexpr int kHighBits = C::kBits - C::kLowBits;
    const Words bytes = reinterpret_cast<Words>(widen_bytes(high, part));
    // Straight to where the field belongs, by one shift.
    codes |= shift_down(bytes, high_field * kHighBits - C::kLowBits) &
             static_cast<uint16_t>(C::High::kMask << C::kLowBits);
  }
  return reinterpret_cast<IntRegister>(codes);
}

// The widened registers of a whole line of codes.
//
// Two planes cost less as bytes, twice as many to a register, where a line of bytes is one register
// and two of integers. Widening then leaves the line's order: a register has eight bytes of either
// half of the line (order_as_line).
template <typename C>
constexpr bool kIsInterleaved = kNumRegisters == 2 && C::kBits > C::kLowBits;

template <typename C>
INT8KV_INLINE void load_line(const int8_t* low, int low_field, const int8_t* high, int high_field,
                             IntRegister (&codes)[kNumRegisters]) {
  if constexpr (!kIsInterleaved<C>) {
    unrolled<kNumRegisters>([&](auto i) __attribute__((always_inline)) {
      codes[i] = load_codes<C>(low, low_field, high, high_field, i);
    });
  } else {
    constexpr int kHighBits = C::kBits - C::kLowBits;
    constexpr uint16_t kLowMask = C::Low::kMask * 0x101;
    constexpr uint16_t kHighMask = (C::High::kMask << C::kLowBits) * 0x101;
    const Words lows = shift_down(load<Words>(low), low_field * C::kLowBits);
    const Words highs = shift_down(load<Words>(high), high_field * kHighBits - C::kLowBits);
    const auto bytes = reinterpret_cast<IntRegister>((lows & kLowMask) | (highs & kHighMask));
    unrolled<2>([&](auto i)
                    __attribute__((always_inline)) { codes[i] = interleave_zeros(bytes, i); });
  }
}

// Sums of a line's products in the order of the line.
template <typename C>
INT8KV_INLINE void order_as_line(IntRegister (&sums)[kNumRegisters]) {
  if constexpr (kIsInterleaved<C>) {
    const IntRegister lower = sums[0], upper = sums[1];
    unrolled<2>([&](auto i)
                    __attribute__((always_inline)) { sums[i] = order_halves(lower, upper, i); });
  }
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
    constexpr int kInLine = in_line;
    constexpr int kLowField = kInLine % (C::Low::kFields / 2) * 2;
    const int8_t* low_lines = low + unit / (C::Low::kFields / 2) * (4 * kLineBytes);
    const int8_t* high_lines = high;
    int high_field = 0;
    if constexpr (C::kBits > C::kLowBits) {
      high_field = kInLine % (C::High::kFields / 2) * 2;
      high_lines = high + unit / (C::High::kFields / 2) * (4 * kLineBytes);
    }
#pragma GCC unroll 4
    for (int line = 0; line < 4; ++line) {
#pragma GCC unroll 2
      for (int field = 0; field < 2; ++field) {
        IntRegister codes[kNumRegisters];
        load_line<C>(low_lines + line * kLineBytes, kLowField + field,
                     high_lines + line * kLineBytes, high_field + field, codes);
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
    unrolled<kUnits>([&](auto u) __attribute__((always_inline)) { add_unit(unit + u, u); });
  }
  if constexpr (kUnits > 1) {
    const int32_t rest = num_units - unit;
    unrolled<kUnits - 1>([&](auto u) __attribute__((always_inline)) {
      if (u < rest) add_unit(unit + u, u);
    });
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kNumRegisters; ++i) {
      for (int s = 1; s < kSums; ++s) sum[0][r][i] = add(sum[0][r][i], sum[s][r][i]);
    }
    order_as_line<C>(sum[0][r]);
    for (int i = 0; i < kNumRegisters; ++i) {
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
  constexpr bool kIsWholeLine = kParts == kNumRegisters;
  IntRegister sum[kSums][kRows][kGroups][kParts] = {};
  const auto add_pair = [&](int32_t pair, auto& sums) __attribute__((always_inline)) {
    IntRegister codes[kGroups][kParts];
    const int8_t* low_line = low + pair * kLineBytes;
    const int8_t* high_line = high + pair * kLineBytes;
    unrolled<kGroups>([&](auto g) __attribute__((always_inline)) {
      if constexpr (kIsWholeLine) {
        load_line<C>(low_line, field + g, high_line, high_field + g, codes[g]);
      } else {
        unrolled<kParts>([&](auto i) __attribute__((always_inline)) {
          codes[g][i] = load_codes<C>(low_line, field + g, high_line, high_field + g, part + i);
        });
      }
    });
    unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
      const IntRegister broadcast = broadcast_pair(load<int32_t>(a + r * d.a_stride + 2 * pair));
      unrolled<kGroups>([&](auto g) __attribute__((always_inline)) {
        unrolled<kParts>([&](auto i) __attribute__((always_inline)) {
          add_in_order(sums[r][g][i], codes[g][i], broadcast);
        });
      });
    });
  };
  constexpr int kPasses = kNumRegisters / kParts;  // which fetch ahead as much as one
  constexpr int kPairs = kSums * kPasses;
  int32_t pair = 0;
  for (; pair + kPairs <= d.num_pairs; pair += kPairs) {
    unrolled<kPairs>([&](auto i) __attribute__((always_inline)) {
      add_pair(pair + i, sum[i % kSums]);
      if (i % kPasses == 0) prefetcher.advance();
    });
  }
  for (; kPairs > 1 && pair < d.num_pairs; ++pair) add_pair(pair, sum[0]);
  unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
    unrolled<kGroups>([&](auto g) __attribute__((always_inline)) {
      auto& total = sum[0][r][g];
      unrolled<kParts>([&](auto i) __attribute__((always_inline)) {
        for (int s = 1; s < kSums; ++s) total[i] = add(total[i], sum[s][r][g][i]);
      });
      if constexpr (kIsWholeLine) order_as_line<C>(total);
      unrolled<kParts>([&](auto i) __attribute__((always_inline)) {
        int32_t* to = c + r * d.c_stride + g * kLanes + i * kRegisterLanes;
        if (d.accumulate) total[i] = add(total[i], load<IntRegister>(to));
        store(to, total[i]);
      });
    });
  });
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
  Prefetcher prefetcher(d, static_cast<int64_t>((d.num_groups + 1) / 2) * d.num_pairs);
  const auto add_groups = [&](int32_t group, auto in_line) __attribute__((always_inline)) {
    constexpr int kInLine = in_line;
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
    unrolled<kUnits>([&](auto u) __attribute__((always_inline)) {
      if (group + 2 * u < d.num_groups) add_groups(group + 2 * u, u);
    });
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
  Prefetcher prefetcher(d, static_cast<int64_t>(d.num_groups) * (d.num_pairs / 2));
  for (int32_t group = 0; group < d.num_groups; ++group) {
    const int8_t* low = d.low + group * d.low_stride;
    const int8_t* high = d.high + group * d.high_stride;
    int8_t* to = d.scratch + static_cast<int64_t>(group) * d.num_pairs * kLineBytes;
    const auto unpack_unit = [&](int32_t unit, auto in_line) __attribute__((always_inline)) {
      constexpr int kInLine = in_line;
      constexpr int kLowField = kInLine % (C::Low::kFields / 2) * 2;
      const int8_t* low_lines = low + unit / (C::Low::kFields / 2) * (4 * kLineBytes);
      const int8_t* high_lines = high + unit / kUnits * (4 * kLineBytes);
      for (int line = 0; line < 4; ++line) {
        for (int field = 0; field < 2; ++field) {
          unpack_line<C>(low_lines + line * kLineBytes, kLowField + field,
                         high_lines + line * kLineBytes, 2 * kInLine + field,
                         to + (8 * unit + 4 * field + line) * kLineBytes);
        }
        prefetcher.advance();
      }
    };
    for (int32_t unit = 0; unit < num_units; unit += kUnits) {
      unrolled<kUnits>([&](auto u) __attribute__((always_inline)) {
        if (unit + u < num_units) unpack_unit(unit + u, u);
      });
    }
  }
}

template <typename C>
INT8KV_INLINE void unpack_v(const DotFields& d) {
  constexpr int kFields = 2 * units_per_line<C>();
  const int64_t group_bytes = static_cast<int64_t>(d.num_pairs) * kLineBytes;
  Prefetcher prefetcher(d, static_cast<int64_t>(d.num_groups) * d.num_pairs);
  for (int32_t first = 0; first < d.num_groups; first += kFields) {
    const int8_t* high = d.high + first / kFields * d.high_stride;
    const auto unpack_group = [&](auto in_line) __attribute__((always_inline)) {
      constexpr int kInLine = in_line;
      if (first + kInLine >= d.num_groups) return;
      const int8_t* low = d.low + (first + kInLine) / C::Low::kFields * d.low_stride;
      int8_t* to = d.scratch + (first + kInLine) * group_bytes;
      for (int32_t pair = 0; pair < d.num_pairs; ++pair) {
        unpack_line<C>(low + pair * kLineBytes, kInLine % C::Low::kFields, high + pair * kLineBytes,
                       kInLine, to + pair * kLineBytes);
        prefetcher.advance();
      }
    };
    unrolled<kFields>(unpack_group);
  }
}

template <typename C, bool kIsKey>
static void dot_fields(const DotFields& all) {
  if (all.num_rows <= max_unpacking_rows(C::kBits > C::kLowBits)) {
    DotFields d = all;
    for_each_row_block(all.num_rows, [&](int32_t row, int32_t rows) {
      dot_fields_rows_of<C, kIsKey>(rows, d, row);
      d.prefetch = nullptr;  // once is enough
    });
    return;
  }
  // With as many rows as prompts have, every code is unpacked once instead of in every pass.
  if constexpr (kIsKey) {
    unpack_k<C>(all);
  } else {
    unpack_v<C>(all);
  }
  dot_pairs<Codes<8>>({.a = all.a,
                       .a_stride = all.a_stride,
                       .b = all.scratch,
                       .group_stride = static_cast<int64_t>(all.num_pairs) * kLineBytes,
                       .prefetch_ahead = 0,
                       .c = all.c,
                       .c_stride = all.c_stride,
                       .num_rows = all.num_rows,
                       .num_groups = all.num_groups,
                       .num_pairs = all.num_pairs,
                       .accumulate = all.accumulate});
}

}  // namespace int8kv::cpu::INT8KV_ISA
