#pragma once

#include "launcher.h"

namespace gptkern {

// layer_norm: x, residual, dy, s, incoming (…, width); weight, bias (width,); statistics (2, rows) float32,
// contiguous: mean, rstd. weight and bias have one dtype: that of y or s, or float32.

// y, summed (…, width), contiguous, summed where there is a residual.
Unreadable layer_norm_forward(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias,
                              const Tensor& y, const Tensor& summed, const Tensor& statistics, double eps,
                              Address stream);
// incoming: the gradient that reaches s by itself, or none. ds (…, width), dweight, dbias (width,) float32: any of them
// none. partial: float32 (how many of dweight and dbias are there, partials, width). partials: at least 1; where the width
// is no multiple of 8, at least min(rows, 8).
Unreadable layer_norm_backward(const Tensor& dy, const Tensor& incoming, const Tensor& s, const Tensor& weight,
                               const Tensor& statistics, const Tensor& ds, const Tensor& dweight, const Tensor& dbias,
                               const Tensor& partial, int partials, Address stream);

}  // namespace gptkern
