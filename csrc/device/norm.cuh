// What layer_norm and rms_norm share beside rows.cuh: rows of another dtype, parameters, and the sums over rows that are
// their gradients.
//
// Groups of threads walk rows in steps that keep the columns of each thread, which sums them in float32. A block adds
// its groups' sums and stores one row of partial sums, and a second kernel adds those: an order that is fixed, without
// atomics, so that the gradients are the same on every run.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "rows.cuh"
#include "tensor.h"

namespace gptkern {

// The thread's vectors of a row of any dtype that values of BYTES bytes hold exactly.
template <Reuse REUSE, bool WHOLE = false, int BYTES, int V, int SLOTS>
GPTKERN_DEVICE void load_row_of(Raw<BYTES, V> (&held)[SLOTS], const Rows& rows, int64_t row, int dtype,
                                const Columns<V>& columns, int end) {
    if constexpr (BYTES == 4)
        if (dtype != FLOAT32) {
            const auto line = line_of<V, 2, WHOLE>(rows, row, 0, columns.shift);
#pragma unroll
            for (int i = 0; i < SLOTS; ++i) {
                float values[V];
                to_floats(load<V, Reuse::ONCE>(line, columns[i], end, end), dtype == FLOAT16, values);
                held[i] = from_floats<4>(values, false);
            }
            return;
        }
    load_row<REUSE>(held, line_of<V, BYTES, WHOLE>(rows, row, 0, columns.shift), columns, end);
}

// A (width,) tensor, or none.
struct Parameter {
    const void* values;
    int dtype;  // float32, or the rows' own
};

// Columns n … n + V - 1 of the parameter's range that starts at `begin` and has `end` columns, 0 beyond it; all `absent`
// where there is none. BYTES and is_half: of the rows.
template <int BYTES, bool WHOLE = false, int V>
GPTKERN_DEVICE void load_parameter(float (&values)[V], const Parameter& parameter, float absent, bool is_half,
                                   int begin, int n, int end, int shift) {
    const Rows row{parameter.values, 0};
    if (!parameter.values) {
#pragma unroll
        for (int e = 0; e < V; ++e) values[e] = absent;
    } else if (BYTES == 4 || parameter.dtype == FLOAT32) {
        to_floats(load<V>(line_of<V, 4, WHOLE>(row, 0, begin, shift), n, end, end), false, values);
    } else {
        to_floats(load<V>(line_of<V, BYTES, WHOLE>(row, 0, begin, shift), n, end, end), is_half, values);
    }
}

// --- Partial sums -----------------------------------------------------------------------------------------------------

// Where a block's sums lie in shared memory, column c of group g at (c % V) * column_pitch + g * group_pitch + c / V:
// for one element of their vectors, lanes have neighbouring words; and column_pitch is 32 / V more than a multiple of
// 32, so that neighbouring columns are in different banks too.
struct SumsLayout {
    int group_pitch, column_pitch;
};

// Of `groups` groups of `lanes` threads with up to `slots` vectors of `vector` columns each.
inline SumsLayout sums_layout(int vector, int slots, int lanes, int groups) {
    constexpr int BANKS = 32;
    const int skew = BANKS / vector, group_pitch = slots * lanes;
    return {group_pitch, ceil_div(std::max(groups * group_pitch - skew, 0), BANKS) * BANKS + skew};
}

inline size_t bytes_of(const SumsLayout& layout, int vector) {
    return size_t(vector) * size_t(layout.column_pitch) * sizeof(float);
}

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

// Adds what the groups of a block have summed for each of `end` columns, and stores it as the block's row of partial
// sums. All threads of the block call it.
template <int SLOTS, int V>
GPTKERN_DEVICE void store_partial(const float (&sums)[SLOTS][V], const Columns<V>& columns, float* shared,
                                  const SumsLayout& layout, int group, int groups, int end, float* partial) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < SLOTS; ++i)
#pragma unroll
        for (int e = 0; e < V; ++e) {
            const int column = columns[i] + e;
            if (unsigned(column) < unsigned(end))
                store_shared(shared + (column % V * layout.column_pitch + group * layout.group_pitch + column / V),
                             sums[i][e]);
        }
    __syncthreads();
    for (int column = int(threadIdx.x); column < end; column += int(blockDim.x)) {
        const float* address = shared + (column % V * layout.column_pitch + column / V);
        auto of_group = [&](int g) { return load_shared(address + g * layout.group_pitch); };
        store_global(partial + column, sum_of(groups, of_group));
    }
}

// --- The sum of partial sums ------------------------------------------------------------------------------------------

inline constexpr int REDUCE_WARPS = 16;

struct ReduceShared {
    float sums[REDUCE_WARPS][WARP];
};

// A block of REDUCE_WARPS warps sums 32 columns.
GPTKERN_DEVICE void reduce_partials(const float* partial,  // (partials, width)
                                    float* total,          // (width,)
                                    int partials, int width) {
    auto& shared = shared_memory<ReduceShared>();
    const int column = int(blockIdx.x) * WARP + lane_of_thread();
    float sum = 0.0f;
    if (column < width)
#pragma unroll 4
        for (int row = warp_of_thread(); row < partials; row += REDUCE_WARPS)
            sum += load_global_once(partial + (int64_t(row) * width + column));
    store_shared(&shared.sums[warp_of_thread()][lane_of_thread()], sum);
    __syncthreads();
    if (warp_of_thread() != 0 || column >= width) return;
    store_global(total + column,
                 sum_of(REDUCE_WARPS, [&](int warp) { return load_shared(&shared.sums[warp][lane_of_thread()]); }));
}

inline LaunchShape reduce_shape(int width) {
    return {.grid_x = ceil_div(width, WARP), .threads = REDUCE_WARPS * WARP, .shared_bytes = sizeof(ReduceShared)};
}

}  // namespace gptkern
