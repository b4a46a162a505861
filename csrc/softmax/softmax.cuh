// What forward.cu and backward.cu of softmax share: where rows lie, and how a launch is cut.
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
#pragma once

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "softmax/launchers.h"
#include "device/launch.cuh"
#include "device/rows.cuh"

namespace gptkern {

inline constexpr float HIDDEN = -std::numeric_limits<float>::infinity();

// Values of a row that a thread holds in registers: 64 registers are what 1024 threads can have, and the backward
// holds two rows.
inline constexpr int FORWARD_VALUES = 32, BACKWARD_VALUES = 16;
inline constexpr int MOST_THREADS = 1024;
inline constexpr int ROWS_THREADS = 256;  // of a block whose rows need no more
// Two blocks with a full stash each fit a multiprocessor of sm_90, one fits sm_80.
inline constexpr int LONG_THREADS = 512;
inline constexpr int COLUMNS_THREADS = 256;
inline constexpr int BATCH = 2;  // vectors that a walk has under way at a time
// Threads side by side in the columns kernel: 8 * 16 bytes are a cache line, the others of the block share the walk.
inline constexpr int MOST_ACROSS = 8;
inline constexpr int MOST_DIMENSIONS = 8;

// A Dtype, or this.
inline constexpr int NO_MASK = -1;

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

// 1 / sum. A row of which nothing takes part is 0 under a mask or a causal limit, and PyTorch's NaN (0 * inf) without.
GPTKERN_DEVICE float reciprocal_of(float total, bool may_be_empty) {
    return may_be_empty && total == 0.0f ? 0.0f : 1.0f / total;
}

// The scratch of two reductions over a row's threads.
struct TwoScratches {
    Scratch first, second;
};

// --- Columns --------------------------------------------------------------------------------------------------------

// Of the columns kernels: where this thread's V columns lie and how it walks them.
template <int V>
struct ColumnWalk {
    unsigned group;  // of `lanes` columns
    int first, step, across, walker, walkers;

    GPTKERN_DEVICE ColumnWalk(const Walk& walk, int across) : across(across) {
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
GPTKERN_DEVICE void over_walkers(float (&values)[V], const ColumnWalk<V>& columns, ColumnScratch<V>& scratch) {
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

// --- For launchers --------------------------------------------------------------------------------------------------


// How the kernels walk tensors of one shape: every dimension but `dim` counts rows, neighbours merged where all strides
// allow. Where something lies inside of `dim`, the innermost of it is `lanes`.
inline Walk walk_of(const Tensor& in, int dim, const Tensor& mask) {
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
inline bool is_spread_row(const Tensor& in, int dim) {
    return dim >= 0 && dim == in.rank - 1 && in.shape[dim] > 1 && in.strides[dim] > 1;
}

// Whether a tensor's vectors of V elements along the lanes are whole and aligned everywhere.
inline bool lanes_take_vectors(const Walk& walk, const Tensor& in, int V) {
    int in_bytes = int(bytes_of(in.dtype)), piece = std::min(16, V * in_bytes) / in_bytes;
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
inline Plan plan_of(const Walk& walk, Options& options, int V, int values, int held, int64_t one_pass_limit) {
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
        int64_t blocks = int64_t(walk.rows) * ceil_div(walk.lanes, options.threads * V);
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
                {.grid_x = ceil_div<int64_t>(walk.rows, rows), .threads = unsigned(threads * rows),
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

}  // namespace gptkern
