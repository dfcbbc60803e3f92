// Plans one attention call over the threads: which rows are attended together, and which of those
// units are cut into splits so that no thread is left with a long one.
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/kernels.h"

namespace int8kv::cpu {

namespace {

// Splits [split_begin, split_end) of a unit.
struct WorkItem {
  int32_t unit;
  int32_t split_begin;
  int32_t split_end;
  int64_t partials;  // offset into the workspace in floats, or -1: the unit is whole
};

struct PlannedUnit : AttentionUnit {
  int32_t split_begin;
  int32_t split_end;
  int64_t cost;      // rows times keys
  int64_t partials;  // as in WorkItem
};

// The partial results of one head of a unit that was cut.
struct Merge {
  int32_t unit;
  int32_t unit_head;
};

struct AttentionPlan {
  std::vector<PlannedUnit> units;
  std::vector<WorkItem> items;
  std::vector<Merge> merges;
  int64_t workspace_floats = 0;
};

// The splits that hold a key which some row of the unit sees.
void find_splits(const PagedAttentionParams& p, PlannedUnit& unit) {
  const int64_t offset = static_cast<int64_t>(unit.seq_len) - unit.query_len;
  const int64_t first = offset + unit.row_begin / p.num_queries_per_kv();
  const int64_t last = offset + (unit.row_begin + unit.num_rows - 1) / p.num_queries_per_kv();
  int64_t begin = 0, end = unit.seq_len;
  if (p.sliding_window > 0) {
    begin = first - p.sliding_window + 1;
    end = last + p.sliding_window < end ? last + p.sliding_window : end;
  }
  if (p.causal) end = last + 1 < end ? last + 1 : end;
  if (begin < 0) begin = 0;
  if (end < begin) end = begin;
  unit.split_begin = static_cast<int32_t>(begin / kSplitSlots);
  unit.split_end = static_cast<int32_t>((end + kSplitSlots - 1) / kSplitSlots);
  // A row costs its share of the products; reading the unit's keys costs as much as about 8 rows.
  unit.cost = (end - begin + kTileSlots) * (unit.num_rows + 8) * unit.num_unit_heads;
}

// How many KV heads a unit of `num_rows` rows per head takes. The chunks of a block's heads are
// neighbours in memory, and reading them in order is 1.1 to 1.3 times as fast as jumping from block
// to block; but every thread needs something to do.
int32_t heads_per_unit(const PagedAttentionParams& p, int64_t num_rows, int32_t num_threads) {
  int64_t num_splits = 0;
  for (int32_t seq = 0; seq < p.num_seqs; ++seq) {
    num_splits += (p.seq_lens[seq] + kSplitSlots - 1) / kSplitSlots;
  }
  int64_t heads = kMaxRows / num_rows;
  if (heads > p.cache.num_kv_heads) heads = p.cache.num_kv_heads;
  while (heads > 1 && num_threads > 1 &&
         num_splits * p.cache.num_kv_heads / heads < 4 * num_threads) {
    heads = (heads + 1) / 2;
  }
  return heads < 1 ? 1 : static_cast<int32_t>(heads);
}

AttentionPlan make_plan(const PagedAttentionParams& p, int32_t num_threads) {
  AttentionPlan plan;
  int64_t total_cost = 0;
  for (int32_t seq = 0; seq < p.num_seqs; ++seq) {
    const int32_t query_len = p.query_start_loc[seq + 1] - p.query_start_loc[seq];
    const int64_t num_rows = static_cast<int64_t>(query_len) * p.num_queries_per_kv();
    if (num_rows == 0) continue;
    const int32_t heads = heads_per_unit(p, num_rows, num_threads);
    for (int32_t kv_head = 0; kv_head < p.cache.num_kv_heads; kv_head += heads) {
      for (int64_t row = 0; row < num_rows; row += kMaxRows) {
        PlannedUnit unit{};
        unit.seq = seq;
        unit.head_begin = kv_head;
        unit.num_unit_heads =
            kv_head + heads < p.cache.num_kv_heads ? heads : p.cache.num_kv_heads - kv_head;
        unit.row_begin = static_cast<int32_t>(row);
        unit.num_rows = static_cast<int32_t>(num_rows - row < kMaxRows ? num_rows - row : kMaxRows);
        unit.query_len = query_len;
        unit.seq_len = p.seq_lens[seq];
        unit.first_token = p.query_start_loc[seq];
        unit.partials = -1;
        find_splits(p, unit);
        total_cost += unit.cost;
        plan.units.push_back(unit);
      }
    }
  }
  // Cut units that cost more than a quarter of one thread's equal share.
  const int64_t target = total_cost / (4 * num_threads) + 1;
  for (size_t i = 0; i < plan.units.size(); ++i) {
    PlannedUnit& unit = plan.units[i];
    const int32_t num_splits = unit.split_end - unit.split_begin;
    const int32_t index = static_cast<int32_t>(i);
    if (num_threads == 1 || unit.cost <= target || num_splits < 2) {
      plan.items.push_back({index, unit.split_begin, unit.split_end, -1});
      continue;
    }
    // An item per split: the finer items are, the less a thread waits for the last one of another.
    const int64_t split_floats = unit.total_rows() * partial_size(p.cache.head_size);
    unit.partials = plan.workspace_floats;
    for (int32_t split = 0; split < num_splits; ++split) {
      const int32_t begin = unit.split_begin + split;
      plan.items.push_back({index, begin, begin + 1, unit.partials + split * split_floats});
    }
    for (int32_t head = 0; head < unit.num_unit_heads; ++head) plan.merges.push_back({index, head});
    plan.workspace_floats += num_splits * split_floats;
  }
  return plan;
}

char* thread_scratch(size_t size) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t capacity = 0;
  if (capacity < size) {
    memory.reset(std::aligned_alloc(64, (size + 63) / 64 * 64));
    if (!memory) throw std::bad_alloc();
    capacity = size;
  }
  return static_cast<char*>(memory.get());
}

}  // namespace

void paged_attention(const PagedAttentionParams& p, const ParallelFor& pool, const char* isa) {
  const Kernels& kernels = kernels_for(p.cache.format, isa);
  const AttentionPlan plan = make_plan(p, pool.num_threads);
  const std::unique_ptr<float[]> workspace(new float[plan.workspace_floats]);
  const size_t scratch_bytes = kernels.scratch_bytes();
  // Threads take the next item when they are done with one. `body` gets the thread's scratch and
  // the unit whose queries are in it, -1 at first.
  const auto for_each = [&](size_t count, const auto& body) {
    if (count == 0) return;
    std::atomic<size_t> next{0};
    parallel_for(pool, pool.num_threads, [&](int64_t, int64_t) {
      char* scratch = thread_scratch(scratch_bytes);
      int32_t loaded = -1;
      for (size_t i = next++; i < count; i = next++) body(i, scratch, loaded);
    });
  };
  for_each(plan.items.size(), [&](size_t i, char* scratch, int32_t& loaded) {
    const WorkItem& item = plan.items[i];
    const PlannedUnit& unit = plan.units[item.unit];
    // Loading takes 2.7 us at 32 rows of 128, a tenth of what a split takes.
    if (loaded != item.unit) kernels.load_queries(p, unit, scratch);
    loaded = item.unit;
    float* partials = item.partials < 0 ? nullptr : workspace.get() + item.partials;
    kernels.attend(p, unit, item.split_begin, item.split_end, partials, scratch);
  });
  for_each(plan.merges.size(), [&](size_t i, char* scratch, int32_t&) {
    const PlannedUnit& unit = plan.units[plan.merges[i].unit];
    kernels.combine(p, unit, plan.merges[i].unit_head, unit.split_end - unit.split_begin,
                    workspace.get() + unit.partials, scratch);
  });
}

}  // namespace int8kv::cpu
