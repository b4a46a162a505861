// int8_linear, forward in mode w8a8 and backward, with x (M, K), weight (N, K) in int8, y (M, N).
//
//     w8a8    z = (q @ weight^T) * input_scale * weight_scale + bias      y = act(z); q: device/quantize.cuh
//     w8a16   w8a16.cu
//
// Backward, with dz = dy * act'(z):
//     dx = (dz * weight_scale) @ weight,  dbias = sum over rows of dz
//
// w8a8 multiplies int8 by int8 into int32, exactly. Tiles of q and the weight come through four stages of shared
// memory, by asynchronous copies and ldmatrix, whose 8×8 matrices of 16 bits are 8 rows of 16 int8. The int32 sums
// never reach memory.
//
//     operations  2 M N K: the int8 matrix unit is the floor of many rows (1,979 dense TOPS by the H200's datasheet;
//                 what mma.sync, the instruction of every part since sm_80, reaches of them on Hopper is not measured
//                 yet)
//     shared      a k of 32 of a warp's 64×64 tile is 4 + 4 ldmatrix of 512 bytes and 32 mma: 32 cycles of shared
//                 memory at 128 bytes each, for 64 of the matrix unit at 2048 multiply-adds
//     bytes       N K of weight + b M (K + N) of x and y, b bytes each, + 2 M K for q: the floor of few rows
//
// The backward recomputes z in float32. A pass over dy forms dz * weight_scale and sums dbias (per tile of rows, then
// over the tiles: no atomics, so it is the same on every run), and dx is a w8a16 product with the transposed weight,
// read in place. Bytes beside those of the products: 2 b M N, and 4 M N for z.
#include "int8_linear/int8_linear.h"

#include "device/launch.cuh"
#include "device/quantize.cuh"

namespace gptkern {
namespace {

constexpr int MMA_M = 16, MMA_N = 8, MMA_K = 32;
constexpr int TILE_K = 64;  // bytes a row of a tile in shared memory
constexpr int CHUNKS = TILE_K / CHUNK_BYTES;

// Two rows share the 32 banks; chunks of 8 neighbouring rows, which ldmatrix reads, fall into different ones.
GPTKERN_DEVICE int swizzled(int row, int chunk) { return chunk ^ (row >> 1 & 3); }

template <int TILE_M, int TILE_N, int STAGES>
struct W8a8Layout {
    struct Stage {
        unsigned char q[TILE_M * TILE_K];
        unsigned char weight[TILE_N * TILE_K];
    };
    alignas(128) Stage stages[STAGES];
    static_assert(sizeof(stages) <= SHARED_BYTES_EVERYWHERE);
    static_assert(sizeof(stages) >= TILE_M * TILE_N * sizeof(float), "the sums take the stages' place");
};

template <int TILE_M, int TILE_N, int WARPS_M, int WARPS_N, int STAGES>
__global__ void __launch_bounds__(WARPS_M* WARPS_N* WARP)
    w8a8_kernel(Operand<int8_t> q,       // (M, K)
                Operand<int8_t> weight,  // (N, K)
                Epilogue epilogue, int M, int N, int K) {
    constexpr int THREADS = WARPS_M * WARPS_N * WARP;
    constexpr int WARP_M = TILE_M / WARPS_M, WARP_N = TILE_N / WARPS_N;
    static_assert(WARP_M % MMA_M == 0 && WARP_N % (2 * MMA_N) == 0);
    auto& shared = shared_memory<W8a8Layout<TILE_M, TILE_N, STAGES>>();
    TileIndex tile = tile_of_block(M, N, TILE_M, TILE_N);
    int first_m = tile.m * TILE_M, first_n = tile.n * TILE_N;
    int lane = lane_of_thread(), g = lane / 4, t = lane % 4;
    int warp_m = warp_of_thread() / WARPS_N * WARP_M, warp_n = warp_of_thread() % WARPS_N * WARP_N;
    const int8_t* q_rows = q.data + first_m * q.row_stride;
    const int8_t* weight_rows = weight.data + first_n * weight.row_stride;
    int steps = ceil_div(K, TILE_K);

    auto fill = [&](int step) {
        if (step < steps) {
            auto& stage = shared.stages[step % STAGES];
            int k = step * TILE_K;
            copy_rows<TILE_M, CHUNKS, THREADS>(stage.q, q, q_rows + k, M - first_m, K - k, swizzled);
            copy_rows<TILE_N, CHUNKS, THREADS>(stage.weight, weight, weight_rows + k * weight.element_stride,
                                               N - first_n, K - k, swizzled);
        }
        cp_async_commit();
    };
#pragma unroll 1
    for (int step = 0; step < STAGES - 1; ++step) fill(step);

    // total[m][n] += q[m][k] * weight[n][k]
    int32_t total[WARP_M / MMA_M][WARP_N / MMA_N][4] = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<STAGES - 2>();
        // The step's tiles have landed for all, and all have done with those of the step before.
        __syncthreads();
        fill(step + STAGES - 1);
        const auto& stage = shared.stages[step % STAGES];
#pragma unroll
        for (int k32 = 0; k32 < TILE_K / MMA_K; ++k32) {
            uint32_t a[WARP_M / MMA_M][4];
#pragma unroll
            for (int i = 0; i < WARP_M / MMA_M; ++i) {
                int row = warp_m + i * MMA_M + lane % 16, chunk = 2 * k32 + lane / 16;
                ldmatrix_x4(a[i], stage.q + (row * CHUNKS + swizzled(row, chunk)) * CHUNK_BYTES);
            }
#pragma unroll
            for (int j = 0; j < WARP_N / MMA_N; j += 2) {
                uint32_t b[4];
                int row = warp_n + j * MMA_N + lane / 16 * MMA_N + lane % 8, chunk = 2 * k32 + lane / 8 % 2;
                ldmatrix_x4(b, stage.weight + (row * CHUNKS + swizzled(row, chunk)) * CHUNK_BYTES);
#pragma unroll
                for (int i = 0; i < WARP_M / MMA_M; ++i) {
                    mma_m16n8k32_s8(total[i][j], a[i], {b[0], b[1]});
                    mma_m16n8k32_s8(total[i][j + 1], a[i], {b[2], b[3]});
                }
            }
        }
    }
    cp_async_wait<0>();
    __syncthreads();

    float* sums = reinterpret_cast<float*>(&shared);
#pragma unroll
    for (int i = 0; i < WARP_M / MMA_M; ++i)
#pragma unroll
        for (int j = 0; j < WARP_N / MMA_N; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int row = warp_m + i * MMA_M + half * 8 + g, column = warp_n + j * MMA_N + 2 * t;
                store_shared(reinterpret_cast<Vector<float, 2>*>(sums + place_of_sum<TILE_N>(row, column)),
                             {float(total[i][j][2 * half]), float(total[i][j][2 * half + 1])});
            }
    __syncthreads();
    write_tile<TILE_M, TILE_N, THREADS>(sums, epilogue, first_m, first_n, M, N);
}

template <int TILE_M, int TILE_N, int WARPS_M, int WARPS_N, int STAGES>
void launch_w8a8(const Operand<int8_t>& q, const Operand<int8_t>& weight, const Epilogue& epilogue, int M, int N, int K,
                 void* stream) {
    LaunchShape shape{.grid_x = int64_t(ceil_div(M, TILE_M)) * ceil_div(N, TILE_N),
                      .threads = WARPS_M * WARPS_N * WARP,
                      .shared_bytes = sizeof(W8a8Layout<TILE_M, TILE_N, STAGES>)};
    GPTKERN_LAUNCH((w8a8_kernel<TILE_M, TILE_N, WARPS_M, WARPS_N, STAGES>), shape, stream, q, weight, epilogue, M, N,
                   K);
}

// q's rows lie a multiple of 16 bytes apart, with zeros between K and the next row: its chunks are whole.
int64_t q_pitch_of(int64_t K) { return ceil_div<int64_t>(K, CHUNK_BYTES) * CHUNK_BYTES; }

void w8a8_product(Address q_address, const Weight& weight, int M, int N, int K, const Epilogue& epilogue, int block_m,
                  int block_n, void* stream) {
    Operand<int8_t> q{at<int8_t>(q_address), q_pitch_of(K), 1, BY_CHUNK};
    auto rows = operand<int8_t>(weight.address, K, weight.stride_n, weight.stride_k);
    W8a8Tiles::choose("w8a8", block_m, block_n, [&](auto size) {
        launch_w8a8<size.m, size.n, 2, 2, 4>(q, rows, epilogue, M, N, K, stream);
    });
}

// --- Backward -------------------------------------------------------------------------------------------------------

// Of dx: the one tile that reads the weight transposed.
constexpr int INPUT_BLOCK = 64;
constexpr int GRADIENT_WARPS = 8, GRADIENT_ROWS = 64;  // as gptkern/operators/int8_linear/cuda.py
constexpr int LARGEST_THREADS = 1024;

struct LargestLayout {
    float of_warp[LARGEST_THREADS / WARP];
};

// One block. A NaN passes: |v| is compared as an integer, in whose order a NaN is the largest.
__global__ void __launch_bounds__(LARGEST_THREADS)
    largest_kernel(const float* weight_scale,  // (N,), stride apart
                   float* largest,             // (): max|weight_scale|
                   int N, int64_t stride) {
    auto& shared = shared_memory<LargestLayout>();
    int bits = 0;
    for (int n = int(threadIdx.x); n < N; n += LARGEST_THREADS)
        bits = max(bits, __float_as_int(load_global(weight_scale + n * stride)) & 0x7fffffff);
#pragma unroll
    for (int mask = WARP / 2; mask > 0; mask /= 2) bits = max(bits, shuffle_xor(bits, mask));
    if (lane_of_thread() == 0) store_shared(shared.of_warp + warp_of_thread(), __int_as_float(bits));
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int warp = 0; warp < LARGEST_THREADS / WARP; ++warp)
        bits = max(bits, __float_as_int(load_shared(shared.of_warp + warp)));
    store_global(largest, __int_as_float(bits));
}

template <class T>
struct GradientLayout {
    // Lanes side by side in each of a chunk's elements: no bank conflict.
    float sums[GRADIENT_WARPS][VECTOR<T>][WARP];
};

template <class T>
__global__ void __launch_bounds__(GRADIENT_WARPS* WARP)
    gradient_kernel(Operand<T> dy,              // (M, N)
                    const float* z,             // (M, N)   contiguous, where there is an activation
                    const float* weight_scale,  // (N,)     scale_stride apart
                    const float* largest,       // ()       max|weight_scale|
                    T* scaled,                  // (M, N)   dz * weight_scale / largest, contiguous, or null
                    float* partial,             // (tiles of rows, N)   sums of dz over a tile's rows, or null
                    int M, int N, int64_t scale_stride, int activation) {
    constexpr int ELEMENTS = VECTOR<T>;
    auto& shared = shared_memory<GradientLayout<T>>();
    int lane = lane_of_thread(), warp = warp_of_thread();
    // One number for both: the second of a grid ends at 65,535.
    unsigned tiles_m = unsigned(ceil_div(M, GRADIENT_ROWS));
    int tile_m = int(blockIdx.x % tiles_m), tile_n = int(blockIdx.x / tiles_m);
    int first_m = tile_m * GRADIENT_ROWS, n = (tile_n * WARP + lane) * ELEMENTS, count = N - n;
    bool whole = N % ELEMENTS == 0;

    float relative[ELEMENTS], sums[ELEMENTS];
    // Of the size of dz, whatever the scales: dz * weight_scale alone would underflow in float16.
    float divisor = scaled ? load_global(largest) : 1.0f;
    if (divisor == 0.0f) divisor = 1.0f;
#pragma unroll
    for (int i = 0; i < ELEMENTS; ++i) {
        relative[i] = 0.0f;
        if (scaled && i < count) relative[i] = divide_rn(load_global(weight_scale + (n + i) * scale_stride), divisor);
        sums[i] = 0.0f;
    }
    int rows = count > 0 ? min(GRADIENT_ROWS, M - first_m) : 0;
#pragma unroll 2
    for (int row = warp; row < rows; row += GRADIENT_WARPS) {
        int64_t m = first_m + row;
        const T* source = dy.data + m * dy.row_stride + n * dy.element_stride;
        Vector<T, ELEMENTS> loaded;
        if (dy.copy == BY_CHUNK)
            loaded = load_global(reinterpret_cast<const Vector<T, ELEMENTS>*>(source));
        else
            loaded = gather_chunk(source, count, dy.element_stride);
        float dz[ELEMENTS];
#pragma unroll
        for (int i = 0; i < ELEMENTS; ++i) dz[i] = to_float(loaded[i]);
        if (activation != IDENTITY) {
            const float* z_row = z + m * N + n;
#pragma unroll
            for (int first = 0; first < ELEMENTS; first += 4) {
                auto arguments = whole ? load_global(reinterpret_cast<const Vector<float, 4>*>(z_row + first))
                                       : gather_chunk(z_row + first, count - first, 1);
                // dz = dy * act'(z)
#pragma unroll
                for (int i = 0; i < 4; ++i) dz[first + i] *= activation_slope(arguments[i], activation);
            }
        }
#pragma unroll
        for (int i = 0; i < ELEMENTS; ++i) sums[i] += dz[i];
        if (!scaled) continue;
        Vector<T, ELEMENTS> result;
#pragma unroll
        for (int i = 0; i < ELEMENTS; ++i) result[i] = from_float<T>(dz[i] * relative[i]);
        T* scaled_row = scaled + m * N + n;
        if (whole) {
            store_global(reinterpret_cast<Vector<T, ELEMENTS>*>(scaled_row), result);
        } else {
#pragma unroll
            for (int i = 0; i < ELEMENTS; ++i)
                if (i < count) store_global(scaled_row + i, result[i]);
        }
    }
    if (!partial) return;
#pragma unroll
    for (int i = 0; i < ELEMENTS; ++i) store_shared(&shared.sums[warp][i][lane], sums[i]);
    __syncthreads();
    if (warp >= ELEMENTS || warp >= count) return;
    float sum = 0.0f;
    for (int other = 0; other < GRADIENT_WARPS; ++other) sum += load_shared(&shared.sums[other][warp][lane]);
    store_global(partial + int64_t(tile_m) * N + n + warp, sum);
}

constexpr int REDUCTION_THREADS = 128;

__global__ void __launch_bounds__(REDUCTION_THREADS)
    sum_of_tiles_kernel(const float* partial,  // (tiles, N)
                        float* dbias,          // (N,)
                        int tiles, int N) {
    int n = int(blockIdx.x) * REDUCTION_THREADS + int(threadIdx.x);
    if (n >= N) return;
    float sum = 0.0f;
#pragma unroll 8
    for (int tile = 0; tile < tiles; ++tile) sum += load_global(partial + int64_t(tile) * N + n);
    store_global(dbias + n, sum);
}

template <class T>
void gradient(Address dy, Address z, Address weight_scale, Address largest, Address scaled, Address partial, int M,
              int N, int64_t dy_stride_m, int64_t dy_stride_n, int64_t scale_stride, int activation, void* stream) {
    LaunchShape shape{.grid_x = int64_t(ceil_div(M, GRADIENT_ROWS)) * ceil_div(N, WARP * VECTOR<T>),
                      .threads = GRADIENT_WARPS * WARP,
                      .shared_bytes = sizeof(GradientLayout<T>)};
    GPTKERN_LAUNCH((gradient_kernel<T>), shape, stream, operand<T>(dy, N, dy_stride_m, dy_stride_n), at<float>(z),
                   at<float>(weight_scale), at<float>(largest), at<T>(scaled), at<float>(partial), M, N, scale_stride,
                   activation);
}

Weight weight_of(const Tensor& weight) { return {weight.address, weight.strides[0], weight.strides[1]}; }

// act(x @ weight^T …) as the mode has it: q is 0 for w8a16.
void product(Address x, int dtype, int64_t x_stride_m, int64_t x_stride_k, const Weight& weight, Address q,
             Address input_scale, int64_t M, int64_t N, int64_t K, Epilogue epilogue, int block_m, int block_n,
             Address stream) {
    if (input_scale == 0)
        return w8a16_product(x, dtype, x_stride_m, x_stride_k, weight, M, N, K, epilogue, block_m, block_n,
                             at<void>(stream));
    quantize_rows_of(dtype, x, q, input_scale, M, K, x_stride_m, x_stride_k, q_pitch_of(K), at<void>(stream));
    epilogue.row_scale = at<float>(input_scale);
    w8a8_product(q, weight, int(M), int(N), int(K), epilogue, block_m, block_n, at<void>(stream));
}

}  // namespace

// --- Launchers ------------------------------------------------------------------------------------------------------

std::map<std::string, std::vector<std::pair<int, int>>> int8_linear_tiles() {
    return {{"w8a8", W8a8Tiles::sizes()}, {"w8a16", W8a16Tiles::sizes()}, {"w8a32", W8a32Tiles::sizes()}};
}

Unreadable int8_linear_forward(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const Tensor& bias,
                               const Tensor& q, const Tensor& input_scale, const Tensor& y, int activation,
                               int block_m, int block_n, Address stream) {
    if (y.elements() == 0) return nullptr;
    auto x_stride_m = merged_stride(x, 0, x.rank - 1);
    if (!x_stride_m) return &x;
    const int64_t N = weight.shape[0], K = weight.shape[1], M = y.elements() / N;
    Epilogue epilogue{nullptr,
                      at<float>(weight_scale.address),
                      at<void>(bias.address),
                      at<void>(y.address),
                      weight_scale.strides[0],
                      bias.object ? bias.strides[0] : 0,
                      bias.dtype,
                      x.dtype,
                      activation};
    product(x.address, x.dtype, *x_stride_m, x.strides[x.rank - 1], weight_of(weight), q.address, input_scale.address, M,
            N, K, epilogue, block_m, block_n, stream);
    return nullptr;
}

Unreadable int8_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                                const Tensor& bias, const Tensor& q, const Tensor& input_scale, const Tensor& z,
                                const Tensor& largest, const Tensor& scaled, const Tensor& partial,
                                const Tensor& dinput, const Tensor& dbias, int activation, int block_m, int block_n,
                                Address stream) {
    const int64_t N = weight.shape[0], K = weight.shape[1];
    int64_t M = 1;
    for (int d = 0; d < dy.rank - 1; ++d) M *= dy.shape[d];
    auto dy_stride_m = merged_stride(dy, 0, dy.rank - 1), x_stride_m = merged_stride(x, 0, x.rank - 1);
    if (!dy_stride_m) return &dy;
    if (!x_stride_m) return &x;
    if (M > 0 && N > 0) {
        if (activation != IDENTITY) {
            Epilogue epilogue{nullptr,
                              at<float>(weight_scale.address),
                              at<void>(bias.address),
                              at<void>(z.address),
                              weight_scale.strides[0],
                              bias.object ? bias.strides[0] : 0,
                              bias.dtype,
                              FLOAT32,
                              IDENTITY};
            product(x.address, x.dtype, *x_stride_m, x.strides[x.rank - 1], weight_of(weight), q.address,
                    input_scale.address, M, N, K, epilogue, block_m, block_n, stream);
        }
        if (scaled.address)
            GPTKERN_LAUNCH((largest_kernel),
                           (LaunchShape{.threads = LARGEST_THREADS, .shared_bytes = sizeof(LargestLayout)}),
                           at<void>(stream), at<float>(weight_scale.address), at<float>(largest.address), int(N),
                           weight_scale.strides[0]);
        auto* launch = dy.dtype == FLOAT32   ? &gradient<float>
                       : dy.dtype == FLOAT16 ? &gradient<float16>
                                             : &gradient<bfloat16>;
        launch(dy.address, z.address, weight_scale.address, largest.address, scaled.address, partial.address, int(M),
               int(N), *dy_stride_m, dy.strides[dy.rank - 1], weight_scale.strides[0], activation, at<void>(stream));
    }
    if (dbias.address) {
        LaunchShape shape{.grid_x = ceil_div<int64_t>(N, REDUCTION_THREADS), .threads = REDUCTION_THREADS};
        GPTKERN_LAUNCH((sum_of_tiles_kernel), shape, at<void>(stream), at<float>(partial.address),
                       at<float>(dbias.address), int(ceil_div<int64_t>(M, GRADIENT_ROWS)), int(N));
    }
    if (dinput.address && M > 0 && K > 0) {
        // dx = (dz * weight_scale) @ weight, one scale for all of it left
        Epilogue epilogue{nullptr, at<float>(largest.address), nullptr, at<void>(dinput.address), 0, 0, FLOAT32, dy.dtype,
                          IDENTITY};
        w8a16_product(scaled.address, dy.dtype, N, 1, {weight.address, weight.strides[1], weight.strides[0]}, M, K, N,
                      epilogue, INPUT_BLOCK, INPUT_BLOCK, at<void>(stream));
    }
    return nullptr;
}

}  // namespace gptkern
