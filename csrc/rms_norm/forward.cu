// rms_norm in CUDA C++, forward. backward.cu has the backward.
//
//     x_hat = x * rstd            rstd = 1 / sqrt(avg(x²) + eps)
//     y     = x_hat * weight
//
// Memory is the floor. With b bytes an element the forward moves 2 b a column (x in, y out) and 4 bytes a row (rstd).
// Some 6 instructions an element are under what an H200 issues in that time. At its data sheet's 4.8 TB/s a row of 4096
// bfloat16 takes 3.4 ns.
//
// Two kernels:
//     forward     a row belongs to a group of threads: a part of a warp, a warp, or several warps of one block, which
//                 hold it in registers and read it once: up to 32,768 columns, in vectors of 16 bytes (device/rows.cuh)
//     long        wider rows, a block each, in two walks over the row. The second one finds in shared memory what that
//                 has room for (96 KB), and reads the rest again
//
// float16 and bfloat16 are one kernel's instance, told apart at run time: what differs is the conversion.
#include "rms_norm/rms_norm.cuh"

namespace gptkern {
namespace {

// Values of a row that a thread holds: 64 registers are what each of 1024 threads can have.
constexpr int FORWARD_VALUES = 32, FORWARD_THREADS = 1024;

// rstd = 1 / sqrt(avg(x²) + eps)
GPTKERN_DEVICE float rstd_of(float squares, int width, float eps) {
    return 1.0f / sqrtf(squares / float(width) + eps);
}

struct Forward {
    Rows x;         // (rows, width)   input
    Parameter weight;  // (width,), or none: its values are 1
    void* y;        // (rows, width)   output, contiguous
    float* rstd;    // (rows,)         kept for the backward
    int64_t rows;
    int width;
    float eps;
    bool is_half;  // float16 where x has 16 bits, else bfloat16
    int lanes;     // threads of a group
};

template <int BYTES>
__global__ void __launch_bounds__(FORWARD_THREADS) rms_norm_forward_kernel(const __grid_constant__ Forward call) {
    constexpr int V = 16 / BYTES, SLOTS = FORWARD_VALUES / V;
    auto& shared = shared_memory<Shared>();
    const int group = int(threadIdx.x) / call.lanes, lane = int(threadIdx.x) % call.lanes;
    const int64_t row = int64_t(blockIdx.x) * (int(blockDim.x) / call.lanes) + group;
    // A group without a row loads zeros and stores nothing.
    const int end = row < call.rows ? call.width : 0;
    const Line<BYTES> y(call.y, row * call.width, 1, true);
    const Columns<V> columns{lane, call.lanes, y.shift()};
    const auto x = line_of<V, BYTES>(call.x, row, 0, columns.shift);

    Raw<BYTES, V> held[SLOTS];
    load_row(held, x, columns, end);
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

template <int BYTES>
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

    float squares = 0.0f;
#pragma unroll 4
    for (int i = 0; columns[i] < end; ++i) {
        auto raw = load<V>(x, columns[i], end, end);
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
        to_floats(i < stash.room ? stash.take(i) : load<V>(x, columns[i], end, end), call.is_half, values);
        load_parameter<BYTES>(weight, call.weight, 1.0f, call.is_half, 0, columns[i], end, columns.shift);
        // y = x_hat * weight
#pragma unroll
        for (int e = 0; e < V; ++e) values[e] = values[e] * rstd * weight[e];
        store(y, columns[i], end, values, call.is_half);
    }
}

// --- Launcher --------------------------------------------------------------------------------------------------------

template <int BYTES>
void forward_of(Forward& call, void* stream) {
    constexpr int V = 16 / BYTES;
    call.lanes = lanes_of(vectors_of(call.y, call.width, V), FORWARD_VALUES / V);
    LaunchShape shape;
    if (call.lanes > FORWARD_THREADS) {
        shape.grid_x = call.rows;
        shape.threads = LONG_THREADS;
        shape.shared_bytes = sizeof(Shared) + LONG_STASH;
        return GPTKERN_LAUNCH((rms_norm_forward_long_kernel<BYTES>), shape, stream, call);
    }
    const int groups = groups_of(call.lanes);
    shape.grid_x = ceil_div(call.rows, int64_t(groups));
    shape.threads = unsigned(groups * call.lanes);
    shape.shared_bytes = sizeof(Shared);
    GPTKERN_LAUNCH((rms_norm_forward_kernel<BYTES>), shape, stream, call);
}

}  // namespace

Unreadable rms_norm_forward(const Tensor& x, const Tensor& weight, const Tensor& y, const Tensor& rstd, double eps,
                            Address stream) {
    if (y.elements() == 0) return nullptr;
    const auto x_stride = row_stride(x);
    if (!x_stride) return &x;
    Forward call{};
    call.x = {at<const void>(x.address), *x_stride};
    call.weight = {at<const void>(weight.address), weight.dtype};
    call.y = at<void>(y.address);
    call.rstd = at<float>(rstd.address);
    call.rows = rstd.elements();
    call.width = int(x.shape[x.rank - 1]);
    call.eps = float(eps);
    call.is_half = x.dtype == FLOAT16;
    if (x.dtype == FLOAT32)
        forward_of<4>(call, at<void>(stream));
    else
        forward_of<2>(call, at<void>(stream));
    return nullptr;
}

}  // namespace gptkern
