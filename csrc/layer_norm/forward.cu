// layer_norm in CUDA C++, forward. backward.cu has the backward.
//
//     s     = x, or x + residual
//     x_hat = (s - mean) * rstd            rstd = 1 / sqrt(var + eps)
//     y     = x_hat * weight + bias
//
// Memory is the floor. With b bytes an element it moves 2 b a column (x in, y out; 4 b with a residual) and 8 bytes a
// row (mean, rstd). Some 10 instructions an element are under what an H200 issues in that time. At its data sheet's 4.8
// TB/s a row of 1024 bfloat16 takes 0.86 ns.
//
// A group of threads holds a row in registers (device/rows.cuh), and mean and then variance are taken from there:
// they hold 64 KB of a row, and no variant keeps rows in shared memory. Wider ones are walked in chunks, all but the
// last read twice. Columns that are held:
//
//                  aligned rows     others
//     2 bytes            32,768      6,144
//     4 bytes            16,384      3,072
#include "device/launch.cuh"
#include "layer_norm/layer_norm.cuh"

namespace gptkern {
namespace {

// --- Forward ---------------------------------------------------------------------------------------------------------

struct Forward {
    Rows x;            // (rows, width)   input, of x_dtype
    Rows residual;     // (rows, width)   added to it, of residual_dtype, or null
    Parameter weight;  // (width,)        or none: its values are 1
    Parameter bias;    // (width,)        or none: its values are 0
    void* y;           // (rows, width)   output, of T, contiguous
    void* summed;      // (rows, width)   x + residual, of T, contiguous, where there is a residual
    float* mean;       // (rows,)         kept for the backward
    float* rstd;       // (rows,)
    int64_t rows;
    int width;
    int x_dtype, residual_dtype;
    float eps;
    int lanes;  // threads of a group
};

struct ForwardShared {
    Scratch sum, squares;
};

template <bool WHOLE>
constexpr int CHUNK_SLOTS = WHOLE ? 8 : 2;  // of the instance that takes rows of any width
// Its largest block, which leaves a thread 128 and 168 registers. Of the others two blocks of 512 threads have room at a
// time, each thread with 64 registers.
template <bool WHOLE>
constexpr int CHUNK_THREADS = WHOLE ? 512 : 384;
template <int SLOTS, bool WHOLE>
constexpr bool IS_CHUNKED = SLOTS == CHUNK_SLOTS<WHOLE>;

template <class T, int SLOTS, bool WHOLE>
__global__ void __launch_bounds__(IS_CHUNKED<SLOTS, WHOLE> ? CHUNK_THREADS<WHOLE> : 512,
                                  IS_CHUNKED<SLOTS, WHOLE> ? 1 : 2)
    layer_norm_forward_kernel(const __grid_constant__ Forward call) {
    constexpr int V = VECTOR<T>, BYTES = sizeof(T);
    constexpr bool CHUNKED = IS_CHUNKED<SLOTS, WHOLE>, HALF = IS_HALF<T>;
    // A row wider than a chunk is read again soon.
    constexpr Reuse REUSE = CHUNKED ? Reuse::AGAIN : Reuse::ONCE;
    auto& shared = shared_memory<ForwardShared>();
    const int lanes = call.lanes, width = call.width;
    const int group = int(threadIdx.x) / lanes, lane = int(threadIdx.x) % lanes;
    const int64_t row = int64_t(blockIdx.x) * (blockDim.x / lanes) + group;
    // A group without a row loads zeros and stores nothing.
    const bool has_row = row < call.rows;
    const int end = has_row ? width : 0;
    const Line<BYTES, WHOLE> y(call.y, row * width, 1, true);
    const int shift = y.shift(), chunk = SLOTS * lanes * V;
    Columns<V> columns{lane, lanes, shift};
    const auto summed = line_of<V, BYTES, WHOLE>({call.summed, width}, row, 0, shift);

    Raw<BYTES, V> held[SLOTS];
    float mean = 0.0f, m2 = 0.0f;  // of the columns so far; m2: the sum of squared deviations
    int start = 0;                 // of the chunk: its columns are [start - shift, start - shift + chunk)
#pragma unroll 1
    while (true) {
        load_row_of<REUSE, WHOLE>(held, call.x, row, call.x_dtype, columns, end);
        if (call.residual.start) {
            // Rounded to T before it is normalised: the backward sees the same numbers.
            Raw<BYTES, V> added[SLOTS];
            load_row_of<Reuse::ONCE, WHOLE>(added, call.residual, row, call.residual_dtype, columns, end);
#pragma unroll
            for (int i = 0; i < SLOTS; ++i) {
                float values[V], more[V];
                to_floats(held[i], HALF, values);
                to_floats(added[i], HALF, more);
#pragma unroll
                for (int e = 0; e < V; ++e) values[e] += more[e];
                held[i] = from_floats<BYTES>(values, HALF);
                store(summed, columns[i], end, held[i]);
            }
        }

        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            float values[V], of_slot = 0.0f;
            to_floats(held[i], HALF, values);
#pragma unroll
            for (int e = 0; e < V; ++e) of_slot += values[e];
            sum += of_slot;
        }
        sum = over_group<Sum>(sum, lanes, shared.sum);
        widen_again(held);
        const int begin = max(start - shift, 0), stop = min(start - shift + chunk, width);
        const float chunk_mean = divide_rn(sum, float(stop - begin));

        // var = avg((s - mean)²): a second pass over registers, not E[s²] - mean², which cancels at |mean| >> std
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            const int column = columns[i];
            if (WHOLE && column >= end) continue;
            float values[V];
            to_floats(held[i], HALF, values);
#pragma unroll
            for (int e = 0; e < V; ++e) {
                float centred = values[e] - chunk_mean;
                if (WHOLE || unsigned(column + e) < unsigned(end)) squares += centred * centred;
            }
        }
        squares = over_group<Sum>(squares, lanes, shared.squares);
        widen_again(held);

        if (!CHUNKED || start == 0) {
            mean = chunk_mean;
            m2 = squares;
        } else {
            // Chan's update, of a chunk b of n_b columns after n_a:
            // mean += delta * n_b / n        m2 += m2_b + delta² * n_a * n_b / n
            float delta = chunk_mean - mean, share = divide_rn(float(stop - begin), float(stop));
            mean += delta * share;
            m2 += squares + delta * delta * float(begin) * share;
        }
        if (!CHUNKED || stop == width) break;
        start += chunk;
        columns.shift -= chunk;
    }
    const float rstd = divide_rn(1.0f, sqrtf(m2 / float(width) + call.eps));
    if (lane == 0 && has_row) {
        store_global(call.mean + row, mean);
        store_global(call.rstd + row, rstd);
    }

    // The last chunk is still in registers: chunks are written from the last to the first.
#pragma unroll 1
    while (true) {
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            const int column = columns[i];
            if (column >= end) continue;
            float weight[V], bias[V], values[V];
            load_parameter<BYTES, WHOLE>(weight, call.weight, 1.0f, HALF, 0, column, end, shift);
            load_parameter<BYTES, WHOLE>(bias, call.bias, 0.0f, HALF, 0, column, end, shift);
            to_floats(held[i], HALF, values);
            // y = x_hat * weight + bias
#pragma unroll
            for (int e = 0; e < V; ++e) values[e] = (values[e] - mean) * rstd * weight[e] + bias[e];
            store(y, column, end, values, HALF);
        }
        if (!CHUNKED || start == 0) break;
        start -= chunk;
        columns.shift += chunk;
        // The thread has written these columns of the sum itself.
        if (call.residual.start)
            load_row<Reuse::WRITTEN>(held, summed, columns, end);
        else
            load_row_of<REUSE, WHOLE>(held, call.x, row, call.x_dtype, columns, end);
    }
}

// --- Launcher --------------------------------------------------------------------------------------------------------

constexpr int FORWARD_BLOCK = 256;  // threads, where a row does not need more

template <class T, int SLOTS, bool WHOLE>
void launch_forward(Forward& call, int vectors, void* stream) {
    call.lanes = std::min(lanes_of(vectors, SLOTS), CHUNK_THREADS<WHOLE>);
    int groups = call.lanes <= WARP ? FORWARD_BLOCK / call.lanes : 1;
    LaunchShape shape;
    shape.grid_x = ceil_div(call.rows, int64_t(groups));
    shape.threads = unsigned(groups * call.lanes);
    shape.shared_bytes = sizeof(ForwardShared);
    GPTKERN_LAUNCH((layer_norm_forward_kernel<T, SLOTS, WHOLE>), shape, stream, call);
}

template <class T>
void forward_of(Forward& call, bool whole, void* stream) {
    by_alignment<T>(whole, call.width, [&](auto is_whole, int vectors) {
        constexpr bool WHOLE = decltype(is_whole)::value;
        // The fewest slots that leave a row to one warp; of wider rows, a block of up to 512 threads.
        if (vectors <= (WHOLE ? WARP : CHUNK_THREADS<WHOLE>)) return launch_forward<T, 1, WHOLE>(call, vectors, stream);
        if constexpr (WHOLE) {
            if (vectors <= 2 * WARP) return launch_forward<T, 2, WHOLE>(call, vectors, stream);
            if (vectors <= 4 * 512) return launch_forward<T, 4, WHOLE>(call, vectors, stream);
        }
        launch_forward<T, CHUNK_SLOTS<WHOLE>, WHOLE>(call, vectors, stream);
    });
}

}  // namespace

Unreadable layer_norm_forward(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias,
                              const Tensor& y, const Tensor& summed, const Tensor& statistics, double eps,
                              Address stream) {
    if (y.elements() == 0) return nullptr;
    auto x_stride = row_stride(x), residual_stride = row_stride(residual);
    if (!x_stride) return &x;
    if (!residual_stride) return &residual;
    if (!is_contiguous(weight)) return &weight;
    if (!is_contiguous(bias)) return &bias;
    const Dtype dtype = y.dtype;
    const int vector = 16 / int(bytes_of(dtype));
    Forward call{};
    call.x = {at<const void>(x.address), *x_stride};
    call.residual = {at<const void>(residual.address), *residual_stride};
    call.weight = {at<const void>(weight.address), weight.dtype};
    call.bias = {at<const void>(bias.address), bias.dtype};
    call.y = at<void>(y.address);
    call.summed = at<void>(summed.address);
    call.width = int(y.shape[y.rank - 1]);
    call.rows = y.elements() / call.width;
    call.mean = at<float>(statistics.address);
    call.rstd = call.mean + call.rows;
    call.x_dtype = x.dtype;
    call.residual_dtype = residual.dtype;
    call.eps = float(eps);
    const bool whole = is_whole(x, *x_stride, vector) && is_whole(residual, *residual_stride, vector) &&
                       is_whole(y, call.width, vector) && is_whole(summed, call.width, vector) &&
                       is_whole(weight, call.width, vector) && is_whole(bias, call.width, vector);
    void* on = at<void>(stream);
    if (dtype == FLOAT32)
        forward_of<float>(call, whole, on);
    else if (dtype == FLOAT16)
        forward_of<float16>(call, whole, on);
    else
        forward_of<bfloat16>(call, whole, on);
    return nullptr;
}

}  // namespace gptkern
