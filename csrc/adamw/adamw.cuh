// What the kernels of adamw share: the table of tensors, and what is done to an element.
//
//     g = grad / grad_scale * clip
//     θ = θ − lr · weight_decay · θ
//     m = m + (1 − β₁) (g − m)
//     v = β₂ v + (1 − β₂) g²
//     θ = θ − lr / (1 − β₁ᵗ) · m / (√(v / (1 − β₂ᵗ)) + eps)
#pragma once

#include "adamw/launchers.h"
#include "device/launch.cuh"
#include "device/philox.cuh"
#include "device/rows.cuh"

namespace gptkern {

inline constexpr int THREADS = 256;
// Elements that one counter of Philox serves: two a word.
inline constexpr int DRAWS = 8;

// A row of the table: gptkern/operators/adamw/table.py, NAMES.
enum Column {
    PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, STEP, EXP_AVG_SCALE, EXP_AVG_SQ_SCALE,
    COUNT, WIDTH, FIRST_CHUNK, NUMBER, START, RUN, STRIDE, SEED, COLUMNS
};
// gptkern/operators/adamw/walking.py
enum Places { NEAREST, IN_A_RUN, ANYWHERE };

struct Row {
    const int64_t* columns;

    GPTKERN_DEVICE int64_t operator[](Column column) const { return load_global(columns + column); }
    template <class T>
    GPTKERN_DEVICE T* pointer(Column column) const {
        return reinterpret_cast<T*>(uintptr_t((*this)[column]));
    }
};

struct Tables {
    const int64_t* table;
    const int* owners;  // (programs,): the tensor of each

    GPTKERN_DEVICE Row row_of(int64_t program) const {
        return {table + int64_t(load_global(owners + program)) * COLUMNS};
    }
};

// The row's tensor from element `first` on.
template <int BYTES>
GPTKERN_DEVICE Line<BYTES> line_of(const Row& row, Column column, int64_t first) {
    Line<BYTES> line(row.pointer<const void>(column), first, 1, false);
    line.vectors = reinterpret_cast<uintptr_t>(line.start) % 16 == 0;
    return line;
}

// --- An element -----------------------------------------------------------------------------------------------------

struct Hyper {
    const float *lr, *grad_scale, *found_inf, *clip;  // one element each, or null
    float lr_value, one_less_beta1, log_beta1, beta2, one_less_beta2, log_beta2, eps, weight_decay;
    bool maximize;

    // Whether nothing is to be written.
    GPTKERN_DEVICE bool overflowed() const { return found_inf && !(load_global(found_inf) == 0.0f); }
};

// An update of one tensor.
struct Update {
    const Hyper& hyper;
    float t, rate, decay, correction2, scale, clip;

    GPTKERN_DEVICE Update(const Hyper& hyper, const Row& row) : hyper(hyper) {
        // The host has counted this update already.
        t = load_global(row.pointer<const float>(STEP));
        const float lr = hyper.lr ? load_global(hyper.lr) : hyper.lr_value;
        // 1 − βᵗ = −expm1(t · log β): of β near 1 the difference would have lost its digits
        rate = lr / -expm1f(t * hyper.log_beta1);
        correction2 = -expm1f(t * hyper.log_beta2);
        decay = lr * hyper.weight_decay;
        scale = hyper.grad_scale ? load_global(hyper.grad_scale) : 1.0f;
        clip = hyper.clip ? load_global(hyper.clip) : 1.0f;
        if (hyper.maximize) clip = -clip;
    }
    GPTKERN_DEVICE void average(float g, float& m, float& v) const {
        // g = grad / grad_scale * clip
        if (hyper.grad_scale) g = g / scale;
        g *= clip;
        // m = m + (1 − β₁) (g − m)
        m += hyper.one_less_beta1 * (g - m);
        // v = β₂ v + (1 − β₂) g²
        v = hyper.beta2 * v + hyper.one_less_beta2 * g * g;
    }
    GPTKERN_DEVICE float moved(float p, float m, float largest) const {
        // θ = θ − lr · weight_decay · θ
        p -= decay * p;
        // θ = θ − lr / (1 − β₁ᵗ) · m / (√(v / (1 − β₂ᵗ)) + eps)
        return p - rate * m / (sqrtf(largest / correction2) + hyper.eps);
    }
};

// --- Rounding at random ---------------------------------------------------------------------------------------------

// float32 of which bfloat16 holds every bit: up with a probability that is the part of the way that p lies above the
// value below. draw: sixteen random bits.
GPTKERN_DEVICE float rounded_at_random(float p, uint32_t draw) {
    const uint32_t bits = uint32_t(__float_as_int(p));
    // An infinity and NaN stay what they are.
    if ((bits & 0x7f800000u) == 0x7f800000u) return p;
    return __int_as_float(int((bits + draw) & 0xffff0000u));
}

// Elements e, e + 1, … of the tensor, each rounded by half `place % 8` of the words that `place / 8` counts.
template <int V>
GPTKERN_DEVICE void round_at_random(float (&p)[V], const Row& row, float t, int64_t e, int places) {
    const int64_t start = row[START];
    const uint64_t seed = uint64_t(row[SEED]);
    const uint32_t number = uint32_t(row[NUMBER]), updates = uint32_t(t);
    auto words_of = [&](int64_t group) {
        return philox(seed, uint32_t(group), uint32_t(uint64_t(group) >> 32), number, updates);
    };
    if (places == IN_A_RUN) {
        // e is a multiple of V, and so is the start of 8.
        const PhiloxWords drawn = words_of((start + e) / DRAWS);
        const int half = V < DRAWS ? int((start + e) % DRAWS) : 0;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            // Of V = 4 the vector is the first half of the words, or the second.
            uint32_t word = drawn[i / 2];
            if (V < DRAWS && half) word = drawn[(i + V) / 2 % 4];
            p[i] = rounded_at_random(p[i], word >> 16 * (i % 2) & 0xffffu);
        }
        return;
    }
    const int64_t run = row[RUN], stride = row[STRIDE];
    int64_t drawn_for = -1;
    PhiloxWords drawn{};
#pragma unroll 1
    for (int i = 0; i < V; ++i) {
        const int64_t place = start + (e + i) / run * stride + (e + i) % run;
        if (place / DRAWS != drawn_for) {
            drawn_for = place / DRAWS;
            drawn = words_of(drawn_for);
        }
        const int half = int(place % DRAWS);
        const uint32_t word = drawn[half / 2];
        // An index that changes would put the vector into local memory.
#pragma unroll
        for (int k = 0; k < V; ++k)
            if (k == i) p[k] = rounded_at_random(p[k], word >> 16 * (half % 2) & 0xffffu);
    }
}

// --- For launchers ----------------------------------------------------------------------------------------------------

inline Hyper hyper_of(const Tensor& lr, const Tensor& grad_scale, const Tensor& found_inf, const Tensor& clip,
                      double lr_value, double one_less_beta1, double log_beta1, double beta2, double one_less_beta2,
                      double log_beta2, double eps, double weight_decay, bool maximize) {
    Hyper hyper{};
    hyper.lr = at<const float>(lr.address);
    hyper.grad_scale = at<const float>(grad_scale.address);
    hyper.found_inf = at<const float>(found_inf.address);
    hyper.clip = at<const float>(clip.address);
    hyper.lr_value = float(lr_value);
    hyper.one_less_beta1 = float(one_less_beta1);
    hyper.log_beta1 = float(log_beta1);
    hyper.beta2 = float(beta2);
    hyper.one_less_beta2 = float(one_less_beta2);
    hyper.log_beta2 = float(log_beta2);
    hyper.eps = float(eps);
    hyper.weight_decay = float(weight_decay);
    hyper.maximize = maximize;
    return hyper;
}

inline Tables tables_of(const Tensor& table, const Tensor& owners) {
    return {at<const int64_t>(table.address), at<const int>(owners.address)};
}

}  // namespace gptkern
