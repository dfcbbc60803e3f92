// Where the planes of K and of V lie in a chunk, for kernels that serve every format: they choose
// the trait of the codes once per vector, since loading and rotating it takes longer than packing
// its codes. Host and device.
#pragma once

#include "cuda/alignment.h"
#include "cuda/ptx.cuh"
#include "format/params.h"

namespace int8kv {

// Eight bits are a plane of their own, with one code in a byte: the lines of Codes<8>.
template <typename C>
struct PlanesOf {
  using Low = typename C::Low;
  using High = typename C::High;
  static constexpr int kLowBits = C::kLowBits;
};
template <>
struct PlanesOf<Codes<8>> {
  using Low = BitPlane<8>;
  using High = BitPlane<0>;
  static constexpr int kLowBits = 8;
};

// Those of K or of V. Bytes from the start of a chunk.
struct VectorPlanes {
  int32_t bits;
  int32_t codes;   // the first code plane
  int32_t scales;  // below 8 bits the midpoints follow
};

struct FormatPlanes {
  VectorPlanes k, v;

  INT8KV_HD const VectorPlanes& of(bool is_key) const { return is_key ? k : v; }
};

inline FormatPlanes format_planes(const KVCache& cache) {
  return with_format(cache.format, [&]<typename F>() {
    return FormatPlanes{{F::K::kBits, 0, cache.k_scales<F>()},
                        {F::V::kBits, cache.v_codes<F>(), cache.v_scales<F>()}};
  });
}

// Calls f.operator()<C>() with the trait of codes of that many bits.
template <typename Call>
INT8KV_DEVICE void with_codes(int32_t bits, Call&& f) {
  switch (bits) {
    case 8:
      return f.template operator()<Codes<8>>();
    case 6:
      return f.template operator()<Codes<6>>();
    case 5:
      return f.template operator()<Codes<5>>();
    case 4:
      return f.template operator()<Codes<4>>();
    default:
      return f.template operator()<Codes<2>>();
  }
}

// The planes of codes of K or of V as they lie in a block of `block_size` slots.
template <typename C, bool kIsKey>
struct PlaneMap {
  using Low = typename PlanesOf<C>::Low;
  using High = typename PlanesOf<C>::High;
  static constexpr int kLowBits = PlanesOf<C>::kLowBits;
  static constexpr bool kHasHigh = C::kBits > kLowBits;

  int8_t* codes;  // the first byte of the low plane
  int32_t block_size;
  int32_t head_size;

  INT8KV_HD int8_t* high() const {
    return codes +
           (kIsKey ? Low::k_bytes(block_size, head_size) : Low::v_bytes(block_size, head_size));
  }

  // Calls f.operator()<Plane>(first byte of the plane, lowest bit of a code in it).
  template <typename Call>
  INT8KV_DEVICE void for_each(Call&& f) const {
    f.template operator()<Low>(codes, 0);
    if constexpr (kHasHigh) f.template operator()<High>(high(), kLowBits);
  }

  template <typename Plane>
  INT8KV_HD int32_t byte(int32_t slot, int32_t dim) const {
    return kIsKey ? Plane::k_byte(head_size, slot, dim) : Plane::v_byte(block_size, slot, dim);
  }
};

}  // namespace int8kv
