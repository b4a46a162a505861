#pragma once

#include "launcher.h"

namespace gptkern {

// rms_norm: x, residual, dy, incoming (…, width); weight (width,) of y's or x's dtype or float32, or none; rstd (rows,)
// float32

// y, summed (…, width), contiguous, summed where there is a residual.
Unreadable rms_norm_forward(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& y,
                            const Tensor& summed, const Tensor& rstd, double eps, Address stream);
// incoming: the gradient that reaches x by itself, or none. dx (…, width), contiguous, or none; dweight (width,) and partial (partials, width) float32, or none of both. partials: at
// least 1; where the width is no multiple of 8, at least min(rows, 8).
Unreadable rms_norm_backward(const Tensor& dy, const Tensor& incoming, const Tensor& x, const Tensor& weight,
                             const Tensor& rstd, const Tensor& dx, const Tensor& dweight, const Tensor& partial, Address stream);

}  // namespace gptkern
