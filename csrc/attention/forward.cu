// attention, the forward, on the tensor cores of sm_80 and newer, after FlashAttention-2 (Dao, 2023, arXiv:2307.08691).
//
//   S = log2(e) scale Q Kᵀ        P = softmax(scale Q Kᵀ) = 2^(S - lse)
//   O = P V                       lse = log2(sum over the keys of 2^S)
//
// A tile of keys at a time; m is a reference for the row near its running maximum, l the running sum, A the running P V:
//   m' = max(m, rowmax(S)) where that is above m + RESCALE_AT in any row of the warp, else m' = m
//   p  = 2^(S - m')               l = l 2^(m - m') + rowsum(p)          A = A 2^(m - m') + p V
//   O  = A / l                    lse = m + log2(l)
// Any reference gives the same O and lse; one that seldom moves saves the products of A with 2^(m - m').
//
// A block computes BLOCK_M = 128 queries of one head. Its keys and values stream through shared memory in tiles of
// BLOCK_N = 64, by cp.async; a warp owns its queries for the whole loop and keeps S, then P, and A in registers (the
// accumulators of S lie as the operand A of the second product wants them). Causal blocks stop at the diagonal, a warp at
// its own part of it, and only tiles that hold the diagonal or the end of the keys are masked. Heavier blocks come first.
//
// What it costs, for n = batch * heads, lengths T and S, head_dim D, 2 bytes an element:
//   operations     4 n T S D, half of it causal: 2 products of 2 T S D
//   least bytes    2 n (2 T + 2 S / group) D + 4 n T; each block reads its head's keys and values once, from the L2 cache
//                  where the blocks of a head run side by side: 4 * 128 S D operations for 4 S D bytes, 128 a byte
//   floor          operations over the rate of mma.sync. An A100's 312 TFLOP/s and 2.0 TB/s meet at 156 operations a byte
//                  of memory, and the forward does T S / (T + S) of them: above lengths of some 300 (600 causal) the
//                  tensor cores are the floor.
// Inside a multiprocessor of sm_80, in cycles for one tile of keys and a warp, with W queries in the warp:
//   matrix units   W * 64 * D * 2 multiply-adds at 256 a cycle and quarter     W D / 2
//   exp2           W * 64 at 4 a cycle and quarter                             16 W          half at D = 64, a quarter at 128
//   shared memory  K and V for each warp, 256 D bytes at 32 a cycle and quarter     8 D      (+ W D / 16 for Q, if from there)
// so a warp of 16 queries would read shared memory all the time that its products take, and one of 32 half of it: 32,
// wherever the registers hold it.
//
//   D                        64    80    96    128   256
//   warps x queries          4x32  4x32  4x32  4x32  8x16
//   keys of a tile           64    64    64    64    32
//   registers: A             64    80    96    128   128    of 255, with 16 for m, l and the maxima; the rest is for
//              S             64    64    64    64    16     addresses and operands on their way
//              Q             32    40    -     -     64     else in shared memory, and 8 at a time
//   stages                   2     2     2     1     2      of a tile of keys and one of values
//   shared memory, KB        32    40    72    64    64     two blocks a multiprocessor of sm_80 up to 128, one at 256
// Q passes through the stages on its way to registers. With two stages a tile is copied while the one before is computed,
// one barrier a tile; with one stage K is copied during softmax and P V, V during Q Kᵀ.
//
// parts: GPTKERN_HEAD_DIM = 64, 80, 96, 128, 256
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "attention/attention.h"
#include "device/launch.cuh"
#include "device/tile.cuh"

namespace gptkern {

// What the kernel is called with, whatever the tile.
struct AttentionForward {
    const void* query;  // (batch, heads, length_q, head_dim), any strides but the last, which is 1; so are those below
    const void* key;    // (batch, heads / group, length_k, head_dim)
    const void* value;  // (batch, heads / group, length_k, head_dim)
    void* output;       // (batch, heads, length_q, head_dim)
    float* lse;         // (batch, heads, length_q), contiguous
    struct Strides {    // in elements; of the rows, and of tensors and heads
        int64_t batch, head;
        int row;
    } query_strides, key_strides, value_strides, output_strides;
    int heads, group, length_q, length_k, head_dim;
    float scale_log2e;
    bool is_causal;
};

// Launches the kernel whose tiles are D wide.
template <int D>
void attention_forward_of_width(const AttentionForward& call, int batch, Dtype dtype, void* stream);

#ifdef GPTKERN_HEAD_DIM

namespace {

// Where m starts: below every score, yet finite, so that m - m' is never -inf - -inf.
constexpr float LOWEST = -1.0e38f;
// p reaches 2^RESCALE_AT = 256 at most: far from the 65,504 of float16, and rounded no worse than in [0, 1].
constexpr float RESCALE_AT = 8.0f;
// The D from which even the thread's number is one register more than there are, so that each copy reads it anew. By nvcc
// 13.0: kept at 128, sm_100 and sm_120 spill four addresses in the loop, which sm_90 recomputes (1180 instructions a tile
// of keys, 1148 so); read anew, sm_80 to sm_89 spill instead.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int READS_THREAD_ANEW_FROM = 128;
#else
constexpr int READS_THREAD_ANEW_FROM = 256;
#endif

template <class T, int D>
struct Tiles {
    static constexpr int BLOCK_N = D <= 128 ? 64 : 32;
    static constexpr int WARP_ROWS = D <= 128 ? 32 : 16;  // queries of a warp
    static constexpr int WARPS = D <= 128 ? 4 : 8;
    static constexpr int THREADS = WARPS * WARP, BLOCK_M = WARPS * WARP_ROWS;
    static constexpr bool QUERY_IN_REGISTERS = D <= 80 || D == 256;
    static constexpr int STAGES = D == 128 ? 1 : 2;
    static constexpr int BLOCKS_OF_A_MULTIPROCESSOR = D <= 128 ? 2 : 1;

    struct Stage {
        Tile<T, BLOCK_N, D> key, value;
    };
    using Rows = Tile<T, BLOCK_M, D>;  // Q at first, O at last
    struct Apart {
        Stage stages[STAGES];
        Rows rows;
    };
    union Overlaid {
        Stage stages[STAGES];
        Rows rows;
    };
    // Q leaves shared memory before the first stage comes, where registers hold it.
    using Shared = std::conditional_t<QUERY_IN_REGISTERS, Overlaid, Apart>;
    static_assert(sizeof(Shared) <= SHARED_BYTES_EVERYWHERE);
};

// One warp's part of a block: its queries, and what it has seen so far. In a row fragment, register 2 h + i of an
// accumulator belongs to row g + 8 h (g = lane / 4).
template <class T, int D>
struct WarpState {
    using Shape = Tiles<T, D>;
    static constexpr int FRAGMENTS = Shape::WARP_ROWS / 16;  // of 16 queries
    static constexpr int KEYS = Shape::BLOCK_N / 8, COLUMNS = D / 8, STEPS = D / 16;

    uint32_t query[Shape::QUERY_IN_REGISTERS ? STEPS : 1][FRAGMENTS][4];
    float scores[FRAGMENTS][KEYS][4];          // Q Kᵀ
    float accumulator[FRAGMENTS][COLUMNS][4];  // A
    float reference[FRAGMENTS][2];             // m
    float sum[FRAGMENTS][2];                   // l, of this lane's keys

    GPTKERN_DEVICE void clear() {
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) {
#pragma unroll
            for (int h = 0; h < 2; ++h) reference[f][h] = LOWEST, sum[f][h] = 0.0f;
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) accumulator[f][j][i] = 0.0f;
        }
    }

    GPTKERN_DEVICE void load_query(const Tile<T, Shape::BLOCK_M, D>& tile, int first_row) {
        if constexpr (Shape::QUERY_IN_REGISTERS) {
#pragma unroll
            for (int step = 0; step < STEPS; ++step)
#pragma unroll
                for (int f = 0; f < FRAGMENTS; ++f) load_a(query[step][f], tile, first_row + 16 * f, 16 * step);
        }
    }

    // scores = Q Kᵀ
    GPTKERN_DEVICE void multiply_keys(const Tile<T, Shape::BLOCK_N, D>& key, const Tile<T, Shape::BLOCK_M, D>& rows,
                                      int first_row, int first_key) {
        const unsigned lane = unsigned(not_hoisted(lane_of_thread(), first_key));
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
            for (int j = 0; j < KEYS; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) scores[f][j][i] = 0.0f;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            constexpr bool LOADS = !Shape::QUERY_IN_REGISTERS;
            const int kept = LOADS ? 0 : step;
            if constexpr (LOADS) {
#pragma unroll
                for (int f = 0; f < FRAGMENTS; ++f) load_a(query[0][f], rows, first_row + 16 * f, 16 * step, lane);
            }
#pragma unroll
            for (int j = 0; j < KEYS; j += 2) {
                uint32_t b[2][2];
                load_b(b, key, 8 * j, 16 * step, lane);
#pragma unroll
                for (int f = 0; f < FRAGMENTS; ++f) {
                    mma_m16n8k16<T>(scores[f][j], query[kept][f], b[0]);
                    mma_m16n8k16<T>(scores[f][j + 1], query[kept][f], b[1]);
                }
            }
        }
    }

    // -inf for the keys, of a tile that starts at `first_key`, that a row of the warp does not see.
    GPTKERN_DEVICE void mask(int first_row, int first_key, int length_k, bool is_causal) {
        const int lane = not_hoisted(lane_of_thread(), first_key);
        // Register 2 h + i of fragment f, j is row first_row + 16 f + 8 h + lane / 4 and key first_key + 8 j + i +
        // 2 (lane % 4). It is seen if the key is below length_k and, causal, at most the row.
        int tail = length_k - first_key - lane % 4 * 2;
        int diagonal = is_causal ? first_row + lane / 4 - first_key - lane % 4 * 2 : Shape::BLOCK_N;
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int j = 0; j < KEYS; ++j)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        if (8 * j + i >= tail || 8 * j + i - 16 * f - 8 * h > diagonal)
                            scores[f][j][2 * h + i] = -INFINITY;
    }

    // Brings m, l and A to a new reference where that is needed.
    GPTKERN_DEVICE void rescale(float scale_log2e) {
        float largest[FRAGMENTS][2];
        bool grown = false;
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float most = scores[f][0][2 * h];
#pragma unroll
                for (int j = 0; j < KEYS; ++j)
                    most = fmaxf(most, fmaxf(scores[f][j][2 * h], scores[f][j][2 * h + 1]));
                // rowmax(S): scale > 0, so one product a row instead of one a score
                largest[f][h] = warp_max<4>(most) * scale_log2e;
                grown = grown || largest[f][h] - reference[f][h] > RESCALE_AT;
            }
        if (ballot(grown)) {
#pragma unroll
            for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    // m' = max(m, rowmax(S)),  l = l 2^(m - m'),  A = A 2^(m - m')
                    float moved = fmaxf(reference[f][h], largest[f][h]);
                    float correction = exp2_approx(reference[f][h] - moved);
                    reference[f][h] = moved;
                    sum[f][h] *= correction;
#pragma unroll
                    for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
                        for (int i = 0; i < 2; ++i) accumulator[f][j][2 * h + i] *= correction;
                }
        }
    }

    // l = l + rowsum(p),  A = A + p V
    GPTKERN_DEVICE void multiply_values(const Tile<T, Shape::BLOCK_N, D>& value, float scale_log2e, int first_key) {
        const unsigned lane = unsigned(not_hoisted(lane_of_thread(), first_key));
#pragma unroll
        for (int step = 0; step < Shape::BLOCK_N / 16; ++step) {
            uint32_t p[FRAGMENTS][4];
#pragma unroll
            for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    // Operand register i: row g + 8 (i % 2), keys 16 step + 8 (i / 2) + 2 t, + 1.
                    const int h = i % 2;
                    const float* pair = &scores[f][2 * step + i / 2][2 * h];
                    // p = 2^(S - m')
                    float low = exp2_approx(pair[0] * scale_log2e - reference[f][h]);
                    float high = exp2_approx(pair[1] * scale_log2e - reference[f][h]);
                    sum[f][h] += low + high;
                    p[f][i] = pack<T>(low, high);
                }
#pragma unroll
            for (int j = 0; j < COLUMNS; j += 2) {
                uint32_t b[2][2];
                load_b_transposed(b, value, 16 * step, 8 * j, lane);
#pragma unroll
                for (int f = 0; f < FRAGMENTS; ++f) {
                    mma_m16n8k16<T>(accumulator[f][j], p[f], b[0]);
                    mma_m16n8k16<T>(accumulator[f][j + 1], p[f], b[1]);
                }
            }
        }
    }

    // O = A / l into the tile's rows from first_row on, and lse of the rows below `rows`.
    GPTKERN_DEVICE void finish(Tile<T, Shape::BLOCK_M, D>& tile, int first_row, float* lse, int rows) {
        int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float total = warp_sum<4>(sum[f][h]), inverse = 1.0f / total;
                int row = 16 * f + 8 * h + g;
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j) {
                    const float* pair = &accumulator[f][j][2 * h];
                    store_shared(tile.pair(first_row + row, 8 * j + 2 * t),
                                 pack<T>(pair[0] * inverse, pair[1] * inverse));
                }
                // lse = m + log2(l)
                if (t == 0 && row < rows) store_global(lse + row, reference[f][h] + log2f(total));
            }
    }
};

template <class T, int D>
__global__ void __launch_bounds__(Tiles<T, D>::THREADS, Tiles<T, D>::BLOCKS_OF_A_MULTIPROCESSOR)
    attention_forward_kernel(const AttentionForward call) {
    using Shape = Tiles<T, D>;
    constexpr int BLOCK_N = Shape::BLOCK_N, THREADS = Shape::THREADS;
    constexpr bool TWO_STAGES = Shape::STAGES == 2;
    auto& shared = shared_memory<typename Shape::Shared>();
    const int thread = int(threadIdx.x);

    // Neighbouring blocks share a head's keys in the L2 cache; within a head the heaviest causal block comes first.
    const int start_m = int(gridDim.x - 1 - blockIdx.x) * Shape::BLOCK_M;
    const int head = int(blockIdx.y), batch = int(blockIdx.z);
    auto first_of = [&](const void* tensor, const AttentionForward::Strides& strides, int of_head, int row) {
        return static_cast<const T*>(tensor) + batch * strides.batch + of_head * strides.head +
               int64_t(row) * strides.row;
    };
    const T* key = first_of(call.key, call.key_strides, head / call.group, 0);
    const T* value = first_of(call.value, call.value_strides, head / call.group, 0);
    auto this_thread = [&](int pass) {
        return D >= READS_THREAD_ANEW_FROM ? thread_index_anew() : not_hoisted(thread, pass);
    };
    auto copy_key = [&](auto& tile, int start) {
        load_tile<THREADS>(tile, key + int64_t(start) * call.key_strides.row, call.key_strides.row,
                           call.length_k - start, call.head_dim, this_thread(start));
    };
    auto copy_value = [&](auto& tile, int start) {
        load_tile<THREADS>(tile, value + int64_t(start) * call.value_strides.row, call.value_strides.row,
                           call.length_k - start, call.head_dim, this_thread(start));
    };

    // The keys that somebody sees: of the block, and of this warp. A warp past the last query sees none.
    const int rows = min(Shape::BLOCK_M, call.length_q - start_m);
    // The shuffle tells the compiler that the number is the same in all lanes: what follows from it is in uniform registers.
    const int first_row = shuffle(warp_of_thread(), 0) * Shape::WARP_ROWS;
    const int warp_rows = min(Shape::WARP_ROWS, rows - first_row);
    const int stop = call.is_causal ? min(call.length_k, start_m + rows) : call.length_k;
    int warp_stop = call.is_causal ? min(stop, start_m + first_row + warp_rows) : stop;
    if (warp_rows <= 0) warp_stop = 0;
    // Keys below are seen by all the warp's rows.
    const int seen_by_all = call.is_causal ? min(stop, start_m + first_row + 1) : stop;

    load_tile<THREADS>(shared.rows, first_of(call.query, call.query_strides, head, start_m), call.query_strides.row,
                       rows, call.head_dim, thread);
    WarpState<T, D> warp;
    warp.clear();
    if constexpr (Shape::QUERY_IN_REGISTERS) {
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        warp.load_query(shared.rows, first_row);
        __syncthreads();  // keys overwrite Q
    }
    copy_key(shared.stages[0].key, 0);
    if constexpr (TWO_STAGES) copy_value(shared.stages[0].value, 0);
    cp_async_commit();

#pragma unroll 1
    for (int start = 0; start < stop; start += BLOCK_N) {
        auto& stage = shared.stages[TWO_STAGES ? start / BLOCK_N % 2 : 0];
        const bool active = start < warp_stop;
        // This tile's K (and V, of two stages) is there, and the block has read all of the tile before.
        cp_async_wait<0>();
        __syncthreads();
        if constexpr (TWO_STAGES) {
            auto& next = shared.stages[(start / BLOCK_N + 1) % 2];
            if (start + BLOCK_N < stop) {
                copy_key(next.key, start + BLOCK_N);
                copy_value(next.value, start + BLOCK_N);
            }
        } else {
            copy_value(stage.value, start);
        }
        cp_async_commit();
        if (active) warp.multiply_keys(stage.key, shared.rows, first_row, start);
        if constexpr (!TWO_STAGES) {
            // V is there, and the block has read K.
            cp_async_wait<0>();
            __syncthreads();
            if (start + BLOCK_N < stop) copy_key(stage.key, start + BLOCK_N);
            cp_async_commit();
        }
        if (active) {
            if (start + BLOCK_N > seen_by_all) warp.mask(start_m + first_row, start, call.length_k, call.is_causal);
            warp.rescale(call.scale_log2e);
            warp.multiply_values(stage.value, call.scale_log2e, start);
        }
    }

    __syncthreads();  // O overwrites what the block reads
    if (warp_rows <= 0) return;
    const int row = start_m + first_row;
    const int64_t batch_head = int64_t(batch) * call.heads + head;
    warp.finish(shared.rows, first_row, call.lse + batch_head * call.length_q + row, warp_rows);
    warp_sync();
    T* output = const_cast<T*>(first_of(call.output, call.output_strides, head, row));
    store_tile<Shape::WARP_ROWS, WARP>(shared.rows, first_row, output, call.output_strides.row, warp_rows,
                                       call.head_dim, lane_of_thread());
}

template <class T, int D>
void launch(const AttentionForward& call, int batch, void* stream) {
    using Shape = Tiles<T, D>;
    LaunchShape shape{.grid_x = ceil_div(call.length_q, Shape::BLOCK_M),
                      .grid_y = call.heads,
                      .grid_z = batch,
                      .threads = Shape::THREADS,
                      .shared_bytes = sizeof(typename Shape::Shared)};
    GPTKERN_LAUNCH((attention_forward_kernel<T, D>), shape, stream, call);
}

}  // namespace

template <>
void attention_forward_of_width<GPTKERN_HEAD_DIM>(const AttentionForward& call, int batch, Dtype dtype, void* stream) {
    if (dtype == FLOAT16)
        launch<float16, GPTKERN_HEAD_DIM>(call, batch, stream);
    else
        launch<bfloat16, GPTKERN_HEAD_DIM>(call, batch, stream);
}

#else

constexpr int LARGEST_GRID = int(MOST_GRID_YZ);

Unreadable attention_forward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
                             const Tensor& lse, bool is_causal, double scale, Address stream) {
    if (output.elements() == 0 || key.elements() == 0) return nullptr;
    for (const Tensor* tensor : {&query, &key, &value})
        if (!is_readable(*tensor)) return tensor;
    const int batch = int(query.shape[0]), heads = int(query.shape[1]), head_dim = int(query.shape[3]);
    if (heads > LARGEST_GRID) throw std::runtime_error("gptkern: attention_forward: more than 65,535 heads");
    auto strides = [](const Tensor& tensor) {
        return AttentionForward::Strides{step_of(tensor, 0), step_of(tensor, 1), int(step_of(tensor, 2))};
    };
    AttentionForward call{
        .query = at<const void>(query.address),
        .key = at<const void>(key.address),
        .value = at<const void>(value.address),
        .output = at<void>(output.address),
        .lse = at<float>(lse.address),
        .query_strides = strides(query),
        .key_strides = strides(key),
        .value_strides = strides(value),
        .output_strides = strides(output),
        .heads = heads,
        .group = heads / int(key.shape[1]),
        .length_q = int(query.shape[2]),
        .length_k = int(key.shape[2]),
        .head_dim = head_dim,
        .scale_log2e = float(scale * LOG2E),
        .is_causal = is_causal,
    };
    // The narrowest tile that holds head_dim.
    auto launch = head_dim <= 64    ? attention_forward_of_width<64>
                  : head_dim <= 80  ? attention_forward_of_width<80>
                  : head_dim <= 96  ? attention_forward_of_width<96>
                  : head_dim <= 128 ? attention_forward_of_width<128>
                                    : attention_forward_of_width<256>;
    for (int first = 0; first < batch; first += LARGEST_GRID) {
        launch(call, std::min(batch - first, LARGEST_GRID), query.dtype, at<void>(stream));
        constexpr int BYTES = 2;  // of an element
        auto skip = [](auto* tensor, int64_t bytes) {
            return at<std::remove_pointer_t<decltype(tensor)>>(reinterpret_cast<Address>(tensor) + bytes);
        };
        call.query = skip(call.query, LARGEST_GRID * call.query_strides.batch * BYTES);
        call.key = skip(call.key, LARGEST_GRID * call.key_strides.batch * BYTES);
        call.value = skip(call.value, LARGEST_GRID * call.value_strides.batch * BYTES);
        call.output = skip(call.output, LARGEST_GRID * call.output_strides.batch * BYTES);
        call.lse = skip(call.lse, LARGEST_GRID * int64_t(heads) * call.length_q * int64_t(sizeof(float)));
    }
    return nullptr;
}

#endif

}  // namespace gptkern
