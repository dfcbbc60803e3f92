// Shares the way back from the cache to floats among the threads, by rows.
#include <algorithm>

#include "cpu/kernels.h"

namespace int8kv::cpu {

void gather_cache(const GatherCacheParams& p, const ParallelFor& pool) {
  if (p.num_seqs == 0) return;
  const Kernels& kernels = kernels_for(p.cache.format, nullptr);
  const int32_t block_size = p.cache.block_size;
  parallel_for(pool, p.cu_seq_lens[p.num_seqs], [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
      const int32_t seq = p.seq_of(row);
      const int64_t position = p.seq_starts[seq] + row - p.cu_seq_lens[seq];
      const int64_t block = p.block_table[seq * p.block_table_stride + position / block_size];
      const auto slot = static_cast<int32_t>(position % block_size);
      const int64_t last = std::min<int64_t>(end, p.cu_seq_lens[seq + 1]);
      const auto count =
          static_cast<int32_t>(std::min<int64_t>(last - row, kSlotGroup - slot % kSlotGroup));
      kernels.gather_slots(p, row, count, block, slot);
      row += count;
    }
  });
}

}  // namespace int8kv::cpu
