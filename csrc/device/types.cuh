// float16 and bfloat16, and how they become float32 and back (rounded to nearest, ties to even).
#pragma once

#include "platform.cuh"

#ifdef GPTKERN_EMULATED
#include <bit>
#endif

namespace gptkern {

#ifdef GPTKERN_EMULATED

struct float16 {
    uint16_t bits;
};
struct bfloat16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(float16 x) { return emulator::float_of_float16(x.bits); }
inline float to_float(bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline float16 from_float<float16>(float x) {
    return {emulator::float16_of_float(x)};
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {
    return {emulator::bfloat16_of_float(x)};
}

template <class T>
uint16_t bits_of(T x) {
    return x.bits;
}
template <class T>
T of_bits(uint16_t bits) {
    return {bits};
}

#else

using float16 = __half;
using bfloat16 = __nv_bfloat16;

GPTKERN_DEVICE float to_float(float x) { return x; }
GPTKERN_DEVICE float to_float(float16 x) { return __half2float(x); }
GPTKERN_DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }

template <class T>
GPTKERN_DEVICE T from_float(float x);
template <>
GPTKERN_DEVICE float from_float<float>(float x) {
    return x;
}
template <>
GPTKERN_DEVICE float16 from_float<float16>(float x) {
    return __float2half_rn(x);
}
template <>
GPTKERN_DEVICE bfloat16 from_float<bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

#endif

// Two 16-bit values in a register, `low` in the lower half: the operand of a matrix instruction.
template <class T>
GPTKERN_DEVICE uint32_t pack(float low, float high) {
#ifdef GPTKERN_EMULATED
    return uint32_t(bits_of(from_float<T>(low))) | uint32_t(bits_of(from_float<T>(high))) << 16;
#else
    if constexpr (sizeof(T) == 2) {
        // One instruction (cvt.rn.*x2) for both.
        if constexpr (std::is_same_v<T, float16>) {
            __half2 pair = __floats2half2_rn(low, high);
            return *reinterpret_cast<uint32_t*>(&pair);
        } else {
            __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
            return *reinterpret_cast<uint32_t*>(&pair);
        }
    }
#endif
}

template <class T>
GPTKERN_DEVICE float2 unpack(uint32_t pair) {
#ifdef GPTKERN_EMULATED
    return {to_float(of_bits<T>(uint16_t(pair))), to_float(of_bits<T>(uint16_t(pair >> 16)))};
#else
    if constexpr (std::is_same_v<T, float16>)
        return __half22float2(*reinterpret_cast<__half2*>(&pair));
    else
        return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&pair));
#endif
}

// Four int8 as two registers of 16-bit pairs, which hold every int8 exactly: pairs[0] are bytes 0 and 1, pairs[1] bytes
// 2 and 3; ALTERNATE: bytes 0 and 2, bytes 1 and 3.
template <class T, bool ALTERNATE = false>
GPTKERN_DEVICE void widen_int8(uint32_t bytes, uint32_t (&pairs)[2]) {
#ifdef GPTKERN_EMULATED
    auto value = [&](int i) { return float(int8_t(bytes >> 8 * i)); };
    pairs[0] = pack<T>(value(0), value(ALTERNATE ? 2 : 1));
    pairs[1] = pack<T>(value(ALTERNATE ? 1 : 2), value(3));
#else
    // A byte below a constant byte is the low mantissa of a number: no conversion, which runs at a quarter of the rate.
    constexpr unsigned SELECT[2] = {ALTERNATE ? 0x4240u : 0x4140u, ALTERNATE ? 0x4341u : 0x4342u};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if constexpr (std::is_same_v<T, float16>) {
            // 0x64uu is 1024 + u, and u = v + 128
            unsigned shifted = __byte_perm(bytes ^ 0x80808080u, 0x64646464u, SELECT[i]);
            unsigned offset = 0x64806480u;  // 1152
            __half2 pair = __hsub2(*reinterpret_cast<__half2*>(&shifted), *reinterpret_cast<__half2*>(&offset));
            pairs[i] = *reinterpret_cast<uint32_t*>(&pair);
        } else {
            // 0x43bb without its bit 7 is 128 + the low 7 bits; with nothing but that bit it is 128, or 256 below 0.
            unsigned both = __byte_perm(bytes, 0x43434343u, SELECT[i]);
            unsigned low = both & 0xff7fff7fu, offset = both & 0xff80ff80u;
            __nv_bfloat162 pair =
                __hsub2(*reinterpret_cast<__nv_bfloat162*>(&low), *reinterpret_cast<__nv_bfloat162*>(&offset));
            pairs[i] = *reinterpret_cast<uint32_t*>(&pair);
        }
    }
#endif
}

// Byte i of four int8.
template <int I>
GPTKERN_DEVICE float int8_to_float(uint32_t bytes) {
#ifdef GPTKERN_EMULATED
    return float(int8_t(bytes >> 8 * I));
#else
    // 0x4b0000uu is 2^23 + u, and u = v + 128
    return __int_as_float(int(__byte_perm(bytes ^ 0x80808080u, 0x4b000000u, 0x7540u + I))) - 8388736.0f;
#endif
}

}  // namespace gptkern
