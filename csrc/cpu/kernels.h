// What the CPU kernels offer to the operators, and the functions that are compiled once per
// instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "format/params.h"

namespace int8kv::cpu {

// Runs body(context, begin, end) over disjoint ranges that cover [0, size), on the threads of the
// caller's pool.
struct ParallelFor {
  using Body = void (*)(const void* context, int64_t begin, int64_t end);
  void (*run)(int64_t size, const void* context, Body body);
  int32_t num_threads;
};

template <typename F>
void parallel_for(const ParallelFor& pool, int64_t size, const F& f) {
  pool.run(size, &f, [](const void* context, int64_t begin, int64_t end) {
    (*static_cast<const F*>(context))(begin, end);
  });
}

// `isa` names the instruction set of one call; null means that of the process.
void reshape_and_cache(const ReshapeAndCacheParams& params, const ParallelFor& pool,
                       const char* isa);
void gather_cache(const GatherCacheParams& params, const ParallelFor& pool);
void paged_attention(const PagedAttentionParams& params, const ParallelFor& pool, const char* isa);

// Query rows of one sequence that are attended together: the same rows of one or several KV heads,
// which lie side by side in a block. Row r of a KV head is query token r / num_queries_per_kv and
// query head kv_head * num_queries_per_kv + r % num_queries_per_kv.
struct AttentionUnit {
  int32_t seq;
  int32_t head_begin;  // the KV heads [head_begin, head_begin + num_unit_heads)
  int32_t num_unit_heads;
  int32_t row_begin;
  int32_t num_rows;     // per KV head; at most kMaxRows for all of them together
  int32_t query_len;    // of the sequence
  int32_t seq_len;      // of the sequence
  int64_t first_token;  // of the sequence, in `query`

  INT8KV_HD int32_t total_rows() const { return num_unit_heads * num_rows; }
};

constexpr int32_t kMaxRows = 32;
constexpr int32_t kTileSlots = 128;  // scores held at once, per row
// Keys per split. Fixed, so that no result depends on the batch.
constexpr int32_t kSplitSlots = 512;

// Floats per row of a split's partial result: the softmax state and whether the query is finite,
// padded, then head_size values.
constexpr int32_t kPartialHeader = 16;
INT8KV_HD int64_t partial_size(int32_t head_size) { return kPartialHeader + head_size; }

// These functions exist once per instruction set and cache format.
struct Kernels {
  // Quantizes and stores tokens [token_begin, token_end) of KV heads [head_begin, head_end).
  void (*quantize_tokens)(const ReshapeAndCacheParams&, int64_t token_begin, int64_t token_end,
                          int32_t head_begin, int32_t head_end);
  // Writes rows [row, row + count) of keys and values, which are as many slots of one slot group
  // from `slot` on, of all KV heads.
  void (*gather_slots)(const GatherCacheParams&, int64_t row, int32_t count, int64_t block,
                       int32_t slot);
  // Leaves the queries of a unit in `scratch` as `attend` wants them.
  void (*load_queries)(const PagedAttentionParams&, const AttentionUnit&, char* scratch);
  // Attends a unit, whose queries are in `scratch`, over splits [split_begin, split_end). With
  // `partials` [split_end - split_begin, total_rows, partial_size] it leaves one partial result per
  // split there, else it merges them in order and writes out and lse.
  void (*attend)(const PagedAttentionParams&, const AttentionUnit&, int32_t split_begin,
                 int32_t split_end, float* partials, char* scratch);
  // Merges `num_splits` partial results of the rows of one of the unit's heads in order and writes
  // out and lse.
  void (*combine)(const PagedAttentionParams&, const AttentionUnit&, int32_t unit_head,
                  int32_t num_splits, const float* partials, char* scratch);
  size_t (*scratch_bytes)();  // of one thread, 64-byte aligned
};

// Every instruction set that kernels are compiled for, slowest first.
#define INT8KV_FOR_EACH_ISA(CALL, ...)       \
  CALL(scalar __VA_OPT__(, ) __VA_ARGS__)    \
  CALL(avx2 __VA_OPT__(, ) __VA_ARGS__)      \
  CALL(avx2_vnni __VA_OPT__(, ) __VA_ARGS__) \
  CALL(avx512 __VA_OPT__(, ) __VA_ARGS__)    \
  CALL(avx512_vnni __VA_OPT__(, ) __VA_ARGS__)

// Defines `const Table& function()`: what the function of that name in the namespace of the
// instruction set in use returns.
#define INT8KV_DISPATCH(Table, function)                      \
  INT8KV_FOR_EACH_ISA(INT8KV_DECLARE_TABLE, Table, function)  \
  const Table& function() {                                   \
    const std::string_view name = current_isa();              \
    INT8KV_FOR_EACH_ISA(INT8KV_RETURN_TABLE, Table, function) \
    return scalar::function();                                \
  }
#define INT8KV_DECLARE_TABLE(isa, Table, function) \
  namespace isa {                                  \
  const Table& function();                         \
  }
#define INT8KV_RETURN_TABLE(isa, Table, function) \
  if (name == #isa) return isa::function();

// Those of an instruction set that `has_isa`, or with null of the one that the process has chosen.
const Kernels& kernels_for(CacheFormat format, const char* isa);

const char* available_isas();  // comma-separated, slowest first
bool has_isa(const char* name);
const char* current_isa();       // what the process has chosen, the fastest unless `set_isa` did
bool set_isa(const char* name);  // false: this CPU has no such path, or there is none of that name

}  // namespace int8kv::cpu
