// The order of work of the fused kernel: which ticket is which piece of the matrix. Host and
// device, so that a host test can check it.
//
// The matrix is cut into strips of channels and each strip into items of tokens. An item is worked
// on twice: once for the maxima (amax), and once for the codes when all maxima of its strip are
// known. Tickets are handed out in order, so whoever waits for maxima waits only for tickets handed
// out before his own: no order of thread blocks can deadlock.
//
// The amax items run one strip and `lag` items ahead of the others: far enough that the maxima are
// there when they are asked for, and near enough that the strip is still in the L2 cache when it is
// read again.
#pragma once

#include "format/params.h"

namespace int8kv {

constexpr int kQueueThreads = 512;
constexpr int kQueuePasses = 4;      // vectors of 16 bytes per thread and item
constexpr int kMinStripVectors = 8;  // 128 bytes of a row: one cache line
constexpr int kMaxStripVectors = 64;
constexpr int kMinStripChannels = 32;  // of any strip: kMinStripVectors of fp32

struct QuantizeQueue {
  int32_t strip_vectors;    // threads along the channels, a power of two
  int32_t strip_channels;   // the last strip may be narrower
  int32_t tokens_per_item;  // the last item of a strip may be shorter
  int64_t num_strips;
  int64_t items_per_strip;
  int64_t lead;  // amax items before the first quantization; all of them if nothing is quantized

  INT8KV_HD int64_t num_items() const { return num_strips * items_per_strip; }
};

struct QueueItem {
  int64_t strip;
  int64_t first_token;
  bool is_amax;
};

// A strip of at most `strip_bytes`, as far as that is possible, and a whole power of two of
// vectors.
INT8KV_HD QuantizeQueue make_quantize_queue(int64_t num_tokens, int64_t num_channels,
                                            int element_bytes, int64_t strip_bytes, int64_t lag) {
  QuantizeQueue queue{};
  const int channels_per_vector = 16 / element_bytes;
  queue.strip_vectors = kMinStripVectors;
  while (queue.strip_vectors < kMaxStripVectors &&
         queue.strip_vectors * channels_per_vector < num_channels &&
         2 * queue.strip_vectors * 16 * num_tokens <= strip_bytes) {
    queue.strip_vectors *= 2;
  }
  queue.strip_channels = queue.strip_vectors * channels_per_vector;
  queue.tokens_per_item = kQueueThreads / queue.strip_vectors * kQueuePasses;
  queue.num_strips = (num_channels + queue.strip_channels - 1) / queue.strip_channels;
  const int64_t items = (num_tokens + queue.tokens_per_item - 1) / queue.tokens_per_item;
  queue.items_per_strip = items > 0 ? items : 1;  // an empty matrix has scales, too
  queue.lead = queue.items_per_strip + lag;
  if (queue.lead > queue.num_items()) queue.lead = queue.num_items();
  return queue;
}

// Tickets [0, lead) are amax items, then both kinds alternate until no amax item is left.
INT8KV_HD QueueItem queue_item(const QuantizeQueue& queue, int64_t ticket) {
  const int64_t follows = ticket - queue.lead;
  const int64_t alternating = 2 * (queue.num_items() - queue.lead);
  bool is_amax = true;
  int64_t index = ticket;
  if (follows >= alternating) {
    is_amax = false;
    index = follows - alternating / 2;
  } else if (follows >= 0) {
    is_amax = follows % 2 == 1;
    index = is_amax ? queue.lead + follows / 2 : follows / 2;
  }
  return {index / queue.items_per_strip, index % queue.items_per_strip * queue.tokens_per_item,
          is_amax};
}

}  // namespace int8kv
