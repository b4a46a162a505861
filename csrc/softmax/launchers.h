#pragma once

#include "launcher.h"

namespace gptkern {

// softmax: x, dy (…), any strides; y, dx (…), contiguous
// mask: none, or one that broadcasts to x, of any of the dtypes or bool. Rows wider than one_pass_limit are walked twice:
// tests alone set it.

Unreadable softmax_forward(const Tensor& x, const Tensor& mask, const Tensor& y, int dim, double scale, bool is_causal,
                           int64_t one_pass_limit, Address stream);
Unreadable softmax_backward(const Tensor& dy, const Tensor& y, const Tensor& dx, int dim, double scale, bool is_causal,
                            int64_t one_pass_limit, Address stream);

}  // namespace gptkern
