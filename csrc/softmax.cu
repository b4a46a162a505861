// softmax: fused scale, mask and causal limit; forward and backward, over any dimension.
//
//     z_j = scale * x_j  (+ mask_j)        -inf where a bool mask or the causal limit hides j
//     y_j = exp(z_j - m) / sum_k exp(z_k - m)        m = max(z)
//
// Backward, with dy the gradient of y:
//     dx_j = scale * y_j * (dy_j - sum_k dy_k * y_k)
// A y of 16 bits is divided by its own sum first. Rounding moves that sum away from 1, and with it the weighted mean
// of dy, which nearly cancels dy where one y_j is nearly 1.
//
// Memory is the limit. A row is read once and written once, and nothing moves fewer bytes:
//     forward     width * (bytes of x + bytes of y)        bf16: 4 B an element
//     backward    width * (2 * bytes of y + bytes of dx)   bf16: 6 B an element
// Under a causal limit only what lies left of it is read (and the rest of the vector that it cuts), and zeros are
// written right of it. With about ten instructions and one exponential (two where a row is walked twice) an element,
// an H100 or H200 (4 * 32 lanes and 16 exponentials a clock and multiprocessor, for 15 to 20 bytes) waits for memory:
// the floor is bytes / bandwidth.
//
// Three kernels each for forward and backward:
//     rows     the row lies along memory and is held in registers: 1 to 32 lanes, or several warps, a row
//     long     a row of any width, by a block, which walks it twice: a running maximum and sum first, the output then.
//              What shared memory holds of the row is stashed there by the first walk and not read again.
//     columns  the softmax is over another dimension than the innermost: threads lie along the innermost, which is
//              where memory is contiguous, and each walks down its columns, twice, with a stash as above
//
// A thread loads and stores 16 bytes of the output's dtype at a time, and as many values of the input. Rows of odd
// widths begin anywhere: vectors are laid over memory's own grid of 16 bytes, so that a row's first and last vectors
// are partial, and go element by element. So do tensors that no vector fits (strides, other alignments).
// Which bytes a thread holds follows from width, output dtype and alignment alone: the order of every sum is fixed.
//
// float16 and bfloat16 are one kernel's instance, told apart at run time: what differs is the conversion.
#include <algorithm>
#include <limits>
#include <stdexcept>

#include "device/launch.cuh"
#include "device/lines.cuh"
#include "device/ptx.cuh"
#include "device/warp.cuh"
#include "launchers.h"

namespace gptkern {
namespace {

constexpr float LOG2E = 1.44269504088896340736f;
constexpr float HIDDEN = -std::numeric_limits<float>::infinity();

// Values of a row that a thread holds in registers: 64 registers are what 1024 threads can have, and the backward
// holds two rows.
constexpr int FORWARD_VALUES = 32, BACKWARD_VALUES = 16;
constexpr int MOST_THREADS = 1024;
constexpr int ROWS_THREADS = 256;  // of a block whose rows need no more
constexpr int LONG_THREADS = 512;  // two blocks with a full stash each fit a multiprocessor of sm_90, one fits sm_80
constexpr int COLUMNS_THREADS = 256;
constexpr int BATCH = 2;  // vectors that a walk has under way at a time
// Threads side by side in the columns kernel: 8 * 16 bytes are a cache line, the others of the block share the walk.
constexpr int MOST_ACROSS = 8;
constexpr int MOST_DIMENSIONS = 8;

// A Dtype, or this.
constexpr int NO_MASK = -1;

// Where rows lie. Index r of a row counts through `dimensions`, the last one fastest. Strides are in elements.
struct Walk {
    struct Dimension {
        int64_t in_stride, mask_stride, out_stride;
        unsigned size;
    };
    Dimension dimensions[MOST_DIMENSIONS];
    int count;  // of dimensions; 0: one row
    int width;
    int64_t in_stride_n, mask_stride_n, out_stride_n;
    // Of the columns kernels: a "row" above is a group of `lanes` columns, neighbours in the output.
    int lanes;
    int64_t in_stride_lane, mask_stride_lane;
    bool vectors;  // input and output take vectors along the lanes
    unsigned rows;
};

struct Options {
    float scale;
    bool in_is_half, out_is_half;  // float16, where a dtype has 16 bits, else bfloat16
    int mask_kind;
    unsigned causal_rows;  // row r sees columns 0 … r % causal_rows; 0: all
    int threads;           // of a row; of the columns kernels, side by side
    int stashed;           // vectors a thread has room for in the stash
};

// --- Rows -----------------------------------------------------------------------------------------------------------

struct Offsets {
    int64_t in, mask, out;
};

GPTKERN_DEVICE Offsets offsets_of(const Walk& walk, unsigned row) {
    Offsets offsets{0, 0, 0};
    for (int i = walk.count - 1; i >= 0; --i) {
        const Walk::Dimension& dimension = walk.dimensions[i];
        // A row lies inside of the outermost dimension: no division there, and none at all in a contiguous tensor.
        unsigned place = i == 0 ? row : row % dimension.size;
        row = i == 0 ? 0 : row / dimension.size;
        offsets.in += int64_t(place) * dimension.in_stride;
        offsets.mask += int64_t(place) * dimension.mask_stride;
        offsets.out += int64_t(place) * dimension.out_stride;
    }
    return offsets;
}

// --- Arithmetic -----------------------------------------------------------------------------------------------------

// exp(x). The maximum is subtracted before the change of base: max * log2(e) would be rounded at the size of |max|.
GPTKERN_DEVICE float exp_of(float x) { return exp2_approx(x * LOG2E); }

// The maximum to subtract: 0 for a row of -inf, as -inf - -inf is NaN.
GPTKERN_DEVICE float finite(float m) { return m == HIDDEN ? 0.0f : m; }

// z = scale * x, of x converted to the output's dtype first, as PyTorch does.
template <int IN, int OUT, int V>
GPTKERN_DEVICE void scaled(const Raw<IN, V>& raw, const Options& options, float (&z)[V]) {
    to_floats(raw, options.in_is_half, z);
    if constexpr (OUT == 2) {
        if (IN == 4 || options.in_is_half != options.out_is_half) {
            Raw<OUT, V> converted = from_floats<OUT>(z, options.out_is_half);
            to_floats(converted, options.out_is_half, z);
        }
    }
#pragma unroll
    for (int e = 0; e < V; ++e) z[e] *= options.scale;
}

// A row of the mask, of any of its dtypes.
struct MaskLine {
    const void* mask;
    int64_t offset, stride;
    int kind;

    template <int BYTES, int V>
    GPTKERN_DEVICE Raw<BYTES, V> load_as(int n, int end, int width, int shift, int step) const {
        Line<BYTES> line(mask, offset, stride, false);
        line.vectors = step == 1 && line.template takes_vectors<V>(shift);
        return load<V>(line, n, end, width, step);
    }
    // z += mask, or -inf where a bool mask hides.
    template <int V>
    GPTKERN_DEVICE void apply(float (&z)[V], int n, int end, int width, int shift, int step = 1) const {
        if (n >= end) return;
        if (kind == BOOL) {
            Raw<1, V> raw = load_as<1, V>(n, end, width, shift, step);
#pragma unroll
            for (int e = 0; e < V; ++e)
                if ((raw.words[e / 4] >> 8 * (e % 4) & 0xff) == 0) z[e] = HIDDEN;
            return;
        }
        float added[V];
        if (kind == FLOAT32)
            to_floats(load_as<4, V>(n, end, width, shift, step), false, added);
        else
            to_floats(load_as<2, V>(n, end, width, shift, step), kind == FLOAT16, added);
#pragma unroll
        for (int e = 0; e < V; ++e) z[e] += added[e];
    }
};

// values[e] = filling where n + e is not in 0 … end - 1.
template <int V>
GPTKERN_DEVICE void fill_outside(float (&values)[V], int n, int end, float filling) {
    if (n >= 0 && n + V <= end) return;
#pragma unroll
    for (int e = 0; e < V; ++e)
        if (n + e < 0 || n + e >= end) values[e] = filling;
}

// 1 / sum. A row of which nothing takes part is 0 under a mask or a causal limit, and PyTorch's NaN (0 * inf) without.
GPTKERN_DEVICE float reciprocal_of(float total, bool may_be_empty) {
    return may_be_empty && total == 0.0f ? 0.0f : 1.0f / total;
}

// --- Reductions over the threads of a row ---------------------------------------------------------------------------
// A row has `threads` neighbours: a power of 2 up to a warp, or whole warps. All threads of the block call these; a
// scratch is used once.

using Scratch = float[MOST_THREADS / WARP];

struct Largest {
    static constexpr float NONE = HIDDEN;
    GPTKERN_DEVICE static float of(float a, float b) { return fmaxf(a, b); }
};
struct Sum {
    static constexpr float NONE = 0.0f;
    GPTKERN_DEVICE static float of(float a, float b) { return a + b; }
};

template <class Of>
GPTKERN_DEVICE float over_lanes(float value, int lanes, int stride = 1) {
    for (int mask = lanes / 2; mask >= stride; mask /= 2) value = Of::of(value, shuffle_xor(value, mask));
    return value;
}

// The warps' own results, which lie in `scratch`, made one.
template <class Of>
GPTKERN_DEVICE float over_warps(const Scratch& scratch, int threads) {
    int warps = threads / WARP, first = warp_of_thread() / warps * warps;
    return over_lanes<Of>(lane_of_thread() < warps ? load_shared(&scratch[first + lane_of_thread()]) : Of::NONE, WARP);
}

template <class Of>
GPTKERN_DEVICE float over_row(float value, int threads, Scratch& scratch) {
    value = over_lanes<Of>(value, threads < WARP ? threads : WARP);
    if (threads <= WARP) return value;
    if (lane_of_thread() == 0) store_shared(&scratch[warp_of_thread()], value);
    __syncthreads();
    return over_warps<Of>(scratch, threads);
}

struct TwoScratches {
    Scratch first, second;
};

// --- Forward --------------------------------------------------------------------------------------------------------

template <int IN, int OUT>
__global__ void __launch_bounds__(MOST_THREADS) softmax_forward_rows_kernel(
    const void* x,     // (rows, width) in the strides of `walk`; IN bytes an element
    const void* mask,  // broadcast to the same; bool or floating point
    void* y,           // (rows, width), contiguous; OUT bytes an element
    const __grid_constant__ Walk walk, const __grid_constant__ Options options) {
    constexpr int V = 16 / OUT, K = FORWARD_VALUES / V;
    auto& scratch = shared_memory<TwoScratches>();
    unsigned row = blockIdx.x * (blockDim.x / options.threads) + threadIdx.x / options.threads;
    int thread = int(threadIdx.x % options.threads);
    bool in_range = row < walk.rows;
    Offsets offsets = offsets_of(walk, in_range ? row : 0);
    int width = in_range ? walk.width : 0;
    // Columns 0 … visible - 1 are seen.
    int visible = options.causal_rows && in_range ? min(width, int(row % options.causal_rows) + 1) : width;

    Line<OUT> y_line(y, offsets.out, 1, true);
    int shift = int(reinterpret_cast<uintptr_t>(y_line.start) / OUT % V);
    Line<IN> x_line(x, offsets.in, walk.in_stride_n, false);
    x_line.vectors = x_line.template takes_vectors<V>(shift);

    // All loads are under way before the first value is used.
    Raw<IN, V> raw[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
        int n = (k * options.threads + thread) * V - shift;
        raw[k] = load<V>(x_line, n, visible, width);
    }
    float z[K][V];
    float m = HIDDEN;
#pragma unroll
    for (int k = 0; k < K; ++k) {
        int n = (k * options.threads + thread) * V - shift;
        scaled<IN, OUT>(raw[k], options, z[k]);
        if (options.mask_kind != NO_MASK)
            MaskLine{mask, offsets.mask, walk.mask_stride_n, options.mask_kind}.apply(z[k], n, visible, width, shift);
        fill_outside(z[k], n, visible, HIDDEN);
#pragma unroll
        for (int e = 0; e < V; ++e) m = fmaxf(m, z[k][e]);
    }
    m = finite(over_row<Largest>(m, options.threads, scratch.first));

    // p = exp(z - m)
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
        for (int e = 0; e < V; ++e) total += z[k][e] = exp_of(z[k][e] - m);
    total = over_row<Sum>(total, options.threads, scratch.second);

    // y = p / total
    float reciprocal = reciprocal_of(total, options.causal_rows || options.mask_kind != NO_MASK);
#pragma unroll
    for (int k = 0; k < K; ++k) {
        int n = (k * options.threads + thread) * V - shift;
        if (n >= width) continue;
#pragma unroll
        for (int e = 0; e < V; ++e) z[k][e] *= reciprocal;
        // Also in a row whose visible part holds NaN.
        fill_outside(z[k], n, visible, 0.0f);
        store(y_line, n, width, z[k], options.out_is_half);
    }
}

// A running maximum and the sum of exp(z - maximum), of what a thread has walked over.
struct Running {
    float m = HIDDEN, total = 0.0f;

    template <int COUNT>
    GPTKERN_DEVICE void take(const float (&z)[COUNT]) {
        float larger = m;
#pragma unroll
        for (int e = 0; e < COUNT; ++e) larger = fmaxf(larger, z[e]);
        // total = total * exp(m - m') + sum(exp(z - m'))        m' = max(m, max(z))
        rescale(larger);
#pragma unroll
        for (int e = 0; e < COUNT; ++e) total += exp_of(z[e] - finite(m));
    }
    GPTKERN_DEVICE void rescale(float larger) {
        total *= exp_of(m - finite(larger));
        m = larger;
    }
};

template <int IN, int OUT>
__global__ void __launch_bounds__(LONG_THREADS) softmax_forward_long_kernel(
    const void* x,  // arguments: as of softmax_forward_rows_kernel
    const void* mask, void* y, const __grid_constant__ Walk walk, const __grid_constant__ Options options) {
    constexpr int V = 16 / OUT;
    auto& scratch = shared_memory<TwoScratches>();
    Stash<IN, V> stash{reinterpret_cast<typename Raw<IN, V>::Piece*>(&scratch + 1), options.stashed};
    unsigned row = blockIdx.x;
    int threads = int(blockDim.x);
    Offsets offsets = offsets_of(walk, row);
    int width = walk.width;
    int visible = options.causal_rows ? min(width, int(row % options.causal_rows) + 1) : width;

    Line<OUT> y_line(y, offsets.out, 1, true);
    int shift = int(reinterpret_cast<uintptr_t>(y_line.start) / OUT % V);
    Line<IN> x_line(x, offsets.in, walk.in_stride_n, false);
    x_line.vectors = x_line.template takes_vectors<V>(shift);
    MaskLine mask_line{mask, offsets.mask, walk.mask_stride_n, options.mask_kind};
    auto column = [&](int i) { return (i * threads + int(threadIdx.x)) * V - shift; };

    // One body for both walks: half the code, for the compiler and for the instruction cache.
    Running running;
    float m = 0.0f, reciprocal = 0.0f;
#pragma unroll 1
    for (int writes = 0; writes < 2; ++writes) {
        if (writes) {
            // total = sum over threads of total_t * exp(m_t - m)
            running.rescale(over_row<Largest>(running.m, threads, scratch.first));
            m = finite(running.m);
            float total = over_row<Sum>(running.total, threads, scratch.second);
            reciprocal = reciprocal_of(total, options.causal_rows || options.mask_kind != NO_MASK);
        }
        int end = writes ? width : visible;
        for (int i = 0; column(i) < end; i += BATCH) {
            Raw<IN, V> raw[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; ++b)
                if (!writes || i + b >= stash.room) raw[b] = load<V>(x_line, column(i + b), visible, width);
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                int n = column(i + b);
                if (n >= end) continue;
                if (!writes)
                    stash.keep(i + b, raw[b]);
                else if (i + b < stash.room && n < visible)
                    raw[b] = stash.take(i + b);
                float z[V];
                scaled<IN, OUT>(raw[b], options, z);
                if (options.mask_kind != NO_MASK) mask_line.apply(z, n, visible, width, shift);
                fill_outside(z, n, visible, HIDDEN);
                if (!writes) {
                    running.take(z);
                    continue;
                }
                // y = exp(z - m) / total
#pragma unroll
                for (int e = 0; e < V; ++e) z[e] = exp_of(z[e] - m) * reciprocal;
                fill_outside(z, n, visible, 0.0f);
                store(y_line, n, width, z, options.out_is_half);
            }
        }
    }
}

// Of the columns kernels: where this thread's V columns lie and how it walks them.
template <int V>
struct Columns {
    unsigned group;  // of `lanes` columns
    int first, step, across, walker, walkers;

    GPTKERN_DEVICE Columns(const Walk& walk, int across) : across(across) {
        int blocks = ceil_div(walk.lanes, across * V), place = int(threadIdx.x) % across;
        group = blockIdx.x / unsigned(blocks);
        // Without vectors a thread's columns lie apart, so that neighbouring threads have neighbouring ones.
        step = walk.vectors ? 1 : across;
        first = int(blockIdx.x % unsigned(blocks)) * across * V + (walk.vectors ? place * V : place);
        walker = int(threadIdx.x) / across;
        walkers = int(blockDim.x) / across;
    }
    GPTKERN_DEVICE int n(int i) const { return i * walkers + walker; }
};

// A value of each of the V columns from every walker: [warp][column][thread across], so that no two lanes share a bank.
template <int V>
struct ColumnScratch {
    float values[COLUMNS_THREADS / WARP][V][MOST_ACROSS];
};

template <class Of, int V>
GPTKERN_DEVICE void over_walkers(float (&values)[V], const Columns<V>& columns, ColumnScratch<V>& scratch) {
    int place = lane_of_thread() % columns.across;
#pragma unroll
    for (int e = 0; e < V; ++e) {
        values[e] = over_lanes<Of>(values[e], WARP, columns.across);
        if (lane_of_thread() < columns.across) store_shared(&scratch.values[warp_of_thread()][e][place], values[e]);
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < V; ++e) values[e] = Of::NONE;
#pragma unroll 1
    for (int warp = 0; warp < int(blockDim.x) / WARP; ++warp)
#pragma unroll
        for (int e = 0; e < V; ++e) values[e] = Of::of(values[e], load_shared(&scratch.values[warp][e][place]));
}

template <int V>
struct ColumnScratches {
    ColumnScratch<V> first, second;
};

template <int IN, int OUT>
__global__ void __launch_bounds__(COLUMNS_THREADS) softmax_forward_columns_kernel(
    const void* x,     // (rows, width, lanes) in the strides of `walk`; IN bytes an element
    const void* mask,  // broadcast to the same; bool or floating point
    void* y,           // (rows, width, lanes), contiguous but for the dimensions of `rows`; OUT bytes an element
    const __grid_constant__ Walk walk, const __grid_constant__ Options options) {
    constexpr int V = 16 / OUT;
    auto& scratch = shared_memory<ColumnScratches<V>>();
    Stash<IN, V> stash{reinterpret_cast<typename Raw<IN, V>::Piece*>(&scratch + 1), options.stashed};
    Columns<V> columns(walk, options.threads);
    Offsets offsets = offsets_of(walk, columns.group);
    auto loaded = [&](int i) {
        int n = columns.n(i);
        Line<IN> line(x, offsets.in + n * walk.in_stride_n, walk.in_stride_lane, walk.vectors);
        return load<V>(line, n < walk.width ? columns.first : walk.lanes, walk.lanes, walk.lanes, columns.step);
    };

    Running running[V];
    float m[V], reciprocal[V];
#pragma unroll 1
    for (int writes = 0; writes < 2; ++writes) {
        if (writes) {
#pragma unroll
            for (int e = 0; e < V; ++e) m[e] = running[e].m;
            over_walkers<Largest>(m, columns, scratch.first);
#pragma unroll
            for (int e = 0; e < V; ++e) {
                running[e].rescale(m[e]);
                m[e] = finite(m[e]);
                reciprocal[e] = running[e].total;
            }
            over_walkers<Sum>(reciprocal, columns, scratch.second);
#pragma unroll
            for (int e = 0; e < V; ++e) reciprocal[e] = reciprocal_of(reciprocal[e], options.mask_kind != NO_MASK);
        }
        for (int i = 0; columns.n(i) < walk.width; i += BATCH) {
            Raw<IN, V> raw[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; ++b)
                if (!writes || i + b >= stash.room) raw[b] = loaded(i + b);
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                int n = columns.n(i + b);
                if (n >= walk.width) continue;
                if (!writes)
                    stash.keep(i + b, raw[b]);
                else if (i + b < stash.room)
                    raw[b] = stash.take(i + b);
                float z[V];
                scaled<IN, OUT>(raw[b], options, z);
                if (options.mask_kind != NO_MASK) {
                    int64_t offset = offsets.mask + n * walk.mask_stride_n;
                    MaskLine{mask, offset, walk.mask_stride_lane, options.mask_kind}.apply(
                        z, columns.first, walk.lanes, walk.lanes, 0, columns.step);
                }
                if (!writes) {
#pragma unroll
                    for (int e = 0; e < V; ++e) running[e].take({z[e]});
                    continue;
                }
                // y = exp(z - m) / total
#pragma unroll
                for (int e = 0; e < V; ++e) z[e] = exp_of(z[e] - m[e]) * reciprocal[e];
                Line<OUT> y_line(y, offsets.out + n * walk.out_stride_n, 1, walk.vectors);
                store(y_line, columns.first, walk.lanes, z, options.out_is_half, columns.step);
            }
        }
    }
}

// --- Backward -------------------------------------------------------------------------------------------------------

// Sums over a row: of y, and of dy * y.
struct Dots {
    float total = 0.0f, dot = 0.0f;

    // dy counts as 0 where it is hidden: y is 0 there already, but dy might be infinite.
    template <int V>
    GPTKERN_DEVICE void take(const float (&y)[V], const float (&dy)[V]) {
#pragma unroll
        for (int e = 0; e < V; ++e) {
            total += y[e];
            dot += dy[e] * y[e];
        }
    }
};

// What is left of a row's sums for its elements: dx = factor * y * (dy - dot).
struct Gradient {
    float factor, dot;

    Gradient() = default;
    GPTKERN_DEVICE Gradient(float scale, float total, float dot, bool renormalised) {
        float reciprocal = renormalised ? reciprocal_of(total, true) : 1.0f;
        factor = scale * reciprocal;
        this->dot = dot * reciprocal;
    }
    GPTKERN_DEVICE float of(float y, float dy) const { return factor * y * (dy - dot); }
};

template <int IN, int OUT>
__global__ void __launch_bounds__(MOST_THREADS) softmax_backward_rows_kernel(
    const void* dy,  // (rows, width) in the strides of `walk`; OUT bytes an element
    const void* y,   // (rows, width), contiguous; OUT bytes an element
    void* dx,        // (rows, width), contiguous; IN bytes an element
    const __grid_constant__ Walk walk, const __grid_constant__ Options options) {
    constexpr int V = 16 / OUT, K = BACKWARD_VALUES / V;
    auto& scratch = shared_memory<TwoScratches>();
    unsigned row = blockIdx.x * (blockDim.x / options.threads) + threadIdx.x / options.threads;
    int thread = int(threadIdx.x % options.threads);
    bool in_range = row < walk.rows;
    Offsets offsets = offsets_of(walk, in_range ? row : 0);
    int width = in_range ? walk.width : 0;
    int visible = options.causal_rows && in_range ? min(width, int(row % options.causal_rows) + 1) : width;

    Line<OUT> y_line(y, offsets.out, 1, false), dy_line(dy, offsets.in, walk.in_stride_n, false);
    Line<IN> dx_line(dx, offsets.out, 1, false);
    int shift = int(reinterpret_cast<uintptr_t>(y_line.start) / OUT % V);
    y_line.vectors = true;
    dy_line.vectors = dy_line.template takes_vectors<V>(shift);
    dx_line.vectors = dx_line.template takes_vectors<V>(shift);

    Raw<OUT, V> raw_y[K], raw_dy[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
        int n = (k * options.threads + thread) * V - shift;
        raw_y[k] = load<V>(y_line, n, visible, width);
        raw_dy[k] = load<V>(dy_line, n, visible, width);
    }
    float y_of[K][V], dy_of[K][V];
    Dots dots;
#pragma unroll
    for (int k = 0; k < K; ++k) {
        int n = (k * options.threads + thread) * V - shift;
        to_floats(raw_y[k], options.out_is_half, y_of[k]);
        to_floats(raw_dy[k], options.out_is_half, dy_of[k]);
        fill_outside(dy_of[k], n, visible, 0.0f);
        dots.take(y_of[k], dy_of[k]);
    }
    dots.total = over_row<Sum>(dots.total, options.threads, scratch.first);
    dots.dot = over_row<Sum>(dots.dot, options.threads, scratch.second);
    // dx = scale * y * (dy - sum(dy * y))
    Gradient gradient(options.scale, dots.total, dots.dot, OUT == 2);
#pragma unroll
    for (int k = 0; k < K; ++k) {
        int n = (k * options.threads + thread) * V - shift;
        if (n >= width) continue;
#pragma unroll
        for (int e = 0; e < V; ++e) dy_of[k][e] = gradient.of(y_of[k][e], dy_of[k][e]);
        // Also in a row whose visible part holds NaN.
        fill_outside(dy_of[k], n, visible, 0.0f);
        store(dx_line, n, width, dy_of[k], options.in_is_half);
    }
}

template <int IN, int OUT>
__global__ void __launch_bounds__(LONG_THREADS) softmax_backward_long_kernel(
    const void* dy,  // arguments: as of softmax_backward_rows_kernel
    const void* y, void* dx, const __grid_constant__ Walk walk, const __grid_constant__ Options options) {
    constexpr int V = 16 / OUT;
    auto& scratch = shared_memory<TwoScratches>();
    Stash<OUT, V> y_stash{reinterpret_cast<typename Raw<OUT, V>::Piece*>(&scratch + 1), options.stashed};
    Stash<OUT, V> dy_stash{y_stash.start + options.stashed * int(blockDim.x), options.stashed};
    unsigned row = blockIdx.x;
    int threads = int(blockDim.x);
    Offsets offsets = offsets_of(walk, row);
    int width = walk.width;
    int visible = options.causal_rows ? min(width, int(row % options.causal_rows) + 1) : width;

    Line<OUT> y_line(y, offsets.out, 1, false), dy_line(dy, offsets.in, walk.in_stride_n, false);
    Line<IN> dx_line(dx, offsets.out, 1, false);
    int shift = int(reinterpret_cast<uintptr_t>(y_line.start) / OUT % V);
    y_line.vectors = true;
    dy_line.vectors = dy_line.template takes_vectors<V>(shift);
    dx_line.vectors = dx_line.template takes_vectors<V>(shift);
    auto column = [&](int i) { return (i * threads + int(threadIdx.x)) * V - shift; };


    Dots dots;
    Gradient gradient{};
#pragma unroll 1
    for (int writes = 0; writes < 2; ++writes) {
        if (writes) {
            dots.total = over_row<Sum>(dots.total, threads, scratch.first);
            dots.dot = over_row<Sum>(dots.dot, threads, scratch.second);
            gradient = Gradient(options.scale, dots.total, dots.dot, OUT == 2);
        }
        int end = writes ? width : visible;
        for (int i = 0; column(i) < end; i += BATCH) {
            Raw<OUT, V> raw_y[BATCH], raw_dy[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; ++b)
                if (!writes || i + b >= y_stash.room) {
                    raw_y[b] = load<V>(y_line, column(i + b), visible, width);
                    raw_dy[b] = load<V>(dy_line, column(i + b), visible, width);
                }
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                int n = column(i + b);
                if (n >= end) continue;
                if (!writes) {
                    y_stash.keep(i + b, raw_y[b]);
                    dy_stash.keep(i + b, raw_dy[b]);
                } else if (i + b < y_stash.room && n < visible) {
                    raw_y[b] = y_stash.take(i + b);
                    raw_dy[b] = dy_stash.take(i + b);
                }
                float y_of[V], dy_of[V];
                to_floats(raw_y[b], options.out_is_half, y_of);
                to_floats(raw_dy[b], options.out_is_half, dy_of);
                fill_outside(dy_of, n, visible, 0.0f);
                if (!writes) {
                    dots.take(y_of, dy_of);
                    continue;
                }
#pragma unroll
                for (int e = 0; e < V; ++e) dy_of[e] = gradient.of(y_of[e], dy_of[e]);
                fill_outside(dy_of, n, visible, 0.0f);
                store(dx_line, n, width, dy_of, options.in_is_half);
            }
        }
    }
}

template <int IN, int OUT>
__global__ void __launch_bounds__(COLUMNS_THREADS) softmax_backward_columns_kernel(
    const void* dy,  // (rows, width, lanes) in the strides of `walk`; OUT bytes an element
    const void* y,   // (rows, width, lanes), contiguous but for the dimensions of `rows`; OUT bytes an element
    void* dx,        // as y; IN bytes an element
    const __grid_constant__ Walk walk, const __grid_constant__ Options options) {
    constexpr int V = 16 / OUT;
    auto& scratch = shared_memory<ColumnScratches<V>>();
    Stash<OUT, V> y_stash{reinterpret_cast<typename Raw<OUT, V>::Piece*>(&scratch + 1), options.stashed};
    Stash<OUT, V> dy_stash{y_stash.start + options.stashed * int(blockDim.x), options.stashed};
    Columns<V> columns(walk, options.threads);
    Offsets offsets = offsets_of(walk, columns.group);
    auto load_at = [&](int i, Raw<OUT, V>& raw_y, Raw<OUT, V>& raw_dy) {
        int n = columns.n(i), first = n < walk.width ? columns.first : walk.lanes;
        Line<OUT> y_line(y, offsets.out + n * walk.out_stride_n, 1, walk.vectors);
        Line<OUT> dy_line(dy, offsets.in + n * walk.in_stride_n, walk.in_stride_lane, walk.vectors);
        raw_y = load<V>(y_line, first, walk.lanes, walk.lanes, columns.step);
        raw_dy = load<V>(dy_line, first, walk.lanes, walk.lanes, columns.step);
    };


    Dots dots[V];
    Gradient gradient[V] = {};
#pragma unroll 1
    for (int writes = 0; writes < 2; ++writes) {
        if (writes) {
            float total[V], dot[V];
#pragma unroll
            for (int e = 0; e < V; ++e) {
                total[e] = dots[e].total;
                dot[e] = dots[e].dot;
            }
            over_walkers<Sum>(total, columns, scratch.first);
            over_walkers<Sum>(dot, columns, scratch.second);
#pragma unroll
            for (int e = 0; e < V; ++e) gradient[e] = Gradient(options.scale, total[e], dot[e], OUT == 2);
        }
        for (int i = 0; columns.n(i) < walk.width; i += BATCH) {
            Raw<OUT, V> raw_y[BATCH], raw_dy[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; ++b)
                if (!writes || i + b >= y_stash.room) load_at(i + b, raw_y[b], raw_dy[b]);
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                int n = columns.n(i + b);
                if (n >= walk.width) continue;
                if (!writes) {
                    y_stash.keep(i + b, raw_y[b]);
                    dy_stash.keep(i + b, raw_dy[b]);
                } else if (i + b < y_stash.room) {
                    raw_y[b] = y_stash.take(i + b);
                    raw_dy[b] = dy_stash.take(i + b);
                }
                float y_of[V], dy_of[V];
                to_floats(raw_y[b], options.out_is_half, y_of);
                to_floats(raw_dy[b], options.out_is_half, dy_of);
                if (!writes) {
#pragma unroll
                    for (int e = 0; e < V; ++e) dots[e].take({y_of[e]}, {dy_of[e]});
                    continue;
                }
#pragma unroll
                for (int e = 0; e < V; ++e) dy_of[e] = gradient[e].of(y_of[e], dy_of[e]);
                Line<IN> dx_line(dx, offsets.out + n * walk.out_stride_n, 1, walk.vectors);
                store(dx_line, columns.first, walk.lanes, dy_of, options.in_is_half, columns.step);
            }
        }
    }
}

// --- Launchers ------------------------------------------------------------------------------------------------------

int bytes_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

unsigned next_power_of_2(unsigned x) {
    unsigned power = 1;
    while (power < x) power *= 2;
    return power;
}

// How the kernels walk tensors of one shape: every dimension but `dim` counts rows, neighbours merged where all strides
// allow. Where something lies inside of `dim`, the innermost of it is `lanes`.
Walk walk_of(const Tensor& in, int dim, const Tensor& mask) {
    Walk walk{};
    // Of a tensor without dimensions.
    walk.width = 1;
    walk.out_stride_n = 1;
    int missing = in.rank - mask.rank;
    int64_t out_stride = 1;
    Walk::Dimension merged[MOST_DIMENSIONS];  // innermost first
    int count = 0;
    bool has_lanes = false;
    for (int d = in.rank - 1; d >= 0; --d) {
        bool broadcast = d < missing || mask.shape[d - missing] == 1;
        int64_t size = in.shape[d], mask_stride = broadcast ? 0 : mask.strides[d - missing];
        if (d == dim) {
            walk.width = int(size);
            walk.in_stride_n = in.strides[d];
            walk.mask_stride_n = mask_stride;
            walk.out_stride_n = out_stride;
            has_lanes = count > 0;
        } else if (size != 1) {
            Walk::Dimension* inner = count ? &merged[count - 1] : nullptr;
            if (inner && in.strides[d] == inner->in_stride * inner->size &&
                mask_stride == inner->mask_stride * inner->size && out_stride == inner->out_stride * inner->size) {
                inner->size *= unsigned(size);
            } else {
                if (count == MOST_DIMENSIONS) throw std::runtime_error("gptkern: softmax: too many dimensions");
                merged[count++] = {in.strides[d], mask_stride, out_stride, unsigned(size)};
            }
        }
        out_stride *= size;
    }
    int innermost = 0;
    walk.lanes = 1;
    if (has_lanes) {
        walk.lanes = int(merged[0].size);
        walk.in_stride_lane = merged[0].in_stride;
        walk.mask_stride_lane = merged[0].mask_stride;
        innermost = 1;
    }
    walk.rows = 1;
    walk.count = count - innermost;
    for (int i = 0; i < walk.count; ++i) {
        walk.dimensions[i] = merged[count - 1 - i];
        walk.rows *= walk.dimensions[i].size;
    }
    return walk;
}

// Whether the softmax is along the last dimension and its elements lie apart: every one of them would cost a sector of
// memory, twice.
bool is_spread_row(const Tensor& in, int dim) {
    return dim >= 0 && dim == in.rank - 1 && in.shape[dim] > 1 && in.strides[dim] > 1;
}

// Whether a tensor's vectors of V elements along the lanes are whole and aligned everywhere.
bool lanes_take_vectors(const Walk& walk, const Tensor& in, int V) {
    int in_bytes = bytes_of(in.dtype), piece = std::min(16, V * in_bytes) / in_bytes;
    bool whole = walk.lanes % V == 0 && walk.in_stride_lane == 1 && in.address % (piece * in_bytes) == 0 &&
                 walk.in_stride_n % piece == 0;
    for (int i = 0; i < walk.count; ++i) whole = whole && walk.dimensions[i].in_stride % piece == 0;
    return whole;
}

// Which kernel, and how its blocks are cut.
struct Plan {
    enum { ROWS, LONG, COLUMNS } kind;
    LaunchShape shape;
};

// `held`: bytes of a vector's place in the stash; `values`: of a thread of the rows kernel. Rows wider than
// `one_pass_limit` are walked by the other kernels, with no more than that in the stash: set by tests alone.
Plan plan_of(const Walk& walk, Options& options, int V, int values, int held, int64_t one_pass_limit) {
    auto room = [&](size_t scratch, int threads, int64_t vectors, int64_t limit) {
        int64_t most = (SHARED_BYTES_EVERYWHERE - int64_t(scratch)) / (int64_t(threads) * held);
        if (walk.width > one_pass_limit) most = std::min(most, limit);
        return int(std::min(most, ceil_div(vectors, int64_t(threads))));
    };
    if (walk.out_stride_n != 1) {
        size_t scratch = V == 4 ? sizeof(ColumnScratches<4>) : sizeof(ColumnScratches<8>);
        unsigned across = next_power_of_2(unsigned(ceil_div(walk.lanes, V)));
        options.threads = int(std::min<unsigned>(across, MOST_ACROSS));
        int walkers = int(std::min<unsigned>(next_power_of_2(unsigned(walk.width)), COLUMNS_THREADS / options.threads));
        int threads = std::max(WARP, options.threads * walkers);
        walkers = threads / options.threads;
        options.stashed = room(scratch, threads, int64_t(ceil_div(walk.width, walkers)) * threads,
                               one_pass_limit / walkers);
        unsigned blocks = walk.rows * unsigned(ceil_div(walk.lanes, options.threads * V));
        return {Plan::COLUMNS,
                {.grid_x = blocks, .threads = unsigned(threads),
                 .shared_bytes = scratch + size_t(options.stashed) * threads * held}};
    }
    // A row that does not begin on the grid of vectors has one more than it fills.
    int64_t vectors = ceil_div(int64_t(walk.width) + (walk.width % V ? V - 1 : 0), int64_t(V));
    int64_t threads = ceil_div(vectors, int64_t(values / V));
    if (threads <= MOST_THREADS && walk.width <= one_pass_limit) {
        // At least 4 threads a row where there is work for them: 64 bytes in one request.
        constexpr unsigned LEAST = 4;
        if (threads < WARP)
            threads = std::max(next_power_of_2(unsigned(threads)), std::min(next_power_of_2(unsigned(vectors)), LEAST));
        else
            threads = ceil_div<int64_t>(threads, WARP) * WARP;
        int64_t rows = std::max<int64_t>(1, ROWS_THREADS / threads);
        int64_t least_rows = std::max<int64_t>(1, WARP / threads);  // whole warps
        while (rows / 2 >= std::max<int64_t>(walk.rows, least_rows)) rows /= 2;
        options.threads = int(threads);
        return {Plan::ROWS,
                {.grid_x = unsigned(ceil_div<int64_t>(walk.rows, rows)), .threads = unsigned(threads * rows),
                 .shared_bytes = sizeof(TwoScratches)}};
    }
    // Narrow rows come here in tests alone: a thread then walks several vectors all the same.
    constexpr int VECTORS_A_THREAD = 8;
    threads = std::clamp<int64_t>(vectors / VECTORS_A_THREAD / WARP * WARP, WARP, LONG_THREADS);
    options.threads = int(threads);
    options.stashed = room(sizeof(TwoScratches), int(threads), vectors, ceil_div(one_pass_limit, threads * V));
    return {Plan::LONG,
            {.grid_x = walk.rows, .threads = unsigned(threads),
             .shared_bytes = sizeof(TwoScratches) + size_t(options.stashed) * threads * held}};
}

#define GPTKERN_SOFTMAX(DIRECTION, IN, OUT)                                                                           \
    (plan.kind == Plan::ROWS                                                                                          \
         ? GPTKERN_LAUNCH((softmax_##DIRECTION##_rows_kernel<IN, OUT>), plan.shape, stream, first, second, third,     \
                          walk, options)                                                                              \
     : plan.kind == Plan::LONG                                                                                        \
         ? GPTKERN_LAUNCH((softmax_##DIRECTION##_long_kernel<IN, OUT>), plan.shape, stream, first, second, third,     \
                          walk, options)                                                                              \
         : GPTKERN_LAUNCH((softmax_##DIRECTION##_columns_kernel<IN, OUT>), plan.shape, stream, first, second, third,  \
                          walk, options))

}  // namespace

Unreadable softmax_forward(const Tensor& x, const Tensor& mask, const Tensor& y, int dim, double scale, bool is_causal,
                           int64_t one_pass_limit, Address stream_address) {
    if (y.elements() == 0) return nullptr;
    if (dim < 0) dim += x.rank;
    if (is_spread_row(x, dim)) return &x;
    int x_bytes = bytes_of(x.dtype), y_bytes = bytes_of(y.dtype), V = 16 / y_bytes;
    Walk walk = walk_of(x, dim, mask);
    Options options{.scale = float(scale), .in_is_half = x.dtype == FLOAT16, .out_is_half = y.dtype == FLOAT16,
                    .mask_kind = mask.object ? int(mask.dtype) : NO_MASK,
                    .causal_rows = is_causal ? unsigned(x.shape[x.rank - 2]) : 0};
    walk.vectors = lanes_take_vectors(walk, x, V);
    Plan plan = plan_of(walk, options, V, FORWARD_VALUES, V * x_bytes, one_pass_limit);
    auto *first = at<const void>(x.address), *second = at<const void>(mask.address);
    auto *third = at<void>(y.address), *stream = at<void>(stream_address);
    if (x_bytes == 2 && y_bytes == 2) GPTKERN_SOFTMAX(forward, 2, 2);
    else if (x_bytes == 4 && y_bytes == 4) GPTKERN_SOFTMAX(forward, 4, 4);
    else if (x_bytes == 2) GPTKERN_SOFTMAX(forward, 2, 4);
    else GPTKERN_SOFTMAX(forward, 4, 2);
    return nullptr;
}

Unreadable softmax_backward(const Tensor& dy, const Tensor& y, const Tensor& dx, int dim, double scale, bool is_causal,
                            int64_t one_pass_limit, Address stream_address) {
    if (dx.elements() == 0) return nullptr;
    if (dim < 0) dim += dy.rank;
    if (is_spread_row(dy, dim)) return &dy;
    if (!is_contiguous(y)) return &y;
    int y_bytes = bytes_of(y.dtype), dx_bytes = bytes_of(dx.dtype), V = 16 / y_bytes;
    Walk walk = walk_of(dy, dim, {});
    Options options{.scale = float(scale), .in_is_half = dx.dtype == FLOAT16, .out_is_half = y.dtype == FLOAT16,
                    .mask_kind = NO_MASK, .causal_rows = is_causal ? unsigned(dy.shape[dy.rank - 2]) : 0};
    // y and dx are contiguous, and the lanes a multiple of V: only where they begin may spoil their vectors.
    walk.vectors = lanes_take_vectors(walk, dy, V) && y.address % 16 == 0 && dx.address % 16 == 0;
    Plan plan = plan_of(walk, options, V, BACKWARD_VALUES, 2 * V * y_bytes, one_pass_limit);
    auto *first = at<const void>(dy.address), *second = at<const void>(y.address);
    auto *third = at<void>(dx.address), *stream = at<void>(stream_address);
    if (dx_bytes == 2 && y_bytes == 2) GPTKERN_SOFTMAX(backward, 2, 2);
    else if (dx_bytes == 4 && y_bytes == 4) GPTKERN_SOFTMAX(backward, 4, 4);
    else if (dx_bytes == 2) GPTKERN_SOFTMAX(backward, 2, 4);
    else GPTKERN_SOFTMAX(backward, 4, 2);
    return nullptr;
}

}  // namespace gptkern
