// rms_norm in CUDA C++, backward: of what was normalised, x (input + residual), and rstd as forward.cu leaves it.
//
//     x_hat = x * rstd            g = dy * weight, the average over the row:
//     dx = rstd * (g - x_hat * avg(g * x_hat))  (+ the gradient that reaches x by itself)
//     dweight = sum over rows of dy * x_hat
//
// Memory is the floor. With b bytes an element it moves 3 b a column (dy and x in, dx out; 4 b where a gradient reaches x by itself), and once a block 4 bytes a
// column of partial sums, which are read again. Some 12 instructions an element are under what an H200 issues in that
// time. At its data sheet's 4.8 TB/s a row of 4096 bfloat16 takes 5.1 ns.
//
// Two kernels, and one that adds partial sums (device/norm.cuh):
//     backward    a group of threads holds a row, up to 16,384 columns of 16 bits or 8,192 of 32. Groups walk rows, and
//                 blocks store partial sums of dweight. Without dx, columns do not need one another: blocks share them
//                 as well as the rows, whatever the width
//     long        dx of wider rows, a block each, in two walks over the row, as the forward's. dweight comes from
//                 `backward` without dx
//     reduce      adds the blocks' partial sums
#include "rms_norm/rms_norm.cuh"

namespace gptkern {
namespace {

// Vectors of dy, and of x, that a thread holds, with the sums of dweight of these columns: each of 512 threads can have
// 128 registers. With few vectors there is room for the weight, and for the next row, on its way while this one is
// worked on.
constexpr int FEW_SLOTS = 2, MANY_SLOTS = 4, BACKWARD_THREADS = 512;

struct Backward {
    Rows dy;             // (rows, width)     gradient of y
    Rows incoming;       // (rows, width)     gradient that reaches x by itself, or null
    Rows x;              // (rows, width)     what was normalised
    Parameter weight;    // (width,), or none: its values are 1
    const float* rstd;   // (rows,)
    void* dx;            // (rows, width)     gradient of x, contiguous, or null
    float* partial;      // (blocks, width)   sums of dweight, or null
    int64_t rows;
    int width;
    int first_column;
    int range;  // columns of a block, from first_column on: all where there is dx
    bool is_half;
    int lanes;  // threads of a group
    SumsLayout sums;
};

// Groups walk the rows, of a range of columns, and blocks store partial sums of dweight.
template <int BYTES, int SLOTS>
__global__ void __launch_bounds__(BACKWARD_THREADS, 1) rms_norm_backward_kernel(const __grid_constant__ Backward call) {
    constexpr int V = 16 / BYTES;
    constexpr bool ROOM = SLOTS <= FEW_SLOTS;
    auto& shared = shared_memory<Shared>();
    const int lanes = call.lanes, begin = call.first_column + int(blockIdx.y) * call.range;
    const int width = min(call.width - begin, call.range);
    const int groups = int(blockDim.x) / lanes, group = int(threadIdx.x) / lanes;
    const int64_t step = int64_t(gridDim.x) * groups, first_row = int64_t(blockIdx.x) * groups + group;

    // `step` rows on, dx is aligned alike: these columns are the thread's for good.
    const int shift = call.dx ? Line<BYTES>(call.dx, first_row * call.width, 1, true).shift() : 0;
    const Columns<V> columns{int(threadIdx.x) % lanes, lanes, shift};

    struct Held {
        Raw<BYTES, V> dy[SLOTS], x[SLOTS];
        float rstd;
    };
    auto load_weight = [&](float(&values)[V], int column) {
        load_parameter<BYTES>(values, call.weight, 1.0f, call.is_half, begin, column, width, columns.shift);
    };
    // Of a row that is not there, zeros, which add nothing to any sum.
    auto load_both = [&](Held& held, int64_t row) {
        const int end = row < call.rows ? width : 0;
        const auto dy = line_of<V, BYTES>(call.dy, row, begin, columns.shift);
        const auto x = line_of<V, BYTES>(call.x, row, begin, columns.shift);
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            const int column = ROOM ? columns[i] : int(opaque(uint32_t(columns[i])));
            held.dy[i] = load<V>(dy, column, end, end);
            held.x[i] = load<V>(x, column, end, end);
        }
        held.rstd = end > 0 ? load_global(call.rstd + row) : 0.0f;
    };

    float weight[ROOM ? SLOTS : 1][V], dweight[SLOTS][V] = {};
    Held held, next;
    if constexpr (ROOM) {
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) load_weight(weight[i], columns[i]);
        load_both(next, first_row);
    }

    int parity = 0;
    // All groups of the block go around equally often.
#pragma unroll 1
    for (int64_t row = first_row; row - group < call.rows; row += step, parity ^= 1) {
        if constexpr (ROOM) {
            held = next;
            load_both(next, row + step);
        } else {
            load_both(held, row);
        }
        float sum = 0.0f;  // of g * x_hat
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            float dy[V], x[V], own[V];
            to_floats(held.dy[i], call.is_half, dy);
            to_floats(held.x[i], call.is_half, x);
            if constexpr (!ROOM) load_weight(own, int(opaque(uint32_t(columns[i]))));
#pragma unroll
            for (int e = 0; e < V; ++e) {
                const float of_weight = dy[e] * (x[e] * held.rstd);
                dweight[i][e] += of_weight;
                sum += of_weight * (ROOM ? weight[ROOM ? i : 0][e] : own[e]);
            }
        }
        if (!call.dx) continue;
        const float average = over_group<Sum>(sum, lanes, shared.scratch[parity]) / float(width);
        const int end = row < call.rows ? width : 0;
        const Line<BYTES> dx_line(call.dx, row * call.width, 1, true);
        const auto incoming = line_of<V, BYTES>(call.incoming, row, 0, columns.shift);
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            // opaque: the addresses of all slots at once would take registers that there are not.
            const int column = ROOM ? columns[i] : int(opaque(uint32_t(columns[i])));
            if (column >= end) continue;
            float dy[V], x[V], own[V];
            to_floats(held.dy[i], call.is_half, dy);
            to_floats(held.x[i], call.is_half, x);
            if constexpr (!ROOM) load_weight(own, column);
            // dx = rstd * (g - x_hat * avg(g * x_hat))
#pragma unroll
            for (int e = 0; e < V; ++e) {
                const float g = dy[e] * (ROOM ? weight[ROOM ? i : 0][e] : own[e]);
                dy[e] = held.rstd * (g - x[e] * held.rstd * average);
            }
            if (call.incoming.start) {
                to_floats(load<V, Reuse::ONCE>(incoming, column, end, end), call.is_half, x);
#pragma unroll
                for (int e = 0; e < V; ++e) dy[e] += x[e];
            }
            store(dx_line, column, end, dy, call.is_half);
        }
    }
    if (call.partial)
        store_partial(dweight, columns, reinterpret_cast<float*>(&shared + 1), call.sums, group, groups, width,
                      call.partial + (int64_t(blockIdx.x) * call.width + begin));
}

// dx alone, a block a row.
template <int BYTES>
__global__ void __launch_bounds__(LONG_THREADS, 2)
    rms_norm_backward_long_kernel(const __grid_constant__ Backward call) {
    constexpr int V = 16 / BYTES;
    using Piece = typename Raw<BYTES, V>::Piece;
    constexpr int ROOM = int(LONG_STASH) / (2 * LONG_THREADS * 16);
    auto& shared = shared_memory<Shared>();
    auto* stash = reinterpret_cast<Piece*>(&shared + 1);
    const Stash<BYTES, V> dy_stash{stash, ROOM}, x_stash{stash + ROOM * LONG_THREADS, ROOM};
    const int64_t row = blockIdx.x;
    const int end = call.width;
    const float rstd = load_global(call.rstd + row);
    const Line<BYTES> dx_line(call.dx, row * end, 1, true);
    const int threads = LONG_THREADS;
    const Columns<V> columns{int(threadIdx.x), threads, dx_line.shift()};
    const auto dy_line = line_of<V, BYTES>(call.dy, row, 0, columns.shift);
    const auto x_line = line_of<V, BYTES>(call.x, row, 0, columns.shift);
    const auto incoming = line_of<V, BYTES>(call.incoming, row, 0, columns.shift);

    float sum = 0.0f;  // of g * x_hat
#pragma unroll 2
    for (int i = 0; columns[i] < end; ++i) {
        auto dy_raw = load<V>(dy_line, columns[i], end, end), x_raw = load<V>(x_line, columns[i], end, end);
        dy_stash.keep(i, dy_raw);
        x_stash.keep(i, x_raw);
        float dy[V], x[V], weight[V], of_vector = 0.0f;
        to_floats(dy_raw, call.is_half, dy);
        to_floats(x_raw, call.is_half, x);
        load_parameter<BYTES>(weight, call.weight, 1.0f, call.is_half, 0, columns[i], end, columns.shift);
#pragma unroll
        for (int e = 0; e < V; ++e) of_vector += dy[e] * weight[e] * (x[e] * rstd);
        sum += of_vector;
    }
    const float average = over_group<Sum>(sum, LONG_THREADS, shared.scratch[0]) / float(end);

#pragma unroll 2
    for (int i = 0; columns[i] < end; ++i) {
        float dy[V], x[V], weight[V];
        const bool kept = i < ROOM;
        to_floats(kept ? dy_stash.take(i) : load<V>(dy_line, columns[i], end, end), call.is_half, dy);
        to_floats(kept ? x_stash.take(i) : load<V>(x_line, columns[i], end, end), call.is_half, x);
        load_parameter<BYTES>(weight, call.weight, 1.0f, call.is_half, 0, columns[i], end, columns.shift);
        // dx = rstd * (g - x_hat * avg(g * x_hat))
#pragma unroll
        for (int e = 0; e < V; ++e) dy[e] = rstd * (dy[e] * weight[e] - x[e] * rstd * average);
        if (call.incoming.start) {
            to_floats(load<V, Reuse::ONCE>(incoming, columns[i], end, end), call.is_half, x);
#pragma unroll
            for (int e = 0; e < V; ++e) dy[e] += x[e];
        }
        store(dx_line, columns[i], end, dy, call.is_half);
    }
}

// A block sums 32 columns.
__global__ void __launch_bounds__(REDUCE_WARPS* WARP) rms_norm_reduce_kernel(
    const float* partial,  // (partials, width)
    float* dweight,        // (width,)
    int partials, int width) {
    reduce_partials(partial, dweight, partials, width);
}

// --- Launcher --------------------------------------------------------------------------------------------------------

// Starts the kernel that holds rows, or a range of columns of them; returns how many blocks share the rows.
template <int BYTES, int SLOTS>
int launch_backward(Backward& call, int vectors, int most_blocks, void* stream) {
    constexpr int V = 16 / BYTES;
    call.lanes = lanes_of(vectors, SLOTS);
    const int groups = groups_of(call.lanes);
    int64_t blocks = ceil_div(call.rows, int64_t(groups));
    // Where groups walk on: a step of a multiple of V rows keeps the alignment of dx.
    if (blocks > most_blocks) blocks = call.width % V == 0 ? most_blocks : most_blocks / V * V;
    LaunchShape shape;
    shape.grid_x = blocks;
    shape.threads = unsigned(groups * call.lanes);
    shape.shared_bytes = sizeof(Shared);
    if (call.partial) {
        call.sums = sums_layout(V, ceil_div(vectors, call.lanes), call.lanes, groups);
        shape.shared_bytes += bytes_of(call.sums, V);
    }
    const int ranges = ceil_div(call.width, call.range);
    for (int first = 0; first < ranges; first += int(MOST_GRID_YZ)) {
        shape.grid_y = std::min<int64_t>(ranges - first, MOST_GRID_YZ);
        call.first_column = first * call.range;
        GPTKERN_LAUNCH((rms_norm_backward_kernel<BYTES, SLOTS>), shape, stream, call);
    }
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
        shape.shared_bytes = sizeof(Shared) + LONG_STASH;
        GPTKERN_LAUNCH((rms_norm_backward_long_kernel<BYTES>), shape, stream, call);
    }
    if (!call.partial) return 0;
    call.dx = nullptr;
    call.range = FEW_SLOTS * WARP * V;
    return launch_backward<BYTES, FEW_SLOTS>(call, FEW_SLOTS * WARP, most_blocks, stream);
}

}  // namespace

Unreadable rms_norm_backward(const Tensor& dy, const Tensor& incoming, const Tensor& x, const Tensor& weight,
                             const Tensor& rstd, const Tensor& dx, const Tensor& dweight, const Tensor& partial, Address stream) {
    if (x.elements() == 0) return nullptr;
    const auto dy_stride = row_stride(dy), incoming_stride = row_stride(incoming), x_stride = row_stride(x);
    if (!dy_stride) return &dy;
    if (!incoming_stride) return &incoming;
    if (!x_stride) return &x;
    Backward call{};
    call.dy = {at<const void>(dy.address), *dy_stride};
    call.incoming = {at<const void>(incoming.address), *incoming_stride};
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
    GPTKERN_LAUNCH((rms_norm_reduce_kernel), reduce_shape(call.width), on, call.partial, at<float>(dweight.address),
                   blocks, call.width);
    return nullptr;
}

}  // namespace gptkern
