// The tiles of attention's backward, and what its warps do with them: for the kernels of backward.cu, where the
// mathematics is.
#pragma once

#include "attention/attention.h"
#include "device/launch.cuh"
#include "device/tile.cuh"

namespace gptkern {

// A tensor (batch, heads, length, head_dim) of 16-bit values: 16-byte alignment of every row, the last stride 1.
struct Heads {
    Address address;  // 0: no such tensor
    int64_t batch_stride, head_stride;
    int row_stride;

    template <class T>
    GPTKERN_DEVICE T* row(int batch, int head, int row) const {
        return reinterpret_cast<T*>(address) + batch * batch_stride + head * head_stride + int64_t(row) * row_stride;
    }
};

// What the kernels are called with, whatever the tile.
struct AttentionBackward {
    Heads grad_output;  // (batch, heads, length_q, head_dim)
    Heads query;        // (batch, heads, length_q, head_dim)
    Heads key;          // (batch, kv_heads, length_k, head_dim)
    Heads value;        // (batch, kv_heads, length_k, head_dim)
    Heads output;       // (batch, heads, length_q, head_dim), what the forward returned
    Heads grad_query;   // (batch, heads, length_q, head_dim), not computed without address; so are the two below
    Heads grad_key;     // (batch, kv_heads, length_k, head_dim)
    Heads grad_value;   // (batch, kv_heads, length_k, head_dim)
    const float* lse;  // (batch, heads, length_q), contiguous
    float* delta;      // (batch, heads, length_q), contiguous; for dQ and dK
    int batch, heads, kv_heads, length_q, length_k, head_dim;
    float scale, scale_log2e;
    bool is_causal;
};

namespace {

// --- Tiles ----------------------------------------------------------------------------------------------------------

// Sizes of the dK/dV and the dQ kernel, D: the width of a tile, at least head_dim. Chosen for the registers: dK/dV
// keeps D · M_TILES / 2 of them for a sum, half as many for X, and 8 · M_TILES / PARTS for Z, of 255.
template <int D>
struct Sizes {
    static constexpr int ROLES = 2;
    static constexpr int M_TILES = D <= 128 ? 2 : 1;  // of 16 rows: a warp's
    static constexpr int ROW_WARPS = D <= 128 ? 2 : 4;
    static constexpr int WARP_ROWS = 16 * M_TILES;
    static constexpr int X_ROWS = WARP_ROWS * ROW_WARPS;
    static constexpr int Y_ROWS = 32;
    static constexpr int STAGES = D <= 128 ? 3 : 2;  // tiles of Y in shared memory, or on their way there
    static constexpr int ROLE_THREADS = WARP * ROW_WARPS, THREADS = ROLE_THREADS * ROLES;
    static constexpr int BLOCKS = D <= 128 ? 2 : 1;  // on a multiprocessor
    static constexpr int K_STEPS = D / 16;
    // Z in one go or, to spare registers, in two.
    static constexpr int PARTS = D >= 96 ? 2 : 1;
    static constexpr int Z_COLUMNS = Y_ROWS / PARTS;
    static constexpr int Z_TILES = Z_COLUMNS / 8;
};

// One number for each of a lane's places in Z.
template <int D>
using Exchange = Vector<float, 4>[Sizes<D>::ROW_WARPS][Sizes<D>::M_TILES][Sizes<D>::Z_TILES][WARP];

template <class T, int D, int EXCHANGES>
struct Layout {
    using S = Sizes<D>;
    Tile<T, S::Y_ROWS, D> y[S::STAGES][S::ROLES];
    Exchange<D> exchange[Sizes<D>::PARTS][EXCHANGES];
    float statistics[S::STAGES][S::ROLES][S::Y_ROWS];  // lse and delta of a tile of queries

    // Before the walk X passes through the stages, and after it the result does: a tile for each role.
    GPTKERN_DEVICE Tile<T, S::X_ROWS, D>& x(int role) {
        static_assert(sizeof(y) >= S::ROLES * sizeof(Tile<T, S::X_ROWS, D>));
        return reinterpret_cast<Tile<T, S::X_ROWS, D>*>(&y)[role];
    }
};

// X of a warp, as the operand A of every k-step.
template <int D>
struct Kept {
    uint32_t a[Sizes<D>::M_TILES][Sizes<D>::K_STEPS][4];
};

// Z, or a part of it.
template <int D>
using Scores = float[Sizes<D>::M_TILES][Sizes<D>::Z_TILES][4];

// Both roles' X (X_ROWS, D) from global memory to the warps' registers. Nothing else is under way in the stages.
template <class T, int D, class Shared>
GPTKERN_DEVICE void load_kept(Kept<D>& x, Shared& shared, const T* first, int first_stride, const T* second,
                              int second_stride, int rows, int head_dim, int role, int warp_row) {
    using S = Sizes<D>;
    load_tile<S::THREADS>(shared.x(0), first, first_stride, rows, head_dim, int(threadIdx.x));
    load_tile<S::THREADS>(shared.x(1), second, second_stride, rows, head_dim, int(threadIdx.x));
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < S::M_TILES; ++m)
#pragma unroll
        for (int k = 0; k < S::K_STEPS; ++k) load_a(x.a[m][k], shared.x(role), warp_row + 16 * m, 16 * k);
    // The walk's copies write where X was.
    __syncthreads();
}

// Z = X Y[row …]ᵀ
template <class T, int D>
GPTKERN_DEVICE void multiply(Scores<D>& z, const Kept<D>& x, const Tile<T, Sizes<D>::Y_ROWS, D>& y, int row) {
    using S = Sizes<D>;
#pragma unroll
    for (int m = 0; m < S::M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < S::Z_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) z[m][n][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < S::K_STEPS; ++k)
#pragma unroll
        for (int n = 0; n < S::Z_TILES; n += 2) {
            uint32_t b[2][2];
            load_b(b, y, row + 8 * n, 16 * k);
#pragma unroll
            for (int m = 0; m < S::M_TILES; ++m)
#pragma unroll
                for (int j = 0; j < 2; ++j) mma_m16n8k16<T>(z[m][n + j], x.a[m][k], b[j]);
        }
}

// sum += Z Y[row …, column …], Z rounded to T. The lane that has an element of Z as accumulator has it as operand A.
template <class T, int D, int N_TILES>
GPTKERN_DEVICE void accumulate(float (&sum)[Sizes<D>::M_TILES][N_TILES][4], const Scores<D>& z,
                               const Tile<T, Sizes<D>::Y_ROWS, D>& y, int row, int column) {
    using S = Sizes<D>;
#pragma unroll
    for (int k = 0; k < S::Z_COLUMNS / 16; ++k) {
        uint32_t a[S::M_TILES][4];
#pragma unroll
        for (int m = 0; m < S::M_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float(&tile)[4] = z[m][2 * k + half];
                a[m][2 * half] = pack<T>(tile[0], tile[1]);
                a[m][2 * half + 1] = pack<T>(tile[2], tile[3]);
            }
#pragma unroll
        for (int n = 0; n < N_TILES; n += 2) {
            if (column + 8 * n == D) break;
            uint32_t b[2][2];
            load_b_transposed(b, y, row + 16 * k, column + 8 * n);
#pragma unroll
            for (int m = 0; m < S::M_TILES; ++m)
#pragma unroll
                for (int j = 0; j < 2; ++j) mma_m16n8k16<T>(sum[m][n + j], a[m], b[j]);
        }
    }
}

template <int D>
GPTKERN_DEVICE void give(Exchange<D>& exchange, int row_warp, const Scores<D>& z) {
#pragma unroll
    for (int m = 0; m < Sizes<D>::M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < Sizes<D>::Z_TILES; ++n) {
            const float(&tile)[4] = z[m][n];
            store_shared(&exchange[row_warp][m][n][lane_of_thread()], {tile[0], tile[1], tile[2], tile[3]});
        }
}

// Rounds a warp's sums to T, into rows [row, row + WARP_ROWS) and columns [column, column + 8 N_TILES) of a tile.
template <class T, int D, int N_TILES>
GPTKERN_DEVICE void round_to_tile(Tile<T, Sizes<D>::X_ROWS, D>& tile, int row, int column, float factor,
                                  const float (&sum)[Sizes<D>::M_TILES][N_TILES][4]) {
    int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
#pragma unroll
    for (int m = 0; m < Sizes<D>::M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < N_TILES; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (column + 8 * n < D)
                    store_shared(tile.pair(row + 16 * m + 8 * half + g, column + 8 * n + 2 * t),
                                 pack<T>(factor * sum[m][n][2 * half], factor * sum[m][n][2 * half + 1]));
}

}  // namespace
}  // namespace gptkern
