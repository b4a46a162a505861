#pragma once

#include "launcher.h"

namespace gptkern {

// nonlinearity: x (…, width) and up of its shape, or none; packed: x is (…, 2 width), and its second half is up. bias
// (width,) of x's dtype or float32, or none; not beside up. activation: device/activation.cuh.

// y (…, width), contiguous.
Unreadable nonlinearity_forward(const Tensor& x, const Tensor& up, const Tensor& bias, const Tensor& y, int activation,
                                bool packed, Address stream);
// dx as x, contiguous, or none; dup (…, width), contiguous, or none. dbias (width,) and partial (partials, width)
// float32, or none of both; not beside up.
Unreadable nonlinearity_backward(const Tensor& dy, const Tensor& x, const Tensor& up, const Tensor& bias,
                                 const Tensor& dx, const Tensor& dup, const Tensor& dbias, const Tensor& partial,
                                 int activation, bool packed, Address stream);

}  // namespace gptkern
