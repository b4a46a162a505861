// layer_norm in CUDA C++, backward: of s, mean and rstd as layer_norm.cu leaves them.
//
//     x_hat = (s - mean) * rstd            g = dy * weight, averages over the row:
//     ds = rstd * (g - avg(g) - x_hat * avg(g * x_hat))  (+ the gradient that reaches s by itself)
//     dweight = sum over rows of dy * x_hat,  dbias = sum over rows of dy
//
// Memory is the floor. With b bytes an element it moves 3 b a column (dy and s in, ds out; 4 b with a gradient of s),
// and once a block 8 bytes a column of partial sums. Some 20 instructions an element are under what an H200 issues in
// that time. At its data sheet's 4.8 TB/s a row of 1024 bfloat16 takes 1.28 ns.
//
// A group of threads holds a row in registers (device/layer_norm.cuh). Of wider ones one kernel makes ds, and another
// dweight and dbias: dy and s are read twice, and what goes beyond the registers of the kernel for ds three times.
// Columns that are held:
//
//                                aligned rows     others
//     all at once, 2 bytes             12,288      4,096
//     all at once, 4 bytes              6,144      2,048
//     ds alone, 2 bytes                24,576      6,144
//     ds alone, 4 bytes                12,288      3,072
//
// Groups walk rows in steps that keep the alignment, hence the columns of a thread, which it sums in float32. Blocks
// store one row of partial sums each, and a second kernel adds those: an order that is fixed, so dweight and dbias are
// the same on every run.
#include "device/launch.cuh"
#include "layer_norm/layer_norm.cuh"

namespace gptkern {
namespace {

// --- Backward --------------------------------------------------------------------------------------------------------

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

// --- Backward of rows too wide for that ------------------------------------------------------------------------------

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

// --- The sum of partial sums -----------------------------------------------------------------------------------------

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

// --- Launchers -------------------------------------------------------------------------------------------------------

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
    shape.grid_x = ceil_div(width, WARP);
    shape.grid_y = 2;
    shape.threads = REDUCE_WARPS * WARP;
    shape.shared_bytes = sizeof(ReduceShared);
    GPTKERN_LAUNCH((layer_norm_reduce_kernel), shape, on, call.dweight, call.dbias,
                   at<float>(dweight.address), at<float>(dbias.address), blocks, width);
    return nullptr;
}

}  // namespace gptkern
