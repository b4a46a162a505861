// What the files of int8_linear give each other.
#pragma once

#include "device/linear.cuh"
#include "int8_linear/launchers.h"

namespace gptkern {

// The weight, (N, K) int8 of any strides.
struct Weight {
    Address address;
    int64_t stride_n, stride_k;
};

// y (M, N) = act((x @ weight^T) * column_scale + bias), x (M, K) of `dtype`, any strides.
void w8a16_product(Address x, int dtype, int64_t x_stride_m, int64_t x_stride_k, const Weight& weight, int64_t M,
                   int64_t N, int64_t K, const Epilogue& epilogue, int multiprocessors, void* stream);

}  // namespace gptkern
