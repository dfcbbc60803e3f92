// The attention kernel of a batch, as each format's own file offers it to the launcher.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/attention/attention_params.h"

namespace int8kv {

struct KernelChoice {
  void (*kernel)(AttentionParams);
  int num_blocks;  // that the device holds at once
  int rows_per_tile;
  int shared_bytes;
};

// With the kernels of format F, which format_kernels.cu instantiates.
template <typename F>
cudaError_t choose_kernel(const PagedAttentionParams& params, KernelChoice* choice);

}  // namespace int8kv
