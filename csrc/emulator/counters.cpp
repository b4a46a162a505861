#include "counters.h"

#include <algorithm>
#include <array>
#include <set>
#include <tuple>

namespace gptkern::emulator {

bool counting = false;

namespace {

constexpr int WARP = 32, BANKS = 32, WORD = 4, SECTOR = 32;

std::vector<Region> regions;
std::map<std::string, KernelCounts> kernels;

struct Request {
    int kind;
    uint32_t size;
    std::vector<uintptr_t> addresses, shared_addresses;
};

// The rounds that shared memory takes for one phase: the most different words that one bank has to give.
uint64_t wavefronts(const uintptr_t* addresses, size_t count, size_t bytes) {
    std::array<std::set<uintptr_t>, BANKS> words;
    for (size_t i = 0; i < count; ++i)
        for (uintptr_t word = addresses[i] / WORD; word <= (addresses[i] + bytes - 1) / WORD; ++word)
            words[word % BANKS].insert(word);
    size_t most = 0;
    for (const auto& bank : words) most = std::max(most, bank.size());
    return most;
}

// Accesses of 8 and 16 bytes a lane go in phases of 16 and 8 lanes.
void count_shared(SharedCounts& counts, const std::vector<uintptr_t>& addresses, uint32_t bytes) {
    size_t lanes = std::min<size_t>(WARP, WARP * WORD / std::max<uint32_t>(bytes, WORD));
    ++counts.requests;
    for (size_t first = 0; first < addresses.size(); first += lanes) {
        counts.wavefronts += wavefronts(&addresses[first], std::min(lanes, addresses.size() - first), bytes);
        ++counts.least;
    }
}

void count_global(KernelCounts& kernel, GlobalCounts& counts, const Request& request, bool store) {
    std::set<uintptr_t> sectors;
    ++counts.requests;
    for (uintptr_t address : request.addresses) {
        counts.bytes += request.size;
        sectors.insert(address / SECTOR);
        sectors.insert((address + request.size - 1) / SECTOR);
        for (const Region& region : regions)
            if (address - region.address < region.bytes) {
                RegionCounts& there = kernel.regions[region.name];
                (store ? there.stored : there.loaded) += request.size;
            }
    }
    counts.sectors += sectors.size();
}

}  // namespace

void start_counting(std::vector<Region> watched) {
    regions = std::move(watched);
    kernels.clear();
    counting = true;
}

std::map<std::string, KernelCounts> stop_counting() {
    counting = false;
    regions.clear();
    return std::move(kernels);
}

KernelCounts& counts_of(const char* kernel) {
    std::string name = kernel;
    // GPTKERN_LAUNCH takes the kernel in parentheses.
    if (name.size() > 2 && name.front() == '(') name = name.substr(1, name.size() - 2);
    return kernels[name];
}

void count_warp(KernelCounts& counts, std::vector<LogEntry>* logs) {
    // (epoch, site, which one of the lane's accesses there) -> request
    std::map<std::tuple<uint32_t, uint32_t, uint32_t>, Request> requests;
    for (int lane = 0; lane < WARP; ++lane) {
        std::map<std::pair<uint32_t, uint32_t>, uint32_t> seen;
        for (const LogEntry& entry : logs[lane]) {
            uint32_t occurrence = seen[{entry.epoch, entry.site}]++;
            Request& request = requests[{entry.epoch, entry.site, occurrence}];
            request.kind = entry.kind;
            request.size = entry.size;
            if (entry.address) request.addresses.push_back(entry.address);
            request.shared_addresses.push_back(entry.shared_address);
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
                if (!request.addresses.empty()) count_global(counts, counts.async, request, false);
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
