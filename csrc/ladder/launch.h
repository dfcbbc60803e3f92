// What the CUDA kernels of the ladder offer to csrc/ops; as for those of the cache, cuda/launch.h,
// every launcher only enqueues kernels on `stream`, and arguments are checked before.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "ladder/params.h"

namespace int8kv {

// Bytes of device memory that launch_quantize_per_channel() needs: 4 per channel and a little more.
size_t quantize_per_channel_workspace_bytes(const QuantizePerChannelParams& params);

// Quantizes a matrix, every variant to the same bytes. With compute_scales the scales come from x,
// for kFused in the same kernel, else in one before it; kFused takes no scales.
//
// Requires: workspace aligned to 4 bytes, contents arbitrary. Anything else returns
// cudaErrorInvalidValue.
cudaError_t launch_quantize_per_channel(const QuantizePerChannelParams& params, CudaVariant variant,
                                        void* workspace, size_t workspace_bytes,
                                        cudaStream_t stream);

// The way back; there is no kFused.
cudaError_t launch_dequantize_per_channel(const DequantizePerChannelParams& params,
                                          CudaVariant variant, cudaStream_t stream);

}  // namespace int8kv
