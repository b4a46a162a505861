// nonlinearity in CUDA C++, backward: of x, and up and the bias as forward.cu had them.
//
//     dx = dy * f'(x + bias)      gated: dx = dy * up * f'(x), dup = dy * f(x)        dbias = sum over rows of dx
//
// Memory is the floor. With b bytes an element it moves 3 b a column (dy and x in, dx out), gated 5 b (dy, x, up; dx,
// dup). Some 30 instructions an element are under what an H200 issues in that time (forward.cu has its rates).
//
// Two kernels, and one that adds partial sums (device/norm.cuh):
//     backward    as the forward's
//     bias        warps walk rows, each of a range of columns: every thread keeps its columns, and sums dx in float32.
//                 A block adds its warps' sums and stores one row of partial sums
//     reduce      adds the blocks' partial sums: an order that is fixed, without atomics
#include "device/launch.cuh"
#include "nonlinearity/nonlinearity.cuh"

namespace gptkern {
namespace {

// Vectors of each operand that a thread has under way, and blocks of a multiprocessor (forward.cu). Not measured.
constexpr int ROWS = 2, BLOCKS = 3;
constexpr int BIAS_ROWS = 2, BIAS_BLOCKS = 2;  // gptkern/operators/nonlinearity/cuda.py, _BLOCKS
constexpr int WARPS = BLOCK / WARP;

template <class T>
struct Backward {
    Walked<const T> dy;  // (rows, width)
    Walked<const T> x;   // (rows, width)
    Walked<const T> up;  // (rows, width)   or null
    Parameter bias;      // (width,)        or none
    Walked<T> dx;        // (rows, width)   or null
    Walked<T> dup;       // (rows, width)   or null
    float* partial;      // (blocks, width) sums of dx, or null
    int64_t rows;
    int width;
    int lanes;   // threads that share a row
    int chunks;  // of a row, a block's each
    int activation;
    SumsLayout sums;
};

template <class T, int V>
__global__ void __launch_bounds__(BLOCK, BLOCKS)
    nonlinearity_backward_kernel(const __grid_constant__ Backward<T> call) {
    const int groups = int(blockDim.x) / call.lanes;
    const int column = (int(blockIdx.x % call.chunks) * call.lanes + int(threadIdx.x) % call.lanes) * V;
    const int64_t first = int64_t(blockIdx.x / call.chunks) * (groups * ROWS) + int(threadIdx.x) / call.lanes;
    const int count = call.width - column;
    if (count <= 0) return;

    Vector<T, V> dy[ROWS], x[ROWS], up[ROWS];
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
        const int64_t row = first + k * groups;
        if (row >= call.rows) continue;
        dy[k] = load_part<T, V>(call.dy.at(row, column), count);
        x[k] = load_part<T, V>(call.x.at(row, column), count);
        if (call.up.start) up[k] = load_part<T, V>(call.up.at(row, column), count);
    }
    for_activation(call.activation, [&](auto constant) {
        constexpr int ACTIVATION = decltype(constant)::value;
#pragma unroll
        for (int k = 0; k < ROWS; ++k) {
            const int64_t row = first + k * groups;
            if (row >= call.rows) continue;
            float dx[V], dup[V];
#pragma unroll
            for (int e = 0; e < V; ++e) {
                const float of_y = to_float(dy[k][e]);
                const auto [value, slope] = activated_with_slope(to_float(x[k][e]), ACTIVATION);
                // dup = dy * f(x)
                dup[e] = of_y * value;
                // dx = dy * f'(x), or dy * up * f'(x)
                dx[e] = of_y * slope;
                if (call.up.start) dx[e] *= to_float(up[k][e]);
            }
            if (call.dx.start) store_part(call.dx.at(row, column), rounded<T>(dx), count);
            if (call.dup.start) store_part(call.dup.at(row, column), rounded<T>(dup), count);
        }
    });
}

template <class T, int V>
__global__ void __launch_bounds__(BLOCK, BIAS_BLOCKS)
    nonlinearity_bias_kernel(const __grid_constant__ Backward<T> call) {
    const int range = WARP * V, begin = int(blockIdx.y) * range, lanes = WARP;
    const int column = begin + lane_of_thread() * V, count = call.width - column;
    const int64_t step = int64_t(gridDim.x) * WARPS, first = int64_t(blockIdx.x) * WARPS + warp_of_thread();

    float bias[V], sums[1][V] = {};
    if (call.bias.values && count > 0) load_bias<T>(bias, call.bias, column, call.width);
    for_activation(call.activation, [&](auto constant) {
        constexpr int ACTIVATION = decltype(constant)::value;
#pragma unroll 1
        for (int64_t start = first; count > 0 && start < call.rows; start += step * BIAS_ROWS) {
            Vector<T, V> dy[BIAS_ROWS], x[BIAS_ROWS];
#pragma unroll
            for (int k = 0; k < BIAS_ROWS; ++k) {
                const int64_t row = start + k * step;
                if (row >= call.rows) continue;
                dy[k] = load_part<T, V>(call.dy.at(row, column), count);
                x[k] = load_part<T, V>(call.x.at(row, column), count);
            }
#pragma unroll
            for (int k = 0; k < BIAS_ROWS; ++k) {
                const int64_t row = start + k * step;
                if (row >= call.rows) continue;
                float dx[V];
#pragma unroll
                for (int e = 0; e < V; ++e) {
                    const float z = to_float(x[k][e]);
                    // dx = dy * f'(x + bias)
                    dx[e] = to_float(dy[k][e]) * activation_slope(call.bias.values ? z + bias[e] : z, ACTIVATION);
                    sums[0][e] += dx[e];
                }
                if (call.dx.start) store_part(call.dx.at(row, column), rounded<T>(dx), count);
            }
        }
    });
    if (call.partial)
        store_partial(sums, Columns<V>{lane_of_thread(), lanes, 0}, &shared_memory<float>(), call.sums,
                      warp_of_thread(), WARPS, min(range, call.width - begin),
                      call.partial + (int64_t(blockIdx.x) * call.width + begin));
}

// A block sums 32 columns.
__global__ void __launch_bounds__(REDUCE_WARPS* WARP) nonlinearity_reduce_kernel(
    const float* partial,  // (partials, width)
    float* dbias,          // (width,)
    int partials, int width) {
    reduce_partials(partial, dbias, partials, width);
}

// --- Launcher --------------------------------------------------------------------------------------------------------

template <class T, int V>
void launch(Backward<T> call, void* stream) {
    call.lanes = lanes_of_row(ceil_div(call.width, V));
    call.chunks = ceil_div(ceil_div(call.width, V), call.lanes);
    const int groups = BLOCK / call.lanes;
    LaunchShape shape;
    shape.grid_x = ceil_div(call.rows, int64_t(groups * ROWS)) * call.chunks;
    shape.threads = unsigned(groups * call.lanes);
    GPTKERN_LAUNCH((nonlinearity_backward_kernel<T, V>), shape, stream, call);
}

template <class T, int V>
void launch_bias(Backward<T> call, int64_t blocks, void* stream) {
    call.sums = sums_layout(V, 1, WARP, WARPS);
    LaunchShape shape;
    shape.grid_x = blocks;
    shape.grid_y = ceil_div(call.width, WARP * V);
    shape.threads = BLOCK;
    shape.shared_bytes = bytes_of(call.sums, V);
    GPTKERN_LAUNCH((nonlinearity_bias_kernel<T, V>), shape, stream, call);
}

struct Tensors {
    const Tensor &dy, &x, &up, &bias, &dx, &dup, &dbias, &partial;
};

template <class T>
void backward_of(const Tensors& of, int activation, bool packed, const Shape& shape, bool flat,
                 void* stream) {
    Backward<T> call{};
    call.dy = walked<const T>(of.dy, shape, flat);
    call.x = walked<const T>(of.x, shape, flat);
    call.up = packed ? second_half(call.x, shape.width) : walked<const T>(of.up, shape, flat);
    call.bias = {at<const void>(of.bias.address), of.bias.dtype};
    call.dx = walked<T>(of.dx, shape, flat);
    call.dup = packed ? second_half(call.dx, shape.width) : walked<T>(of.dup, shape, flat);
    call.partial = at<float>(of.partial.address);
    call.rows = shape.rows;
    call.width = shape.width;
    call.activation = activation;
    constexpr int V = VECTOR<T>;
    const auto fits = [&](const auto& walk) { return whole_vectors<V>(walk, call.rows); };
    const bool whole = fits(call.dy) && fits(call.x) && fits(call.up) && fits(call.dx) && fits(call.dup);
    if (!of.bias.object && !call.partial) return whole ? launch<T, V>(call, stream) : launch<T, 1>(call, stream);
    int64_t blocks = ceil_div(call.rows, int64_t(WARPS * BIAS_ROWS));
    if (call.partial) blocks = of.partial.shape[0];
    whole ? launch_bias<T, V>(call, blocks, stream) : launch_bias<T, 1>(call, blocks, stream);
    if (call.partial)
        GPTKERN_LAUNCH((nonlinearity_reduce_kernel), reduce_shape(call.width), stream, call.partial,
                       at<float>(of.dbias.address), int(blocks), call.width);
}

}  // namespace

Unreadable nonlinearity_backward(const Tensor& dy, const Tensor& x, const Tensor& up, const Tensor& bias,
                                 const Tensor& dx, const Tensor& dup, const Tensor& dbias, const Tensor& partial,
                                 int activation, bool packed, Address stream) {
    if (dy.elements() == 0) return nullptr;
    for (const Tensor* tensor : {&dy, &x, &up})
        if (!row_stride(*tensor)) return tensor;
    if (!is_contiguous(bias)) return &bias;
    const bool flat = !bias.object && !partial.object && !packed && is_contiguous(dy) && is_contiguous(x) &&
                      (!up.object || is_contiguous(up));
    const Shape shape = shape_of(dy, flat);
    auto* start = x.dtype == FLOAT32   ? &backward_of<float>
                  : x.dtype == FLOAT16 ? &backward_of<float16>
                                       : &backward_of<bfloat16>;
    start({dy, x, up, bias, dx, dup, dbias, partial}, activation, packed, shape, flat, at<void>(stream));
    return nullptr;
}

}  // namespace gptkern
