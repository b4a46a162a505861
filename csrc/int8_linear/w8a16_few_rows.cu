// int8_linear, w8a16 of at most 16 rows: y (M, N) = act((x @ weight^T) * weight_scale + bias), as w8a16.cu has it.
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
#include "device/launch.cuh"
#include "int8_linear/int8_linear.h"

namespace gptkern {
namespace {

constexpr int MMA_M = 16, MMA_N = 8;
constexpr int FEW_WARPS = 8, FEW_THREADS = FEW_WARPS * WARP;
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

}  // namespace

// --- Launcher -------------------------------------------------------------------------------------------------------

template <class T, int BLOCK_N>
void w8a16_few_rows(const Operand<T>& x, const Operand<int8_t>& weight, const Epilogue& epilogue, int M, int N, int K,
                    void* stream) {
    constexpr int TILES = BLOCK_N / MMA_M;
    LaunchShape shape{.grid_x = ceil_div(N, BLOCK_N),
                      .threads = FEW_THREADS,
                      .shared_bytes = sizeof(FewRowsLayout<TILES>)};
    if constexpr (std::is_same_v<T, float>)
        GPTKERN_LAUNCH((w8a32_few_rows_kernel), shape, stream, x, weight, epilogue, M, N, K);
    else
        GPTKERN_LAUNCH((w8a16_few_rows_kernel<T, TILES>), shape, stream, x, weight, epilogue, M, N, K);
}

#define GPTKERN_FEW_ROWS(T, BLOCK_N)                                                                               \
    template void w8a16_few_rows<T, BLOCK_N>(const Operand<T>&, const Operand<int8_t>&, const Epilogue&, int, int, \
                                             int, void*);
GPTKERN_FEW_ROWS(float, 16)
GPTKERN_FEW_ROWS(float16, 16)
GPTKERN_FEW_ROWS(float16, 32)
GPTKERN_FEW_ROWS(float16, 64)
GPTKERN_FEW_ROWS(bfloat16, 16)
GPTKERN_FEW_ROWS(bfloat16, 32)
GPTKERN_FEW_ROWS(bfloat16, 64)

}  // namespace gptkern
