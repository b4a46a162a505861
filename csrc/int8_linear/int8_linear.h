// What the files of int8_linear give each other.
#pragma once

#include "device/instances.h"
#include "device/linear.cuh"
#include "int8_linear/launchers.h"

namespace gptkern {

inline constexpr int FEW_ROWS = 16;  // of x, or fewer: two tiles of mma

// The tiles of y that each product was compiled for. Those of FEW_ROWS rows are for as many, or fewer.
using W8a8Tiles = Instances<TileSize<64, 64>, TileSize<128, 128>>;
using W8a16Tiles =
    Instances<TileSize<FEW_ROWS, 16>, TileSize<FEW_ROWS, 32>, TileSize<FEW_ROWS, 64>, TileSize<64, 64>>;
using W8a32Tiles = Instances<TileSize<FEW_ROWS, 16>, TileSize<64, 64>>;

// The weight, (N, K) int8 of any strides.
struct Weight {
    Address address;
    int64_t stride_n, stride_k;
};

// y (M, N) = act((x @ weight^T) * column_scale + bias), x (M, K) of `dtype`, any strides; in tiles of block_m rows and
// block_n columns, of W8a16Tiles, or of W8a32Tiles for float32.
void w8a16_product(Address x, int dtype, int64_t x_stride_m, int64_t x_stride_k, const Weight& weight, int64_t M,
                   int64_t N, int64_t K, const Epilogue& epilogue, int block_m, int block_n, void* stream);

// The same, M being at most FEW_ROWS.
template <class T, int BLOCK_N>
void w8a16_few_rows(const Operand<T>& x, const Operand<int8_t>& weight, const Epilogue& epilogue, int M, int N, int K,
                    void* stream);

}  // namespace gptkern
