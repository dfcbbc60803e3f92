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

void restore_channels(Tensor integers, Tensor codes, Tensor order, Tensor means) {
  check_dim(codes, "codes", 2, "[num_rows, block_size]");
  check_type(codes, "codes", ScalarType::Char);
  check_type(order, "order", ScalarType::Long);
  check_type(means, "means", ScalarType::Short);
  const bool short_ones = is_short(integers);
  const auto own = view_channels<int16_t>(integers);
  INT8KV_CHECK(own.num_blocks == 1 && codes.size(1) == own.block_size,
               "integers must be [1, num_channels, ", codes.size(1), "], got ", shape_of(integers));
  INT8KV_CHECK(order.dim() == 1 && order.size(0) == codes.size(0), "order must be [num_rows] = [",
               codes.size(0), "], got ", shape_of(order));
  INT8KV_CHECK(means.dim() == 1 && means.size(0) == own.num_channels,
               "means must be [num_channels] = [", own.num_channels, "], got ", shape_of(means));
  INT8KV_CHECK(codes.is_contiguous() && order.is_contiguous() && means.is_contiguous(),
               "codes, order and means must be contiguous");
  const auto* rows = static_cast<const int64_t*>(order.const_data_ptr());
  for (int64_t r = 0; r < order.size(0); ++r) {
    INT8KV_CHECK(0 <= rows[r] && rows[r] < own.num_channels, "order[", r, "] must be below ",
                 own.num_channels, ", got ", rows[r]);
  }
  const auto* from = static_cast<const int8_t*>(codes.const_data_ptr());
  const auto* levels = static_cast<const int16_t*>(means.const_data_ptr());
  const cpu::ChannelKernels& kernels = cpu::channel_kernels();
  if (short_ones) {
    kernels.restore_short(own, from, rows, levels, codes.size(0));
  } else {
    kernels.restore_long(view_channels<int32_t>(integers), from, rows, levels, codes.size(0));
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
  m.def("restore_channels(Tensor(a!) integers, Tensor codes, Tensor order, Tensor means) -> ()");
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
