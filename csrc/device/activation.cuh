// Activations and their slopes: GELU in both of PyTorch's forms, and SiLU.
//
//     GELU         f(z) = z * Phi(z)      f'(z) = Phi(z) + z * phi(z)
//     GELU_TANH    f(z) = z * s           f'(z) = s + z * s * (1 - s) * 2u'(z)       s = sigmoid(2u)
//     SILU         f(z) = z * s           f'(z) = s + z * s * (1 - s)                s = sigmoid(z)
//
// with u = sqrt(2/pi) * (z + 0.044715 z^3): GELU_TANH is z/2 * (1 + tanh(u)). For every finite z all of them are
// finite, and where the slope is 0 or 1 in float32 it is that exactly.
#pragma once

#include "ptx.cuh"

namespace gptkern {

// gptkern/backends/cuda/common.py, ACTIVATIONS
enum Activation : int { IDENTITY = 0, GELU = 1, GELU_TANH = 2, SILU = 3 };

inline constexpr float SQRT_HALF = 0.7071067811865476f, INV_SQRT_2PI = 0.3989422804014327f;
inline constexpr float TWO_SQRT_2_PI = 1.5957691216057308f, CUBIC = 0.044715f;
// Beyond it float32's sigmoid(2u) is 0 or 1, and z^3 on the way to infinity.
inline constexpr float SATURATED = 20.0f;

GPTKERN_DEVICE float two_u(float z) { return (z + z * z * z * CUBIC) * TWO_SQRT_2_PI; }

// s = sigmoid(t) and 1 - s, which has all its digits where s is near 1.
struct Sigmoid {
    float s, rest;
};
GPTKERN_DEVICE Sigmoid sigmoid_of(float t) {
    // e^-|t| is at most 1: nothing overflows, and s is exact to its last digits on both sides.
    float e = expf(-fabsf(t)), reciprocal = reciprocal_approx(1.0f + e);
    return {(t > 0.0f ? 1.0f : e) * reciprocal, (t > 0.0f ? e : 1.0f) * reciprocal};
}

GPTKERN_DEVICE float activated(float z, int activation) {
    // f(z) = z * Phi(z)
    if (activation == GELU) return z * 0.5f * (1.0f + erff(z * SQRT_HALF));
    // f(z) = z * sigmoid(2u)
    if (activation == GELU_TANH) return z * sigmoid_of(two_u(z)).s;
    // f(z) = z * sigmoid(z)
    if (activation == SILU) return z * sigmoid_of(z).s;
    return z;
}

struct Activated {
    float value, slope;
};
GPTKERN_DEVICE Activated activated_with_slope(float z, int activation) {
    if (activation == GELU) {
        // f'(z) = Phi(z) + z * phi(z)
        float Phi = 0.5f * (1.0f + erff(z * SQRT_HALF));
        return {z * Phi, Phi + z * INV_SQRT_2PI * expf(-0.5f * z * z)};
    }
    if (activation == GELU_TANH) {
        // f'(z) = s + z * s * (1 - s) * 2u'(z)
        auto [s, rest] = sigmoid_of(two_u(z));
        float inner = (1.0f + z * z * 3.0f * CUBIC) * TWO_SQRT_2_PI;
        return {z * s, fabsf(z) > SATURATED ? s : s + z * s * rest * inner};
    }
    if (activation == SILU) {
        // f'(z) = s + z * s * (1 - s)
        auto [s, rest] = sigmoid_of(z);
        return {z * s, s + z * s * rest};
    }
    return {z, 1.0f};
}

GPTKERN_DEVICE float activation_slope(float z, int activation) { return activated_with_slope(z, activation).slope; }

}  // namespace gptkern
