// Who compiles: nvcc for a GPU, or a C++20 host compiler for the emulator (csrc/emulator), which runs the same files.
//
// A kernel in this project
//   - keeps all its shared memory in one struct, reached through shared_memory<Layout>(): no __shared__ variables;
//   - reaches global and shared memory through the helpers of memory.cuh, or as cp_async and ldmatrix of ptx.cuh;
//   - calls warp.cuh and ptx.cuh for whatever is an intrinsic or inline PTX in CUDA; plain are threadIdx, blockIdx,
//     blockDim, gridDim and __syncthreads();
//   - is started by GPTKERN_LAUNCH (launch.cuh).
// That is what lets the emulator see, check and count what a kernel does.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef GPTKERN_EMULATED
#include <source_location>

#include "../emulator/cuda.h"
// The last parameter of a helper: where in the kernel it was called. Lanes meet at a collective only at one place.
#define GPTKERN_SITE , std::source_location site = std::source_location::current()
#define GPTKERN_SITE_ONLY std::source_location site = std::source_location::current()
// Hands it on to another helper, as its last argument.
#define GPTKERN_HERE , site
#define GPTKERN_HERE_ONLY site
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define GPTKERN_SITE
#define GPTKERN_SITE_ONLY
#define GPTKERN_HERE
#define GPTKERN_HERE_ONLY
#endif

#define GPTKERN_DEVICE __device__ __forceinline__

namespace gptkern {

inline constexpr int WARP = 32;
inline constexpr unsigned ALL_LANES = 0xffffffffu;

// What a block may have on every GPU from sm_80 on: sm_86 and sm_89 have the least.
// (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")
inline constexpr int SHARED_BYTES_EVERYWHERE = 99 * 1024;

// The block's dynamic shared memory, laid out as the struct says. Its contents are undefined at first.
template <class Layout>
GPTKERN_DEVICE Layout& shared_memory() {
    static_assert(sizeof(Layout) <= 227 * 1024, "no GPU has that much shared memory for a block");
#ifdef GPTKERN_EMULATED
    return *reinterpret_cast<Layout*>(emulator::shared_memory(sizeof(Layout)));
#else
    extern __shared__ __align__(128) unsigned char gptkern_shared_memory[];
    return *reinterpret_cast<Layout*>(gptkern_shared_memory);
#endif
}

template <class Integer>
constexpr GPTKERN_DEVICE __host__ Integer ceil_div(Integer a, Integer b) {
    return (a + b - 1) / b;
}

}  // namespace gptkern
