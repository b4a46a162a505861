// Philox4x32-10, as gptkern/backends/philox.py has it: a counter of four words and a key of two give four random words.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
#pragma once

#include "platform.cuh"

namespace gptkern {

struct PhiloxWords {
    uint32_t w0, w1, w2, w3;

    // Not an array: with an index that changes it would lie in local memory.
    GPTKERN_DEVICE uint32_t operator[](int i) const { return i < 2 ? (i == 0 ? w0 : w1) : (i == 2 ? w2 : w3); }
};

GPTKERN_DEVICE PhiloxWords philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t(0xD2511F53u) * c0, product1 = uint64_t(0xCD9E8D57u) * c2;
        c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
        c1 = uint32_t(product1);
        c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
        c3 = uint32_t(product0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}

}  // namespace gptkern
