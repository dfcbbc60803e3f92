// Runs the CUDA kernels on the host, thread by thread, so that their logic is tested where no GPU
// is.
//
// Replaces csrc/cuda/ptx.cuh and csrc/cuda/device.cuh (it defines their guards) and the CUDA
// runtime. Each thread of a block is a fiber; blocks run one after another, in rising or in random
// order. A warp-wide primitive
// parks its lane until all 32 have called the same primitive, so a divergent call fails instead of
// hanging a GPU. Asynchronous copies land either at once or as late as their wait allows, and
// fibers run in rising or falling order: a missing wait or barrier shows as a wrong result in one
// of these modes. Memory-model subtleties, performance and the instructions themselves are not
// modelled.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#define INT8KV_CUDA_PTX_CUH
#define INT8KV_CUDA_DEVICE_CUH
#define INT8KV_DEVICE inline
#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max;
using std::min;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorMisalignedAddress };

inline dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace emulation {

// Set by the test before a launch.
inline bool copies_are_late = false;
inline bool fibers_fall = false;
inline bool blocks_are_shuffled = false;
inline std::mt19937 random_order;
inline char failed_check[256];
inline unsigned resident = 3;
inline int64_t l2_cache_bytes = 4 << 20;

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kMostSharedBytes = 99 * 1024;
inline size_t shared_bytes_of_a_block = 64 * 1024;  // what the smallest supported GPU has
constexpr int kWarp = 32;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "cuda_emulation: %s (block %u %u %u, thread %u)\n", message, blockIdx.x,
               blockIdx.y, blockIdx.z, threadIdx.x);
  std::abort();
}

struct Copy {
  void* to;
  uint32_t words[4];
};

// A fiber starts by its context and goes on by _longjmp, which makes no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf here;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool started = false, done = false;
  const uint64_t* waits_on = nullptr;  // a generation that must move before it can go on
  uint64_t generation = 0;
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
};

// One meeting point: of a warp or of the block.
struct Meeting {
  const void* kind = nullptr;
  unsigned arrived = 0;
  uint64_t generation = 0;
  uint32_t in[kWarp][12];
  uint32_t out[kWarp][4];
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Meeting> warps;
inline Meeting block;
inline jmp_buf scheduler;
inline std::function<void()> body;
alignas(16) inline unsigned char shared_memory[kMostSharedBytes];

inline Fiber& self() { return *fibers[threadIdx.x]; }

inline void yield() {
  if (_setjmp(self().here) == 0) _longjmp(scheduler, 1);
}

inline void resume() {
  if (_setjmp(scheduler) != 0) return;
  Fiber& fiber = self();
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

// Parks the caller until `expected` threads have arrived; the last one runs `finish`.
template <typename Finish>
void meet(Meeting& meeting, unsigned expected, const void* kind, Finish&& finish) {
  if (meeting.arrived == 0) meeting.kind = kind;
  if (meeting.kind != kind) fail("threads of a warp or block diverge at a collective operation");
  const uint64_t generation = meeting.generation;
  if (++meeting.arrived == expected) {
    finish();
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  self().waits_on = &meeting.generation;
  self().generation = generation;
  yield();
}

// A warp-wide primitive: `compute(in, out)` sees the words of all lanes.
template <int kIn, int kOut, typename Compute>
void collective(const void* kind, const uint32_t (&in)[kIn], uint32_t (&out)[kOut],
                Compute&& compute) {
  Meeting& warp = warps[threadIdx.x / kWarp];
  const unsigned lane = threadIdx.x % kWarp;
  std::copy(in, in + kIn, warp.in[lane]);
  meet(warp, kWarp, kind, [&] { compute(warp.in, warp.out); });
  std::copy(warp.out[lane], warp.out[lane] + kOut, out);
}

inline void run_fiber() {
  body();
  self().done = true;
  yield();
}

inline void prepare(Fiber& fiber) {
  fiber.started = fiber.done = false;
  fiber.waits_on = nullptr;
  fiber.groups.clear();
  fiber.open_group.clear();
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
}

inline void run_block(unsigned threads) {
  std::memset(shared_memory, 0xff, sizeof(shared_memory));  // NaN, whatever the type
  warps.assign(threads / kWarp, Meeting());
  block = Meeting();
  fibers.resize(threads);
  for (auto& fiber : fibers) {
    if (!fiber) fiber = std::make_unique<Fiber>();
    prepare(*fiber);
  }
  for (bool running = true; running;) {
    running = false;
    bool moved = false;
    for (unsigned i = 0; i < threads; ++i) {
      threadIdx.x = fibers_fall ? threads - 1 - i : i;
      if (self().done) continue;
      running = true;
      if (self().waits_on != nullptr && *self().waits_on == self().generation) continue;
      self().waits_on = nullptr;
      moved = true;
      resume();
    }
    if (running && !moved) fail("every thread waits: some have left or take another path");
  }
}

inline void land(const std::vector<Copy>& group) {
  for (const Copy& copy : group) std::memcpy(copy.to, copy.words, 16);
}

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline uint16_t to_half(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline float from_half(uint32_t bits) {
  const auto low = static_cast<uint16_t>(bits);
  _Float16 half;
  std::memcpy(&half, &low, 2);
  return static_cast<float>(half);
}

}  // namespace emulation

inline void __syncthreads() {
  static const char kind = 0;
  emulation::meet(emulation::block, blockDim.x, &kind, [] {});
}

inline void __syncwarp() {
  static const char kind = 0;
  emulation::meet(emulation::warps[threadIdx.x / 32], 32, &kind, [] {});
}

namespace int8kv {

template <typename From>
uint32_t exchange(uint32_t x, From&& lane_from, const void* kind) {
  uint32_t out[1];
  emulation::collective<1, 1>(kind, {x}, out, [&](auto& in, auto& result) {
    for (int lane = 0; lane < 32; ++lane) result[lane][0] = in[lane_from(lane)][0];
  });
  return out[0];
}

inline uint32_t shuffle_xor(uint32_t x, int mask) {
  static const char kind = 0;
  return exchange(x, [=](int lane) { return lane ^ mask; }, &kind);
}
inline float shuffle_xor(float x, int mask) {
  return emulation::as_float(shuffle_xor(emulation::as_bits(x), mask));
}
inline float shuffle(float x, int from) {
  static const char kind = 0;
  return emulation::as_float(exchange(emulation::as_bits(x), [=](int) { return from; }, &kind));
}
inline int32_t shuffle_up(int32_t x, int delta) {
  static const char kind = 0;
  return static_cast<int32_t>(exchange(
      static_cast<uint32_t>(x), [=](int lane) { return lane < delta ? lane : lane - delta; },
      &kind));
}
inline int32_t add_shuffled_up(int32_t x, int delta) {
  const int32_t below = shuffle_up(x, delta);
  return static_cast<int>(threadIdx.x % emulation::kWarp) < delta ? x : x + below;
}
inline uint32_t ballot(bool claim) {
  static const char kind = 0;
  uint32_t out[1];
  emulation::collective<1, 1>(&kind, {claim}, out, [](auto& in, auto& result) {
    uint32_t mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= in[lane][0] << lane;
    for (int lane = 0; lane < 32; ++lane) result[lane][0] = mask;
  });
  return out[0];
}

inline int count_threads(bool claim) {
  static const char kind = 0;
  static int arrived = 0, count = 0;  // of this meeting, and of the last one
  arrived += claim;
  emulation::meet(emulation::block, blockDim.x, &kind, [] { count = std::exchange(arrived, 0); });
  return count;
}

inline int opaque(int x) { return x; }

inline unsigned char* dynamic_shared() { return emulation::shared_memory; }

inline float half_bits_to_float(uint16_t bits) { return emulation::from_half(bits); }
inline uint16_t float_to_half_bits(float x) { return emulation::to_half(x); }
inline uint32_t pack_half2(float low, float high) {
  return emulation::to_half(low) | static_cast<uint32_t>(emulation::to_half(high)) << 16;
}
inline uint32_t sub_half2(uint32_t a, uint32_t b) {
  return pack_half2(emulation::from_half(a) - emulation::from_half(b),
                    emulation::from_half(a >> 16) - emulation::from_half(b >> 16));
}
inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    out |= static_cast<uint32_t>(bytes >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
  }
  return out;
}
inline float exp2_fast(float x) { return std::exp2(x); }
// One unit off, as a GPU's may be.
inline float approximate_reciprocal(float x) { return std::nextafter(1.0f / x, 0.0f); }

inline uint32_t transpose_8x8(uint32_t row_pair) {
  static const char kind = 0;
  uint32_t out[1];
  emulation::collective<1, 1>(&kind, {row_pair}, out, [](auto& in, auto& result) {
    const auto element = [&](int r, int c) {
      return in[4 * r + c / 2][0] >> 16 * (c % 2) & 0xffff;
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int r = lane / 4, c = lane % 4 * 2;
      result[lane][0] = element(c, r) | element(c + 1, r) << 16;
    }
  });
  return out[0];
}

// Fragment layout of mma.m16n8k16 as the PTX manual has it.
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static const char kind = 0;
  uint32_t out[4];
  const uint32_t words[10] = {a[0],
                              a[1],
                              a[2],
                              a[3],
                              b0,
                              b1,
                              emulation::as_bits(c[0]),
                              emulation::as_bits(c[1]),
                              emulation::as_bits(c[2]),
                              emulation::as_bits(c[3])};
  emulation::collective<10, 4>(&kind, words, out, [](auto& in, auto& result) {
    float lhs[16][16], rhs[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int e = 0; e < 2; ++e) {
        for (int r = 0; r < 4; ++r) {
          lhs[g + r % 2 * 8][2 * t + e + r / 2 * 8] = emulation::from_half(in[lane][r] >> 16 * e);
        }
        for (int r = 0; r < 2; ++r) {
          rhs[2 * t + e + r * 8][g] = emulation::from_half(in[lane][4 + r] >> 16 * e);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = emulation::as_float(in[lane][6 + i]);
        for (int k = 0; k < 16; ++k) sum += lhs[row][k] * rhs[k][column];
        result[lane][i] = emulation::as_bits(sum);
      }
    }
  });
  for (int i = 0; i < 4; ++i) c[i] = emulation::as_float(out[i]);
}

inline void copy_async_16(void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    emulation::fail("16-byte copy of a misaligned address");
  }
  emulation::Copy copy{shared, {}};
  std::memcpy(copy.words, global, 16);
  if (emulation::copies_are_late) {
    emulation::self().open_group.push_back(copy);
  } else {
    std::memcpy(shared, copy.words, 16);
  }
}
inline void copy_async_commit() {
  emulation::Fiber& fiber = emulation::self();
  fiber.groups.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}
template <int kPending>
void copy_async_wait() {
  emulation::Fiber& fiber = emulation::self();
  while (fiber.groups.size() > static_cast<size_t>(kPending)) {
    emulation::land(fiber.groups.front());
    fiber.groups.pop_front();
  }
}

// Blocks run one after another: what one waits for must have been done by those before it.
inline uint32_t atomic_max(uint32_t* to, uint32_t x) {
  const uint32_t before = *to;
  *to = std::max(before, x);
  return before;
}
inline uint32_t atomic_add(uint32_t* to, uint32_t x) {
  const uint32_t before = *to;
  *to += x;
  return before;
}
inline uint32_t atomic_inc(uint32_t* to, uint32_t last) {
  const uint32_t before = *to;
  *to = before >= last ? 0 : before + 1;
  return before;
}
inline void fence() {}
inline uint32_t load_acquire(const uint32_t* from) { return *from; }
inline void store_release(uint32_t* to, uint32_t x) { *to = x; }
inline void wait_until_set(const uint32_t* flag) {
  if (*flag == 0) emulation::fail("waits for work that a later ticket would do");
}
// The first message of a launch is kept.
inline void fail_check(const char* format, int64_t a, int64_t b, int64_t c) {
  if (emulation::failed_check[0] != '\0') return;
  std::snprintf(emulation::failed_check, sizeof(emulation::failed_check), format,
                static_cast<long long>(a), static_cast<long long>(b), static_cast<long long>(c));
}
inline float load_from_l2(const float* from) { return *from; }
inline float2 load_from_l2(const float2* from) { return *from; }
inline float4 load_from_l2(const float4* from) { return *from; }
inline uint4 load_last_use(const uint4* from) { return *from; }

inline cudaError_t zero_async(void* to, size_t bytes, cudaStream_t) {
  std::memset(to, 0, bytes);
  return cudaSuccess;
}
inline cudaError_t l2_bytes(int64_t* bytes) {
  *bytes = emulation::l2_cache_bytes;
  return cudaSuccess;
}

template <typename... Params>
cudaError_t launch_kernel(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
                          cudaStream_t, std::common_type_t<Params>... args) {
  if (shared_bytes > emulation::shared_bytes_of_a_block) return cudaErrorInvalidValue;
  gridDim = grid;
  blockDim = dim3(static_cast<unsigned>(threads));
  emulation::body = [=] { kernel(args...); };
  std::vector<unsigned> blocks(grid.x * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (emulation::blocks_are_shuffled) {
    std::shuffle(blocks.begin(), blocks.end(), emulation::random_order);
  }
  for (const unsigned number : blocks) {
    blockIdx = dim3(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y);
    emulation::run_block(static_cast<unsigned>(threads));
  }
  return cudaSuccess;
}

inline cudaError_t half_shared_bytes(int* bytes) {
  *bytes = static_cast<int>(emulation::shared_bytes_of_a_block);
  return cudaSuccess;
}

template <auto kKernel>
cudaError_t resident_blocks(int, size_t, int* blocks) {
  *blocks = static_cast<int>(emulation::resident);
  return cudaSuccess;
}

}  // namespace int8kv
