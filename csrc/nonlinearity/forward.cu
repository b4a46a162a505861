// nonlinearity in CUDA C++, forward: GELU and SiLU, plain and gated.
//
//     y = f(x + bias)             gated: y = f(x) * up
//
// Memory is the floor. With b bytes an element it moves 2 b a column (x in, y out), gated 3 b. Some 15 to 25
// instructions an element are under what an H200 issues in that time: at its data sheet's 4.8 TB/s, 132 multiprocessors
// and 1.755 GHz a multiprocessor has 25 for each 16-bit width that is moved.
//
// A thread has neighbouring columns of several rows, loads all of them before it uses the first, and a bias once.
#include "device/launch.cuh"
#include "nonlinearity/nonlinearity.cuh"

namespace gptkern {
namespace {

// Vectors of each operand that a thread has under way, and blocks of a multiprocessor: 32 KB of each operand, where an
// H200 needs some 25 KB for its share of 4.8 TB/s at 700 ns. With 4 vectors and 3 blocks ptxas spills. Not measured.
constexpr int ROWS = 2, BLOCKS = 4;

template <class T>
struct Forward {
    Walked<const T> x;   // (rows, width)
    Walked<const T> up;  // (rows, width)   or null
    Parameter bias;      // (width,)        or none
    Walked<T> y;         // (rows, width)
    int64_t rows;
    int width;
    int lanes;   // threads that share a row
    int chunks;  // of a row, a block's each
    int activation;
};

template <class T, int V>
__global__ void __launch_bounds__(BLOCK, BLOCKS) nonlinearity_forward_kernel(const __grid_constant__ Forward<T> call) {
    const int groups = int(blockDim.x) / call.lanes;
    const int column = (int(blockIdx.x % call.chunks) * call.lanes + int(threadIdx.x) % call.lanes) * V;
    const int64_t first = int64_t(blockIdx.x / call.chunks) * (groups * ROWS) + int(threadIdx.x) / call.lanes;
    const int count = call.width - column;
    if (count <= 0) return;

    float bias[V];
    if (call.bias.values) load_bias<T>(bias, call.bias, column, call.width);
    Vector<T, V> x[ROWS], up[ROWS];
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
        const int64_t row = first + k * groups;
        if (row >= call.rows) continue;
        x[k] = load_part<T, V>(call.x.at(row, column), count);
        if (call.up.start) up[k] = load_part<T, V>(call.up.at(row, column), count);
    }
    for_activation(call.activation, [&](auto constant) {
        constexpr int ACTIVATION = decltype(constant)::value;
#pragma unroll
        for (int k = 0; k < ROWS; ++k) {
            const int64_t row = first + k * groups;
            if (row >= call.rows) continue;
            float y[V];
#pragma unroll
            for (int e = 0; e < V; ++e) {
                const float z = to_float(x[k][e]);
                // y = f(x + bias), or f(x) * up
                y[e] = activated(call.bias.values ? z + bias[e] : z, ACTIVATION);
                if (call.up.start) y[e] *= to_float(up[k][e]);
            }
            store_part(call.y.at(row, column), rounded<T>(y), count);
        }
    });
}

// --- Launcher --------------------------------------------------------------------------------------------------------

template <class T, int V>
void launch(Forward<T> call, void* stream) {
    call.lanes = lanes_of_row(ceil_div(call.width, V));
    call.chunks = ceil_div(ceil_div(call.width, V), call.lanes);
    const int groups = BLOCK / call.lanes;
    LaunchShape shape;
    shape.grid_x = ceil_div(call.rows, int64_t(groups * ROWS)) * call.chunks;
    shape.threads = unsigned(groups * call.lanes);
    GPTKERN_LAUNCH((nonlinearity_forward_kernel<T, V>), shape, stream, call);
}

template <class T>
void forward_of(const Tensor& x, const Tensor& up, const Tensor& bias, const Tensor& y, int activation, bool packed,
                const Shape& shape, bool flat, void* stream) {
    Forward<T> call{};
    call.x = walked<const T>(x, shape, flat);
    call.up = packed ? second_half(call.x, shape.width) : walked<const T>(up, shape, flat);
    call.bias = {at<const void>(bias.address), bias.dtype};
    call.y = walked<T>(y, shape, flat);
    call.rows = shape.rows;
    call.width = shape.width;
    call.activation = activation;
    constexpr int V = VECTOR<T>;
    const bool whole = whole_vectors<V>(call.x, call.rows) && whole_vectors<V>(call.up, call.rows) &&
                       whole_vectors<V>(call.y, call.rows);
    whole ? launch<T, V>(call, stream) : launch<T, 1>(call, stream);
}

}  // namespace

Unreadable nonlinearity_forward(const Tensor& x, const Tensor& up, const Tensor& bias, const Tensor& y, int activation,
                                bool packed, Address stream) {
    if (y.elements() == 0) return nullptr;
    for (const Tensor* tensor : {&x, &up})
        if (!row_stride(*tensor)) return tensor;
    if (!is_contiguous(bias)) return &bias;
    const bool flat = !bias.object && !packed && is_contiguous(x) && (!up.object || is_contiguous(up));
    const Shape shape = shape_of(y, flat);
    auto* start = x.dtype == FLOAT32   ? &forward_of<float>
                  : x.dtype == FLOAT16 ? &forward_of<float16>
                                       : &forward_of<bfloat16>;
    start(x, up, bias, y, activation, packed, shape, flat, at<void>(stream));
    return nullptr;
}

}  // namespace gptkern
