// What kernels call, beneath cuda.h and device/: collectives, matrix products, copies and the checks of every access.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "block.h"

namespace gptkern::emulator {

using namespace running;

namespace {

void log_access(int kind, const void* address, size_t bytes, const Site& site, const void* shared_address = nullptr) {
    logs[current->warp * WARP + current->lane].push_back(
        {kind, site, current->epoch, uint32_t(bytes),
         reinterpret_cast<uintptr_t>(address), reinterpret_cast<uintptr_t>(shared_address)});
}

bool in_shared(const void* address, size_t bytes) {
    auto offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(shared);
    return shared && offset < shared_bytes_launched && offset + bytes <= shared_bytes_launched;
}

// Now and then another thread runs between two accesses, as on a GPU: what a thread reads and then writes may have
// changed in between.
void maybe_switch() {
    if (accesses_to_switch == 0 || --accesses_to_switch) return;
    constexpr uint32_t LONGEST = 128;
    accesses_to_switch = 1 + random_numbers.below(LONGEST);
    make_ready(current->warp, 1u << current->lane);
    current->waits_for = "its turn";
    go_on(false);
}

Accessor accessor(const Thread& thread, const Site& site) {
    return {{barriers, warps[thread.warp].barriers}, thread.warp * WARP + thread.lane, site};
}

void fail_race(const char* memory, const char* kind, const Thread& thread, const Site& site, const Conflict& other) {
    if (std::strcmp(other.kind, "cp_async") == 0)
        fail("the " + std::string(kind) + " at " + place(site) + " (thread " +
             std::to_string(thread.warp * WARP + thread.lane) + ") touches what the cp_async at " + place(other.site) +
             " (thread " + std::to_string(other.thread) + ") is writing: no cp_async_wait has covered it");
    fail("a race in " + std::string(memory) + " memory: nothing orders the " + kind + " at " + place(site) +
         " (thread " + std::to_string(thread.warp * WARP + thread.lane) + ") and the " + other.kind + " at " +
         place(other.site) + " (thread " + std::to_string(other.thread) + ")");
}

size_t shared_offset(const void* address) { return size_t(static_cast<const unsigned char*>(address) - shared); }

void check_alignment(const char* what, const void* address, size_t bytes, const Site& site) {
    if (reinterpret_cast<uintptr_t>(address) % bytes)
        fail(std::string(what) + " of " + std::to_string(bytes) + " bytes at " + place(site) +
             ": the address is not aligned to them");
}

void check_shared(const char* what, const void* address, size_t bytes, const Site& site) {
    if (!in_shared(address, bytes))
        fail(std::string(what) + " of " + std::to_string(bytes) + " bytes at " + place(site) +
             ": the address is outside of the block's shared memory");
}

void check_global(const char* what, const void* address, size_t bytes, const Site& site) {
    if (in_shared(address, 1)) fail(std::string(what) + " at " + place(site) + ": a global access to shared memory");
    if (bounds.empty()) return;
    auto first = reinterpret_cast<uintptr_t>(address);
    for (const auto& [begin, end] : bounds)
        if (begin <= first && first + bytes <= end) return;
    fail(std::string(what) + " of " + std::to_string(bytes) + " bytes at " + place(site) +
         ": the address is outside of the launcher's tensors");
}

}  // namespace

const Index& thread_index() { return current->index; }
const Index& block_index() { return the_block; }
const Index& block_size() { return the_block_size; }
const Index& grid_size() { return the_grid; }

void* shared_memory(size_t bytes) {
    if (bytes > shared_bytes_launched)
        fail("the kernel lays out " + std::to_string(bytes) + " bytes of shared memory and was launched with " +
             std::to_string(shared_bytes_launched));
    return shared;
}

void block_barrier(Site site) {
    if (at_barrier && !same_place(barrier_site, site))
        fail("divergent barrier: the block's threads wait at " + place(barrier_site) + " and at " + place(site));
    barrier_site = site;
    ++current->epoch;
    if (++at_barrier < thread_count) return wait_at("__syncthreads", site);
    at_barrier = 0;
    ++barriers;
    if (counts) ++counts->barriers;
    for (unsigned warp = 0; warp < warp_count; ++warp)
        make_ready(warp, warp == current->warp ? ALL & ~(1u << current->lane) : ALL);
}

void warp_barrier(Site site) {
    meet("warp_sync", site, nullptr, [](void**) { ++warps[current->warp].barriers; });
}

uint32_t shuffle(uint32_t value, int source_lane, const char* name, Site site) {
    struct Argument {
        uint32_t value, result;
        int source;
    } argument{value, 0, source_lane};
    meet(name, site, &argument, [](void** lanes) {
        for (unsigned lane = 0; lane < WARP; ++lane) {
            auto* own = static_cast<Argument*>(lanes[lane]);
            own->result = static_cast<Argument*>(lanes[unsigned(own->source) % WARP])->value;
        }
        if (counts) ++counts->shuffles;
    });
    return argument.result;
}

unsigned ballot(bool predicate, Site site) {
    struct Argument {
        bool predicate;
        unsigned result;
    } argument{predicate, 0};
    meet("ballot", site, &argument, [](void** lanes) {
        unsigned votes = 0;
        for (unsigned lane = 0; lane < WARP; ++lane)
            votes |= unsigned(static_cast<Argument*>(lanes[lane])->predicate) << lane;
        for (unsigned lane = 0; lane < WARP; ++lane) static_cast<Argument*>(lanes[lane])->result = votes;
    });
    return argument.result;
}

namespace {

template <class Accumulator>
struct MatrixArgument {
    Accumulator* d;
    const uint32_t *a, *b;
};

// 65,536 values: a table is faster than the conversion.
const float* float16_table() {
    static const std::vector<float> table = [] {
        std::vector<float> values(65536);
        for (uint32_t bits = 0; bits < 65536; ++bits) values[bits] = float_of_float16(uint16_t(bits));
        return values;
    }();
    return table.data();
}

template <bool BFLOAT16>
float widened(uint16_t bits) {
    if constexpr (BFLOAT16)
        return std::bit_cast<float>(uint32_t(bits) << 16);
    else
        return float16_table()[bits];
}

template <bool BFLOAT16>
void execute_m16n8k16(void** lanes) {
    float a[16][16], b[16][8];
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const auto& own = *static_cast<MatrixArgument<float>*>(lanes[lane]);
        unsigned g = lane / 4, t = lane % 4;
        for (unsigned r = 0; r < 4; ++r)
            for (unsigned half = 0; half < 2; ++half)
                a[g + r % 2 * 8][2 * t + r / 2 * 8 + half] = widened<BFLOAT16>(uint16_t(own.a[r] >> 16 * half));
        for (unsigned r = 0; r < 2; ++r)
            for (unsigned half = 0; half < 2; ++half)
                b[2 * t + r * 8 + half][g] = widened<BFLOAT16>(uint16_t(own.b[r] >> 16 * half));
    }
    for (unsigned g = 0; g < 16; ++g) {
        float row[8];
        for (unsigned n = 0; n < 8; ++n)
            row[n] = static_cast<MatrixArgument<float>*>(lanes[g % 8 * 4 + n / 2])->d[g / 8 * 2 + n % 2];
        for (unsigned k = 0; k < 16; ++k)
            for (unsigned n = 0; n < 8; ++n) row[n] += a[g][k] * b[k][n];
        for (unsigned n = 0; n < 8; ++n)
            static_cast<MatrixArgument<float>*>(lanes[g % 8 * 4 + n / 2])->d[g / 8 * 2 + n % 2] = row[n];
    }
    if (counts) ++counts->mma_16bit;
}

void execute_m16n8k32(void** lanes) {
    int a[16][32], b[32][8];
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const auto& own = *static_cast<MatrixArgument<int32_t>*>(lanes[lane]);
        unsigned g = lane / 4, t = lane % 4;
        for (unsigned r = 0; r < 4; ++r)
            for (unsigned byte = 0; byte < 4; ++byte)
                a[g + r % 2 * 8][4 * t + r / 2 * 16 + byte] = int8_t(own.a[r] >> 8 * byte);
        for (unsigned r = 0; r < 2; ++r)
            for (unsigned byte = 0; byte < 4; ++byte) b[4 * t + r * 16 + byte][g] = int8_t(own.b[r] >> 8 * byte);
    }
    for (unsigned g = 0; g < 16; ++g) {
        uint32_t row[8] = {};  // wraps as the hardware does
        for (unsigned k = 0; k < 32; ++k)
            for (unsigned n = 0; n < 8; ++n) row[n] += uint32_t(a[g][k] * b[k][n]);
        for (unsigned n = 0; n < 8; ++n) {
            int32_t& d = static_cast<MatrixArgument<int32_t>*>(lanes[g % 8 * 4 + n / 2])->d[g / 8 * 2 + n % 2];
            d = int32_t(uint32_t(d) + row[n]);
        }
    }
    if (counts) ++counts->mma_int8;
}

struct LoadMatrixArgument {
    uint32_t* r;
    const void* row;
    int matrices;
    Site site;
};

template <bool TRANSPOSED>
void execute_ldmatrix(void** lanes) {
    int matrices = static_cast<LoadMatrixArgument*>(lanes[0])->matrices;
    uintptr_t rows[WARP];
    for (unsigned lane = 0; lane < WARP; ++lane)
        rows[lane] = reinterpret_cast<uintptr_t>(static_cast<LoadMatrixArgument*>(lanes[lane])->row);
    if (checking_races)
        for (unsigned lane = 0; lane < 8 * unsigned(matrices); ++lane) {
            const Thread& thread = threads[current->warp * WARP + lane];
            const Site& site = static_cast<LoadMatrixArgument*>(lanes[lane])->site;
            const void* row = reinterpret_cast<const void*>(rows[lane]);
            if (Conflict other = shared_races.load_matrix_row(accessor(thread, site), shared_offset(row), 16))
                fail_race("shared", "ldmatrix", thread, site, other);
        }
    for (int m = 0; m < matrices; ++m) {
        uint16_t matrix[8][8];
        for (unsigned row = 0; row < 8; ++row)
            std::memcpy(matrix[row], reinterpret_cast<const void*>(rows[8 * m + row]), sizeof matrix[row]);
        for (unsigned lane = 0; lane < WARP; ++lane) {
            unsigned g = lane / 4, t = lane % 4;
            uint32_t low = TRANSPOSED ? matrix[2 * t][g] : matrix[g][2 * t];
            uint32_t high = TRANSPOSED ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
            static_cast<LoadMatrixArgument*>(lanes[lane])->r[m] = low | high << 16;
        }
    }
    if (counts) count_ldmatrix(*counts, rows, matrices);
}

}  // namespace

void mma_m16n8k16(bool bfloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
    MatrixArgument<float> argument{d, a, b};
    if (bfloat16)
        meet("mma_m16n8k16 bfloat16", site, &argument, execute_m16n8k16<true>);
    else
        meet("mma_m16n8k16 float16", site, &argument, execute_m16n8k16<false>);
}

void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
    MatrixArgument<int32_t> argument{d, a, b};
    meet("mma_m16n8k32_s8", site, &argument, execute_m16n8k32);
}

void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row, Site site) {
    constexpr size_t ROW_BYTES = 16;
    if (int(current->lane) < 8 * matrices) {
        check_alignment("ldmatrix", row, ROW_BYTES, site);
        check_shared("ldmatrix", row, ROW_BYTES, site);
    }
    LoadMatrixArgument argument{r, row, matrices, site};
    const char* names[] = {"ldmatrix_x2", "ldmatrix_x2_transposed", "ldmatrix_x4", "ldmatrix_x4_transposed"};
    meet(names[(matrices == 4) * 2 + transposed], site, &argument,
         transposed ? execute_ldmatrix<true> : execute_ldmatrix<false>);
}

void cp_async(void* destination, const void* global, int bytes, bool in_range, Site site) {
    check_alignment("cp_async to shared memory", destination, size_t(bytes), site);
    check_shared("cp_async", destination, size_t(bytes), site);
    if (in_range) {
        check_alignment("cp_async from global memory", global, size_t(bytes), site);
        check_global("cp_async", global, size_t(bytes), site);
        // AddressSanitizer looks at the source here, where the report names the kernel's line.
        volatile const char* source = static_cast<const char*>(global);
        (void)source[0];
        (void)source[bytes - 1];
    }
    if (counts) log_access(LOGGED_ASYNC, in_range ? global : nullptr, size_t(bytes), site, destination);
    maybe_switch();
    if (checking_races) {
        Accessor by = accessor(*current, site);
        if (in_range)
            if (Conflict other = global_races.load(by, block_number, reinterpret_cast<uintptr_t>(global), size_t(bytes), true))
                fail_race("global", "cp_async", *current, site, other);
        if (Conflict other = shared_races.issue_copy(by, shared_offset(destination), size_t(bytes)))
            fail_race("shared", "cp_async", *current, site, other);
    }
    Copy copy{destination, in_range ? global : nullptr, bytes, current->group, -1, false};
    std::memset(destination, POISON, size_t(bytes));
    if (!in_order) {
        constexpr uint32_t WAITS = 16;
        uint32_t draw = random_numbers();
        if (draw % 4 == 0) land(copy);
        if (draw % 4 == 1) copy.countdown = int(1 + (draw >> 8) % WAITS);
    }
    current->copies.push_back(copy);
}

void cp_async_commit() { ++current->group; }

void cp_async_wait(int newest) {
    int covered = current->group - newest;
    std::erase_if(current->copies, [&](Copy& copy) {
        if (copy.group >= covered) return false;
        if (!copy.landed) land(copy);
        if (checking_races)
            shared_races.finish_copy(accessor(*current, {}), shared_offset(copy.shared), size_t(copy.bytes));
        return true;
    });
}

void accessed(Access kind, const void* address, size_t bytes, Site site) {
    static constexpr const char* names[] = {"load", "store", "atomic", "load", "store", "load"};
    check_alignment(names[kind], address, bytes, site);
    if (kind == SHARED_LOAD || kind == SHARED_STORE)
        check_shared(names[kind], address, bytes, site);
    else
        check_global(names[kind], address, bytes, site);
    if (counts) log_access(kind == GLOBAL_LOAD_READ_ONLY ? GLOBAL_LOAD : kind, address, bytes, site);
    maybe_switch();
    if (!checking_races) return;
    Accessor by = accessor(*current, site);
    Conflict other;
    auto place_in_memory = reinterpret_cast<uintptr_t>(address);
    switch (kind) {
        case GLOBAL_LOAD: other = global_races.load(by, block_number, place_in_memory, bytes, false); break;
        case GLOBAL_LOAD_READ_ONLY: other = global_races.load(by, block_number, place_in_memory, bytes, true); break;
        case GLOBAL_STORE: other = global_races.write(by, block_number, place_in_memory, bytes, GlobalRaces::STORE); break;
        case GLOBAL_ATOMIC: other = global_races.write(by, block_number, place_in_memory, bytes, GlobalRaces::ATOMIC); break;
        case SHARED_LOAD: other = shared_races.load(by, shared_offset(address), bytes); break;
        case SHARED_STORE: other = shared_races.store(by, shared_offset(address), bytes); break;
    }
    if (!other) return;
    bool in_shared_memory = kind == SHARED_LOAD || kind == SHARED_STORE;
    if (kind == GLOBAL_LOAD_READ_ONLY && other.block == block_number)
        fail("load_global at " + place(site) + ": the kernel itself wrote that memory, at " + place(other.site) +
             "; load_global_written reads it");
    if (!in_shared_memory && other.block != block_number)
        fail("a race in global memory: block " + std::to_string(block_number) + "'s " + names[kind] + " at " +
             place(site) + " and block " + std::to_string(other.block) + "'s " + other.kind + " at " + place(other.site));
    fail_race(in_shared_memory ? "shared" : "global", names[kind], *current, site, other);
}

// --- Conversions ------------------------------------------------------------------------------------------------------

float float_of_float16(uint16_t bits) {
    uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 0x1f, mantissa = bits & 0x3ff;
    if (exponent == 0) {  // subnormal: mantissa · 2^-24
        float value = std::ldexp(float(mantissa), -24);
        return sign ? -value : value;
    }
    if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
    return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

uint16_t float16_of_float(float x) {
    uint32_t bits = std::bit_cast<uint32_t>(x);
    uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7fff;  // NaN
    if (magnitude >= 0x47800000) return sign | 0x7c00;  // 2^16 and more
    if (magnitude < 0x38800000) {                       // below 2^-14: subnormal, in steps of 2^-24
        float steps = std::bit_cast<float>(magnitude) * 0x1p24f;
        return sign | uint16_t(std::nearbyint(steps));
    }
    uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return sign | uint16_t((rounded - 0x38000000) >> 13);
}

uint16_t bfloat16_of_float(float x) {
    uint32_t bits = std::bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);  // NaN
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace gptkern::emulator
