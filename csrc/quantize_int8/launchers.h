#pragma once

#include "launcher.h"

namespace gptkern {

// quantize_int8: x (…), q (…) int8, scale (… without dim) float32

Unreadable quantize_int8(const Tensor& x, const Tensor& q, const Tensor& scale, int dim, Address stream);

}  // namespace gptkern
