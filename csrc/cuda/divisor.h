// Division by a number that the host knows. Host and device.
#pragma once

#include <cstdint>

#include "format/cache_format.h"

namespace int8kv {

// A multiplication and a shift, where a GPU takes twenty dependent instructions for 32 bits and a
// hundred for 64. With 2^(s-1) < d <= 2^s and m = floor(2^(31+s) / d) + 1, m exceeds 2^(31+s) / d
// by at most 1, so that n * m / 2^(31+s) exceeds n / d by less than 1 / d for all n < 2^31
// (Granlund and Montgomery, 1994).
struct Divisor {
  int32_t value;
  uint32_t multiplier;
  int32_t shift;

  // of a value from 1 to 2^31 - 1
  static Divisor of(int32_t value) {
    int32_t s = 0;
    while ((int64_t{1} << s) < value) ++s;
    return {value,
            static_cast<uint32_t>((uint64_t{1} << (31 + s)) / static_cast<uint32_t>(value) + 1),
            31 + s};
  }

  // n / value, n not negative.
  INT8KV_HD int32_t divide(int32_t n) const {
    return static_cast<int32_t>(uint64_t{static_cast<uint32_t>(n)} * multiplier >> shift);
  }
};

}  // namespace int8kv
