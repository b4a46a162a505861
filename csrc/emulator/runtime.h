// Runs a kernel's threads on the CPU, as fibers, and checks what a GPU would not tell.
//
//   order        Inside a block the threads that can go on are taken in an order drawn from a seed; a switch happens
//                where a thread waits, and in some launches between any two accesses to memory. A missing barrier
//                shows as a wrong answer, or one that changes with the seed. Blocks run one after another, in an order
//                drawn from the seed.
//   races        Two accesses that no barrier orders, one of them a write, fail the launch, whichever comes first.
//   collectives  The lanes of a warp meet at the same place in the kernel. If one never comes, the launch fails with
//                a list of who waits where.
//   memory       Shared memory starts as NaN. An address that is not aligned for its access fails the launch, and so
//                does one outside of the block's shared memory, or of the global memory that set_bounds named.
//   cp.async     The destination is poisoned when the copy is issued; the data lands at a time drawn from the seed, at
//                the latest in the wait that covers it. The end of a kernel without that wait fails the launch.
//   counters     Bytes, sectors, bank conflicts and instructions of each kernel, where asked for.
//
// One launch runs at a time, whichever threads of the operating system call: `launch` holds a lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

namespace gptkern::emulator {

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

// --- For device/launch.cuh --------------------------------------------------------------------------------------------

void launch(const char* kernel, Index grid, unsigned threads, size_t shared_bytes, void (*body)(void*), void* context);

// --- For kernels, through cuda.h and device/ --------------------------------------------------------------------------

const Index& thread_index();
const Index& block_index();
const Index& block_size();
const Index& grid_size();
inline int this_lane() { return int(thread_index().x % 32); }

using Site = std::source_location;

void* shared_memory(size_t bytes);
void block_barrier(Site site);
void warp_barrier(Site site);
uint32_t shuffle(uint32_t value, int source_lane, const char* name, Site site);
unsigned ballot(bool predicate, Site site);
void mma_m16n8k16(bool bfloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site);
void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site);
void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row, Site site);
void cp_async(void* shared, const void* global, int bytes, bool in_range, Site site);
void cp_async_commit();
void cp_async_wait(int newest);

enum Access { GLOBAL_LOAD, GLOBAL_STORE, GLOBAL_ATOMIC, SHARED_LOAD, SHARED_STORE, GLOBAL_LOAD_READ_ONLY };
// Called before the access: checks it, and counts it where asked for.
void accessed(Access kind, const void* address, size_t bytes, Site site);

float float_of_float16(uint16_t bits);
uint16_t float16_of_float(float x);
uint16_t bfloat16_of_float(float x);

// --- For tests and the bindings ---------------------------------------------------------------------------------------

// The seed of the next launch; each launch counts it on. 0 stays, and takes threads and blocks in their order while
// asynchronous copies land last.
void set_seed(uint64_t seed);
uint64_t seed();
// Global memory that the launches that follow may touch, as [first, one after the last) bytes; empty: any.
void set_bounds(std::vector<std::pair<uintptr_t, uintptr_t>> extents);
// Launches that follow check their configuration and do nothing more: what is left is the host's own time.
void skip_launches(bool skip);
// Launches that follow run the last `count` blocks of their grid, in which the largest offsets are; 0: all of them.
void run_last_blocks(uint64_t count);
// Whether accesses that nothing orders fail a launch (they do at first), and are not left to the schedule to show.
void check_races(bool check);

}  // namespace gptkern::emulator
