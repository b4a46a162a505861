// softmax, backward: of y as forward.cu leaves it and its gradient dy.
//
//     dx_j = scale * y_j * (dy_j - sum_k dy_k * y_k)
//
// A y of 16 bits is divided by its own sum first. Rounding moves that sum away from 1, and with it the weighted mean
// of dy, which nearly cancels dy where one y_j is nearly 1.
//
// Memory is the limit, as in the forward: width * (2 * bytes of y + bytes of dx) a row, 6 an element of bfloat16;
// under a causal limit only what lies left of it is read.
//
// The three kernels, and how threads lie in a row: softmax.cuh.
#include "softmax/softmax.cuh"

namespace gptkern {
namespace {

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
    const int shift = y_line.shift();
    y_line.vectors = true;
    dy_line.vectors = dy_line.template takes_vectors<V>(shift);
    dx_line.vectors = dx_line.template takes_vectors<V>(shift);
    const Columns<V> columns{thread, options.threads, shift};

    Raw<OUT, V> raw_y[K], raw_dy[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
        int n = columns[k];
        raw_y[k] = load<V>(y_line, n, visible, width);
        raw_dy[k] = load<V>(dy_line, n, visible, width);
    }
    float y_of[K][V], dy_of[K][V];
    Dots dots;
#pragma unroll
    for (int k = 0; k < K; ++k) {
        int n = columns[k];
        to_floats(raw_y[k], options.out_is_half, y_of[k]);
        to_floats(raw_dy[k], options.out_is_half, dy_of[k]);
        fill_outside(dy_of[k], n, visible, 0.0f);
        dots.take(y_of[k], dy_of[k]);
    }
    dots.total = over_group<Sum>(dots.total, options.threads, scratch.first);
    dots.dot = over_group<Sum>(dots.dot, options.threads, scratch.second);
    // dx = scale * y * (dy - sum(dy * y))
    Gradient gradient(options.scale, dots.total, dots.dot, OUT == 2);
#pragma unroll
    for (int k = 0; k < K; ++k) {
        int n = columns[k];
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
    const int shift = y_line.shift();
    y_line.vectors = true;
    dy_line.vectors = dy_line.template takes_vectors<V>(shift);
    dx_line.vectors = dx_line.template takes_vectors<V>(shift);
    const Columns<V> columns{int(threadIdx.x), threads, shift};

    Dots dots;
    Gradient gradient{};
#pragma unroll 1
    for (int writes = 0; writes < 2; ++writes) {
        if (writes) {
            dots.total = over_group<Sum>(dots.total, threads, scratch.first);
            dots.dot = over_group<Sum>(dots.dot, threads, scratch.second);
            gradient = Gradient(options.scale, dots.total, dots.dot, OUT == 2);
        }
        int end = writes ? width : visible;
        for (int i = 0; columns[i] < end; i += BATCH) {
            Raw<OUT, V> raw_y[BATCH], raw_dy[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; ++b)
                if (!writes || i + b >= y_stash.room) {
                    raw_y[b] = load<V>(y_line, columns[i + b], visible, width);
                    raw_dy[b] = load<V>(dy_line, columns[i + b], visible, width);
                }
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                int n = columns[i + b];
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
    ColumnWalk<V> columns(walk, options.threads);
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

}  // namespace

Unreadable softmax_backward(const Tensor& dy, const Tensor& y, const Tensor& dx, int dim, double scale, bool is_causal,
                            int64_t one_pass_limit, Address stream_address) {
    if (dx.elements() == 0) return nullptr;
    if (dim < 0) dim += dy.rank;
    if (is_spread_row(dy, dim)) return &dy;
    if (!is_contiguous(y)) return &y;
    int y_bytes = int(bytes_of(y.dtype)), dx_bytes = int(bytes_of(dx.dtype)), V = 16 / y_bytes;
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
