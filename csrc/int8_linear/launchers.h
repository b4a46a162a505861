#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "launcher.h"

namespace gptkern {

// int8_linear: x (…, K), weight (N, K) int8, weight_scale (N,) float32, bias (N,) or none, y (…, N)
// block_m, block_n: the tile of y, or of the backward's z, one of int8_linear_tiles().
// w8a8: q (M, K rounded up to 16) int8 and input_scale (M,) float32 are written on the way; w8a16: both are none.

Unreadable int8_linear_forward(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const Tensor& bias,
                               const Tensor& q, const Tensor& input_scale, const Tensor& y, int activation,
                               int block_m, int block_n, Address stream);
// x and z (M, N) float32, where there is an activation; largest () float32 and scaled (M, N) of dy's dtype, where there
// is dinput (…, K); partial (tiles of 64 rows, N) float32, where there is dbias (N,) float32.
Unreadable int8_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                                const Tensor& bias, const Tensor& q, const Tensor& input_scale, const Tensor& z,
                                const Tensor& largest, const Tensor& scaled, const Tensor& partial,
                                const Tensor& dinput, const Tensor& dbias, int activation, int block_m, int block_n,
                                Address stream);

// "w8a8", "w8a16" of 16-bit inputs, "w8a32" of float32 ones -> the (block_m, block_n) that were compiled: others are
// std::invalid_argument, as is an input of more than 16 rows for block_m 16.
std::map<std::string, std::vector<std::pair<int, int>>> int8_linear_tiles();

}  // namespace gptkern
