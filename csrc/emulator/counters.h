// What a kernel did, counted warp by warp: the performance facts that need no GPU.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "runtime.h"

namespace gptkern::emulator {

// One kind of access to global memory. A request is one instruction of a warp. Bytes are those that the request
// touches, each once; a sector, which is what moves, is 32 bytes of memory.
struct GlobalCounts {
    uint64_t requests = 0, bytes = 0, sectors = 0;
};

// One kind of access to shared memory. Without bank conflicts, wavefronts is `least`.
struct SharedCounts {
    uint64_t requests = 0, wavefronts = 0, least = 0;
};

struct RegionCounts {
    uint64_t loaded = 0, stored = 0;  // bytes
    uint64_t loaded_sectors = 0, stored_sectors = 0;
};

struct KernelCounts {
    uint64_t launches = 0, blocks = 0;
    uint64_t threads = 0, shared_bytes = 0;  // of a block: the most of all launches
    uint64_t barriers = 0, shuffles = 0;
    uint64_t mma_16bit = 0, mma_int8 = 0;  // instructions, m16n8k16 and m16n8k32
    GlobalCounts load, store, atomic, async;
    SharedCounts shared_load, shared_store, ldmatrix, async_store;
    std::map<std::string, RegionCounts> regions;
};

struct Region {
    std::string name;
    uintptr_t address;
    size_t bytes;
};

// The launches that follow are counted; bytes are told apart by the regions that they lie in.
void start_counting(std::vector<Region> regions);
std::map<std::string, KernelCounts> stop_counting();

// --- For the runtime --------------------------------------------------------------------------------------------------

extern bool counting;

enum Logged { LOGGED_ASYNC = 100 };

// An access of one lane. The lanes of a warp that made the same access of the same epoch made one request.
struct LogEntry {
    int kind;  // Access or Logged
    Site site;
    uint32_t epoch, size;
    uintptr_t address, shared_address;
};

KernelCounts& counts_of(const char* kernel);
// Requests from the logs of a warp's 32 lanes, which are emptied.
void count_warp(KernelCounts& counts, std::vector<LogEntry>* logs);
// One phase of 8 rows of 16 bytes for each matrix.
void count_ldmatrix(KernelCounts& counts, const uintptr_t* rows, int matrices);

}  // namespace gptkern::emulator
