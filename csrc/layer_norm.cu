// layer_norm in CUDA C++.
//
//     s     = x, or x + residual
//     x_hat = (s - mean) * rstd            rstd = 1 / sqrt(var + eps)
//     y     = x_hat * weight + bias
//
// Backward, with g = dy * weight and averages over the row:
//     ds = rstd * (g - avg(g) - x_hat * avg(g * x_hat))  (+ the gradient that reaches s by itself)
//     dweight = sum over rows of dy * x_hat,  dbias = sum over rows of dy
//
// Memory is the floor. With b bytes an element the forward moves 2 b a column (x in, y out; 4 b with a residual) and
// 8 bytes a row (mean, rstd); the backward 3 b a column (dy and s in, ds out; 4 b with a gradient of s), and once a
// block 8 bytes a column of partial sums. Some 10 and 20 instructions an element are under what an H200 issues in that
// time. At its data sheet's 4.8 TB/s a row of 1024 bfloat16 takes 0.86 ns forward and 1.28 ns backward.
//
// A row belongs to a group of threads: a part of a warp, a warp, or several warps of one block. Every thread holds
// SLOTS vectors of 16 bytes of it in registers, so memory is read once, and mean and then variance are taken from
// registers: they hold 64 KB of a row, and no variant keeps rows in shared memory. Columns that are held, of 2 bytes
// (half as many of 4):
//
//                       aligned rows     others
//     forward               32,768      6,144     wider ones are walked in chunks, all but the last read twice
//     backward              12,288      4,096     of wider ones one kernel makes ds, and another dweight and dbias:
//     its ds alone          24,576      6,144     dy and s are read twice, and what goes beyond this three times
//
// Rows are aligned where every tensor has all of its rows at multiples of 16 bytes, of such a length. Else vectors begin
// up to 7 columns before the row, where memory is aligned: of a row of odd width only the first and the last vector are
// moved in pieces. Where tensors are not aligned alike, what is written decides and the others are read in pieces.
//
// The groups of the backward walk rows in steps that keep the alignment, hence the columns of a thread, which it sums
// in float32. Blocks store one row of partial sums each, and a second kernel adds those: an order that is fixed, so
// dweight and dbias are the same on every run.

#include <algorithm>
#include <type_traits>

#include "device/launch.cuh"
#include "device/ptx.cuh"
#include "device/warp.cuh"
#include "launchers.h"

namespace gptkern {
namespace {

// --- How a thread sees a row ------------------------------------------------------------------------------------------

constexpr int MOST_WARPS = 32;  // of a block

// The columns of this thread: vectors of V, the first at `first`, the next `step` on. WHOLE: no vector is only partly
// in its row, and all of them are aligned in every tensor.
template <bool WHOLE>
struct Span {
    int shift = 0;  // columns from the first vector's start to the row's, so that vectors are aligned to 16 bytes
    int first;      // -shift at the earliest
    int step;       // from a vector to the thread's next
    int end;        // the row's width; 0 for a group that has no row, which loads zeros and stores nothing
};

// Columns that `row` begins after an address aligned to 16 bytes.
template <class T>
GPTKERN_DEVICE int misaligned_columns(const T* row) {
    return int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}

// Whether vectors of V columns of `row` are aligned to their bytes, or to 16 where they have more.
template <int V, bool WHOLE, class E>
GPTKERN_DEVICE bool is_aligned(const E* row, const Span<WHOLE>& span) {
    if constexpr (WHOLE) return true;
    constexpr int BYTES = V * int(sizeof(E)) < 16 ? V * int(sizeof(E)) : 16;
    return (reinterpret_cast<uintptr_t>(row) - uintptr_t(span.shift) * sizeof(E)) % BYTES == 0;
}

enum class Reuse { ONCE, AGAIN, WRITTEN };

template <Reuse REUSE, class V>
GPTKERN_DEVICE V load_as(const V* address) {
    if constexpr (REUSE == Reuse::ONCE) return load_global_once(address);
    if constexpr (REUSE == Reuse::WRITTEN) return load_global_written(address);
    return load_global(address);
}

// Whether columns [column, column + V) are in the row, all of them.
template <int V, bool WHOLE>
GPTKERN_DEVICE bool covers(const Span<WHOLE>& span, int column) {
    return WHOLE ? column < span.end : column >= 0 && column + V <= span.end;
}

// V values of T, packed into words as they are in memory. A row is held like this, and widened where it is worked on:
// 16-bit values in variables of their own would take a register each.
template <class T, int V = VECTOR<T>>
using Packed = Vector<uint32_t, V * int(sizeof(T)) / 4>;

template <class T, int V>
GPTKERN_DEVICE void unpack_to(float (&values)[V], const Packed<T, V>& packed) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int e = 0; e < V; ++e) values[e] = __int_as_float(int(packed[e]));
    } else {
#pragma unroll
        for (int e = 0; e < V; e += 2) {
            float2 pair = unpack<T>(packed[e / 2]);
            values[e] = pair.x;
            values[e + 1] = pair.y;
        }
    }
}

template <class T, int V>
GPTKERN_DEVICE Packed<T, V> packed(const float (&values)[V]) {
    Packed<T, V> result;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int e = 0; e < V; ++e) result[e] = uint32_t(__float_as_int(values[e]));
    } else {
#pragma unroll
        for (int e = 0; e < V; e += 2) result[e / 2] = pack<T>(values[e], values[e + 1]);
    }
    return result;
}

// The same values, of which the compiler does not know it: else it would keep what it has widened for the next pass.
template <class T, int SLOTS>
GPTKERN_DEVICE void stay_packed(Packed<T> (&held)[SLOTS]) {
    if constexpr (sizeof(T) == 2)
#pragma unroll
        for (int i = 0; i < SLOTS; ++i)
#pragma unroll
            for (int word = 0; word < 4; ++word) held[i][word] = opaque(held[i][word]);
}

template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;

// Columns [column, column + V) of a row; zeros beyond it.
template <Reuse REUSE, int V, bool WHOLE, class T>
GPTKERN_DEVICE Packed<T, V> load_columns(const T* row, int column, const Span<WHOLE>& span, bool aligned) {
    Packed<T, V> result{};
    if (aligned && covers<V>(span, column)) {
        result = load_as<REUSE>(reinterpret_cast<const Packed<T, V>*>(row + column));
    } else if constexpr (!WHOLE) {
        constexpr int IN_WORD = 4 / int(sizeof(T));
#pragma unroll
        for (int e = 0; e < V; ++e)
            if (unsigned(column + e) < unsigned(span.end))
                result[e / IN_WORD] |= uint32_t(load_as<REUSE>(reinterpret_cast<const Bits<T>*>(row) + (column + e)))
                                       << e % IN_WORD * 16;
    }
    return result;
}

template <class T, int V, bool WHOLE>
GPTKERN_DEVICE void store_columns(T* row, int column, const Span<WHOLE>& span, bool aligned,
                                  const Packed<T, V>& values) {
    if (aligned && covers<V>(span, column)) {
        store_global(reinterpret_cast<Packed<T, V>*>(row + column), values);
    } else if constexpr (!WHOLE) {
        constexpr int IN_WORD = 4 / int(sizeof(T));
#pragma unroll
        for (int e = 0; e < V; ++e)
            if (unsigned(column + e) < unsigned(span.end))
                store_global(reinterpret_cast<Bits<T>*>(row) + (column + e),
                             Bits<T>(values[e / IN_WORD] >> e % IN_WORD * 16));
    }
}

// The thread's vectors of a row; zeros beyond it.
template <Reuse REUSE, class T, int SLOTS, bool WHOLE>
GPTKERN_DEVICE void load_row(Packed<T> (&held)[SLOTS], const T* row, const Span<WHOLE>& span) {
    bool aligned = is_aligned<VECTOR<T>>(row, span);
#pragma unroll
    for (int i = 0; i < SLOTS; ++i)
        held[i] = load_columns<REUSE, VECTOR<T>>(row, span.first + i * span.step, span, aligned);
}

// As load_row, of 16-bit elements that are held as float32.
template <class E, int SLOTS, bool WHOLE>
GPTKERN_DEVICE void load_row_widened(Packed<float> (&held)[SLOTS], const E* row, const Span<WHOLE>& span) {
    constexpr int V = VECTOR<float>;
    bool aligned = is_aligned<V>(row, span);
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
        float values[V];
        unpack_to<E, V>(values, load_columns<Reuse::ONCE, V>(row, span.first + i * span.step, span, aligned));
        held[i] = packed<float>(values);
    }
}

// As load_row, of elements of any dtype that T holds exactly.
template <Reuse REUSE, class T, int SLOTS, bool WHOLE>
GPTKERN_DEVICE void load_row_of(Packed<T> (&held)[SLOTS], const void* tensor, int64_t offset, int dtype,
                                const Span<WHOLE>& span) {
    if constexpr (sizeof(T) == 4) {
        if (dtype == FLOAT16) return load_row_widened(held, static_cast<const float16*>(tensor) + offset, span);
        if (dtype == BFLOAT16) return load_row_widened(held, static_cast<const bfloat16*>(tensor) + offset, span);
    }
    load_row<REUSE, T>(held, static_cast<const T*>(tensor) + offset, span);
}

// Columns [column, column + V) of a (width,) parameter of T or float32, widened; all `absent` where there is none.
template <class T, int V, bool WHOLE>
GPTKERN_DEVICE void load_parameter(float (&values)[V], const void* parameter, int dtype, float absent, int column,
                                   const Span<WHOLE>& span) {
    if (!parameter) {
#pragma unroll
        for (int e = 0; e < V; ++e) values[e] = absent;
    } else if (sizeof(T) == 4 || dtype == FLOAT32) {
        auto* row = static_cast<const float*>(parameter);
        bool aligned = is_aligned<V>(row, span);
        constexpr int FLOATS = VECTOR<float>;
#pragma unroll
        for (int part = 0; part < V; part += FLOATS) {
            auto four = load_columns<Reuse::AGAIN, FLOATS>(row, column + part, span, aligned);
#pragma unroll
            for (int e = 0; e < FLOATS; ++e) values[part + e] = __int_as_float(int(four[e]));
        }
    } else {
        auto* row = static_cast<const T*>(parameter);
        unpack_to<T, V>(values, load_columns<Reuse::AGAIN, V>(row, column, span, is_aligned<V>(row, span)));
    }
}

// Replaces each of N values by its sum over the thread's group of `lanes` threads, in a fixed order. Groups of several
// warps: all threads of the block call it, and `scratch` may be used again after another barrier.
template <int N>
GPTKERN_DEVICE void group_sums(float (&values)[N], int lanes, float (*scratch)[MOST_WARPS]) {
#pragma unroll
    for (int n = 0; n < N; ++n) values[n] = warp_sum(values[n], lanes);
    if (lanes <= WARP) return;
    int warps = lanes / WARP, first = int(threadIdx.x) / lanes * warps;
#pragma unroll
    for (int n = 0; n < N; ++n)
        if (lane_of_thread() == 0) store_shared(&scratch[n][warp_of_thread()], values[n]);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n)
        values[n] = warp_sum(lane_of_thread() < warps ? load_shared(&scratch[n][first + lane_of_thread()]) : 0.0f);
}

// --- Forward ----------------------------------------------------------------------------------------------------------

struct Forward {
    const void* x;         // (rows, width)   input, of x_dtype
    const void* residual;  // (rows, width)   added to it, of residual_dtype, or null
    const void* weight;    // (width,)        of parameter_dtype, or null
    const void* bias;      // (width,)        of parameter_dtype, or null
    void* y;               // (rows, width)   output, of T, contiguous
    void* summed;          // (rows, width)   x + residual, of T, contiguous, where there is a residual
    float* mean;           // (rows,)         kept for the backward
    float* rstd;           // (rows,)
    int64_t x_stride;      // from a row to the next, in elements
    int64_t residual_stride;
    int64_t rows;
    int width;
    int x_dtype, residual_dtype, parameter_dtype;
    float eps;
    int lanes;  // threads of a group
};

struct ForwardShared {
    float scratch[2][1][MOST_WARPS];
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
                                  IS_CHUNKED<SLOTS, WHOLE> ? 1 : 2) layer_norm_forward_kernel(Forward call) {
    constexpr int V = VECTOR<T>;
    constexpr bool CHUNKED = IS_CHUNKED<SLOTS, WHOLE>;
    // A row wider than a chunk is read again soon.
    constexpr Reuse REUSE = CHUNKED ? Reuse::AGAIN : Reuse::ONCE;
    auto& scratch = shared_memory<ForwardShared>().scratch;
    const int lanes = call.lanes, width = call.width;
    const int group = int(threadIdx.x) / lanes, lane = int(threadIdx.x) % lanes;
    const int64_t row = int64_t(blockIdx.x) * (blockDim.x / lanes) + group;
    const bool has_row = row < call.rows;
    T* y = static_cast<T*>(call.y) + row * width;
    T* summed = call.summed ? static_cast<T*>(call.summed) + row * width : nullptr;

    Span<WHOLE> span;
    if (!WHOLE) span.shift = misaligned_columns(y);
    span.first = lane * V - span.shift;
    span.step = lanes * V;
    span.end = has_row ? width : 0;
    const int chunk = SLOTS * span.step;

    Packed<T> held[SLOTS];
    float mean = 0.0f, m2 = 0.0f;  // of the columns so far; m2: the sum of squared deviations
    int start = 0;                 // of the chunk: its columns are [start - shift, start - shift + chunk)
#pragma unroll 1
    while (true) {
        load_row_of<REUSE, T>(held, call.x, row * call.x_stride, call.x_dtype, span);
        if (call.residual) {
            // Rounded to T before it is normalised: the backward sees the same numbers.
            Packed<T> added[SLOTS];
            load_row_of<Reuse::ONCE, T>(added, call.residual, row * call.residual_stride, call.residual_dtype, span);
            bool aligned = is_aligned<V>(summed, span);
#pragma unroll
            for (int i = 0; i < SLOTS; ++i) {
                float values[V], more[V];
                unpack_to<T>(values, held[i]);
                unpack_to<T>(more, added[i]);
#pragma unroll
                for (int e = 0; e < V; ++e) values[e] += more[e];
                held[i] = packed<T>(values);
                store_columns<T, V>(summed, span.first + i * span.step, span, aligned, held[i]);
            }
        }

        float sum[1] = {0.0f};
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            float values[V], of_slot = 0.0f;
            unpack_to<T>(values, held[i]);
#pragma unroll
            for (int e = 0; e < V; ++e) of_slot += values[e];
            sum[0] += of_slot;
        }
        group_sums(sum, lanes, scratch[0]);
        stay_packed<T>(held);
        const int begin = max(start - span.shift, 0), stop = min(start - span.shift + chunk, width);
        const float chunk_mean = divide_rn(sum[0], float(stop - begin));

        // var = avg((s - mean)²): a second pass over registers, not E[s²] - mean², which cancels at |mean| >> std
        float squares[1] = {0.0f};
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            const int column = span.first + i * span.step;
            if (WHOLE && column >= span.end) continue;
            float values[V];
            unpack_to<T>(values, held[i]);
#pragma unroll
            for (int e = 0; e < V; ++e) {
                float centred = values[e] - chunk_mean;
                if (WHOLE || unsigned(column + e) < unsigned(span.end)) squares[0] += centred * centred;
            }
        }
        group_sums(squares, lanes, scratch[1]);
        stay_packed<T>(held);

        if (!CHUNKED || start == 0) {
            mean = chunk_mean;
            m2 = squares[0];
        } else {
            // Chan's update, of a chunk b of n_b columns after n_a:
            // mean += delta * n_b / n        m2 += m2_b + delta² * n_a * n_b / n
            float delta = chunk_mean - mean, share = divide_rn(float(stop - begin), float(stop));
            mean += delta * share;
            m2 += squares[0] + delta * delta * float(begin) * share;
        }
        if (!CHUNKED || stop == width) break;
        start += chunk;
        span.first += chunk;
    }
    const float rstd = divide_rn(1.0f, sqrtf(m2 / float(width) + call.eps));
    if (lane == 0 && has_row) {
        store_global(call.mean + row, mean);
        store_global(call.rstd + row, rstd);
    }

    // The last chunk is still in registers: chunks are written from the last to the first.
#pragma unroll 1
    while (true) {
        const bool aligned = is_aligned<V>(y, span);
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            const int column = span.first + i * span.step;
            if (column >= span.end) continue;
            float weight[V], bias[V], values[V];
            load_parameter<T>(weight, call.weight, call.parameter_dtype, 1.0f, column, span);
            load_parameter<T>(bias, call.bias, call.parameter_dtype, 0.0f, column, span);
            unpack_to<T>(values, held[i]);
            // y = x_hat * weight + bias
#pragma unroll
            for (int e = 0; e < V; ++e) values[e] = (values[e] - mean) * rstd * weight[e] + bias[e];
            store_columns<T, V>(y, column, span, aligned, packed<T>(values));
        }
        if (!CHUNKED || start == 0) break;
        start -= chunk;
        span.first -= chunk;
        // The thread has written these columns of the sum itself.
        if (call.residual)
            load_row<Reuse::WRITTEN, T>(held, static_cast<const T*>(summed), span);
        else
            load_row_of<REUSE, T>(held, call.x, row * call.x_stride, call.x_dtype, span);
    }
}

// --- Backward ---------------------------------------------------------------------------------------------------------

struct Backward {
    const void* dy;        // (rows, width)     gradient of y, of T, as all but the weight
    const void* incoming;  // (rows, width)     gradient that reaches s by itself, or null
    const void* s;         // (rows, width)     what was normalised
    const void* weight;    // (width,)          of weight_dtype, or null
    const float* mean;     // (rows,)
    const float* rstd;     // (rows,)
    void* ds;              // (rows, width)     gradient of s, contiguous, or null
    float* dweight;        // (blocks, width)   partial sums, or null
    float* dbias;          // (blocks, width)   partial sums, or null
    int64_t dy_stride;     // from a row to the next, in elements
    int64_t incoming_stride;
    int64_t s_stride;
    int64_t rows;
    int width;
    int weight_dtype;
    int lanes;         // threads of a group
    int group_pitch;   // of the block's sums in shared memory (see Sums): from a group to the next
    int column_pitch;  // from a column to the next
};

struct BackwardShared {
    float scratch[2][2][MOST_WARPS];
    // Sums follow.
};

// Adds what the groups of a block have summed for each column, group after group, and stores it as the block's row of
// partial sums. Column c of group g lies in shared memory at (c % V) * column_pitch + g * group_pitch + c / V: for one
// element of their vectors, lanes have neighbouring words; and column_pitch is 32 / V more than a multiple of 32, so
// that neighbouring columns are in different banks too. All threads of the block call it.
template <int SLOTS, int V, bool WHOLE>
GPTKERN_DEVICE void store_partial(const float (&sums)[SLOTS][V], float* shared, float* partial,
                                  const Span<WHOLE>& span, int width, int group, int groups, int group_pitch,
                                  int column_pitch) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < SLOTS; ++i)
#pragma unroll
        for (int e = 0; e < V; ++e) {
            int column = span.first + i * span.step + e;
            if (unsigned(column) < unsigned(width))
                store_shared(shared + (column % V * column_pitch + group * group_pitch + column / V), sums[i][e]);
        }
    __syncthreads();
    for (int column = int(threadIdx.x); column < width; column += int(blockDim.x)) {
        const float* address = shared + (column % V * column_pitch + column / V);
        float total = 0.0f;
#pragma unroll 4
        for (int g = 0; g < groups; ++g) total += load_shared(address + g * group_pitch);
        store_global(partial + column, total);
    }
}

constexpr int BACKWARD_THREADS = 512;  // at most

// Groups walk the rows, and blocks store partial sums of dweight and dbias.
template <class T, int SLOTS, bool WHOLE>
__global__ void __launch_bounds__(BACKWARD_THREADS, 1) layer_norm_backward_kernel(Backward call) {
    constexpr int V = VECTOR<T>;
    // Of 128 registers a thread, sums take 2 * SLOTS * V. With up to 16 columns a thread there is room for the weight
    // and for the next row, on its way while this one is worked on.
    constexpr bool ROOM = SLOTS * V <= 16;
    auto& shared = shared_memory<BackwardShared>();
    const int lanes = call.lanes, width = call.width;
    const int groups = int(blockDim.x) / lanes, group = int(threadIdx.x) / lanes, lane = int(threadIdx.x) % lanes;
    // More than 2^31 rows of several vectors a thread are more than any memory.
    using Row = std::conditional_t<SLOTS == 1, int64_t, int>;
    const Row step = Row(gridDim.x) * groups, rows = Row(call.rows);
    const T* dy = static_cast<const T*>(call.dy);
    const T* s = static_cast<const T*>(call.s);
    const T* incoming = static_cast<const T*>(call.incoming);
    T* ds = static_cast<T*>(call.ds);
    const bool needs_s = ds || call.dweight;

    // `step` rows on, ds is aligned alike: these columns are the thread's for good.
    const Row first_row = Row(blockIdx.x) * groups + group;
    Span<WHOLE> span;
    if (!WHOLE && ds) span.shift = misaligned_columns(ds + int64_t(first_row) * width);
    span.first = lane * V - span.shift;
    span.step = lanes * V;

    float weight[ROOM ? SLOTS : 1][V];
    if constexpr (ROOM) {
        span.end = width;
#pragma unroll
        for (int i = 0; i < SLOTS; ++i)
            load_parameter<T>(weight[i], call.weight, call.weight_dtype, 1.0f, span.first + i * span.step, span);
    }
    float dweight[SLOTS][V] = {}, dbias[SLOTS][V] = {};
    Packed<T> dy_held[SLOTS], s_held[SLOTS], dy_next[ROOM ? SLOTS : 1], s_next[ROOM ? SLOTS : 1];
    float mean = 0.0f, rstd = 0.0f, mean_next = 0.0f, rstd_next = 0.0f;

    auto load = [&](Row row, auto& dy_to, auto& s_to, float& mean_to, float& rstd_to) {
        span.end = row < rows ? width : 0;
        load_row<Reuse::ONCE, T>(dy_to, dy + row * call.dy_stride, span);
        if (needs_s) {
            load_row<Reuse::ONCE, T>(s_to, s + row * call.s_stride, span);
            mean_to = span.end ? load_global(call.mean + row) : 0.0f;
            rstd_to = span.end ? load_global(call.rstd + row) : 0.0f;
        }
    };
    if constexpr (!ROOM) {
        // Not read where they are not needed, but worked on.
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) s_held[i] = Packed<T>{};
    } else {
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) s_next[i] = Packed<T>{};
        load(first_row, dy_next, s_next, mean_next, rstd_next);
    }

    int parity = 0;
    // All groups of the block go around equally often.
#pragma unroll 1
    for (Row row = first_row; row - group < rows; row += step, parity ^= 1) {
        if constexpr (ROOM) {
#pragma unroll
            for (int i = 0; i < SLOTS; ++i) {
                dy_held[i] = dy_next[i];
                s_held[i] = s_next[i];
            }
            mean = mean_next;
            rstd = rstd_next;
            load(row + step, dy_next, s_next, mean_next, rstd_next);
            span.end = row < rows ? width : 0;
        } else {
            load(row, dy_held, s_held, mean, rstd);
        }
        // Beyond the row dy is 0, and so is all that is added up.
        float sums[2] = {0.0f, 0.0f};  // of g, of g * x_hat
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            float own_weight[V], dy_values[V], s_values[V];
            unpack_to<T>(dy_values, dy_held[i]);
            unpack_to<T>(s_values, s_held[i]);
            // opaque: neither the weight nor its addresses are to stay in registers.
            if constexpr (!ROOM)
                load_parameter<T>(own_weight, call.weight, call.weight_dtype, 1.0f,
                                  int(opaque(uint32_t(span.first + i * span.step))), span);
#pragma unroll
            for (int e = 0; e < V; ++e) {
                float gradient = dy_values[e];
                float x_hat = (s_values[e] - mean) * rstd;
                float g = gradient * (ROOM ? weight[ROOM ? i : 0][e] : own_weight[e]);
                dweight[i][e] += gradient * x_hat;
                dbias[i][e] += gradient;
                sums[0] += g;
                sums[1] += g * x_hat;
            }
        }
        if (ds) {
            group_sums(sums, lanes, shared.scratch[parity]);
            stay_packed<T>(dy_held);
            stay_packed<T>(s_held);
            const float average_g = sums[0] / float(width), average_gx = sums[1] / float(width);
            T* ds_row = ds + int64_t(row) * width;
            const T* incoming_row = incoming + row * call.incoming_stride;
            const bool aligned = is_aligned<V>(ds_row, span), incoming_aligned = is_aligned<V>(incoming_row, span);
#pragma unroll
            for (int i = 0; i < SLOTS; ++i) {
                const int column = span.first + i * span.step;
                if (column >= span.end) continue;
                float own_weight[V], dy_values[V], s_values[V];
                unpack_to<T>(dy_values, dy_held[i]);
                unpack_to<T>(s_values, s_held[i]);
                if constexpr (!ROOM)
                    load_parameter<T>(own_weight, call.weight, call.weight_dtype, 1.0f, int(opaque(uint32_t(column))),
                                      span);
                // ds = rstd * (g - avg(g) - x_hat * avg(g * x_hat))
#pragma unroll
                for (int e = 0; e < V; ++e) {
                    float x_hat = (s_values[e] - mean) * rstd;
                    float g = dy_values[e] * (ROOM ? weight[ROOM ? i : 0][e] : own_weight[e]);
                    dy_values[e] = rstd * (g - average_g - x_hat * average_gx);
                }
                if (incoming) {
                    unpack_to<T>(s_values, load_columns<Reuse::ONCE, V>(incoming_row, column, span, incoming_aligned));
#pragma unroll
                    for (int e = 0; e < V; ++e) dy_values[e] += s_values[e];
                }
                store_columns<T, V>(ds_row, column, span, aligned, packed<T>(dy_values));
            }
        }
    }

    float* sums = reinterpret_cast<float*>(&shared + 1);
    if (call.dweight)
        store_partial(dweight, sums, call.dweight + int64_t(blockIdx.x) * width, span, width, group, groups,
                      call.group_pitch, call.column_pitch);
    if (call.dbias)
        store_partial(dbias, sums, call.dbias + int64_t(blockIdx.x) * width, span, width, group, groups,
                      call.group_pitch, call.column_pitch);
}

// --- Backward of rows too wide for that -------------------------------------------------------------------------------

template <bool WHOLE>
constexpr int INPUT_GRADIENT_SLOTS = WHOLE ? 4 : 1;
constexpr int INPUT_GRADIENT_THREADS = 768;

// ds alone, a block a row, in chunks; the last chunk is held between the two passes.
template <class T, bool WHOLE>
__global__ void __launch_bounds__(INPUT_GRADIENT_THREADS, 1) layer_norm_input_gradient_kernel(Backward call) {
    constexpr int V = VECTOR<T>, SLOTS = INPUT_GRADIENT_SLOTS<WHOLE>;
    auto& scratch = shared_memory<BackwardShared>().scratch;
    const int width = call.width;
    const int64_t row = blockIdx.x;
    const T* dy = static_cast<const T*>(call.dy) + row * call.dy_stride;
    const T* s = static_cast<const T*>(call.s) + row * call.s_stride;
    const T* incoming = static_cast<const T*>(call.incoming) + row * call.incoming_stride;
    T* ds = static_cast<T*>(call.ds) + row * width;
    const float mean = load_global(call.mean + row), rstd = load_global(call.rstd + row);

    Span<WHOLE> span;
    if (!WHOLE) span.shift = misaligned_columns(ds);
    span.first = int(threadIdx.x) * V - span.shift;
    span.step = int(blockDim.x) * V;
    span.end = width;
    const int chunk = SLOTS * span.step;

    Packed<T> dy_held[SLOTS], s_held[SLOTS];
    float sums[2] = {0.0f, 0.0f};  // of g, of g * x_hat
    int start = -span.shift;
#pragma unroll 1
    while (true) {
        load_row<Reuse::AGAIN, T>(dy_held, dy, span);
        load_row<Reuse::AGAIN, T>(s_held, s, span);
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            float weight[V], dy_values[V], s_values[V], slot_sums[2] = {0.0f, 0.0f};
            unpack_to<T>(dy_values, dy_held[i]);
            unpack_to<T>(s_values, s_held[i]);
            load_parameter<T>(weight, call.weight, call.weight_dtype, 1.0f, span.first + i * span.step, span);
#pragma unroll
            for (int e = 0; e < V; ++e) {
                float g = dy_values[e] * weight[e];
                slot_sums[0] += g;
                slot_sums[1] += g * ((s_values[e] - mean) * rstd);
            }
            sums[0] += slot_sums[0];
            sums[1] += slot_sums[1];
        }
        if (start + chunk >= width) break;
        start += chunk;
        span.first += chunk;
    }
    group_sums(sums, int(blockDim.x), scratch[0]);
    stay_packed<T>(dy_held);
    stay_packed<T>(s_held);
    const float average_g = sums[0] / float(width), average_gx = sums[1] / float(width);

    const bool aligned = is_aligned<V>(ds, span), incoming_aligned = is_aligned<V>(incoming, span);
#pragma unroll 1
    while (true) {
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            const int column = span.first + i * span.step;
            if (column >= span.end) continue;
            float weight[V], dy_values[V], s_values[V];
            unpack_to<T>(dy_values, dy_held[i]);
            unpack_to<T>(s_values, s_held[i]);
            load_parameter<T>(weight, call.weight, call.weight_dtype, 1.0f, column, span);
            // ds = rstd * (g - avg(g) - x_hat * avg(g * x_hat))
#pragma unroll
            for (int e = 0; e < V; ++e) {
                float x_hat = (s_values[e] - mean) * rstd;
                dy_values[e] = rstd * (dy_values[e] * weight[e] - average_g - x_hat * average_gx);
            }
            if (call.incoming) {
                unpack_to<T>(s_values, load_columns<Reuse::ONCE, V>(incoming, column, span, incoming_aligned));
#pragma unroll
                for (int e = 0; e < V; ++e) dy_values[e] += s_values[e];
            }
            store_columns<T, V>(ds, column, span, aligned, packed<T>(dy_values));
        }
        if (start <= 0) break;
        start -= chunk;
        span.first -= chunk;
        load_row<Reuse::AGAIN, T>(dy_held, dy, span);
        load_row<Reuse::AGAIN, T>(s_held, s, span);
    }
}

constexpr int PARAMETER_GRADIENT_WARPS = 8;

// dweight and dbias alone: a block sums 32 vectors of columns over every gridDim.y-th set of rows, a warp a row.
template <class T, bool WHOLE>
__global__ void __launch_bounds__(PARAMETER_GRADIENT_WARPS * WARP)
    layer_norm_parameter_gradient_kernel(Backward call) {
    constexpr int V = VECTOR<T>;
    auto& shared = shared_memory<BackwardShared>();
    const int begin = int(blockIdx.x) * (WARP * V);
    const int width = min(call.width - begin, WARP * V);  // of the block's columns
    const int64_t step = int64_t(gridDim.y) * PARAMETER_GRADIENT_WARPS;

    // Rows of another alignment would put other columns into the same place: all of them begin at `begin`.
    Span<WHOLE> span;
    span.first = lane_of_thread() * V;
    span.step = WARP * V;
    span.end = width;

    float dweight[1][V] = {}, dbias[1][V] = {};
#pragma unroll 4
    for (int64_t row = int64_t(blockIdx.y) * PARAMETER_GRADIENT_WARPS + warp_of_thread(); row < call.rows; row += step) {
        Packed<T> dy[1], s[1] = {};
        float mean = 0.0f, rstd = 0.0f;
        load_row<Reuse::ONCE, T>(dy, static_cast<const T*>(call.dy) + row * call.dy_stride + begin, span);
        if (call.dweight) {
            load_row<Reuse::ONCE, T>(s, static_cast<const T*>(call.s) + row * call.s_stride + begin, span);
            mean = load_global(call.mean + row);
            rstd = load_global(call.rstd + row);
        }
        float dy_values[V], s_values[V];
        unpack_to<T>(dy_values, dy[0]);
        unpack_to<T>(s_values, s[0]);
#pragma unroll
        for (int e = 0; e < V; ++e) {
            dweight[0][e] += dy_values[e] * ((s_values[e] - mean) * rstd);
            dbias[0][e] += dy_values[e];
        }
    }
    float* sums = reinterpret_cast<float*>(&shared + 1);
    const int64_t offset = int64_t(blockIdx.y) * call.width + begin;
    if (call.dweight)
        store_partial(dweight, sums, call.dweight + offset, span, width, warp_of_thread(), PARAMETER_GRADIENT_WARPS,
                      call.group_pitch, call.column_pitch);
    if (call.dbias)
        store_partial(dbias, sums, call.dbias + offset, span, width, warp_of_thread(), PARAMETER_GRADIENT_WARPS,
                      call.group_pitch, call.column_pitch);
}

// --- The sum of partial sums ------------------------------------------------------------------------------------------

constexpr int REDUCE_WARPS = 16;

struct ReduceShared {
    float sums[REDUCE_WARPS][WARP];
};

// A block sums 32 columns, of dweight (blockIdx.y = 0) or dbias (1).
__global__ void __launch_bounds__(REDUCE_WARPS* WARP) layer_norm_reduce_kernel(
    const float* dweight_partial,  // (partials, width), or null
    const float* dbias_partial,    // (partials, width), or null
    float* dweight,                // (width,)
    float* dbias,                  // (width,)
    int partials, int width) {
    const float* partial = blockIdx.y == 0 ? dweight_partial : dbias_partial;
    if (!partial) return;
    auto& shared = shared_memory<ReduceShared>();
    const int column = int(blockIdx.x) * WARP + lane_of_thread();
    float total = 0.0f;
    if (column < width)
#pragma unroll 4
        for (int row = warp_of_thread(); row < partials; row += REDUCE_WARPS)
            total += load_global_once(partial + (int64_t(row) * width + column));
    store_shared(&shared.sums[warp_of_thread()][lane_of_thread()], total);
    __syncthreads();
    if (warp_of_thread() != 0 || column >= width) return;
    total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < REDUCE_WARPS; ++warp) total += load_shared(&shared.sums[warp][lane_of_thread()]);
    store_global((blockIdx.y == 0 ? dweight : dbias) + column, total);
}

// --- Launchers --------------------------------------------------------------------------------------------------------

size_t bytes_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

// Whether a tensor's rows, `stride` elements apart, are made of whole vectors that are aligned to their bytes: 16, or 8
// where 16-bit elements are widened. No tensor has no vectors.
bool is_whole(const Tensor& tensor, int64_t stride, int vector) {
    size_t bytes = std::min(bytes_of(tensor.dtype) * size_t(vector), size_t(16));
    return tensor.address % bytes == 0 && stride % vector == 0;
}

int round_up(int n, int multiple) { return ceil_div(n, multiple) * multiple; }

int next_power_of_2(int n) {
    int power = 1;
    while (power < n) power *= 2;
    return power;
}

// A group of up to 32 threads is a power of two, so that it is a part of a warp.
int lanes_of(int vectors, int slots) {
    int lanes = ceil_div(vectors, slots);
    return lanes <= WARP ? next_power_of_2(lanes) : round_up(lanes, WARP);
}

// Calls `with` with std::true_type where rows are WHOLE, else std::false_type; and how many vectors a row has, wherever
// it begins.
template <class T, class Function>
void by_alignment(bool whole, int width, Function with) {
    if (whole)
        with(std::true_type{}, width / VECTOR<T>);
    else
        with(std::false_type{}, ceil_div(width + VECTOR<T> - 1, VECTOR<T>));
}

constexpr int FORWARD_BLOCK = 256;  // threads, where a row does not need more

template <class T, int SLOTS, bool WHOLE>
void launch_forward(Forward& call, int vectors, void* stream) {
    call.lanes = std::min(lanes_of(vectors, SLOTS), CHUNK_THREADS<WHOLE>);
    int groups = call.lanes <= WARP ? FORWARD_BLOCK / call.lanes : 1;
    LaunchShape shape;
    shape.grid_x = unsigned(ceil_div(call.rows, int64_t(groups)));
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

// Lays the sums of `groups` groups of `lanes` threads with `slots` vectors each out in shared memory; its bytes.
size_t lay_out_sums(Backward& call, int vector, int slots, int lanes, int groups) {
    constexpr int BANKS = 32;
    if (!call.dweight && !call.dbias) return sizeof(BackwardShared);
    call.group_pitch = slots * lanes;
    // The next number that is BANKS / vector more than a multiple of BANKS.
    int skew = BANKS / vector;
    call.column_pitch = round_up(std::max(groups * call.group_pitch - skew, 0), BANKS) + skew;
    return sizeof(BackwardShared) + size_t(vector) * size_t(call.column_pitch) * sizeof(float);
}

constexpr int BACKWARD_BLOCK = 256;  // threads, where a row does not need more

// Returns how many blocks have stored partial sums.
template <class T, int SLOTS, bool WHOLE>
int launch_backward(Backward& call, int vectors, int most_blocks, void* stream) {
    constexpr int V = VECTOR<T>;
    call.lanes = lanes_of(vectors, SLOTS);
    int groups = std::max(BACKWARD_BLOCK / call.lanes, 1);
    int64_t blocks = ceil_div(call.rows, int64_t(groups));
    // Where groups walk on: a step of a multiple of V rows keeps the alignment of ds.
    if (blocks > most_blocks) blocks = call.width % V == 0 ? most_blocks : most_blocks / V * V;
    LaunchShape shape;
    shape.grid_x = unsigned(blocks);
    shape.threads = unsigned(groups * call.lanes);
    shape.shared_bytes = lay_out_sums(call, V, SLOTS, call.lanes, groups);
    GPTKERN_LAUNCH((layer_norm_backward_kernel<T, SLOTS, WHOLE>), shape, stream, call);
    return int(blocks);
}

template <class T, bool WHOLE>
int launch_wide_backward(Backward& call, int most_blocks, void* stream) {
    constexpr int V = VECTOR<T>;
    LaunchShape shape;
    if (call.ds) {
        shape.grid_x = unsigned(call.rows);
        shape.threads = INPUT_GRADIENT_THREADS;
        shape.shared_bytes = sizeof(BackwardShared);
        GPTKERN_LAUNCH((layer_norm_input_gradient_kernel<T, WHOLE>), shape, stream, call);
    }
    if (!call.dweight && !call.dbias) return 0;
    shape.grid_x = unsigned(ceil_div(call.width, WARP * V));
    shape.grid_y = unsigned(std::min(ceil_div(call.rows, int64_t(PARAMETER_GRADIENT_WARPS)), int64_t(most_blocks)));
    shape.threads = PARAMETER_GRADIENT_WARPS * WARP;
    shape.shared_bytes = lay_out_sums(call, V, 1, WARP, PARAMETER_GRADIENT_WARPS);
    GPTKERN_LAUNCH((layer_norm_parameter_gradient_kernel<T, WHOLE>), shape, stream, call);
    return int(shape.grid_y);
}

template <class T>
int backward_of(Backward& call, bool whole, int most_blocks, void* stream) {
    int blocks = 0;
    by_alignment<T>(whole, call.width, [&](auto is_whole, int vectors) {
        constexpr bool WHOLE = decltype(is_whole)::value;
        auto launch = [&](auto slots) {
            blocks = launch_backward<T, decltype(slots)::value, WHOLE>(call, vectors, most_blocks, stream);
        };
        using std::integral_constant;
        if (vectors <= WARP) return launch(integral_constant<int, 1>{});
        if constexpr (WHOLE) {
            // Up to 3 slots leave a row to one warp; of wider rows 2 have room for the next row.
            if (vectors > 2 * WARP && vectors <= 3 * WARP) return launch(integral_constant<int, 3>{});
            if (vectors <= 2 * BACKWARD_THREADS) return launch(integral_constant<int, 2>{});
            if (vectors <= 3 * BACKWARD_THREADS) return launch(integral_constant<int, 3>{});
        } else if (vectors <= BACKWARD_THREADS) {
            return launch(integral_constant<int, 1>{});
        }
        blocks = launch_wide_backward<T, WHOLE>(call, most_blocks, stream);
    });
    return blocks;
}

}  // namespace

Unreadable layer_norm_forward(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias,
                              const Tensor& y, const Tensor& summed, const Tensor& mean, const Tensor& rstd, double eps,
                              Address stream) {
    if (y.elements() == 0) return nullptr;
    auto x_stride = row_stride(x), residual_stride = row_stride(residual);
    if (!x_stride) return &x;
    if (!residual_stride) return &residual;
    if (!is_contiguous(weight)) return &weight;
    if (!is_contiguous(bias)) return &bias;
    const Dtype dtype = y.dtype, parameter_dtype = weight.address ? weight.dtype : bias.dtype;
    const int vector = 16 / int(bytes_of(dtype));
    Forward call{};
    call.x = at<const void>(x.address);
    call.residual = at<const void>(residual.address);
    call.weight = at<const void>(weight.address);
    call.bias = at<const void>(bias.address);
    call.y = at<void>(y.address);
    call.summed = at<void>(summed.address);
    call.mean = at<float>(mean.address);
    call.rstd = at<float>(rstd.address);
    call.x_stride = *x_stride;
    call.residual_stride = *residual_stride;
    call.width = int(y.shape[y.rank - 1]);
    call.rows = y.elements() / call.width;
    call.x_dtype = x.dtype;
    call.residual_dtype = residual.dtype;
    call.parameter_dtype = parameter_dtype;
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

Unreadable layer_norm_backward(const Tensor& dy, const Tensor& incoming, const Tensor& s, const Tensor& weight,
                               const Tensor& mean, const Tensor& rstd, const Tensor& ds, const Tensor& dweight,
                               const Tensor& dbias, const Tensor& partial, int partials, Address stream) {
    if (s.elements() == 0) return nullptr;
    auto dy_stride = row_stride(dy), incoming_stride = row_stride(incoming), s_stride = row_stride(s);
    if (!dy_stride) return &dy;
    if (!incoming_stride) return &incoming;
    if (!s_stride) return &s;
    for (const Tensor* vector : {&weight, &mean, &rstd})
        if (!is_contiguous(*vector)) return vector;
    const Dtype dtype = s.dtype;
    const int width = int(s.shape[s.rank - 1]);
    const int vector = 16 / int(bytes_of(dtype));
    Backward call{};
    call.dy = at<const void>(dy.address);
    call.incoming = at<const void>(incoming.address);
    call.s = at<const void>(s.address);
    call.weight = at<const void>(weight.address);
    call.mean = at<const float>(mean.address);
    call.rstd = at<const float>(rstd.address);
    call.ds = at<void>(ds.address);
    call.dweight = dweight.address ? at<float>(partial.address) : nullptr;
    call.dbias =
        dbias.address ? at<float>(partial.address) + (dweight.address ? int64_t(partials) * width : 0) : nullptr;
    call.dy_stride = *dy_stride;
    call.incoming_stride = *incoming_stride;
    call.s_stride = *s_stride;
    call.width = width;
    call.rows = s.elements() / width;
    call.weight_dtype = weight.dtype;
    const bool whole = width % vector == 0 && is_whole(dy, *dy_stride, vector) && is_whole(s, *s_stride, vector) &&
                       is_whole(incoming, *incoming_stride, vector) && is_whole(weight, width, vector) &&
                       is_whole(ds, width, vector);
    void* on = at<void>(stream);
    int blocks = dtype == FLOAT32   ? backward_of<float>(call, whole, partials, on)
                 : dtype == FLOAT16 ? backward_of<float16>(call, whole, partials, on)
                                    : backward_of<bfloat16>(call, whole, partials, on);
    if (!call.dweight && !call.dbias) return nullptr;
    LaunchShape shape;
    shape.grid_x = unsigned(ceil_div(width, WARP));
    shape.grid_y = 2;
    shape.threads = REDUCE_WARPS * WARP;
    shape.shared_bytes = sizeof(ReduceShared);
    GPTKERN_LAUNCH((layer_norm_reduce_kernel), shape, on, call.dweight, call.dbias,
                   at<float>(dweight.address), at<float>(dbias.address), blocks, width);
    return nullptr;
}

}  // namespace gptkern
