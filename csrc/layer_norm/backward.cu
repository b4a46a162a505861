// layer_norm in CUDA C++, backward: of s, mean and rstd as forward.cu leaves them.
//
//     x_hat = (s - mean) * rstd            g = dy * weight, averages over the row:
//     ds = rstd * (g - avg(g) - x_hat * avg(g * x_hat))  (+ the gradient that reaches s by itself)
//     dweight = sum over rows of dy * x_hat,  dbias = sum over rows of dy
//
// Memory is the floor. With b bytes an element it moves 3 b a column (dy and s in, ds out; 4 b with a gradient of s),
// and once a block 8 bytes a column of partial sums. Some 20 instructions an element are under what an H200 issues in
// that time. At its data sheet's 4.8 TB/s a row of 1024 bfloat16 takes 1.28 ns.
//
// A group of threads holds a row in registers (device/rows.cuh). Of wider ones one kernel makes ds, and another
// dweight and dbias: dy and s are read twice, and what goes beyond the registers of the kernel for ds three times.
// Columns that are held:
//
//                                aligned rows     others
//     all at once, 2 bytes             12,288      4,096
//     all at once, 4 bytes              6,144      2,048
//     ds alone, 2 bytes                24,576      6,144
//     ds alone, 4 bytes                12,288      3,072
//
// Groups walk rows, and blocks store partial sums of dweight and dbias, which a last kernel adds (device/norm.cuh).
#include "layer_norm/layer_norm.cuh"

namespace gptkern {
namespace {

// --- Backward --------------------------------------------------------------------------------------------------------

struct Backward {
    Rows dy;             // (rows, width)     gradient of y, of T, as all but the weight
    Rows incoming;       // (rows, width)     gradient that reaches s by itself, or null
    Rows s;              // (rows, width)     what was normalised
    Parameter weight;    // (width,)          or none: its values are 1
    const float* mean;   // (rows,)
    const float* rstd;   // (rows,)
    void* ds;            // (rows, width)     gradient of s, contiguous, or null
    float* dweight;      // (blocks, width)   partial sums, or null
    float* dbias;        // (blocks, width)   partial sums, or null
    int64_t rows;
    int width;
    int lanes;  // threads of a group
    SumsLayout sums;
};

struct BackwardShared {
    Scratch scratch[2][2];
    // Sums follow.
};

constexpr int BACKWARD_THREADS = 512;  // at most

// Groups walk the rows, and blocks store partial sums of dweight and dbias.
template <class T, int SLOTS, bool WHOLE>
__global__ void __launch_bounds__(BACKWARD_THREADS, 1) layer_norm_backward_kernel(
    const __grid_constant__ Backward call) {
    constexpr int V = VECTOR<T>, BYTES = sizeof(T);
    constexpr bool HALF = IS_HALF<T>;
    // Of 128 registers a thread, sums take 2 * SLOTS * V. With up to 16 columns a thread there is room for the weight
    // and for the next row, on its way while this one is worked on.
    constexpr bool ROOM = SLOTS * V <= 16;
    auto& shared = shared_memory<BackwardShared>();
    const int lanes = call.lanes, width = call.width;
    const int groups = int(blockDim.x) / lanes, group = int(threadIdx.x) / lanes;
    // More than 2^31 rows of several vectors a thread are more than any memory.
    using Row = std::conditional_t<SLOTS == 1, int64_t, int>;
    const Row step = Row(gridDim.x) * groups, rows = Row(call.rows);
    const bool needs_s = call.ds || call.dweight;

    // `step` rows on, ds is aligned alike: these columns are the thread's for good.
    const Row first_row = Row(blockIdx.x) * groups + group;
    const int shift = call.ds ? Line<BYTES, WHOLE>(call.ds, int64_t(first_row) * width, 1, true).shift() : 0;
    const Columns<V> columns{int(threadIdx.x) % lanes, lanes, shift};

    auto load_weight = [&](float(&values)[V], int column) {
        load_parameter<BYTES, WHOLE>(values, call.weight, 1.0f, HALF, 0, column, width, shift);
    };
    float weight[ROOM ? SLOTS : 1][V];
    if constexpr (ROOM) {
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) load_weight(weight[i], columns[i]);
    }
    float dweight[SLOTS][V] = {}, dbias[SLOTS][V] = {};
    struct Held {
        Raw<BYTES, V> dy[SLOTS], s[SLOTS];
        float mean, rstd;
    };
    // Of a row that is not there, zeros, which add nothing to any sum. s is worked on also where it is not needed.
    auto load_both = [&](Held& to, Row row) {
        const int end = row < rows ? width : 0;
        load_row<Reuse::ONCE>(to.dy, line_of<V, BYTES, WHOLE>(call.dy, row, 0, shift), columns, end);
        if (needs_s) {
            load_row<Reuse::ONCE>(to.s, line_of<V, BYTES, WHOLE>(call.s, row, 0, shift), columns, end);
            to.mean = end ? load_global(call.mean + row) : 0.0f;
            to.rstd = end ? load_global(call.rstd + row) : 0.0f;
        }
    };
    Held held{}, next{};
    if constexpr (ROOM) load_both(next, first_row);

    int parity = 0;
    // All groups of the block go around equally often.
#pragma unroll 1
    for (Row row = first_row; row - group < rows; row += step, parity ^= 1) {
        if constexpr (ROOM) {
            held = next;
            load_both(next, row + step);
        } else {
            load_both(held, row);
        }
        float sums[2] = {0.0f, 0.0f};  // of g, of g * x_hat
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            float own_weight[V], dy[V], s[V];
            to_floats(held.dy[i], HALF, dy);
            to_floats(held.s[i], HALF, s);
            // opaque: neither the weight nor its addresses are to stay in registers.
            if constexpr (!ROOM) load_weight(own_weight, int(opaque(uint32_t(columns[i]))));
#pragma unroll
            for (int e = 0; e < V; ++e) {
                float x_hat = (s[e] - held.mean) * held.rstd;
                float g = dy[e] * (ROOM ? weight[ROOM ? i : 0][e] : own_weight[e]);
                dweight[i][e] += dy[e] * x_hat;
                dbias[i][e] += dy[e];
                sums[0] += g;
                sums[1] += g * x_hat;
            }
        }
        if (!call.ds) continue;
        over_group<Sum>(sums, lanes, shared.scratch[parity]);
        widen_again(held.dy);
        widen_again(held.s);
        const float average_g = sums[0] / float(width), average_gx = sums[1] / float(width);
        const int end = row < rows ? width : 0;
        const Line<BYTES, WHOLE> ds_line(call.ds, int64_t(row) * width, 1, true);
        const auto incoming = line_of<V, BYTES, WHOLE>(call.incoming, row, 0, shift);
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            const int column = columns[i];
            if (column >= end) continue;
            float own_weight[V], dy[V], s[V];
            to_floats(held.dy[i], HALF, dy);
            to_floats(held.s[i], HALF, s);
            if constexpr (!ROOM) load_weight(own_weight, int(opaque(uint32_t(column))));
            // ds = rstd * (g - avg(g) - x_hat * avg(g * x_hat))
#pragma unroll
            for (int e = 0; e < V; ++e) {
                float x_hat = (s[e] - held.mean) * held.rstd;
                float g = dy[e] * (ROOM ? weight[ROOM ? i : 0][e] : own_weight[e]);
                dy[e] = held.rstd * (g - average_g - x_hat * average_gx);
            }
            if (call.incoming.start) {
                to_floats(load<V, Reuse::ONCE>(incoming, column, end, end), HALF, s);
#pragma unroll
                for (int e = 0; e < V; ++e) dy[e] += s[e];
            }
            store(ds_line, column, end, dy, HALF);
        }
    }

    float* sums = reinterpret_cast<float*>(&shared + 1);
    const int64_t offset = int64_t(blockIdx.x) * width;
    if (call.dweight)
        store_partial(dweight, columns, sums, call.sums, group, groups, width, call.dweight + offset);
    if (call.dbias) store_partial(dbias, columns, sums, call.sums, group, groups, width, call.dbias + offset);
}

// --- Backward of rows too wide for that ------------------------------------------------------------------------------

template <bool WHOLE>
constexpr int INPUT_GRADIENT_SLOTS = WHOLE ? 4 : 1;
constexpr int INPUT_GRADIENT_THREADS = 768;

// ds alone, a block a row, in chunks; the last chunk is held between the two passes.
template <class T, bool WHOLE>
__global__ void __launch_bounds__(INPUT_GRADIENT_THREADS, 1) layer_norm_input_gradient_kernel(
    const __grid_constant__ Backward call) {
    constexpr int V = VECTOR<T>, BYTES = sizeof(T), SLOTS = INPUT_GRADIENT_SLOTS<WHOLE>;
    constexpr bool HALF = IS_HALF<T>;
    auto& scratch = shared_memory<BackwardShared>().scratch;
    const int width = call.width, lanes = int(blockDim.x), chunk = SLOTS * lanes * V;
    const int64_t row = blockIdx.x;
    const float mean = load_global(call.mean + row), rstd = load_global(call.rstd + row);
    const Line<BYTES, WHOLE> ds_line(call.ds, row * width, 1, true);
    const int shift = ds_line.shift();
    Columns<V> columns{int(threadIdx.x), lanes, shift};
    const auto dy_line = line_of<V, BYTES, WHOLE>(call.dy, row, 0, shift);
    const auto s_line = line_of<V, BYTES, WHOLE>(call.s, row, 0, shift);
    const auto incoming = line_of<V, BYTES, WHOLE>(call.incoming, row, 0, shift);

    Raw<BYTES, V> dy_held[SLOTS], s_held[SLOTS];
    float sums[2] = {0.0f, 0.0f};  // of g, of g * x_hat
    int start = -shift;
#pragma unroll 1
    while (true) {
        load_row(dy_held, dy_line, columns, width);
        load_row(s_held, s_line, columns, width);
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            float weight[V], dy[V], s[V], slot_sums[2] = {0.0f, 0.0f};
            to_floats(dy_held[i], HALF, dy);
            to_floats(s_held[i], HALF, s);
            load_parameter<BYTES, WHOLE>(weight, call.weight, 1.0f, HALF, 0, columns[i], width, shift);
#pragma unroll
            for (int e = 0; e < V; ++e) {
                float g = dy[e] * weight[e];
                slot_sums[0] += g;
                slot_sums[1] += g * ((s[e] - mean) * rstd);
            }
            sums[0] += slot_sums[0];
            sums[1] += slot_sums[1];
        }
        if (start + chunk >= width) break;
        start += chunk;
        columns.shift -= chunk;
    }
    over_group<Sum>(sums, lanes, scratch[0]);
    widen_again(dy_held);
    widen_again(s_held);
    const float average_g = sums[0] / float(width), average_gx = sums[1] / float(width);

#pragma unroll 1
    while (true) {
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) {
            const int column = columns[i];
            if (column >= width) continue;
            float weight[V], dy[V], s[V];
            to_floats(dy_held[i], HALF, dy);
            to_floats(s_held[i], HALF, s);
            load_parameter<BYTES, WHOLE>(weight, call.weight, 1.0f, HALF, 0, column, width, shift);
            // ds = rstd * (g - avg(g) - x_hat * avg(g * x_hat))
#pragma unroll
            for (int e = 0; e < V; ++e) {
                float x_hat = (s[e] - mean) * rstd;
                dy[e] = rstd * (dy[e] * weight[e] - average_g - x_hat * average_gx);
            }
            if (call.incoming.start) {
                to_floats(load<V, Reuse::ONCE>(incoming, column, width, width), HALF, s);
#pragma unroll
                for (int e = 0; e < V; ++e) dy[e] += s[e];
            }
            store(ds_line, column, width, dy, HALF);
        }
        if (start <= 0) break;
        start -= chunk;
        columns.shift += chunk;
        load_row(dy_held, dy_line, columns, width);
        load_row(s_held, s_line, columns, width);
    }
}

constexpr int PARAMETER_GRADIENT_WARPS = 8;

// dweight and dbias alone: a block sums 32 vectors of columns over every gridDim.y-th set of rows, a warp a row.
template <class T, bool WHOLE>
__global__ void __launch_bounds__(PARAMETER_GRADIENT_WARPS * WARP)
    layer_norm_parameter_gradient_kernel(const __grid_constant__ Backward call) {
    constexpr int V = VECTOR<T>, BYTES = sizeof(T);
    constexpr bool HALF = IS_HALF<T>;
    auto& shared = shared_memory<BackwardShared>();
    const int begin = int(blockIdx.x) * (WARP * V);
    const int width = min(call.width - begin, WARP * V);  // of the block's columns
    const int64_t step = int64_t(gridDim.y) * PARAMETER_GRADIENT_WARPS;

    // Rows of another alignment would put other columns into the same place: all of them begin at `begin`.
    const int lanes = WARP;
    const Columns<V> columns{lane_of_thread(), lanes, 0};

    float dweight[1][V] = {}, dbias[1][V] = {};
#pragma unroll 4
    for (int64_t row = int64_t(blockIdx.y) * PARAMETER_GRADIENT_WARPS + warp_of_thread(); row < call.rows;
         row += step) {
        Raw<BYTES, V> dy_held[1], s_held[1] = {};
        float mean = 0.0f, rstd = 0.0f;
        load_row<Reuse::ONCE>(dy_held, line_of<V, BYTES, WHOLE>(call.dy, row, begin, 0), columns, width);
        if (call.dweight) {
            load_row<Reuse::ONCE>(s_held, line_of<V, BYTES, WHOLE>(call.s, row, begin, 0), columns, width);
            mean = load_global(call.mean + row);
            rstd = load_global(call.rstd + row);
        }
        float dy[V], s[V];
        to_floats(dy_held[0], HALF, dy);
        to_floats(s_held[0], HALF, s);
#pragma unroll
        for (int e = 0; e < V; ++e) {
            dweight[0][e] += dy[e] * ((s[e] - mean) * rstd);
            dbias[0][e] += dy[e];
        }
    }
    float* sums = reinterpret_cast<float*>(&shared + 1);
    const int64_t offset = int64_t(blockIdx.y) * call.width + begin;
    if (call.dweight)
        store_partial(dweight, columns, sums, call.sums, warp_of_thread(), PARAMETER_GRADIENT_WARPS, width,
                      call.dweight + offset);
    if (call.dbias)
        store_partial(dbias, columns, sums, call.sums, warp_of_thread(), PARAMETER_GRADIENT_WARPS, width,
                      call.dbias + offset);
}

// A block sums 32 columns, of dweight (blockIdx.y = 0) or dbias (1).
__global__ void __launch_bounds__(REDUCE_WARPS* WARP) layer_norm_reduce_kernel(
    const float* dweight_partial,  // (partials, width), or null
    const float* dbias_partial,    // (partials, width), or null
    float* dweight,                // (width,)
    float* dbias,                  // (width,)
    int partials, int width) {
    const float* partial = blockIdx.y == 0 ? dweight_partial : dbias_partial;
    if (partial) reduce_partials(partial, blockIdx.y == 0 ? dweight : dbias, partials, width);
}

// --- Launchers -------------------------------------------------------------------------------------------------------

// Lays the block's sums out, where there are any; its shared memory in bytes.
size_t lay_out_sums(Backward& call, int vector, int slots, int lanes, int groups) {
    if (!call.dweight && !call.dbias) return sizeof(BackwardShared);
    call.sums = sums_layout(vector, slots, lanes, groups);
    return sizeof(BackwardShared) + bytes_of(call.sums, vector);
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
    shape.grid_x = blocks;
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
        shape.grid_x = call.rows;
        shape.threads = INPUT_GRADIENT_THREADS;
        shape.shared_bytes = sizeof(BackwardShared);
        GPTKERN_LAUNCH((layer_norm_input_gradient_kernel<T, WHOLE>), shape, stream, call);
    }
    if (!call.dweight && !call.dbias) return 0;
    shape.grid_x = ceil_div(call.width, WARP * V);
    shape.grid_y = std::min(ceil_div(call.rows, int64_t(PARAMETER_GRADIENT_WARPS)), int64_t(most_blocks));
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

Unreadable layer_norm_backward(const Tensor& dy, const Tensor& incoming, const Tensor& s, const Tensor& weight,
                               const Tensor& statistics, const Tensor& ds, const Tensor& dweight, const Tensor& dbias,
                               const Tensor& partial, int partials, Address stream) {
    if (s.elements() == 0) return nullptr;
    auto dy_stride = row_stride(dy), incoming_stride = row_stride(incoming), s_stride = row_stride(s);
    if (!dy_stride) return &dy;
    if (!incoming_stride) return &incoming;
    if (!s_stride) return &s;
    for (const Tensor* vector : {&weight, &statistics})
        if (!is_contiguous(*vector)) return vector;
    const Dtype dtype = s.dtype;
    const int width = int(s.shape[s.rank - 1]);
    const int vector = 16 / int(bytes_of(dtype));
    Backward call{};
    call.dy = {at<const void>(dy.address), *dy_stride};
    call.incoming = {at<const void>(incoming.address), *incoming_stride};
    call.s = {at<const void>(s.address), *s_stride};
    call.weight = {at<const void>(weight.address), weight.dtype};
    call.ds = at<void>(ds.address);
    call.dweight = dweight.address ? at<float>(partial.address) : nullptr;
    call.dbias =
        dbias.address ? at<float>(partial.address) + (dweight.address ? int64_t(partials) * width : 0) : nullptr;
    call.width = width;
    call.rows = s.elements() / width;
    call.mean = at<const float>(statistics.address);
    call.rstd = call.mean + call.rows;
    const bool whole = width % vector == 0 && is_whole(dy, *dy_stride, vector) && is_whole(s, *s_stride, vector) &&
                       is_whole(incoming, *incoming_stride, vector) && is_whole(weight, width, vector) &&
                       is_whole(ds, width, vector);
    void* on = at<void>(stream);
    int blocks = dtype == FLOAT32   ? backward_of<float>(call, whole, partials, on)
                 : dtype == FLOAT16 ? backward_of<float16>(call, whole, partials, on)
                                    : backward_of<bfloat16>(call, whole, partials, on);
    if (!call.dweight && !call.dbias) return nullptr;
    LaunchShape shape = reduce_shape(width);
    shape.grid_y = 2;
    GPTKERN_LAUNCH((layer_norm_reduce_kernel), shape, on, call.dweight, call.dbias,
                   at<float>(dweight.address), at<float>(dbias.address), blocks, width);
    return nullptr;
}

}  // namespace gptkern
