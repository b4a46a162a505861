// int8_linear, w8a16: y (M, N) = act((x @ weight^T) * weight_scale + bias), x (M, K) in float16, bfloat16 or float32,
// weight (N, K) in int8, which those dtypes hold exactly.
//
// Few rows (M <= 16) are there to read the weight at the speed of memory (reasoned, not measured yet):
//     bytes         N K of weight, once; b M N of y; b M K of x for each block of 16, 32 or 64 outputs, from the L2
//                   cache
//     operations    instructions of a thread for each byte of weight: 16-bit: 2 to 4, counted in sm_90a code (for 16
//                   bytes a copy, a load from shared memory, 20 of float16 or 32 of bfloat16 to widen, 4 or 8 mma for
//                   two of them, and what a step costs, shared by all of its bytes); float32: about 2 + 1.3 M
//     floor         N K / 4.8 TB/s on an H200. At 1.755 GHz its 132 multiprocessors have 6 instructions of a thread for
//                   each byte: 16-bit inputs of up to 16 rows and float32 ones of up to 3 are then bound by memory.
// The weight is the left operand of mma, 16 outputs a tile, and x the right one: 8 rows a tile. Both come in the order
// of k that memory has: a thread's 16 bytes are four steps of mma, whose sum does not know the order of its terms. Each
// thread reads what it has copied itself, so that nothing waits for a barrier: up to 16 copies of 16 bytes a thread are
// under way. The warps of a block share K between them, and their sums are added in a fixed order.
//
// More rows, 16-bit: tiles of 64 × 64 through shared memory, the weight widened on its way from there to the operands,
// read as (N, K) or, as the backward needs it, as (K, N): ldmatrix transposes pairs of int8, and bytes of two registers
// are then sorted out.
//     bytes         tiles of the weight and x from the L2 cache; N K + b M (K + N) from memory at the least
//     operations    2 M N K of the 16-bit matrix unit: the floor of many rows
//
// More rows, float32: float32 multiply-adds, 2 M N K of them: the floor. Correct for any strides.
#include "device/launch.cuh"
#include "int8_linear/int8_linear.h"

namespace gptkern {
namespace {

// --- Few rows -------------------------------------------------------------------------------------------------------

constexpr int FEW_ROWS = 16;  // of x: two tiles of mma
constexpr int FEW_WARPS = 8, FEW_THREADS = FEW_WARPS * WARP;
constexpr int MMA_M = 16, MMA_N = 8;
constexpr int K_BLOCK = 64;   // of a warp's step: 4 lanes of 16 bytes
constexpr int LANE_K = 16;
constexpr int QUEUE_SLOTS = 16;

// (n, m) of a warp's sums: what the accumulators' layout stores and rows of n read without bank conflicts.
template <int OUTPUTS>
struct PartialSums {
    float values[FEW_ROWS * OUTPUTS + FEW_ROWS / 2 * 8];
    static GPTKERN_DEVICE int place(int n, int m) { return m * OUTPUTS + m / 2 * 8 + n; }
};

template <int TILES>
union FewRowsLayout {
    struct {
        alignas(CHUNK_BYTES) unsigned char chunk[CHUNK_BYTES];
    } queue[QUEUE_SLOTS][FEW_THREADS];
    PartialSums<TILES * MMA_M> sums[FEW_WARPS];
};

// The warps' stream of the weight: TILES * 16 outputs, from `first_n` on.
template <int TILES>
struct WeightStream {
    static constexpr int SLOTS = 2 * TILES, STAGES = QUEUE_SLOTS / SLOTS;
    FewRowsLayout<TILES>& shared;
    const Operand<int8_t>& weight;
    int first_n, N, K;
    int steps;  // of this warp

    GPTKERN_DEVICE WeightStream(FewRowsLayout<TILES>& shared, const Operand<int8_t>& weight, int first_n, int N, int K)
        : shared(shared), weight(weight), first_n(first_n), N(N), K(K) {
        steps = max(ceil_div(ceil_div(K, K_BLOCK) - warp_of_thread(), FEW_WARPS), 0);
#pragma unroll 1
        for (int step = 0; step < STAGES - 1; ++step) fill(step);
    }

    // The first of this lane's 16 elements along K.
    GPTKERN_DEVICE int k_of(int step) const {
        return (step * FEW_WARPS + warp_of_thread()) * K_BLOCK + lane_of_thread() % 4 * LANE_K;
    }

    // A group of copies, which may be empty.
    GPTKERN_DEVICE void fill(int step) {
        if (step < steps) {
            int k = k_of(step), stage = step % STAGES;
            auto copy = [&](int slot, Copy how) {
                int n = first_n + slot * 8 + lane_of_thread() / 4;
                copy_chunk(shared.queue[stage * SLOTS + slot][threadIdx.x].chunk,
                           weight.data + n * weight.row_stride + k * weight.element_stride, n < N ? K - k : 0,
                           weight.element_stride, how);
            };
            if (weight.copy == BY_CHUNK) {
#pragma unroll
                for (int slot = 0; slot < SLOTS; ++slot) copy(slot, BY_CHUNK);
            } else {
#pragma unroll 1
                for (int slot = 0; slot < SLOTS; ++slot) copy(slot, weight.copy);
            }
        }
        cp_async_commit();
    }

    // What follows may read slots of `step`.
    GPTKERN_DEVICE void advance_to(int step) {
        fill(step + STAGES - 1);
        cp_async_wait<STAGES - 1>();
    }

    // 16 int8 of output first_n + slot * 8 + lane / 4, from k_of(step) on.
    GPTKERN_DEVICE Vector<uint32_t, 4> at(int step, int slot) const {
        return load_shared(reinterpret_cast<const Vector<uint32_t, 4>*>(
            shared.queue[step % STAGES * SLOTS + slot][threadIdx.x].chunk));
    }
};

// Adds the warps' sums, in their order, and writes y.
template <int TILES>
GPTKERN_DEVICE void write_few_rows(const FewRowsLayout<TILES>& shared, const Epilogue& epilogue, int first_n, int M,
                                   int N) {
    constexpr int OUTPUTS = TILES * MMA_M;
    __syncthreads();
#pragma unroll 1
    for (int index = int(threadIdx.x); index < M * OUTPUTS; index += FEW_THREADS) {
        int m = index / OUTPUTS, in_tile = index % OUTPUTS, n = first_n + in_tile;
        if (n >= N) continue;
        float total = 0.0f;
#pragma unroll
        for (int warp = 0; warp < FEW_WARPS; ++warp)
            total += load_shared(shared.sums[warp].values + PartialSums<OUTPUTS>::place(in_tile, m));
        store_from_float(epilogue.y, int64_t(m) * N + n, finished(epilogue, total, 1.0f, of_column(epilogue, n)),
                         epilogue.y_type);
    }
}

// 16 elements of 16 bits: row m of x, from k on; zeros beyond either end.
template <class T>
GPTKERN_DEVICE void load_few(uint32_t (&pairs)[8], const Operand<T>& x, int m, int k, int M, int K) {
    const T* source = x.data + m * x.row_stride + k * x.element_stride;
    int count = m < M ? K - k : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        Vector<uint32_t, 4> words{};
        if (x.copy == BY_CHUNK) {
            if (count > half * VECTOR<T>)
                words = load_global(reinterpret_cast<const Vector<uint32_t, 4>*>(source + half * VECTOR<T>));
        } else {
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                int i = half * VECTOR<T> + pair * 2;
                float low = i < count ? to_float(load_global(source + i * x.element_stride)) : 0.0f;
                float high = i + 1 < count ? to_float(load_global(source + (i + 1) * x.element_stride)) : 0.0f;
                words[pair] = pack<T>(low, high);
            }
        }
#pragma unroll
        for (int word = 0; word < 4; ++word) pairs[half * 4 + word] = words[word];
    }
}

template <class T, int TILES>
__global__ void __launch_bounds__(FEW_THREADS, 2)
    w8a16_few_rows_kernel(Operand<T> x,            // (M, K)
                          Operand<int8_t> weight,  // (N, K)
                          Epilogue epilogue, int M, int N, int K) {
    constexpr int OUTPUTS = TILES * MMA_M;
    auto& shared = shared_memory<FewRowsLayout<TILES>>();
    int lane = lane_of_thread(), g = lane / 4, t = lane % 4, first_n = int(blockIdx.x) * OUTPUTS;
    bool two = M > MMA_N;
    WeightStream<TILES> stream(shared, weight, first_n, N, K);

    // total[n][m] += weight[n][k] * x[m][k]
    float total[TILES][2][4] = {};
    uint32_t next[2][8] = {};
    auto load_x = [&](int step) {
        if (step >= stream.steps) return;
        int k = stream.k_of(step);
        load_few(next[0], x, g, k, M, K);
        if (two) load_few(next[1], x, MMA_N + g, k, M, K);
    };
    // x is loaded a step ahead; step -1 does nothing else.
#pragma unroll 1
    for (int step = -1; step < stream.steps; ++step) {
        uint32_t now[2][8];
#pragma unroll
        for (int i = 0; i < 16; ++i) now[i / 8][i % 8] = next[i / 8][i % 8];
        load_x(step + 1);
        if (step < 0) continue;
        stream.advance_to(step);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            auto upper = stream.at(step, 2 * tile), lower = stream.at(step, 2 * tile + 1);
#pragma unroll
            for (int word = 0; word < 4; ++word) {
                uint32_t pairs[2][2];
                widen_int8<T>(upper[word], pairs[0]);
                widen_int8<T>(lower[word], pairs[1]);
                uint32_t a[4] = {pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]};
                mma_m16n8k16<T>(total[tile][0], a, {now[0][2 * word], now[0][2 * word + 1]});
                if (two) mma_m16n8k16<T>(total[tile][1], a, {now[1][2 * word], now[1][2 * word + 1]});
            }
        }
    }
    cp_async_wait<0>();
    // The sums take the queue's place.
    __syncthreads();
    auto& sums = shared.sums[warp_of_thread()].values;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            int n = tile * MMA_M + i % 4 / 2 * 8 + g, m = i / 4 * MMA_N + 2 * t + i % 2;
            store_shared(sums + PartialSums<OUTPUTS>::place(n, m), total[tile][i / 4][i % 4]);
        }
    write_few_rows(shared, epilogue, first_n, M, N);
}

__global__ void __launch_bounds__(FEW_THREADS, 2)
    w8a32_few_rows_kernel(Operand<float> x,        // (M, K)
                          Operand<int8_t> weight,  // (N, K)
                          Epilogue epilogue, int M, int N, int K) {
    constexpr int TILES = 1, OUTPUTS = MMA_M;
    auto& shared = shared_memory<FewRowsLayout<TILES>>();
    int g = lane_of_thread() / 4, t = lane_of_thread() % 4, first_n = int(blockIdx.x) * OUTPUTS;
    WeightStream<TILES> stream(shared, weight, first_n, N, K);

    // Of this lane's k: total[m][i] = sum of weight[i * 8 + g][k] * x[m][k]
    float total[FEW_ROWS][2] = {};
#pragma unroll 1
    for (int step = 0; step < stream.steps; ++step) {
        stream.advance_to(step);
        int first_k = stream.k_of(step);
        Vector<uint32_t, 4> bytes[2] = {stream.at(step, 0), stream.at(step, 1)};
        const float* x_row = x.data + first_k * x.element_stride;
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            float w[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                w[i][0] = int8_to_float<0>(bytes[i][word]), w[i][1] = int8_to_float<1>(bytes[i][word]);
                w[i][2] = int8_to_float<2>(bytes[i][word]), w[i][3] = int8_to_float<3>(bytes[i][word]);
            }
            int count = K - first_k - 4 * word;
#pragma unroll
            for (int m = 0; m < FEW_ROWS; ++m) {
                if (m >= M) break;
                const float* source = x_row + m * x.row_stride + 4 * word * x.element_stride;
                Vector<float, 4> values{};
                if (x.copy != BY_CHUNK)
                    values = gather_chunk(source, count, x.element_stride);
                else if (count > 0)
                    values = load_global(reinterpret_cast<const Vector<float, 4>*>(source));
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    total[m][0] += w[0][i] * values[i];
                    total[m][1] += w[1][i] * values[i];
                }
            }
        }
    }
    cp_async_wait<0>();
    __syncthreads();
    auto& sums = shared.sums[warp_of_thread()].values;
#pragma unroll
    for (int m = 0; m < FEW_ROWS; ++m) {
        if (m >= M) break;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            // over the four lanes that share an output
            float sum = warp_sum<4>(total[m][i]);
            if (t == 0) store_shared(sums + PartialSums<OUTPUTS>::place(i * 8 + g, m), sum);
        }
    }
    write_few_rows(shared, epilogue, first_n, M, N);
}

// --- More rows, 16-bit ----------------------------------------------------------------------------------------------

constexpr int TILE_M = 64, TILE_N = 64, TILE_K = 64, STAGES = 4;
constexpr int TILE_WARPS = 4, TILE_THREADS = TILE_WARPS * WARP, WARP_M = 32, WARP_N = 32;

struct TileLayout {
    struct Stage {
        unsigned char x[TILE_M * TILE_K * 2];
        unsigned char weight[TILE_N * TILE_K];
    };
    alignas(128) Stage stages[STAGES];
};
static_assert(sizeof(TileLayout) <= SHARED_BYTES_EVERYWHERE);
static_assert(TILE_M * TILE_N * sizeof(float) <= sizeof(TileLayout));

// Rows of 128 bytes, of which 8 bytes a lane are read in four rows at a time: they keep to 32 bytes each.
GPTKERN_DEVICE int x_swizzle(int row, int chunk) { return chunk ^ ((row & 3) << 1); }
constexpr int X_CHUNKS = TILE_K * 2 / CHUNK_BYTES;

// Rows of 64 bytes, of which ldmatrix reads 8 neighbours; transposed: rows 0, 1, 4, 5, 8, 9, 12, 13 of 16, or 2 more.
template <bool TRANSPOSED>
GPTKERN_DEVICE int weight_swizzle(int row, int chunk) {
    return chunk ^ (TRANSPOSED ? row >> 2 & 3 : row >> 1 & 3);
}
constexpr int WEIGHT_CHUNKS = TILE_K / CHUNK_BYTES;
static_assert(TILE_K == TILE_N, "a row of the weight's tile has as many bytes either way");

// The order of k in a step of mma is that of 4 int8 side by side: slots 2t, 2t+1, 2t+8, 2t+9 are k = 4t … 4t+3.
template <class T, bool TRANSPOSED>
__global__ void __launch_bounds__(TILE_THREADS)
    w8a16_kernel(Operand<T> x,            // (M, K)
                 Operand<int8_t> weight,  // (N, K); TRANSPOSED: (K, N)
                 Epilogue epilogue, int M, int N, int K) {
    auto& shared = shared_memory<TileLayout>();
    TileIndex tile = tile_of_block(M, N, TILE_M, TILE_N);
    int first_m = tile.m * TILE_M, first_n = tile.n * TILE_N;
    int lane = lane_of_thread(), g = lane / 4, t = lane % 4;
    int warp_m = warp_of_thread() / 2 * WARP_M, warp_n = warp_of_thread() % 2 * WARP_N;
    const T* x_rows = x.data + first_m * x.row_stride;
    const int8_t* weight_tile = weight.data + first_n * (TRANSPOSED ? weight.element_stride : weight.row_stride);
    int steps = ceil_div(K, TILE_K);

    auto fill = [&](int step) {
        if (step < steps) {
            auto& stage = shared.stages[step % STAGES];
            int k = step * TILE_K;
            copy_rows<TILE_M, X_CHUNKS, TILE_THREADS>(stage.x, x, x_rows + k * x.element_stride, M - first_m, K - k,
                                                      x_swizzle);
            if constexpr (TRANSPOSED)
                copy_rows<TILE_K, WEIGHT_CHUNKS, TILE_THREADS>(stage.weight, weight,
                                                               weight_tile + k * weight.row_stride, K - k,
                                                               N - first_n, weight_swizzle<true>);
            else
                copy_rows<TILE_N, WEIGHT_CHUNKS, TILE_THREADS>(stage.weight, weight,
                                                               weight_tile + k * weight.element_stride, N - first_n,
                                                               K - k, weight_swizzle<false>);
        }
        cp_async_commit();
    };
#pragma unroll 1
    for (int step = 0; step < STAGES - 1; ++step) fill(step);

    // total[m][n] += x[m][k] * weight[n][k]
    float total[WARP_M / MMA_M][WARP_N / MMA_N][4] = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        fill(step + STAGES - 1);
        const auto& stage = shared.stages[step % STAGES];
#pragma unroll
        for (int k16 = 0; k16 < TILE_K / 16; ++k16) {
            uint32_t a[WARP_M / MMA_M][4];
#pragma unroll
            for (int i = 0; i < WARP_M / MMA_M * 2; ++i) {
                int row = warp_m + i * 8 + g;
                auto pairs = load_shared(reinterpret_cast<const Vector<uint32_t, 2>*>(
                    stage.x + (row * X_CHUNKS + x_swizzle(row, 2 * k16 + t / 2)) * CHUNK_BYTES + t % 2 * 8));
                a[i / 2][i % 2] = pairs[0];
                a[i / 2][i % 2 + 2] = pairs[1];
            }
            uint32_t bytes[4], b[WARP_N / MMA_N][2];
            if constexpr (TRANSPOSED) {
                // A pair of matrices, of k = 4t, 4t+1 and 4t+2, 4t+3, for each 16 outputs: even ones, and odd ones.
                int row = k16 * 16 + lane % 8 / 2 * 4 + lane / 8 % 2 * 2 + lane % 2, chunk = warp_n / 16 + lane / 16;
                ldmatrix_x4_transposed(
                    bytes, stage.weight + (row * WEIGHT_CHUNKS + weight_swizzle<true>(row, chunk)) * CHUNK_BYTES);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    uint32_t pairs[2];
                    widen_int8<T, true>(bytes[i], pairs);
                    b[i / 2 * 2][i % 2] = pairs[0];
                    b[i / 2 * 2 + 1][i % 2] = pairs[1];
                }
            } else {
                int row = warp_n + lane;
                ldmatrix_x4(bytes,
                            stage.weight + (row * WEIGHT_CHUNKS + weight_swizzle<false>(row, k16)) * CHUNK_BYTES);
#pragma unroll
                for (int i = 0; i < 4; ++i) widen_int8<T>(bytes[i], b[i]);
            }
#pragma unroll
            for (int i = 0; i < WARP_M / MMA_M; ++i)
#pragma unroll
                for (int j = 0; j < WARP_N / MMA_N; ++j) mma_m16n8k16<T>(total[i][j], a[i], b[j]);
        }
    }
    cp_async_wait<0>();
    __syncthreads();

    float* sums = reinterpret_cast<float*>(&shared);
#pragma unroll
    for (int i = 0; i < WARP_M / MMA_M * 2; ++i) {
        int row = warp_m + i * 8 + g, half = i % 2 * 2;
        auto& of_row = total[i / 2];
        if constexpr (TRANSPOSED) {
#pragma unroll
            for (int j = 0; j < WARP_N / MMA_N; j += 2)
                store_shared(
                    reinterpret_cast<Vector<float, 4>*>(sums + place_of_sum<TILE_N>(row, warp_n + j * 8 + 4 * t)),
                    {of_row[j][half], of_row[j + 1][half], of_row[j][half + 1], of_row[j + 1][half + 1]});
        } else {
#pragma unroll
            for (int j = 0; j < WARP_N / MMA_N; ++j)
                store_shared(
                    reinterpret_cast<Vector<float, 2>*>(sums + place_of_sum<TILE_N>(row, warp_n + j * 8 + 2 * t)),
                    {of_row[j][half], of_row[j][half + 1]});
        }
    }
    __syncthreads();
    write_tile<TILE_M, TILE_N, TILE_THREADS>(sums, epilogue, first_m, first_n, M, N);
}

// --- More rows, float32 ---------------------------------------------------------------------------------------------

constexpr int F32_K = 16, F32_PITCH = TILE_M + 4, F32_ROWS = 8, F32_COLUMNS = 4;

struct Float32Layout {
    union {
        struct {
            alignas(CHUNK_BYTES) float x[F32_K][F32_PITCH];
            alignas(CHUNK_BYTES) float weight[F32_K][F32_PITCH];
        } operands;
        alignas(CHUNK_BYTES) float sums[TILE_M * TILE_N];
    };
};

// A thread has rows 8 (thread / 16) … + 7 of the tile and columns 4 (thread % 16) … + 3.
__global__ void __launch_bounds__(TILE_THREADS)
    w8a32_kernel(Operand<float> x,      // (M, K)
                 const int8_t* weight,  // (N, K), any strides
                 int64_t stride_n, int64_t stride_k, Epilogue epilogue, int M, int N, int K) {
    auto& shared = shared_memory<Float32Layout>();
    auto& operands = shared.operands;
    TileIndex tile = tile_of_block(M, N, TILE_M, TILE_N);
    int first_m = tile.m * TILE_M, first_n = tile.n * TILE_N, thread = int(threadIdx.x);
    int row = thread / 16 * F32_ROWS, column = thread % 16 * F32_COLUMNS;
    const float* x_rows = x.data + first_m * x.row_stride;
    const int8_t* weight_rows = weight + first_n * stride_n;
    constexpr int X_CHUNKS_A_THREAD = TILE_M * F32_K / 4 / TILE_THREADS, BYTES_A_THREAD = TILE_N * F32_K / TILE_THREADS;
    // Neighbouring threads read neighbouring bytes.
    bool along_n = stride_n == 1 && stride_k != 1;
    auto place_of_byte = [&](int i, int& n, int& k) {
        int index = i * TILE_THREADS + thread;
        n = along_n ? index % TILE_N : index / F32_K;
        k = along_n ? index / TILE_N : index % F32_K;
    };

    float total[F32_ROWS][F32_COLUMNS] = {};
    Vector<float, 4> next_x[X_CHUNKS_A_THREAD];
    int8_t next_weight[BYTES_A_THREAD];
    auto load = [&](int first_k) {
#pragma unroll
        for (int i = 0; i < X_CHUNKS_A_THREAD; ++i) {
            int index = i * TILE_THREADS + thread, m = index / 4, k = first_k + index % 4 * 4;
            int count = m < M - first_m ? K - k : 0;
            const float* source = x_rows + m * x.row_stride + k * x.element_stride;
            next_x[i] = {};
            if (x.copy != BY_CHUNK)
                next_x[i] = gather_chunk(source, count, x.element_stride);
            else if (count > 0)
                next_x[i] = load_global(reinterpret_cast<const Vector<float, 4>*>(source));
        }
#pragma unroll
        for (int i = 0; i < BYTES_A_THREAD; ++i) {
            int n, k;
            place_of_byte(i, n, k);
            k += first_k;
            next_weight[i] = 0;
            if (n < N - first_n && k < K) next_weight[i] = load_global(weight_rows + n * stride_n + k * stride_k);
        }
    };
    if (K > 0) load(0);
#pragma unroll 1
    for (int first_k = 0; first_k < K; first_k += F32_K) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < X_CHUNKS_A_THREAD; ++i) {
            int index = i * TILE_THREADS + thread;
#pragma unroll
            for (int j = 0; j < 4; ++j) store_shared(&operands.x[index % 4 * 4 + j][index / 4], next_x[i][j]);
        }
#pragma unroll
        for (int i = 0; i < BYTES_A_THREAD; ++i) {
            int n, k;
            place_of_byte(i, n, k);
            store_shared(&operands.weight[k][n], float(next_weight[i]));
        }
        __syncthreads();
        if (first_k + F32_K < K) load(first_k + F32_K);
        // Sums of 16 terms, then sums of sums: the error of one long sum would be several times as large.
        float part[F32_ROWS][F32_COLUMNS] = {};
#pragma unroll 4
        for (int k = 0; k < F32_K; ++k) {
            auto w = load_shared(reinterpret_cast<const Vector<float, 4>*>(&operands.weight[k][column]));
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                auto values = load_shared(reinterpret_cast<const Vector<float, 4>*>(&operands.x[k][row + 4 * half]));
#pragma unroll
                for (int i = 0; i < 16; ++i) part[half * 4 + i / 4][i % 4] += values[i / 4] * w[i % 4];
            }
        }
#pragma unroll
        for (int i = 0; i < F32_ROWS * F32_COLUMNS; ++i)
            total[i / F32_COLUMNS][i % F32_COLUMNS] += part[i / F32_COLUMNS][i % F32_COLUMNS];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < F32_ROWS; ++i)
        store_shared(reinterpret_cast<Vector<float, 4>*>(shared.sums + place_of_sum<TILE_N>(row + i, column)),
                     {total[i][0], total[i][1], total[i][2], total[i][3]});
    __syncthreads();
    write_tile<TILE_M, TILE_N, TILE_THREADS>(shared.sums, epilogue, first_m, first_n, M, N);
}

// --- Which kernel ---------------------------------------------------------------------------------------------------

template <class T, int TILES>
void few_rows(const Operand<T>& x, const Operand<int8_t>& weight, const Epilogue& epilogue, int M, int N, int K,
              void* stream) {
    LaunchShape shape{.grid_x = ceil_div(N, TILES * MMA_M),
                      .threads = FEW_THREADS,
                      .shared_bytes = sizeof(FewRowsLayout<TILES>)};
    if constexpr (std::is_same_v<T, float>)
        GPTKERN_LAUNCH((w8a32_few_rows_kernel), shape, stream, x, weight, epilogue, M, N, K);
    else
        GPTKERN_LAUNCH((w8a16_few_rows_kernel<T, TILES>), shape, stream, x, weight, epilogue, M, N, K);
}

template <class T>
void product(Address x_address, int64_t x_stride_m, int64_t x_stride_k, const Weight& weight, int M, int N, int K,
             const Epilogue& epilogue, int multiprocessors, void* stream) {
    auto x = operand<T>(x_address, K, x_stride_m, x_stride_k);
    auto rows = operand<int8_t>(weight.address, K, weight.stride_n, weight.stride_k);
    bool transposed = weight.stride_n == 1 && weight.stride_k != 1;
    if (M <= FEW_ROWS && !transposed) {
        // The more outputs a block has, the less often x is read; but each multiprocessor should have a block.
        auto blocks = [&](int tiles) { return ceil_div(N, tiles * MMA_M); };
        if (std::is_same_v<T, float> || blocks(2) < multiprocessors)
            few_rows<T, 1>(x, rows, epilogue, M, N, K, stream);
        else if (blocks(4) < multiprocessors)
            few_rows<T, 2>(x, rows, epilogue, M, N, K, stream);
        else
            few_rows<T, 4>(x, rows, epilogue, M, N, K, stream);
        return;
    }
    LaunchShape shape{.grid_x = int64_t(ceil_div(M, TILE_M)) * ceil_div(N, TILE_N),
                      .threads = TILE_THREADS,
                      .shared_bytes = sizeof(TileLayout)};
    if constexpr (std::is_same_v<T, float>) {
        shape.shared_bytes = sizeof(Float32Layout);
        GPTKERN_LAUNCH((w8a32_kernel), shape, stream, x, rows.data, weight.stride_n, weight.stride_k, epilogue, M, N,
                       K);
    } else if (transposed) {
        auto columns = operand<int8_t>(weight.address, N, weight.stride_k, weight.stride_n);
        GPTKERN_LAUNCH((w8a16_kernel<T, true>), shape, stream, x, columns, epilogue, M, N, K);
    } else {
        GPTKERN_LAUNCH((w8a16_kernel<T, false>), shape, stream, x, rows, epilogue, M, N, K);
    }
}

}  // namespace

void w8a16_product(Address x, int dtype, int64_t x_stride_m, int64_t x_stride_k, const Weight& weight, int64_t M,
                   int64_t N, int64_t K, const Epilogue& epilogue, int multiprocessors, void* stream) {
    auto* launch = dtype == FLOAT32   ? &product<float>
                   : dtype == FLOAT16 ? &product<float16>
                                      : &product<bfloat16>;
    launch(x, x_stride_m, x_stride_k, weight, int(M), int(N), int(K), epilogue, multiprocessors, stream);
}

}  // namespace gptkern
