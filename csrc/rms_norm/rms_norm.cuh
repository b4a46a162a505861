// What forward.cu and backward.cu of rms_norm share.
#pragma once

#include "device/norm.cuh"
#include "rms_norm/launchers.h"

namespace gptkern {

inline constexpr int LONG_THREADS = 512;
inline constexpr size_t LONG_STASH = 96 * 1024;  // bytes of shared memory
inline constexpr int BLOCK = 256;                // threads, where a row does not need more

// A reduction uses the second one while the first may still be read.
struct Shared {
    Scratch scratch[2];
    // The stash, or the sums of dweight, follow.
};

// How many vectors of V a row has.
inline int vectors_of(const void* output, int width, int vector) {
    const bool aligned = reinterpret_cast<Address>(output) % 16 == 0 && width % vector == 0;
    return aligned ? width / vector : most_vectors(width, vector);
}

// Groups of a block.
inline int groups_of(int lanes) { return std::max(BLOCK / lanes, 1); }

}  // namespace gptkern
