// The attention kernels of the format with INT8KV_K_BITS and INT8KV_V_BITS: compiled once per
// format, several at a time.
#include "cuda/attention/format_kernels.cuh"

namespace int8kv {

template cudaError_t choose_kernel<FormatOf<INT8KV_K_BITS, INT8KV_V_BITS>>(
    const PagedAttentionParams&, KernelChoice*);

}  // namespace int8kv
