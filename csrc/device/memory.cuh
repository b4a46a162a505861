// Loads and stores of global and shared memory, 1 to 16 bytes a thread, which the emulator checks and counts.
//
// Addresses have the alignment of the Vector. A warp's best access is 16 bytes a lane, neighbours side by side.
#pragma once

#include <type_traits>

#include "platform.cuh"

namespace gptkern {

// N values side by side, loaded and stored by one instruction.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
    static_assert(sizeof(T) * N <= 16, "one instruction moves at most 16 bytes");
    T values[N];
    GPTKERN_DEVICE T& operator[](int i) { return values[i]; }
    GPTKERN_DEVICE const T& operator[](int i) const { return values[i]; }
};

// As many values of T as 16 bytes hold.
template <class T>
inline constexpr int VECTOR = 16 / int(sizeof(T));

#ifndef GPTKERN_EMULATED
namespace detail {

template <int BYTES>
struct RawOf;
template <>
struct RawOf<16> {
    using type = uint4;
};
template <>
struct RawOf<8> {
    using type = uint2;
};
template <>
struct RawOf<4> {
    using type = unsigned;
};
template <>
struct RawOf<2> {
    using type = unsigned short;
};
template <>
struct RawOf<1> {
    using type = unsigned char;
};
template <class V>
using Raw = typename RawOf<int(sizeof(V))>::type;

template <class V>
GPTKERN_DEVICE V from_raw(Raw<V> raw) {
    return *reinterpret_cast<V*>(&raw);
}
template <class V>
GPTKERN_DEVICE Raw<V> to_raw(V value) {
    return *reinterpret_cast<Raw<V>*>(&value);
}

}  // namespace detail
#endif

// Global memory that this kernel does not write, kept by the caches: read by several blocks, or again later.
template <class V>
GPTKERN_DEVICE V load_global(const V* address GPTKERN_SITE) {
#ifdef GPTKERN_EMULATED
    emulator::accessed(emulator::GLOBAL_LOAD_READ_ONLY, address, sizeof(V), site);
    return *address;
#else
    return detail::from_raw<V>(__ldg(reinterpret_cast<const detail::Raw<V>*>(address)));
#endif
}

// Global memory that is read once: evicted first, so that it displaces nothing of use.
template <class V>
GPTKERN_DEVICE V load_global_once(const V* address GPTKERN_SITE) {
#ifdef GPTKERN_EMULATED
    emulator::accessed(emulator::GLOBAL_LOAD, address, sizeof(V), site);
    return *address;
#else
    return detail::from_raw<V>(__ldcs(reinterpret_cast<const detail::Raw<V>*>(address)));
#endif
}

// Global memory that this kernel has written (by this block before a barrier, or by this thread).
template <class V>
GPTKERN_DEVICE V load_global_written(const V* address GPTKERN_SITE) {
#ifdef GPTKERN_EMULATED
    emulator::accessed(emulator::GLOBAL_LOAD, address, sizeof(V), site);
    return *address;
#else
    return detail::from_raw<V>(*reinterpret_cast<const detail::Raw<V>*>(address));
#endif
}

template <class V>
GPTKERN_DEVICE void store_global(V* address, const std::type_identity_t<V>& value GPTKERN_SITE) {
#ifdef GPTKERN_EMULATED
    emulator::accessed(emulator::GLOBAL_STORE, address, sizeof(V), site);
    *address = value;
#else
    *reinterpret_cast<detail::Raw<V>*>(address) = detail::to_raw<V>(value);
#endif
}

// *address += value, by one thread at a time, in no order: a sum of floats differs from run to run.
GPTKERN_DEVICE void atomic_add(float* address, float value GPTKERN_SITE) {
#ifdef GPTKERN_EMULATED
    emulator::accessed(emulator::GLOBAL_ATOMIC, address, sizeof(float), site);
    *address += value;
#else
    atomicAdd(address, value);
#endif
}

template <class V>
GPTKERN_DEVICE V load_shared(const V* address GPTKERN_SITE) {
#ifdef GPTKERN_EMULATED
    emulator::accessed(emulator::SHARED_LOAD, address, sizeof(V), site);
    return *address;
#else
    return detail::from_raw<V>(*reinterpret_cast<const detail::Raw<V>*>(address));
#endif
}

template <class V>
GPTKERN_DEVICE void store_shared(V* address, const std::type_identity_t<V>& value GPTKERN_SITE) {
#ifdef GPTKERN_EMULATED
    emulator::accessed(emulator::SHARED_STORE, address, sizeof(V), site);
    *address = value;
#else
    *reinterpret_cast<detail::Raw<V>*>(address) = detail::to_raw<V>(value);
#endif
}

}  // namespace gptkern
