// What the lanes of a warp, and the warps of a block, do together: shuffles, votes, sums and maxima.
//
// All lanes of the warp call each of these, at the same place in the kernel.
#pragma once

#include "memory.cuh"

namespace gptkern {

GPTKERN_DEVICE int lane_of_thread() { return int(threadIdx.x) % WARP; }
GPTKERN_DEVICE int warp_of_thread() { return int(threadIdx.x) / WARP; }

// `value` of the lane whose number differs by the bits of `mask`. T: a 32-bit type.
template <class T>
GPTKERN_DEVICE T shuffle_xor(T value, int mask GPTKERN_SITE) {
    static_assert(sizeof(T) == 4);
#ifdef GPTKERN_EMULATED
    return std::bit_cast<T>(
        emulator::shuffle(std::bit_cast<uint32_t>(value), emulator::this_lane() ^ mask, "shuffle_xor", site));
#else
    return __shfl_xor_sync(ALL_LANES, value, mask);
#endif
}

// `value` of lane `lane`.
template <class T>
GPTKERN_DEVICE T shuffle(T value, int lane GPTKERN_SITE) {
    static_assert(sizeof(T) == 4);
#ifdef GPTKERN_EMULATED
    return std::bit_cast<T>(emulator::shuffle(std::bit_cast<uint32_t>(value), lane, "shuffle", site));
#else
    return __shfl_sync(ALL_LANES, value, lane);
#endif
}

// Bit i is the predicate of lane i.
GPTKERN_DEVICE unsigned ballot(bool predicate GPTKERN_SITE) {
#ifdef GPTKERN_EMULATED
    return emulator::ballot(predicate, site);
#else
    return __ballot_sync(ALL_LANES, predicate);
#endif
}

// Orders the warp's accesses to shared memory before it against those after it.
GPTKERN_DEVICE void warp_sync(GPTKERN_SITE_ONLY) {
#ifdef GPTKERN_EMULATED
    emulator::warp_barrier(site);
#else
    __syncwarp();
#endif
}

// __syncthreads() at the place of the helper that calls it.
GPTKERN_DEVICE void block_sync(GPTKERN_SITE_ONLY) {
#ifdef GPTKERN_EMULATED
    emulator::block_barrier(site);
#else
    __syncthreads();
#endif
}

// Sum over aligned groups of LANES lanes; every lane of the group gets it. The order of the additions is fixed.
template <int LANES = WARP>
GPTKERN_DEVICE float warp_sum(float value GPTKERN_SITE) {
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask GPTKERN_HERE);
    return value;
}

template <int LANES = WARP>
GPTKERN_DEVICE float warp_max(float value GPTKERN_SITE) {
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask GPTKERN_HERE));
    return value;
}

// Sum over WARPS warps whose threads are neighbours; `scratch` holds WARPS floats in shared memory, which no thread may
// use again before the next __syncthreads(). All threads of the block call it, and every one gets the sum of its
// warps in a fixed order.
template <int WARPS>
GPTKERN_DEVICE float block_sum(float value, float* scratch GPTKERN_SITE) {
    value = warp_sum(value GPTKERN_HERE);
    if constexpr (WARPS > 1) {
        if (lane_of_thread() == 0) store_shared(scratch + warp_of_thread() % WARPS, value);
        block_sync(GPTKERN_HERE_ONLY);
        value = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) value += load_shared(scratch + warp);
    }
    return value;
}

template <int WARPS>
GPTKERN_DEVICE float block_max(float value, float* scratch GPTKERN_SITE) {
    value = warp_max(value GPTKERN_HERE);
    if constexpr (WARPS > 1) {
        if (lane_of_thread() == 0) store_shared(scratch + warp_of_thread() % WARPS, value);
        block_sync(GPTKERN_HERE_ONLY);
        value = load_shared(scratch);
#pragma unroll
        for (int warp = 1; warp < WARPS; ++warp) value = fmaxf(value, load_shared(scratch + warp));
    }
    return value;
}

}  // namespace gptkern
