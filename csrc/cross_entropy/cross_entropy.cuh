// What forward.cu and backward.cu of cross_entropy share: scores, targets, and how a launch is cut.
//
//     s = logit_scale * x,  then softcap * tanh(s / softcap) where there is a softcap
//
// A row belongs to a group of threads: a part of a warp, a warp, or several warps of one block, which walk it in vectors
// of 16 bytes (device/rows.cuh). Rows of an odd width begin anywhere: vectors are laid over memory's own grid of 16
// bytes, and a row's first and last one go element by element.
//
// One block a row, however few rows there are: a training step has thousands. Of few ones a block has 1024 threads, so
// that a multiprocessor that has one row alone has as many loads under way as one that has four.
//
// Two instances each: PLAIN, and one that can do all else (softcap, label smoothing, stats), told apart at run time.
// float16 and bfloat16 are one instance as well: what differs is the conversion.
#pragma once

#include <limits>

#include "cross_entropy/launchers.h"
#include "device/norm.cuh"
#include "device/ptx.cuh"

namespace gptkern {

inline constexpr float INFINITE = std::numeric_limits<float>::infinity();
inline constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
inline constexpr float LOG2E = 1.44269504088896340736f;

// Threads of a row: up to MANY_ROWS_LANES where there are MANY_ROWS, which four blocks of a multiprocessor share.
// Reasoned (64 registers each), not measured.
inline constexpr int MOST_LANES = 1024, MANY_ROWS_LANES = 256, MANY_ROWS = 1024;
inline constexpr int BLOCK = 256;   // threads, where a row does not need more
inline constexpr int BATCH = 4;     // vectors that a thread has under way
inline constexpr int NO_CLASS = -1;

struct Call {
    Rows x;                 // (rows, classes)   logits
    const int64_t* target;  // (rows,)
    Parameter weight;       // (classes,), or none: its values are 1
    int64_t rows, ignore_index;
    int classes;
    float smoothing, share;  // share: smoothing / classes
    float z_loss;
    float scale, softcap, inverse;  // inverse: scale / softcap; softcap: 0 for none
    bool is_half;
    int lanes;  // threads of a group
};

// --- Arithmetic -----------------------------------------------------------------------------------------------------

// exp(x) of differences to a maximum, which are not large.
GPTKERN_DEVICE float exp_of(float x) { return exp2_approx(x * LOG2E); }

// The maximum to subtract: 0 for a row of -inf, as -inf - -inf is NaN.
GPTKERN_DEVICE float finite(float m) { return m == -INFINITE ? 0.0f : m; }

// To a few units in the last place.
GPTKERN_DEVICE float tanh_of(float v) {
    // (1 - e) / (1 + e) with e = exp(-2 |v|); of a small v its own series, which the difference would lose the digits of
    const float e = exp_of(fabsf(v) * -2.0f), far = (1.0f - e) * reciprocal_approx(1.0f + e), v2 = v * v;
    const float near = v * (1.0f + v2 * (-1.0f / 3 + v2 * (2.0f / 15 + v2 * (-17.0f / 315 + v2 * (62.0f / 2835)))));
    return fabsf(v) < 0.25f ? near : v < 0.0f ? -far : far;
}

template <bool PLAIN>
GPTKERN_DEVICE float score_of(const Call& call, float x) {
    if (PLAIN || call.softcap == 0.0f) return x * call.scale;
    // s = softcap * tanh(s / softcap)
    return call.softcap * tanh_of(x * call.inverse);
}

// --- Targets --------------------------------------------------------------------------------------------------------

// Element `index` of a tensor of `dtype`.
GPTKERN_DEVICE float value_at(const void* values, int dtype, int64_t index) {
    if (dtype == FLOAT32) return load_global(static_cast<const float*>(values) + index);
    const uint32_t bits = load_global(static_cast<const uint16_t*>(values) + index);
    return dtype == FLOAT16 ? unpack<float16>(bits).x : unpack<bfloat16>(bits).x;
}

template <int BYTES>
GPTKERN_DEVICE int dtype_of(const Call& call) {
    return BYTES == 4 ? FLOAT32 : call.is_half ? FLOAT16 : BFLOAT16;
}

struct Target {
    bool counts;  // there is such a row, and its class is not the one that is ignored
    int y;        // NO_CLASS where the row is not read: it does not count, or there is no class of that number
    float own;    // w_y; 0 of a row that does not count, NaN of a class that there is none of
};

GPTKERN_DEVICE Target target_of(const Call& call, int64_t row) {
    Target target{false, NO_CLASS, 0.0f};
    if (row >= call.rows) return target;
    const int64_t y = load_global(call.target + row);
    if (y == call.ignore_index) return target;
    target.counts = true;
    target.own = NOT_A_NUMBER;
    if (y < 0 || y >= call.classes) return target;
    target.y = int(y);
    target.own = call.weight.values ? value_at(call.weight.values, call.weight.dtype, y) : 1.0f;
    return target;
}

// --- For launchers ----------------------------------------------------------------------------------------------------

inline Call call_of(const Tensor& x, int64_t stride, const Tensor& target, const Tensor& weight, int64_t ignore_index,
                    double smoothing, double z_loss, double softcap, double logit_scale) {
    Call call{};
    call.x = {at<const void>(x.address), stride};
    call.target = at<const int64_t>(target.address);
    call.weight = {at<const void>(weight.address), weight.dtype};
    call.rows = x.shape[0];
    call.ignore_index = ignore_index;
    call.classes = int(x.shape[1]);
    call.smoothing = float(smoothing);
    call.share = float(smoothing / double(x.shape[1]));
    call.z_loss = float(z_loss);
    call.scale = float(logit_scale);
    call.softcap = float(softcap);
    call.inverse = softcap > 0.0 ? float(logit_scale / softcap) : 0.0f;
    call.is_half = x.dtype == FLOAT16;
    const int vectors = most_vectors(call.classes, 16 / int(bytes_of(x.dtype)));
    call.lanes = std::min(lanes_of(vectors, BATCH), call.rows < MANY_ROWS ? MOST_LANES : MANY_ROWS_LANES);
    return call;
}

inline bool is_plain(const Call& call) { return call.softcap == 0.0f && call.smoothing == 0.0f; }

// Groups of a block.
inline int groups_of(const Call& call) { return std::max(BLOCK / call.lanes, 1); }

}  // namespace gptkern
