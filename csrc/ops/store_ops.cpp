// The operators on channels of stored blocks, which live on CPU: checks of their arguments, and
// dispatch by the type of the integers.
#include <torch/csrc/stable/library.h>

#include "format/cache_format.h"
#include "ops/checks.h"
#include "store/channels.h"

namespace {

using namespace int8kv;  // NOLINT: this file is the library's border

// Integers [num_blocks, num_channels, block_size], whose blocks may lie apart.
template <typename T>
cpu::Channels<T> view_channels(const Tensor& integers) {
  check_dim(integers, "integers", 3, "[num_blocks, num_channels, block_size]");
  INT8KV_CHECK(
      integers.size(2) == 0 || (integers.stride(2) == 1 && integers.stride(1) == integers.size(2)),
      "integers must be contiguous but for their blocks, got strides ", integers.stride(1), ", ",
      integers.stride(2));
  T* data = const_cast<T*>(static_cast<const T*>(integers.const_data_ptr()));
  return {data, integers.stride(0), integers.size(0), static_cast<int32_t>(integers.size(1)),
          static_cast<int32_t>(integers.size(2))};
}

// Calls f with integers, as `int16_t` or `int32_t`.
template <typename F>
void with_integers(const Tensor& integers, const F& f) {
  const ScalarType type = integers.scalar_type();
  INT8KV_CHECK(type == ScalarType::Short || type == ScalarType::Int,
               "integers must be Short or Int, got ", name_of(type));
  if (type == ScalarType::Short) return f.template operator()<int16_t>();
  f.template operator()<int32_t>();
}

template <typename Byte>
Byte* bytes_of(const Tensor& t) {
  return const_cast<Byte*>(static_cast<const Byte*>(t.const_data_ptr()));
}

template <typename Byte>
cpu::ClassRows<Byte> view_rows(int64_t num_channels, int64_t block_size, const Tensor& codes,
                               const Tensor& high_bytes, const Tensor& num_rows,
                               const Tensor& classes, const Tensor& means) {
  check_dim(codes, "codes", 2, "[num_rows, block_size]");
  check_type(codes, "codes", ScalarType::Char);
  check_type(high_bytes, "high_bytes", ScalarType::Char);
  check_type(num_rows, "num_rows", ScalarType::Long);
  check_type(classes, "classes", ScalarType::Byte);
  check_type(means, "means", ScalarType::Short);
  INT8KV_CHECK(classes.dim() == 1 && classes.size(0) == num_channels,
               "classes must be [num_channels] = [", num_channels, "], got ", shape_of(classes));
  INT8KV_CHECK(means.dim() == 1 && means.size(0) == num_channels,
               "means must be [num_channels] = [", num_channels, "], got ", shape_of(means));
  INT8KV_CHECK(num_rows.dim() == 1 && num_rows.size(0) >= 1 && num_rows.size(0) <= 256,
               "num_rows must be [num_classes], 1 to 256, got ", shape_of(num_rows));
  INT8KV_CHECK(codes.is_contiguous() && high_bytes.is_contiguous() && num_rows.is_contiguous() &&
                   classes.is_contiguous() && means.is_contiguous(),
               "codes, high_bytes, num_rows, classes and means must be contiguous");
  const auto* names = static_cast<const uint8_t*>(classes.const_data_ptr());
  const auto* expected = static_cast<const int64_t*>(num_rows.const_data_ptr());
  const auto num_classes = static_cast<int32_t>(num_rows.size(0));
  int64_t counts[256] = {}, total = 0;
  cpu::ClassRows<Byte> rows{};
  for (int64_t c = 0; c < num_channels; ++c) ++counts[names[c]];
  for (int32_t i = 0; i < num_classes; ++i) {
    INT8KV_CHECK(expected[i] == counts[i], "num_rows[", i,
                 "] must be that of the channels of class ", i, ", ", counts[i], ", got ",
                 expected[i]);
    rows.next[i] = total;
    total += counts[i];
  }
  for (int i = num_classes; i < 256; ++i) {
    INT8KV_CHECK(counts[i] == 0, "classes must be below ", num_classes, ", got ", i);
  }
  INT8KV_CHECK(codes.size(0) == total && codes.size(1) == block_size, "codes must be [", total,
               ", block_size] = [", total, ", ", block_size, "], got ", shape_of(codes));
  const int64_t num_wide = counts[num_classes - 1];
  INT8KV_CHECK(
      high_bytes.dim() == 2 && high_bytes.size(0) == num_wide && high_bytes.size(1) == block_size,
      "high_bytes must be of the last class, [", num_wide, ", ", block_size, "], got ",
      shape_of(high_bytes));
  rows.codes = bytes_of<Byte>(codes);
  rows.high_bytes = bytes_of<Byte>(high_bytes);
  rows.classes = names;
  rows.means = static_cast<const int16_t*>(means.const_data_ptr());
  rows.last_class = num_classes - 1;
  return rows;
}

// One block of integers.
template <typename T>
cpu::Channels<T> view_block(const Tensor& integers) {
  const auto own = view_channels<T>(integers);
  INT8KV_CHECK(own.num_blocks == 1, "integers must be of one block, got ", shape_of(integers));
  return own;
}

void measure_channels(Tensor moments, Tensor integers) {
  check_type(moments, "moments", ScalarType::Float);
  with_integers(integers, [&]<typename T>() {
    const auto own = view_channels<const T>(integers);
    INT8KV_CHECK(moments.dim() == 3 && moments.size(0) == own.num_blocks && moments.size(1) == 3 &&
                     moments.size(2) == own.num_channels && moments.is_contiguous(),
                 "moments must be contiguous [num_blocks, 3, num_channels] = [", own.num_blocks,
                 ", 3, ", own.num_channels, "], got ", shape_of(moments));
    auto* out = static_cast<float*>(moments.mutable_data_ptr());
    cpu::channel_kernels().of<T>().measure(own, out);
  });
}

void split_channels(Tensor codes, Tensor high_bytes, Tensor integers, Tensor num_rows,
                    Tensor classes, Tensor means, int64_t max_wide) {
  INT8KV_CHECK(0 <= max_wide && max_wide <= INT16_MAX,
               "max_wide must fit two bytes, 0 to 32767, got ", max_wide);
  with_integers(integers, [&]<typename T>() {
    const auto own = view_block<const T>(integers);
    const auto rows = view_rows<int8_t>(own.num_channels, own.block_size, codes, high_bytes,
                                        num_rows, classes, means);
    cpu::channel_kernels().of<T>().split(own, static_cast<int32_t>(max_wide), rows);
  });
}

void restore_channels(Tensor integers, Tensor codes, Tensor high_bytes, Tensor num_rows,
                      Tensor classes, Tensor means) {
  with_integers(integers, [&]<typename T>() {
    const auto own = view_block<T>(integers);
    const auto rows = view_rows<const int8_t>(own.num_channels, own.block_size, codes, high_bytes,
                                              num_rows, classes, means);
    cpu::channel_kernels().of<T>().restore(own, rows);
  });
}

// Checks the vectors and steps of integers.
template <typename T>
void check_vectors(const Tensor& vectors, const cpu::Channels<T>& integers, const Tensor& steps) {
  check_type(vectors, "vectors", ScalarType::Float);
  check_type(steps, "steps", ScalarType::Float);
  INT8KV_CHECK(vectors.dim() == 3 && vectors.size(0) == integers.num_blocks &&
                   vectors.size(1) == integers.block_size &&
                   vectors.size(2) == integers.num_channels && vectors.is_contiguous(),
               "vectors must be contiguous [num_blocks, block_size, num_channels] = [",
               integers.num_blocks, ", ", integers.block_size, ", ", integers.num_channels,
               "], got ", shape_of(vectors));
  INT8KV_CHECK(steps.dim() == 2 && steps.size(0) == integers.num_blocks &&
                   steps.size(1) == integers.block_size && steps.stride(1) == 1,
               "steps must be [num_blocks, block_size] = [", integers.num_blocks, ", ",
               integers.block_size, "], contiguous in the latter, got ", shape_of(steps));
}

void quantize_channels(Tensor integers, Tensor vectors, Tensor steps) {
  with_integers(integers, [&]<typename T>() {
    const auto own = view_channels<T>(integers);
    check_vectors(vectors, own, steps);
    check_no_overlap(integers, "integers");
    cpu::channel_kernels().of<T>().quantize(own, static_cast<const float*>(steps.const_data_ptr()),
                                            steps.stride(0),
                                            static_cast<const float*>(vectors.const_data_ptr()));
  });
}

void dequantize_channels(Tensor vectors, Tensor integers, Tensor steps) {
  with_integers(integers, [&]<typename T>() {
    const auto own = view_channels<const T>(integers);
    check_vectors(vectors, own, steps);
    cpu::channel_kernels().of<T>().dequantize(
        own, static_cast<const float*>(steps.const_data_ptr()), steps.stride(0),
        static_cast<float*>(vectors.mutable_data_ptr()));
  });
}

template <typename Byte, typename T>
cpu::CodePlane<Byte> view_plane(const Tensor& plane, const cpu::Channels<T>& channels,
                                int64_t head_size, int64_t bits, int64_t shift, bool of_values) {
  check_type(plane, "plane", ScalarType::Char);
  INT8KV_CHECK(
      head_size > 0 && head_size % kSlotGroup == 0 && channels.num_channels % head_size == 0,
      "head_size must be a multiple of ", kSlotGroup, " that divides num_channels, ",
      channels.num_channels, ", got ", head_size);
  INT8KV_CHECK(channels.block_size % kSlotGroup == 0, "block_size must be a multiple of ",
               kSlotGroup, ", got ", channels.block_size);
  INT8KV_CHECK(bits == 8 || bits == 4 || bits == 2 || bits == 1, "bits must be 8, 4, 2 or 1, got ",
               bits);
  INT8KV_CHECK(0 <= shift && shift + bits <= 8, "shift must leave the ", bits,
               " bits within a byte, got ", shift);
  const int64_t run = (of_values ? 16 : 8) * (8 / bits);
  const int64_t num_bytes = channels.block_size * ((head_size + run - 1) / run * run) * bits / 8;
  INT8KV_CHECK(plane.dim() == 3 && plane.size(0) == channels.num_blocks &&
                   plane.size(1) == channels.num_channels / head_size &&
                   plane.size(2) == num_bytes && plane.stride(2) == 1,
               "plane must be [num_blocks, num_kv_heads, bytes] = [", channels.num_blocks, ", ",
               channels.num_channels / head_size, ", ", num_bytes,
               "], contiguous in the last, got ", shape_of(plane));
  return {bytes_of<Byte>(plane),
          plane.stride(0),
          plane.stride(1),
          static_cast<int32_t>(head_size),
          static_cast<int32_t>(bits),
          static_cast<int32_t>(shift),
          of_values};
}

void pack_channels(Tensor plane, Tensor integers, int64_t head_size, int64_t bits, int64_t shift,
                   bool of_values) {
  check_type(integers, "integers", ScalarType::Short);
  const auto own = view_channels<const int16_t>(integers);
  const auto to = view_plane<int8_t>(plane, own, head_size, bits, shift, of_values);
  check_no_overlap(plane, "plane");
  cpu::channel_kernels().pack_codes(own, to);
}

void unpack_channels(Tensor integers, Tensor plane, int64_t head_size, int64_t bits, int64_t shift,
                     bool of_values) {
  check_type(integers, "integers", ScalarType::Short);
  const auto own = view_channels<int16_t>(integers);
  const auto from = view_plane<const int8_t>(plane, own, head_size, bits, shift, of_values);
  check_no_overlap(integers, "integers");
  cpu::channel_kernels().unpack_codes(own, from);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(int8kv, m) {
  m.def("measure_channels(Tensor(a!) moments, Tensor integers) -> ()");
  m.def(
      "split_channels(Tensor(a!) codes, Tensor(b!) high_bytes, Tensor integers, Tensor num_rows, "
      "Tensor classes, Tensor means, int max_wide) -> ()");
  m.def(
      "restore_channels(Tensor(a!) integers, Tensor codes, Tensor high_bytes, Tensor num_rows, "
      "Tensor classes, Tensor means) -> ()");
  m.def("quantize_channels(Tensor(a!) integers, Tensor vectors, Tensor steps) -> ()");
  m.def("dequantize_channels(Tensor(a!) vectors, Tensor integers, Tensor steps) -> ()");
  m.def(
      "pack_channels(Tensor(a!) plane, Tensor integers, int head_size, int bits, int shift, "
      "bool of_values) -> ()");
  m.def(
      "unpack_channels(Tensor(a!) integers, Tensor plane, int head_size, int bits, int shift, "
      "bool of_values) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(int8kv, CPU, m) {
  m.impl("measure_channels", TORCH_BOX(&measure_channels));
  m.impl("split_channels", TORCH_BOX(&split_channels));
  m.impl("restore_channels", TORCH_BOX(&restore_channels));
  m.impl("quantize_channels", TORCH_BOX(&quantize_channels));
  m.impl("dequantize_channels", TORCH_BOX(&dequantize_channels));
  m.impl("pack_channels", TORCH_BOX(&pack_channels));
  m.impl("unpack_channels", TORCH_BOX(&unpack_channels));
}
