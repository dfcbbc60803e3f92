// The instructions that have no C++ spelling, one thin function each.
//
// All other code of the kernels is plain C++. A host program can therefore define the guards of
// this file and of device.cuh, bring functions of its own with the same names, and run the kernels
// thread by thread: tests/builds/cuda_emulation.h does.
#ifndef INT8KV_CUDA_PTX_CUH
#define INT8KV_CUDA_PTX_CUH

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

#define INT8KV_DEVICE __device__ __forceinline__

namespace int8kv {

constexpr unsigned kAllLanes = 0xffffffffu;

INT8KV_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(kAllLanes, x, mask); }
INT8KV_DEVICE uint32_t shuffle_xor(uint32_t x, int mask) {
  return __shfl_xor_sync(kAllLanes, x, mask);
}
INT8KV_DEVICE float shuffle(float x, int lane) { return __shfl_sync(kAllLanes, x, lane); }
INT8KV_DEVICE int32_t shuffle_up(int32_t x, int delta) {
  return __shfl_up_sync(kAllLanes, x, delta);
}
// x, plus that of the lane `delta` below, if there is one: the shuffle says so, and nothing is to
// be compared.
INT8KV_DEVICE int32_t add_shuffled_up(int32_t x, int delta) {
  int32_t sum;
  asm volatile(
      "{\n"
      ".reg .pred exists;\n"
      "shfl.sync.up.b32 %0|exists, %1, %2, 0, 0xffffffff;\n"
      "@exists add.s32 %0, %0, %1;\n"
      "}"
      : "=&r"(sum)
      : "r"(x), "r"(delta));
  return sum;
}
INT8KV_DEVICE uint32_t ballot(bool claim) { return __ballot_sync(kAllLanes, claim); }
// For how many threads of the block a claim holds; a barrier.
INT8KV_DEVICE int count_threads(bool claim) { return __syncthreads_count(claim); }

// x, without the compiler knowing what it is: what depends on it is computed behind this point and
// not ahead of a loop around it, to be held in registers from there on.
INT8KV_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

INT8KV_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

INT8KV_DEVICE float half_bits_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
INT8KV_DEVICE uint16_t float_to_half_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }
INT8KV_DEVICE uint32_t pack_half2(float low, float high) {
  const __half2 packed = __floats2half2_rn(low, high);
  return static_cast<uint32_t>(__half_as_ushort(__low2half(packed))) |
         static_cast<uint32_t>(__half_as_ushort(__high2half(packed))) << 16;
}
INT8KV_DEVICE uint32_t sub_half2(uint32_t a, uint32_t b) {
  uint32_t difference;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
  return difference;
}
INT8KV_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// 2^x within 2 ulp; 2^-inf is 0.
INT8KV_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x within 1 ulp, for a normal x.
INT8KV_DEVICE float approximate_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Transposes an 8 x 8 matrix of 16-bit elements: lane 4r + c holds [r][2c] and [r][2c + 1].
INT8KV_DEVICE uint32_t transpose_8x8(uint32_t row_pair) {
  uint32_t column_pair;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column_pair) : "r"(row_pair));
  return column_pair;
}

// c[16 x 8] += a[16 x 16] * b[16 x 8], fp16 operands, fp32 sums. With g = lane / 4, t = lane % 4:
//   a[0], a[1], a[2], a[3]: rows g, g + 8, g, g + 8; columns 2t, 2t + 1, of the last two + 8
//   b0, b1: rows 2t, 2t + 1, of b1 + 8; column g
//   c[0], c[1]: row g, columns 2t, 2t + 1; c[2], c[3]: row g + 8
INT8KV_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  // Turing multiplies half the depth at a time.
  const uint32_t b[2] = {b0, b1};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
  }
#endif
}

// Copies 16 bytes to shared memory without waiting, past the L1 cache, and has the whole line
// brought to the L2 cache, where the neighbours want theirs (1 to 2 % faster on an H200); Turing
// waits.
INT8KV_DEVICE void copy_async_16(void* shared, const void* global) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(global)
               : "memory");
#else
  *static_cast<uint4*>(shared) = __ldcg(static_cast<const uint4*>(global));
#endif
}

INT8KV_DEVICE void copy_async_commit() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the last kPending committed groups of this thread have landed; they are then
// visible to this thread.
template <int kPending>
INT8KV_DEVICE void copy_async_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Communication between the blocks of a launch, all of it through the L2 cache.
INT8KV_DEVICE uint32_t atomic_max(uint32_t* to, uint32_t x) { return atomicMax(to, x); }
INT8KV_DEVICE uint32_t atomic_add(uint32_t* to, uint32_t x) { return atomicAdd(to, x); }
// Adds one, or sets to 0 what has reached `last`, and returns what was there. What the block wrote
// before its last barrier is there for a thread that sees the new value, and for its block after a
// barrier: the order is cumulative.
INT8KV_DEVICE uint32_t atomic_inc(uint32_t* to, uint32_t last) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(to), "r"(last)
               : "memory");
  return before;
}
INT8KV_DEVICE void fence() { __threadfence(); }
INT8KV_DEVICE uint32_t load_acquire(const uint32_t* from) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}
INT8KV_DEVICE void store_release(uint32_t* to, uint32_t x) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}
INT8KV_DEVICE void wait_until_set(const uint32_t* flag) {
  while (load_acquire(flag) == 0) __nanosleep(64);
}
// Prints a message with three numbers and ends the kernel; the CUDA context is lost.
INT8KV_DEVICE void fail_check(const char* format, int64_t a, int64_t b, int64_t c) {
  printf(format, static_cast<long long>(a), static_cast<long long>(b), static_cast<long long>(c));
  printf("\n");
  __trap();
}

INT8KV_DEVICE float load_from_l2(const float* from) { return __ldcg(from); }
INT8KV_DEVICE float2 load_from_l2(const float2* from) { return __ldcg(from); }
INT8KV_DEVICE float4 load_from_l2(const float4* from) { return __ldcg(from); }

// A value that nobody will read again: the first to leave the L2 cache.
INT8KV_DEVICE uint4 load_last_use(const uint4* from) { return __ldcs(from); }

}  // namespace int8kv

#endif  // INT8KV_CUDA_PTX_CUH
