// rms_norm in CUDA C++.
//
//     x_hat = x * rstd            rstd = 1 / sqrt(avg(x²) + eps)
//     y     = x_hat * weight
//
// Backward, with g = dy * weight and the average over the row:
//     dx = rstd * (g - x_hat * avg(g * x_hat))
//     dweight = sum over rows of dy * x_hat
//
// Memory is the floor. With b bytes an element the forward moves 2 b a column (x in, y out) and 4 bytes a row (rstd);
// the backward 3 b a column (dy and x in, dx out), and once a block 4 bytes a column of partial sums, which are read
// again. Some 6 and 12 instructions an element are under what an H200 issues in that time. At its data sheet's 4.8 TB/s
// a row of 4096 bfloat16 takes 3.4 ns forward and 5.1 ns backward.
//
// Three kernels, and one that adds partial sums:
//     forward     a row belongs to a group of threads: a part of a warp, a warp, or several warps of one block, which
//                 hold it in registers and read it once: up to 32,768 columns, in vectors of 16 bytes
//     backward    the same, up to 16,384 columns of 16 bits or 8,192 of 32. Groups walk rows in steps that keep their
//                 columns, and sum dweight in float32; a block stores one row of partial sums. Without dx, columns do
//                 not need one another: blocks share them as well as the rows, whatever the width
//     long        wider rows, a block each: y, or dx, in two walks over the row. The second one finds in shared memory
//                 what that has room for (96 KB), and reads the rest again. dweight comes from `backward` without dx
//     reduce      adds the blocks' partial sums in a fixed order: no atomics, dweight is the same on every run
//
// Rows that do not begin at a multiple of 16 bytes: vectors are laid where what is written is aligned, so that a row's
// first and last ones are moved by element, as are those of tensors that are aligned in another way (device/lines.cuh).
// float16 and bfloat16 are one kernel's instance, told apart at run time: what differs is the conversion.

#include <algorithm>

#include "device/launch.cuh"
#include "device/lines.cuh"
#include "device/warp.cuh"
#include "rms_norm/launchers.h"

namespace gptkern {
namespace {

// Values of a row that a thread of the forward holds: 64 registers are what each of 1024 threads can have.
constexpr int FORWARD_VALUES = 32, FORWARD_THREADS = 1024;
// Vectors of dy, and of x, that a thread of the backward holds, with the sums of dweight of these columns: each of 512
// threads can have 128 registers. With few vectors there is room for the weight, and for the next row, on its way while
// this one is worked on.
constexpr int FEW_SLOTS = 2, MANY_SLOTS = 4, BACKWARD_THREADS = 512;
constexpr int LONG_THREADS = 512;
constexpr size_t LONG_STASH = 96 * 1024;  // bytes of shared memory
constexpr int BLOCK = 256;                // threads, where a row does not need more
constexpr int REDUCE_WARPS = 16;

constexpr int MOST_WARPS = FORWARD_THREADS / WARP;

// What the warps of a block tell one another; the second one while the first may still be read.
struct Scratch {
    float sums[2][MOST_WARPS];
    // The stash, or the sums of dweight, follow.
};

// A (width,) tensor, or none: its values are 1.
struct Weight {
    const void* values;
    int dtype;  // float32, or the rows' own
};

struct Rows {
    const void* start;  // (rows, width), contiguous rows
    int64_t stride;     // from a row to the next, in elements
};

// --- Rows and groups -------------------------------------------------------------------------------------------------

// The columns of a thread: vectors of V, of which the first begins `shift` columns before the row's start, or range's.
template <int V>
struct Columns {
    int lane, lanes;  // the thread's place in its group
    int shift;
    GPTKERN_DEVICE int operator[](int i) const { return (i * lanes + lane) * V - shift; }
};

template <int BYTES>
GPTKERN_DEVICE int misaligned_columns(const Line<BYTES>& line) {
    return int(reinterpret_cast<uintptr_t>(line.start) % 16 / BYTES);
}

// Row `row` from column `begin` on, to be read in vectors of V where it is aligned for them.
template <int V, int BYTES>
GPTKERN_DEVICE Line<BYTES> line_of(const Rows& rows, int64_t row, int begin, int shift) {
    Line<BYTES> line(rows.start, row * rows.stride + begin, 1, false);
    line.vectors = line.template takes_vectors<V>(shift);
    return line;
}

// Columns n … n + V - 1 of the weight's range that starts at `begin` and has `end` columns; 0 beyond it.
template <int BYTES, int V>
GPTKERN_DEVICE void load_weight(float (&values)[V], const Weight& weight, int begin, int n, int end, int shift) {
    if (!weight.values) {
#pragma unroll
        for (int e = 0; e < V; ++e) values[e] = 1.0f;
    } else if (BYTES == 4 || weight.dtype == FLOAT32) {
        to_floats(load<V>(line_of<V, 4>({weight.values, 0}, 0, begin, shift), n, end, end), false, values);
    } else {
        auto line = line_of<V, BYTES>({weight.values, 0}, 0, begin, shift);
        to_floats(load<V>(line, n, end, end), weight.dtype == FLOAT16, values);
    }
}

// The sum over the thread's group of `lanes` threads, in a fixed order. Where groups have several warps all threads of
// the block call it, and `scratch` may be used again after another barrier.
GPTKERN_DEVICE float group_sum(float value, int lanes, float* scratch) {
    value = warp_sum(value, lanes);
    if (lanes <= WARP) return value;
    const int warps = lanes / WARP, first = int(threadIdx.x) / lanes * warps;
    if (lane_of_thread() == 0) store_shared(scratch + warp_of_thread(), value);
    __syncthreads();
    return warp_sum(lane_of_thread() < warps ? load_shared(scratch + first + lane_of_thread()) : 0.0f);
}

// rstd = 1 / sqrt(avg(x²) + eps)
GPTKERN_DEVICE float rstd_of(float squares, int width, float eps) {
    return 1.0f / sqrtf(squares / float(width) + eps);
}

// --- Forward ---------------------------------------------------------------------------------------------------------

struct Forward {
    Rows x;         // (rows, width)   input
    Weight weight;  // (width,)
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
    auto& scratch = shared_memory<Scratch>();
    const int group = int(threadIdx.x) / call.lanes, lane = int(threadIdx.x) % call.lanes;
    const int64_t row = int64_t(blockIdx.x) * (int(blockDim.x) / call.lanes) + group;
    // A group without a row loads zeros and stores nothing.
    const int end = row < call.rows ? call.width : 0;
    const Line<BYTES> y(call.y, row * call.width, 1, true);
    const Columns<V> columns{lane, call.lanes, misaligned_columns(y)};
    const auto x = line_of<V, BYTES>(call.x, row, 0, columns.shift);

    // All loads are under way before the first value is used.
    Raw<BYTES, V> held[SLOTS];
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) held[i] = load<V>(x, columns[i], end, end);
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
        float values[V];
        to_floats(held[i], call.is_half, values);
#pragma unroll
        for (int e = 0; e < V; ++e) squares += values[e] * values[e];
    }
    const float rstd = rstd_of(group_sum(squares, call.lanes, scratch.sums[0]), call.width, call.eps);
    if (lane == 0 && end > 0) store_global(call.rstd + row, rstd);

#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
        if (columns[i] >= end) continue;
        float values[V], weight[V];
        to_floats(held[i], call.is_half, values);
        load_weight<BYTES>(weight, call.weight, 0, columns[i], end, columns.shift);
        // y = x_hat * weight
#pragma unroll
        for (int e = 0; e < V; ++e) values[e] = values[e] * rstd * weight[e];
        store(y, columns[i], end, values, call.is_half);
    }
}

template <int BYTES>
__global__ void __launch_bounds__(LONG_THREADS, 2) rms_norm_forward_long_kernel(const __grid_constant__ Forward call) {
    constexpr int V = 16 / BYTES;
    auto& scratch = shared_memory<Scratch>();
    const Stash<BYTES, V> stash{reinterpret_cast<typename Raw<BYTES, V>::Piece*>(&scratch + 1),
                                int(LONG_STASH) / (LONG_THREADS * 16)};
    const int64_t row = blockIdx.x;
    const int end = call.width;
    const Line<BYTES> y(call.y, row * end, 1, true);
    const Columns<V> columns{int(threadIdx.x), LONG_THREADS, misaligned_columns(y)};
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
    const float rstd = rstd_of(group_sum(squares, LONG_THREADS, scratch.sums[0]), end, call.eps);
    if (threadIdx.x == 0) store_global(call.rstd + row, rstd);

#pragma unroll 2
    for (int i = 0; columns[i] < end; ++i) {
        float values[V], weight[V];
        to_floats(i < stash.room ? stash.take(i) : load<V>(x, columns[i], end, end), call.is_half, values);
        load_weight<BYTES>(weight, call.weight, 0, columns[i], end, columns.shift);
        // y = x_hat * weight
#pragma unroll
        for (int e = 0; e < V; ++e) values[e] = values[e] * rstd * weight[e];
        store(y, columns[i], end, values, call.is_half);
    }
}

// --- Backward --------------------------------------------------------------------------------------------------------

struct Backward {
    Rows dy;             // (rows, width)     gradient of y
    Rows x;              // (rows, width)     input
    Weight weight;       // (width,)
    const float* rstd;   // (rows,)
    void* dx;            // (rows, width)     gradient of x, contiguous, or null
    float* partial;      // (blocks, width)   sums of dweight, or null
    int64_t rows;
    int width;
    int range;   // columns of a block: all where there is dx
    int ranges;  // of them in a row: neighbouring blocks have neighbouring ones
    bool is_half;
    int lanes;         // threads of a group
    int group_pitch;   // of the block's sums in shared memory (see store_partial): from a group to the next
    int column_pitch;  // from a column to the next
};

// value(0) + … + value(count - 1), as four sums side by side: with less rounding than one, and less waiting.
template <class Value>
GPTKERN_DEVICE float sum_of(int count, Value value) {
    float sums[4] = {};
    for (int i = 0; i < count; i += 4)
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (i + k < count) sums[k] += value(i + k);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Adds what the groups of a block have summed for each column, in a fixed order, and stores it as the block's row of
// partial sums. Column c of group g lies in shared memory at (c % V) * column_pitch + g * group_pitch + c / V: for one
// element of their vectors, lanes have neighbouring words; and column_pitch is 32 / V more than a multiple of 32, so
// that neighbouring columns are in different banks too. All threads of the block call it.
template <int SLOTS, int V>
GPTKERN_DEVICE void store_partial(const float (&sums)[SLOTS][V], const Columns<V>& columns, float* shared, int group,
                                  int groups, int end, const Backward& call, float* partial) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < SLOTS; ++i)
#pragma unroll
        for (int e = 0; e < V; ++e) {
            const int column = columns[i] + e;
            if (unsigned(column) < unsigned(end))
                store_shared(shared + (column % V * call.column_pitch + group * call.group_pitch + column / V),
                             sums[i][e]);
        }
    __syncthreads();
    for (int column = int(threadIdx.x); column < end; column += int(blockDim.x)) {
        const float* address = shared + (column % V * call.column_pitch + column / V);
        auto of_group = [&](int g) { return load_shared(address + g * call.group_pitch); };
        store_global(partial + column, sum_of(groups, of_group));
    }
}

// Groups walk the rows, of a range of columns, and blocks store partial sums of dweight.
template <int BYTES, int SLOTS>
__global__ void __launch_bounds__(BACKWARD_THREADS, 1) rms_norm_backward_kernel(const __grid_constant__ Backward call) {
    constexpr int V = 16 / BYTES;
    constexpr bool ROOM = SLOTS <= FEW_SLOTS;
    auto& scratch = shared_memory<Scratch>();
    const int block = int(blockIdx.x) / call.ranges, blocks = int(gridDim.x) / call.ranges;  // of those that share rows
    const int begin = int(blockIdx.x) % call.ranges * call.range, width = min(call.width - begin, call.range);
    const int lanes = call.lanes;
    const int groups = int(blockDim.x) / lanes, group = int(threadIdx.x) / lanes;
    const int64_t step = int64_t(blocks) * groups, first_row = int64_t(block) * groups + group;

    // `step` rows on, dx is aligned alike: these columns are the thread's for good.
    Columns<V> columns{int(threadIdx.x) % lanes, lanes, 0};
    if (call.dx) columns.shift = misaligned_columns(Line<BYTES>(call.dx, first_row * call.width, 1, true));

    struct Held {
        Raw<BYTES, V> dy[SLOTS], x[SLOTS];
        float rstd;
    };
    // Of a row that is not there, zeros, which add nothing to any sum.
    auto load_row = [&](Held& held, int64_t row) {
        const int end = row < call.rows ? width : 0;
        const auto dy = line_of<V, BYTES>(call.dy, row, begin, columns.shift);
        const auto x = line_of<V, BYTES>(call.x, row, begin, columns.shift);
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            held.dy[i] = load<V>(dy, columns[i], end, end);
            held.x[i] = load<V>(x, columns[i], end, end);
        }
        held.rstd = end > 0 ? load_global(call.rstd + row) : 0.0f;
    };

    float weight[ROOM ? SLOTS : 1][V], dweight[SLOTS][V] = {};
    Held held, next;
    if constexpr (ROOM) {
#pragma unroll
        for (int i = 0; i < SLOTS; ++i)
            load_weight<BYTES>(weight[i], call.weight, begin, columns[i], width, columns.shift);
        load_row(next, first_row);
    }

    int parity = 0;
    // All groups of the block go around equally often.
#pragma unroll 1
    for (int64_t row = first_row; row - group < call.rows; row += step, parity ^= 1) {
        if constexpr (ROOM) {
            held = next;
            load_row(next, row + step);
        } else {
            load_row(held, row);
        }
        float sum = 0.0f;  // of g * x_hat
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            float dy[V], x[V], own[V];
            to_floats(held.dy[i], call.is_half, dy);
            to_floats(held.x[i], call.is_half, x);
            if constexpr (!ROOM) load_weight<BYTES>(own, call.weight, begin, columns[i], width, columns.shift);
#pragma unroll
            for (int e = 0; e < V; ++e) {
                const float of_weight = dy[e] * (x[e] * held.rstd);
                dweight[i][e] += of_weight;
                sum += of_weight * (ROOM ? weight[ROOM ? i : 0][e] : own[e]);
            }
        }
        if (!call.dx) continue;
        const float average = group_sum(sum, lanes, scratch.sums[parity]) / float(width);
        const int end = row < call.rows ? width : 0;
        const Line<BYTES> dx_line(call.dx, row * call.width, 1, true);
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            if (columns[i] >= end) continue;
            float dy[V], x[V], own[V];
            to_floats(held.dy[i], call.is_half, dy);
            to_floats(held.x[i], call.is_half, x);
            if constexpr (!ROOM) load_weight<BYTES>(own, call.weight, begin, columns[i], width, columns.shift);
            // dx = rstd * (g - x_hat * avg(g * x_hat))
#pragma unroll
            for (int e = 0; e < V; ++e) {
                const float g = dy[e] * (ROOM ? weight[ROOM ? i : 0][e] : own[e]);
                dy[e] = held.rstd * (g - x[e] * held.rstd * average);
            }
            store(dx_line, columns[i], end, dy, call.is_half);
        }
    }
    if (call.partial)
        store_partial(dweight, columns, reinterpret_cast<float*>(&scratch + 1), group, groups, width, call,
                      call.partial + (int64_t(block) * call.width + begin));
}

// dx alone, a block a row.
template <int BYTES>
__global__ void __launch_bounds__(LONG_THREADS, 2)
    rms_norm_backward_long_kernel(const __grid_constant__ Backward call) {
    constexpr int V = 16 / BYTES;
    using Piece = typename Raw<BYTES, V>::Piece;
    constexpr int ROOM = int(LONG_STASH) / (2 * LONG_THREADS * 16);
    auto& scratch = shared_memory<Scratch>();
    auto* stash = reinterpret_cast<Piece*>(&scratch + 1);
    const Stash<BYTES, V> dy_stash{stash, ROOM}, x_stash{stash + ROOM * LONG_THREADS, ROOM};
    const int64_t row = blockIdx.x;
    const int end = call.width;
    const float rstd = load_global(call.rstd + row);
    const Line<BYTES> dx_line(call.dx, row * end, 1, true);
    const Columns<V> columns{int(threadIdx.x), LONG_THREADS, misaligned_columns(dx_line)};
    const auto dy_line = line_of<V, BYTES>(call.dy, row, 0, columns.shift);
    const auto x_line = line_of<V, BYTES>(call.x, row, 0, columns.shift);

    float sum = 0.0f;  // of g * x_hat
#pragma unroll 2
    for (int i = 0; columns[i] < end; ++i) {
        auto dy_raw = load<V>(dy_line, columns[i], end, end), x_raw = load<V>(x_line, columns[i], end, end);
        dy_stash.keep(i, dy_raw);
        x_stash.keep(i, x_raw);
        float dy[V], x[V], weight[V], of_vector = 0.0f;
        to_floats(dy_raw, call.is_half, dy);
        to_floats(x_raw, call.is_half, x);
        load_weight<BYTES>(weight, call.weight, 0, columns[i], end, columns.shift);
#pragma unroll
        for (int e = 0; e < V; ++e) of_vector += dy[e] * weight[e] * (x[e] * rstd);
        sum += of_vector;
    }
    const float average = group_sum(sum, LONG_THREADS, scratch.sums[0]) / float(end);

#pragma unroll 2
    for (int i = 0; columns[i] < end; ++i) {
        float dy[V], x[V], weight[V];
        const bool kept = i < ROOM;
        to_floats(kept ? dy_stash.take(i) : load<V>(dy_line, columns[i], end, end), call.is_half, dy);
        to_floats(kept ? x_stash.take(i) : load<V>(x_line, columns[i], end, end), call.is_half, x);
        load_weight<BYTES>(weight, call.weight, 0, columns[i], end, columns.shift);
        // dx = rstd * (g - x_hat * avg(g * x_hat))
#pragma unroll
        for (int e = 0; e < V; ++e) dy[e] = rstd * (dy[e] * weight[e] - x[e] * rstd * average);
        store(dx_line, columns[i], end, dy, call.is_half);
    }
}

struct ReduceShared {
    float sums[REDUCE_WARPS][WARP];
};

// A block sums 32 columns.
__global__ void __launch_bounds__(REDUCE_WARPS* WARP) rms_norm_reduce_kernel(
    const float* partial,  // (partials, width)
    float* dweight,        // (width,)
    int partials, int width) {
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
    store_global(dweight + column,
                 sum_of(REDUCE_WARPS, [&](int warp) { return load_shared(&shared.sums[warp][lane_of_thread()]); }));
}

// --- Launchers -------------------------------------------------------------------------------------------------------

// How many vectors of V a row has, wherever it begins.
int vectors_of(const void* output, int width, int vector) {
    const bool aligned = reinterpret_cast<Address>(output) % 16 == 0 && width % vector == 0;
    return aligned ? width / vector : ceil_div(width + vector - 1, vector);
}

// Threads of a group: a part of a warp, a power of two, for as many vectors; or whole warps, so that no thread has more
// than `slots` vectors.
int lanes_of(int vectors, int slots) {
    if (vectors <= WARP) {
        int lanes = 1;
        while (lanes < vectors) lanes *= 2;
        return lanes;
    }
    return ceil_div(vectors, slots * WARP) * WARP;
}

// Groups of a block.
int groups_of(int lanes) { return std::max(BLOCK / lanes, 1); }

template <int BYTES>
void forward_of(Forward& call, void* stream) {
    constexpr int V = 16 / BYTES;
    call.lanes = lanes_of(vectors_of(call.y, call.width, V), FORWARD_VALUES / V);
    LaunchShape shape;
    if (call.lanes > FORWARD_THREADS) {
        shape.grid_x = call.rows;
        shape.threads = LONG_THREADS;
        shape.shared_bytes = sizeof(Scratch) + LONG_STASH;
        return GPTKERN_LAUNCH((rms_norm_forward_long_kernel<BYTES>), shape, stream, call);
    }
    const int groups = groups_of(call.lanes);
    shape.grid_x = ceil_div(call.rows, int64_t(groups));
    shape.threads = unsigned(groups * call.lanes);
    shape.shared_bytes = sizeof(Scratch);
    GPTKERN_LAUNCH((rms_norm_forward_kernel<BYTES>), shape, stream, call);
}

// Starts the kernel that holds rows, or a range of columns of them; returns how many blocks share the rows.
template <int BYTES, int SLOTS>
int launch_backward(Backward& call, int vectors, int most_blocks, void* stream) {
    constexpr int V = 16 / BYTES, BANKS = 32;
    call.lanes = lanes_of(vectors, SLOTS);
    const int groups = groups_of(call.lanes);
    int64_t blocks = ceil_div(call.rows, int64_t(groups));
    // Where groups walk on: a step of a multiple of V rows keeps the alignment of dx.
    if (blocks > most_blocks) blocks = call.width % V == 0 ? most_blocks : most_blocks / V * V;
    LaunchShape shape;
    // One number for both: a grid's second one ends at 65,535.
    call.ranges = ceil_div(call.width, call.range);
    shape.grid_x = blocks * call.ranges;
    shape.threads = unsigned(groups * call.lanes);
    shape.shared_bytes = sizeof(Scratch);
    if (call.partial) {
        call.group_pitch = ceil_div(vectors, call.lanes) * call.lanes;
        // The next number that is BANKS / V more than a multiple of BANKS.
        constexpr int SKEW = BANKS / V;
        call.column_pitch = ceil_div(std::max(groups * call.group_pitch - SKEW, 0), BANKS) * BANKS + SKEW;
        shape.shared_bytes += size_t(V) * size_t(call.column_pitch) * sizeof(float);
    }
    GPTKERN_LAUNCH((rms_norm_backward_kernel<BYTES, SLOTS>), shape, stream, call);
    return int(blocks);
}

template <int BYTES>
int backward_of(Backward call, int most_blocks, void* stream) {
    constexpr int V = 16 / BYTES;
    // Without dx vectors begin where the row does.
    const int vectors = call.dx ? vectors_of(call.dx, call.width, V) : ceil_div(call.width, V);
    call.range = call.width;
    if (vectors <= FEW_SLOTS * (call.dx ? BACKWARD_THREADS : WARP))
        return launch_backward<BYTES, FEW_SLOTS>(call, vectors, most_blocks, stream);
    if (call.dx && vectors <= MANY_SLOTS * BACKWARD_THREADS)
        return launch_backward<BYTES, MANY_SLOTS>(call, vectors, most_blocks, stream);
    if (call.dx) {
        LaunchShape shape;
        shape.grid_x = call.rows;
        shape.threads = LONG_THREADS;
        shape.shared_bytes = sizeof(Scratch) + LONG_STASH;
        GPTKERN_LAUNCH((rms_norm_backward_long_kernel<BYTES>), shape, stream, call);
    }
    if (!call.partial) return 0;
    call.dx = nullptr;
    call.range = FEW_SLOTS * WARP * V;
    return launch_backward<BYTES, FEW_SLOTS>(call, FEW_SLOTS * WARP, most_blocks, stream);
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

Unreadable rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                             const Tensor& dx, const Tensor& dweight, const Tensor& partial, Address stream) {
    if (x.elements() == 0) return nullptr;
    const auto dy_stride = row_stride(dy), x_stride = row_stride(x);
    if (!dy_stride) return &dy;
    if (!x_stride) return &x;
    Backward call{};
    call.dy = {at<const void>(dy.address), *dy_stride};
    call.x = {at<const void>(x.address), *x_stride};
    call.weight = {at<const void>(weight.address), weight.dtype};
    call.rstd = at<const float>(rstd.address);
    call.dx = at<void>(dx.address);
    call.partial = at<float>(partial.address);
    call.rows = rstd.elements();
    call.width = int(x.shape[x.rank - 1]);
    call.is_half = x.dtype == FLOAT16;
    const int most_blocks = int(std::min(partial.address ? partial.shape[0] : call.rows, int64_t(1) << 30));
    void* on = at<void>(stream);
    const int blocks =
        x.dtype == FLOAT32 ? backward_of<4>(call, most_blocks, on) : backward_of<2>(call, most_blocks, on);
    if (!call.partial) return nullptr;
    LaunchShape shape;
    shape.grid_x = ceil_div(call.width, WARP);
    shape.threads = REDUCE_WARPS * WARP;
    shape.shared_bytes = sizeof(ReduceShared);
    GPTKERN_LAUNCH((rms_norm_reduce_kernel), shape, on, call.partial, at<float>(dweight.address), blocks, call.width);
    return nullptr;
}

}  // namespace gptkern
