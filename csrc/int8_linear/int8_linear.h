// What int8_linear.cu, int8_linear_w8a16.cu and quantize_int8.cu give each other.
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

// q (rows, q_pitch) int8 and scale (rows,) of x (rows, width) of `dtype`, any strides; q is 0 from width on.
void quantize_int8_rows(Address x, Address q, Address scale, int64_t rows, int64_t width, int64_t x_row_stride,
                        int64_t x_element_stride, int64_t q_pitch, int dtype, Address stream);

}  // namespace gptkern
