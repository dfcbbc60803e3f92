// The functions of one instruction set that its files share.
#pragma once

#include "cpu/kernels.h"

namespace int8kv::cpu::INT8KV_ISA {

template <typename F>
void quantize_tokens(const ReshapeAndCacheParams& params, int64_t token_begin, int64_t token_end,
                     int32_t head_begin, int32_t head_end);

}  // namespace int8kv::cpu::INT8KV_ISA
