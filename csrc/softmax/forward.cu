// softmax, forward: fused scale, mask and causal limit, over any dimension. backward.cu has the backward.
//
//     z_j = scale * x_j  (+ mask_j)        -inf where a bool mask or the causal limit hides j
//     y_j = exp(z_j - m) / sum_k exp(z_k - m)        m = max(z)
//
// Memory is the limit. A row is read once and written once, and nothing moves fewer bytes: width * (bytes of x + bytes
// of y), 4 an element of bfloat16. Under a causal limit only what lies left of it is read (and the rest of the vector
// that it cuts), and zeros are written right of it. With about ten instructions and one exponential (two where a row is
// walked twice) an element, an H100 or H200 (4 * 32 lanes and 16 exponentials a clock and multiprocessor, for 15 to 20
// bytes) waits for memory: the floor is bytes / bandwidth.
//
// The three kernels, and how threads lie in a row: softmax.cuh.
#include "softmax/softmax.cuh"

#include "device/ptx.cuh"

namespace gptkern {
namespace {

constexpr float LOG2E = 1.44269504088896340736f;

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

// --- Kernels --------------------------------------------------------------------------------------------------------

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
    const int shift = y_line.shift();
    Line<IN> x_line(x, offsets.in, walk.in_stride_n, false);
    x_line.vectors = x_line.template takes_vectors<V>(shift);
    const Columns<V> columns{thread, options.threads, shift};

    // All loads are under way before the first value is used.
    Raw<IN, V> raw[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
        int n = columns[k];
        raw[k] = load<V>(x_line, n, visible, width);
    }
    float z[K][V];
    float m = HIDDEN;
#pragma unroll
    for (int k = 0; k < K; ++k) {
        int n = columns[k];
        scaled<IN, OUT>(raw[k], options, z[k]);
        if (options.mask_kind != NO_MASK)
            MaskLine{mask, offsets.mask, walk.mask_stride_n, options.mask_kind}.apply(z[k], n, visible, width, shift);
        fill_outside(z[k], n, visible, HIDDEN);
#pragma unroll
        for (int e = 0; e < V; ++e) m = fmaxf(m, z[k][e]);
    }
    m = finite(over_group<Largest>(m, options.threads, scratch.first));

    // p = exp(z - m)
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
        for (int e = 0; e < V; ++e) total += z[k][e] = exp_of(z[k][e] - m);
    total = over_group<Sum>(total, options.threads, scratch.second);

    // y = p / total
    float reciprocal = reciprocal_of(total, options.causal_rows || options.mask_kind != NO_MASK);
#pragma unroll
    for (int k = 0; k < K; ++k) {
        int n = columns[k];
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
    const int shift = y_line.shift();
    Line<IN> x_line(x, offsets.in, walk.in_stride_n, false);
    x_line.vectors = x_line.template takes_vectors<V>(shift);
    MaskLine mask_line{mask, offsets.mask, walk.mask_stride_n, options.mask_kind};
    const Columns<V> columns{int(threadIdx.x), threads, shift};

    // One body for both walks: half the code, for the compiler and for the instruction cache.
    Running running;
    float m = 0.0f, reciprocal = 0.0f;
#pragma unroll 1
    for (int writes = 0; writes < 2; ++writes) {
        if (writes) {
            // total = sum over threads of total_t * exp(m_t - m)
            running.rescale(over_group<Largest>(running.m, threads, scratch.first));
            m = finite(running.m);
            float total = over_group<Sum>(running.total, threads, scratch.second);
            reciprocal = reciprocal_of(total, options.causal_rows || options.mask_kind != NO_MASK);
        }
        int end = writes ? width : visible;
        for (int i = 0; columns[i] < end; i += BATCH) {
            Raw<IN, V> raw[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; ++b)
                if (!writes || i + b >= stash.room) raw[b] = load<V>(x_line, columns[i + b], visible, width);
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                int n = columns[i + b];
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

template <int IN, int OUT>
__global__ void __launch_bounds__(COLUMNS_THREADS) softmax_forward_columns_kernel(
    const void* x,     // (rows, width, lanes) in the strides of `walk`; IN bytes an element
    const void* mask,  // broadcast to the same; bool or floating point
    void* y,           // (rows, width, lanes), contiguous but for the dimensions of `rows`; OUT bytes an element
    const __grid_constant__ Walk walk, const __grid_constant__ Options options) {
    constexpr int V = 16 / OUT;
    auto& scratch = shared_memory<ColumnScratches<V>>();
    Stash<IN, V> stash{reinterpret_cast<typename Raw<IN, V>::Piece*>(&scratch + 1), options.stashed};
    ColumnWalk<V> columns(walk, options.threads);
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

}  // namespace

Unreadable softmax_forward(const Tensor& x, const Tensor& mask, const Tensor& y, int dim, double scale, bool is_causal,
                           int64_t one_pass_limit, Address stream_address) {
    if (y.elements() == 0) return nullptr;
    if (dim < 0) dim += x.rank;
    if (is_spread_row(x, dim)) return &x;
    int x_bytes = int(bytes_of(x.dtype)), y_bytes = int(bytes_of(y.dtype)), V = 16 / y_bytes;
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

}  // namespace gptkern
