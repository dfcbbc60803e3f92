// The CUDA operators on the host: both kernel files and a C interface for test_cuda_emulation.py.
#include "cuda_emulation.h"

#include "../csrc/cuda/paged_attention.cu"
#include "../csrc/cuda/reshape_and_cache.cu"

using namespace int8kv;

extern "C" {

void set_mode(int copies_are_late, int fibers_fall, int resident) {
  emulation::copies_are_late = copies_are_late != 0;
  emulation::fibers_fall = fibers_fall != 0;
  emulation::resident = static_cast<unsigned>(resident);
}

int reshape_and_cache(const ReshapeAndCacheParams* params) {
  return launch_reshape_and_cache(*params, nullptr);
}

int64_t workspace_bytes(const PagedAttentionParams* params, int max_partials) {
  return static_cast<int64_t>(paged_attention_workspace_bytes(*params, max_partials));
}

int paged_attention(const PagedAttentionParams* params, int max_partials, void* workspace,
                    int64_t bytes) {
  return launch_paged_attention(*params, max_partials, workspace, static_cast<size_t>(bytes),
                                nullptr);
}

}  // extern "C"
