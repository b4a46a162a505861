#pragma once

#include "launcher.h"

namespace gptkern {

// int8_linear: x (…, K), weight (N, K) int8, weight_scale (N,) float32, bias (N,) or none, y (…, N)
// w8a8: q (M, K rounded up to 16) int8 and input_scale (M,) float32 are written on the way; w8a16: both are none.

Unreadable int8_linear_forward(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const Tensor& bias,
                               const Tensor& q, const Tensor& input_scale, const Tensor& y, int activation,
                               int multiprocessors, Address stream);
// x and z (M, N) float32, where there is an activation; largest () float32 and scaled (M, N) of dy's dtype, where there is
// dinput (…, K); partial (tiles of 64 rows, N) float32, where there is dbias (N,) float32.
Unreadable int8_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                                const Tensor& bias, const Tensor& q, const Tensor& input_scale, const Tensor& z,
                                const Tensor& largest, const Tensor& scaled, const Tensor& partial,
                                const Tensor& dinput, const Tensor& dbias, int activation, int multiprocessors,
                                Address stream);

}  // namespace gptkern
