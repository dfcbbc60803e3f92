// Functions that the CPU and the CUDA kernels share are marked INT8KV_HD.
#pragma once

#if defined(__CUDACC__)
#define INT8KV_HD __host__ __device__ __forceinline__
#else
// Always inlined: the CPU kernels are compiled once per instruction set, and an out-of-line copy of
// a shared function could be taken from the AVX-512 object and run on a CPU without AVX-512.
#define INT8KV_HD inline __attribute__((always_inline))
#endif
