// The functions of one instruction set that its files share.
#pragma once

#include "cpu/kernels.h"

namespace int8kv::cpu::INT8KV_ISA {

template <typename F>
void quantize_tokens(const ReshapeAndCacheParams& params, int64_t token_begin, int64_t token_end,
                     int32_t head_begin, int32_t head_end);

template <typename F>
void gather_slots(const GatherCacheParams& params, int64_t row, int32_t count, int64_t block,
                  int32_t slot);

}  // namespace int8kv::cpu::INT8KV_ISA
