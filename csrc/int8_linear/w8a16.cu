// int8_linear, w8a16: y (M, N) = act((x @ weight^T) * weight_scale + bias), x (M, K) in float16, bfloat16 or float32,
// weight (N, K) in int8, which those dtypes hold exactly.
//
// At most 16 rows: w8a16_few_rows.cu.
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

constexpr int MMA_M = 16, MMA_N = 8;

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

template <class T>
void many_rows(const Operand<T>& x, const Operand<int8_t>& rows, const Weight& weight, const Epilogue& epilogue, int M,
               int N, int K, void* stream) {
    LaunchShape shape{.grid_x = int64_t(ceil_div(M, TILE_M)) * ceil_div(N, TILE_N),
                      .threads = TILE_THREADS,
                      .shared_bytes = sizeof(TileLayout)};
    if constexpr (std::is_same_v<T, float>) {
        shape.shared_bytes = sizeof(Float32Layout);
        GPTKERN_LAUNCH((w8a32_kernel), shape, stream, x, rows.data, weight.stride_n, weight.stride_k, epilogue, M, N,
                       K);
    } else if (weight.stride_n == 1 && weight.stride_k != 1) {
        auto columns = operand<int8_t>(weight.address, N, weight.stride_k, weight.stride_n);
        GPTKERN_LAUNCH((w8a16_kernel<T, true>), shape, stream, x, columns, epilogue, M, N, K);
    } else {
        GPTKERN_LAUNCH((w8a16_kernel<T, false>), shape, stream, x, rows, epilogue, M, N, K);
    }
}

template <class T>
void product(Address x_address, int64_t x_stride_m, int64_t x_stride_k, const Weight& weight, int M, int N, int K,
             const Epilogue& epilogue, int block_m, int block_n, void* stream) {
    auto x = operand<T>(x_address, K, x_stride_m, x_stride_k);
    auto rows = operand<int8_t>(weight.address, K, weight.stride_n, weight.stride_k);
    constexpr bool FLOAT = std::is_same_v<T, float>;
    using Tiles = std::conditional_t<FLOAT, W8a32Tiles, W8a16Tiles>;
    Tiles::choose(FLOAT ? "w8a32" : "w8a16", block_m, block_n, [&](auto size) {
        if constexpr (size.m == FEW_ROWS) {
            if (M > FEW_ROWS)
                throw std::invalid_argument("gptkern: tiles of " + std::to_string(FEW_ROWS) +
                                            " rows are for as many, and the input has " + std::to_string(M));
            w8a16_few_rows<T, size.n>(x, rows, epilogue, M, N, K, stream);
        } else {
            static_assert(size.m == TILE_M && size.n == TILE_N);
            many_rows<T>(x, rows, weight, epilogue, M, N, K, stream);
        }
    });
}

}  // namespace

void w8a16_product(Address x, int dtype, int64_t x_stride_m, int64_t x_stride_k, const Weight& weight, int64_t M,
                   int64_t N, int64_t K, const Epilogue& epilogue, int block_m, int block_n, void* stream) {
    auto* launch = dtype == FLOAT32   ? &product<float>
                   : dtype == FLOAT16 ? &product<float16>
                                      : &product<bfloat16>;
    launch(x, x_stride_m, x_stride_k, weight, int(M), int(N), int(K), epilogue, block_m, block_n, stream);
}

}  // namespace gptkern
