#include "counters.h"

#include <algorithm>
#include <array>
#include <set>
#include <string_view>
#include <tuple>

#include "block.h"

namespace gptkern::emulator {

bool counting = false;

namespace {

constexpr int WARP = 32, BANKS = 32, WORD = 4, SECTOR = 32;

std::vector<Region> regions;
std::map<std::string, KernelCounts> kernels;

// One instruction of a warp: what its lanes gave, 0 for a lane that took no part.
struct Request {
    int kind = 0;
    uint32_t size = 0;
    std::array<uintptr_t, WARP> addresses{}, shared_addresses{};
};

// The rounds that shared memory takes for one phase: the most different words that one bank has to give.
uint64_t wavefronts(const uintptr_t* addresses, size_t count, size_t bytes) {
    std::array<std::set<uintptr_t>, BANKS> words;
    for (size_t i = 0; i < count; ++i) {
        if (!addresses[i]) continue;
        for (uintptr_t word = addresses[i] / WORD; word <= (addresses[i] + bytes - 1) / WORD; ++word)
            words[word % BANKS].insert(word);
    }
    size_t most = 0;
    for (const auto& bank : words) most = std::max(most, bank.size());
    return most;
}

// Accesses of 8 and 16 bytes a lane go in phases of 16 and 8 lanes; a phase without any takes no time.
void count_shared(SharedCounts& counts, const std::array<uintptr_t, WARP>& addresses, uint32_t bytes) {
    size_t lanes = std::min<size_t>(WARP, WARP * WORD / std::max<uint32_t>(bytes, WORD));
    ++counts.requests;
    for (size_t first = 0; first < WARP; first += lanes) {
        uint64_t rounds = wavefronts(&addresses[first], lanes, bytes);
        counts.wavefronts += rounds;
        counts.least += rounds != 0;
    }
}

void count_global(KernelCounts& kernel, GlobalCounts& counts, const Request& request, bool store) {
    std::set<uintptr_t> distinct, sectors;
    for (uintptr_t address : request.addresses)
        if (address) distinct.insert(address);
    if (distinct.empty()) return;
    ++counts.requests;
    uint64_t bytes = 0;
    uintptr_t end = 0;  // of what is counted so far: lanes may overlap
    for (uintptr_t address : distinct) {
        bytes += address + request.size - std::clamp(end, address, address + request.size);
        end = address + request.size;
        for (uintptr_t sector = address / SECTOR; sector <= (end - 1) / SECTOR; ++sector) sectors.insert(sector);
    }
    counts.bytes += bytes;
    counts.sectors += sectors.size();
    // The lanes of a request read one tensor.
    for (const Region& region : regions)
        if (*distinct.begin() - region.address < region.bytes) {
            RegionCounts& there = kernel.regions[region.name];
            (store ? there.stored : there.loaded) += bytes;
            (store ? there.stored_sectors : there.loaded_sectors) += sectors.size();
        }
}

// A place in the source, in an order that depends on the source alone.
std::tuple<std::string_view, uint32_t, uint32_t> key_of(const Site& site) {
    return {site.file_name(), site.line(), site.column()};
}

}  // namespace

void start_counting(std::vector<Region> watched) {
    std::lock_guard lock(running::launching);
    regions = std::move(watched);
    kernels.clear();
    counting = true;
}

std::map<std::string, KernelCounts> stop_counting() {
    std::lock_guard lock(running::launching);
    counting = false;
    regions.clear();
    return std::move(kernels);
}

KernelCounts& counts_of(const char* kernel) {
    return kernels[kernel];
}

void count_warp(KernelCounts& counts, std::vector<LogEntry>* logs) {
    // (epoch, site, kind, which one of the lane's accesses there) -> request
    using Place = std::tuple<uint32_t, std::tuple<std::string_view, uint32_t, uint32_t>, int>;
    std::map<std::pair<Place, uint32_t>, Request> requests;
    for (size_t lane = 0; lane < WARP; ++lane) {
        std::map<Place, uint32_t> seen;
        for (const LogEntry& entry : logs[lane]) {
            Place place{entry.epoch, key_of(entry.site), entry.kind};
            Request& request = requests[{place, seen[place]++}];
            request.kind = entry.kind;
            request.size = entry.size;
            request.addresses[lane] = entry.address;
            request.shared_addresses[lane] = entry.shared_address;
        }
        logs[lane].clear();
    }
    for (const auto& [key, request] : requests) {
        switch (request.kind) {
            case GLOBAL_LOAD: count_global(counts, counts.load, request, false); break;
            case GLOBAL_STORE: count_global(counts, counts.store, request, true); break;
            case GLOBAL_ATOMIC: count_global(counts, counts.atomic, request, true); break;
            case SHARED_LOAD: count_shared(counts.shared_load, request.addresses, request.size); break;
            case SHARED_STORE: count_shared(counts.shared_store, request.addresses, request.size); break;
            case LOGGED_ASYNC:
                count_global(counts, counts.async, request, false);
                count_shared(counts.async_store, request.shared_addresses, request.size);
                break;
        }
    }
}

void count_ldmatrix(KernelCounts& counts, const uintptr_t* rows, int matrices) {
    ++counts.ldmatrix.requests;
    for (int matrix = 0; matrix < matrices; ++matrix) {
        counts.ldmatrix.wavefronts += wavefronts(rows + 8 * matrix, 8, 16);
        ++counts.ldmatrix.least;
    }
}

}  // namespace gptkern::emulator
