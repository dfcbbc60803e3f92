// The CUDA operators on the host: the kernel files and a C interface for test_cuda_emulation.py.
#include "cuda_emulation.h"

#include "cuda/attention/paged_attention.cu"
#include "cuda/cache/gather_cache.cu"
#include "cuda/cache/reshape_and_cache.cu"
#include "cuda/check_bounds.cu"
#include "ladder/quantize_per_channel.cu"

using namespace int8kv;

extern "C" {

void set_mode(int copies_are_late, int fibers_fall, int blocks_are_shuffled, int resident) {
  emulation::copies_are_late = copies_are_late != 0;
  emulation::fibers_fall = fibers_fall != 0;
  emulation::blocks_are_shuffled = blocks_are_shuffled != 0;
  emulation::resident = static_cast<unsigned>(resident);
}

void set_shared_bytes(int bytes) {
  emulation::shared_bytes_of_a_block = static_cast<size_t>(bytes);
}

void set_l2_bytes(int64_t bytes) { emulation::l2_cache_bytes = bytes; }

// The CacheFormat of that name, or -1.
int cache_format(const char* name) {
  for (const auto& [known, format] : kCacheFormats) {
    if (std::strcmp(known, name) == 0) return static_cast<int>(format);
  }
  return -1;
}

int reshape_and_cache(const ReshapeAndCacheParams* params) {
  return launch_reshape_and_cache(*params, nullptr);
}

// How often the quotients of the cache write are not those of IEEE division.
int64_t wrong_quotients() {
  int64_t wrong = 0;
  for (const uint32_t exponent : {30u, 127u, 225u}) {
    for (uint32_t mantissa = 0; mantissa < 1u << 23; ++mantissa) {
      const float x = bits_to_float(exponent << 23 | mantissa);
      wrong += divide_by_127(x) != x / 127.0f;
    }
  }
  std::mt19937 random;
  for (uint32_t bits = 0; bits < 128; ++bits) {
    const float scale = bits_to_float(127u << 23 | bits << 16);
    const float reciprocal = 1.0f / scale;
    for (const int units : {-2, -1, 0, 1, 2}) {
      const float guess = bits_to_float(float_bits(reciprocal) + static_cast<uint32_t>(units));
      wrong += improve_reciprocal(scale, guess) != reciprocal;
    }
    for (int i = 0; i < 100000; ++i) {
      const float x = bits_to_float((100u + random() % 34) << 23 | (random() >> 9));
      wrong += divide_by_bf16(x, scale, reciprocal) != x / scale;
    }
  }
  return wrong;
}

int gather_cache(const GatherCacheParams* params) { return launch_gather_cache(*params, nullptr); }

// What the checks of an operator's integers find, or "".
const char* check_slots(const ReshapeAndCacheParams* params) {
  emulation::failed_check[0] = '\0';
  launch_check_bounds(*params, nullptr);
  return emulation::failed_check;
}
const char* check_attention(const PagedAttentionParams* params, int64_t max_blocks_per_seq) {
  emulation::failed_check[0] = '\0';
  launch_check_bounds(*params, max_blocks_per_seq, nullptr);
  return emulation::failed_check;
}
const char* check_gather(const GatherCacheParams* params, int64_t max_blocks_per_seq) {
  emulation::failed_check[0] = '\0';
  launch_check_bounds(*params, max_blocks_per_seq, nullptr);
  return emulation::failed_check;
}

int64_t workspace_bytes(const PagedAttentionParams* params) {
  size_t bytes = 0;
  paged_attention_workspace_bytes(*params, &bytes);
  return static_cast<int64_t>(bytes);
}

// How many arrivals attention needs, or -1.
int64_t prepare_paged_attention(const PagedAttentionParams* params) {
  int64_t count = -1;
  return prepare_paged_attention(*params, &count) == cudaSuccess ? count : -1;
}

int paged_attention(const PagedAttentionParams* params, void* workspace, int64_t bytes,
                    uint32_t* arrivals, int64_t num_arrivals) {
  return launch_paged_attention(*params, workspace, static_cast<size_t>(bytes), arrivals,
                                num_arrivals, nullptr);
}

int64_t quantize_workspace_bytes(const QuantizePerChannelParams* params) {
  return static_cast<int64_t>(quantize_per_channel_workspace_bytes(*params));
}

int quantize_per_channel(const QuantizePerChannelParams* params, int variant, void* workspace,
                         int64_t bytes) {
  return launch_quantize_per_channel(*params, static_cast<CudaVariant>(variant), workspace,
                                     static_cast<size_t>(bytes), nullptr);
}

int dequantize_per_channel(const DequantizePerChannelParams* params, int variant) {
  return launch_dequantize_per_channel(*params, static_cast<CudaVariant>(variant), nullptr);
}

// What the ticket does: {strip, first token, whether it is an amax item}, and the number of
// tickets.
int64_t queue_ticket(int64_t num_tokens, int64_t num_channels, int element_bytes,
                     int64_t strip_bytes, int64_t lag, int64_t ticket, int64_t* item) {
  const QuantizeQueue queue =
      make_quantize_queue(num_tokens, num_channels, element_bytes, strip_bytes, lag);
  const QueueItem found = queue_item(queue, ticket);
  item[0] = found.strip;
  item[1] = found.first_token;
  item[2] = found.is_amax;
  return 2 * queue.num_items();
}

}  // extern "C"
