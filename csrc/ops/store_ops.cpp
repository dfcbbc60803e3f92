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

// Whether integers are Short, otherwise they are Int.
bool is_short(const Tensor& integers) {
  const ScalarType type = integers.scalar_type();
  INT8KV_CHECK(type == ScalarType::Short || type == ScalarType::Int,
               "integers must be Short or Int, got ", name_of(type));
  return type == ScalarType::Short;
}

void restore_channels(Tensor integers, Tensor codes, Tensor high_bytes, Tensor num_rows,
                      Tensor classes, Tensor means) {
  check_dim(codes, "codes", 2, "[num_rows, block_size]");
  check_type(codes, "codes", ScalarType::Char);
  check_type(high_bytes, "high_bytes", ScalarType::Char);
  check_type(num_rows, "num_rows", ScalarType::Long);
  check_type(classes, "classes", ScalarType::Byte);
  check_type(means, "means", ScalarType::Short);
  const bool short_ones = is_short(integers);
  const auto own = view_channels<int16_t>(integers);
  INT8KV_CHECK(own.num_blocks == 1 && codes.size(1) == own.block_size,
               "integers must be [1, num_channels, ", codes.size(1), "], got ", shape_of(integers));
  INT8KV_CHECK(classes.dim() == 1 && classes.size(0) == own.num_channels,
               "classes must be [num_channels] = [", own.num_channels, "], got ",
               shape_of(classes));
  INT8KV_CHECK(means.dim() == 1 && means.size(0) == own.num_channels,
               "means must be [num_channels] = [", own.num_channels, "], got ", shape_of(means));
  INT8KV_CHECK(num_rows.dim() == 1 && num_rows.size(0) >= 1 && num_rows.size(0) <= 256,
               "num_rows must be [num_classes], 1 to 256, got ", shape_of(num_rows));
  INT8KV_CHECK(codes.is_contiguous() && high_bytes.is_contiguous() && num_rows.is_contiguous() &&
                   classes.is_contiguous() && means.is_contiguous(),
               "codes, high_bytes, num_rows, classes and means must be contiguous");
  const auto* names = static_cast<const uint8_t*>(classes.const_data_ptr());
  const auto* expected = static_cast<const int64_t*>(num_rows.const_data_ptr());
  const auto num_classes = static_cast<int32_t>(num_rows.size(0));
  int64_t counts[256] = {}, total = 0;
  cpu::ClassRows rows{};
  for (int32_t c = 0; c < own.num_channels; ++c) ++counts[names[c]];
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
  INT8KV_CHECK(codes.size(0) == total, "codes must have ", total, " rows, got ", shape_of(codes));
  const int64_t num_wide = counts[num_classes - 1];
  INT8KV_CHECK(high_bytes.dim() == 2 && high_bytes.size(0) == num_wide &&
                   high_bytes.size(1) == own.block_size,
               "high_bytes must be of the last class, [", num_wide, ", ", own.block_size, "], got ",
               shape_of(high_bytes));
  rows.codes = static_cast<const int8_t*>(codes.const_data_ptr());
  rows.high_bytes = static_cast<const int8_t*>(high_bytes.const_data_ptr());
  rows.classes = names;
  rows.means = static_cast<const int16_t*>(means.const_data_ptr());
  rows.last_class = num_classes - 1;
  const cpu::ChannelKernels& kernels = cpu::channel_kernels();
  if (short_ones) {
    kernels.restore_short(own, rows);
  } else {
    kernels.restore_long(view_channels<int32_t>(integers), rows);
  }
}

void dequantize_channels(Tensor out, Tensor integers, Tensor steps) {
  check_type(out, "out", ScalarType::Float);
  check_type(steps, "steps", ScalarType::Float);
  const bool short_ones = is_short(integers);
  const auto own = view_channels<const int16_t>(integers);
  INT8KV_CHECK(out.dim() == 3 && out.size(0) == own.num_blocks && out.size(1) == own.block_size &&
                   out.size(2) == own.num_channels && out.is_contiguous(),
               "out must be contiguous [num_blocks, block_size, num_channels] = [", own.num_blocks,
               ", ", own.block_size, ", ", own.num_channels, "], got ", shape_of(out));
  INT8KV_CHECK(steps.dim() == 2 && steps.size(0) == own.num_blocks &&
                   steps.size(1) == own.block_size && steps.stride(1) == 1,
               "steps must be [num_blocks, block_size] = [", own.num_blocks, ", ", own.block_size,
               "], contiguous in the latter, got ", shape_of(steps));
  const auto* factors = static_cast<const float*>(steps.const_data_ptr());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  const cpu::ChannelKernels& kernels = cpu::channel_kernels();
  if (short_ones) {
    kernels.dequantize_short(own, factors, steps.stride(0), to);
  } else {
    kernels.dequantize_long(view_channels<const int32_t>(integers), factors, steps.stride(0), to);
  }
}

void pack_channels(Tensor plane, Tensor integers, int64_t head_size, int64_t bits, int64_t shift,
                   bool of_values) {
  check_type(plane, "plane", ScalarType::Char);
  check_type(integers, "integers", ScalarType::Short);
  const auto own = view_channels<const int16_t>(integers);
  INT8KV_CHECK(head_size > 0 && head_size % kSlotGroup == 0 && own.num_channels % head_size == 0,
               "head_size must be a multiple of ", kSlotGroup, " that divides num_channels, ",
               own.num_channels, ", got ", head_size);
  INT8KV_CHECK(own.block_size % kSlotGroup == 0, "block_size must be a multiple of ", kSlotGroup,
               ", got ", own.block_size);
  INT8KV_CHECK(bits == 8 || bits == 4 || bits == 2 || bits == 1, "bits must be 8, 4, 2 or 1, got ",
               bits);
  INT8KV_CHECK(0 <= shift && shift + bits <= 8, "shift must leave the ", bits,
               " bits within a byte, got ", shift);
  const int64_t run = (of_values ? 16 : 8) * (8 / bits);
  const int64_t num_bytes = own.block_size * ((head_size + run - 1) / run * run) * bits / 8;
  INT8KV_CHECK(plane.dim() == 3 && plane.size(0) == own.num_blocks &&
                   plane.size(1) == own.num_channels / head_size && plane.size(2) == num_bytes &&
                   plane.stride(2) == 1,
               "plane must be [num_blocks, num_kv_heads, bytes] = [", own.num_blocks, ", ",
               own.num_channels / head_size, ", ", num_bytes, "], contiguous in the last, got ",
               shape_of(plane));
  check_no_overlap(plane, "plane");
  const cpu::CodePlane to{static_cast<int8_t*>(plane.mutable_data_ptr()),
                          plane.stride(0),
                          plane.stride(1),
                          static_cast<int32_t>(head_size),
                          static_cast<int32_t>(bits),
                          static_cast<int32_t>(shift),
                          of_values};
  cpu::channel_kernels().pack_codes(own, to);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(int8kv, m) {
  m.def(
      "restore_channels(Tensor(a!) integers, Tensor codes, Tensor high_bytes, Tensor num_rows, "
      "Tensor classes, Tensor means) -> ()");
  m.def("dequantize_channels(Tensor(a!) out, Tensor integers, Tensor steps) -> ()");
  m.def(
      "pack_channels(Tensor(a!) plane, Tensor integers, int head_size, int bits, int shift, "
      "bool of_values) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(int8kv, CPU, m) {
  m.impl("restore_channels", TORCH_BOX(&restore_channels));
  m.impl("dequantize_channels", TORCH_BOX(&dequantize_channels));
  m.impl("pack_channels", TORCH_BOX(&pack_channels));
}
