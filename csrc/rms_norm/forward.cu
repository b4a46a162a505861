// rms_norm in CUDA C++, forward. backward.cu has the backward.
//
//     s     = x, or x + residual
//     x_hat = s * rstd            rstd = 1 / sqrt(avg(s²) + eps)
//     y     = x_hat * weight
//
// Memory is the floor. With b bytes an element the forward moves 2 b a column (x in, y out; 4 b with a residual) and 4
// bytes a row (rstd). Some 6 instructions an element are under what an H200 issues in that time. At its data sheet's 4.8 TB/s a row of 4096
// bfloat16 takes 3.4 ns.
//
// Two kernels:
//     forward     a row belongs to a group of threads: a part of a warp, a warp, or several warps of one block, which
//                 hold it in registers and read it once: up to 32,768 columns (16,384 of a sum in float32), in vectors
//                 of 16 bytes (device/rows.cuh)
//     long        wider rows, a block each, in two walks over the row. The second one finds in shared memory what that
//                 has room for (96 KB), and reads the rest again
//
// float16 and bfloat16 are one kernel's instance, told apart at run time: what differs is the conversion.
#include "rms_norm/rms_norm.cuh"

namespace gptkern {
namespace {

// Values of a row that a thread holds: 64 registers are what each of 1024 threads can have. A residual's are on their way
// beside them, and of float32 there is room for half.
template <int BYTES, bool RESIDUAL>
constexpr int FORWARD_VALUES = RESIDUAL && BYTES == 4 ? 16 : 32;
constexpr int FORWARD_THREADS = 1024;

// rstd = 1 / sqrt(avg(x²) + eps)
GPTKERN_DEVICE float rstd_of(float squares, int width, float eps) {
    return 1.0f / sqrtf(squares / float(width) + eps);
}

struct Forward {
    Rows x;            // (rows, width)   input, of x_dtype
    Rows residual;     // (rows, width)   added to it, of residual_dtype, where there is one
    Parameter weight;  // (width,), or none: its values are 1
    void* y;           // (rows, width)   output, contiguous
    void* summed;      // (rows, width)   x + residual, of y's dtype, contiguous, where there is a residual
    float* rstd;       // (rows,)         kept for the backward
    int64_t rows;
    int width;
    int x_dtype, residual_dtype;
    float eps;
    bool is_half;  // float16 where y has 16 bits, else bfloat16
    int lanes;     // threads of a group
};

// held += added, rounded before it is normalised, so that the backward sees the same numbers.
template <int BYTES, int V>
GPTKERN_DEVICE void add(Raw<BYTES, V>& held, const Raw<BYTES, V>& added, bool is_half) {
    float values[V], more[V];
    to_floats(held, is_half, values);
    to_floats(added, is_half, more);
#pragma unroll
    for (int e = 0; e < V; ++e) values[e] += more[e];
    held = from_floats<BYTES>(values, is_half);
}

template <int BYTES, bool RESIDUAL>
__global__ void __launch_bounds__(FORWARD_THREADS) rms_norm_forward_kernel(const __grid_constant__ Forward call) {
    constexpr int V = 16 / BYTES, SLOTS = FORWARD_VALUES<BYTES, RESIDUAL> / V;
    auto& shared = shared_memory<Shared>();
    const int group = int(threadIdx.x) / call.lanes, lane = int(threadIdx.x) % call.lanes;
    const int64_t row = int64_t(blockIdx.x) * (int(blockDim.x) / call.lanes) + group;
    // A group without a row loads zeros and stores nothing.
    const int end = row < call.rows ? call.width : 0;
    const Line<BYTES> y(call.y, row * call.width, 1, true);
    const Columns<V> columns{lane, call.lanes, y.shift()};

    Raw<BYTES, V> held[SLOTS];
    if constexpr (RESIDUAL) {
        Raw<BYTES, V> added[SLOTS];
        load_row_of<Reuse::ONCE>(held, call.x, row, call.x_dtype, columns, end);
        load_row_of<Reuse::ONCE>(added, call.residual, row, call.residual_dtype, columns, end);
        const auto summed = line_of<V, BYTES>({call.summed, call.width}, row, 0, columns.shift);
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            add(held[i], added[i], call.is_half);
            store(summed, columns[i], end, held[i]);
        }
    } else {
        load_row(held, line_of<V, BYTES>(call.x, row, 0, columns.shift), columns, end);
    }
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
        float values[V];
        to_floats(held[i], call.is_half, values);
#pragma unroll
        for (int e = 0; e < V; ++e) squares += values[e] * values[e];
    }
    const float rstd = rstd_of(over_group<Sum>(squares, call.lanes, shared.scratch[0]), call.width, call.eps);
    if (lane == 0 && end > 0) store_global(call.rstd + row, rstd);

#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
        if (columns[i] >= end) continue;
        float values[V], weight[V];
        to_floats(held[i], call.is_half, values);
        load_parameter<BYTES>(weight, call.weight, 1.0f, call.is_half, 0, columns[i], end, columns.shift);
        // y = x_hat * weight
#pragma unroll
        for (int e = 0; e < V; ++e) values[e] = values[e] * rstd * weight[e];
        store(y, columns[i], end, values, call.is_half);
    }
}

template <int BYTES, bool RESIDUAL>
__global__ void __launch_bounds__(LONG_THREADS, 2) rms_norm_forward_long_kernel(const __grid_constant__ Forward call) {
    constexpr int V = 16 / BYTES;
    auto& shared = shared_memory<Shared>();
    const Stash<BYTES, V> stash{reinterpret_cast<typename Raw<BYTES, V>::Piece*>(&shared + 1),
                                int(LONG_STASH) / (LONG_THREADS * 16)};
    const int64_t row = blockIdx.x;
    const int end = call.width;
    const Line<BYTES> y(call.y, row * end, 1, true);
    const int threads = LONG_THREADS;
    const Columns<V> columns{int(threadIdx.x), threads, y.shift()};
    const auto x = line_of<V, BYTES>(call.x, row, 0, columns.shift);
    const auto summed = line_of<V, BYTES>({call.summed, end}, row, 0, columns.shift);
    // With a residual the second walk reads what this thread has written in the first.
    const auto again = [&](int i) {
        if constexpr (RESIDUAL) return load<V, Reuse::WRITTEN>(summed, columns[i], end, end);
        return load<V>(x, columns[i], end, end);
    };

    float squares = 0.0f;
#pragma unroll 4
    for (int i = 0; columns[i] < end; ++i) {
        Raw<BYTES, V> raw;
        if constexpr (RESIDUAL) {
            Raw<BYTES, V> one[1], added[1];
            const Columns<V> here{0, threads, -columns[i]};
            load_row_of<Reuse::ONCE>(one, call.x, row, call.x_dtype, here, end);
            load_row_of<Reuse::ONCE>(added, call.residual, row, call.residual_dtype, here, end);
            add(one[0], added[0], call.is_half);
            raw = one[0];
            store(summed, columns[i], end, raw);
        } else {
            raw = load<V>(x, columns[i], end, end);
        }
        stash.keep(i, raw);
        float values[V], of_vector = 0.0f;
        to_floats(raw, call.is_half, values);
#pragma unroll
        for (int e = 0; e < V; ++e) of_vector += values[e] * values[e];
        squares += of_vector;
    }
    const float rstd = rstd_of(over_group<Sum>(squares, LONG_THREADS, shared.scratch[0]), end, call.eps);
    if (threadIdx.x == 0) store_global(call.rstd + row, rstd);

#pragma unroll 2
    for (int i = 0; columns[i] < end; ++i) {
        float values[V], weight[V];
        to_floats(i < stash.room ? stash.take(i) : again(i), call.is_half, values);
        load_parameter<BYTES>(weight, call.weight, 1.0f, call.is_half, 0, columns[i], end, columns.shift);
        // y = x_hat * weight
#pragma unroll
        for (int e = 0; e < V; ++e) values[e] = values[e] * rstd * weight[e];
        store(y, columns[i], end, values, call.is_half);
    }
}

// --- Launcher --------------------------------------------------------------------------------------------------------

template <int BYTES, bool RESIDUAL>
void forward_of(Forward& call, void* stream) {
    constexpr int V = 16 / BYTES;
    call.lanes = lanes_of(vectors_of(call.y, call.width, V), FORWARD_VALUES<BYTES, RESIDUAL> / V);
    LaunchShape shape;
    if (call.lanes > FORWARD_THREADS) {
        shape.grid_x = call.rows;
        shape.threads = LONG_THREADS;
        shape.shared_bytes = sizeof(Shared) + LONG_STASH;
        return GPTKERN_LAUNCH((rms_norm_forward_long_kernel<BYTES, RESIDUAL>), shape, stream, call);
    }
    const int groups = groups_of(call.lanes);
    shape.grid_x = ceil_div(call.rows, int64_t(groups));
    shape.threads = unsigned(groups * call.lanes);
    shape.shared_bytes = sizeof(Shared);
    GPTKERN_LAUNCH((rms_norm_forward_kernel<BYTES, RESIDUAL>), shape, stream, call);
}

}  // namespace

Unreadable rms_norm_forward(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& y,
                            const Tensor& summed, const Tensor& rstd, double eps, Address stream) {
    if (y.elements() == 0) return nullptr;
    const auto x_stride = row_stride(x), residual_stride = row_stride(residual);
    if (!x_stride) return &x;
    if (!residual_stride) return &residual;
    Forward call{};
    call.x = {at<const void>(x.address), *x_stride};
    call.residual = {at<const void>(residual.address), *residual_stride};
    call.weight = {at<const void>(weight.address), weight.dtype};
    call.y = at<void>(y.address);
    call.summed = at<void>(summed.address);
    call.rstd = at<float>(rstd.address);
    call.rows = rstd.elements();
    call.width = int(y.shape[y.rank - 1]);
    call.x_dtype = x.dtype;
    call.residual_dtype = residual.dtype;
    call.eps = float(eps);
    call.is_half = y.dtype == FLOAT16;
    void* on = at<void>(stream);
    if (y.dtype == FLOAT32)
        residual.address ? forward_of<4, true>(call, on) : forward_of<4, false>(call, on);
    else
        residual.address ? forward_of<2, true>(call, on) : forward_of<2, false>(call, on);
    return nullptr;
}

}  // namespace gptkern
