#pragma once

#include "launcher.h"

namespace gptkern {

// rotary: x, y (batch, heads, length, head_dim), y's last dimension contiguous
// cos, sin, of one shape and dtype: (length, width) or (batch or 1, length, width), width being rotary_dim / 2 or
// rotary_dim. inverse: by the negative angle.

Unreadable rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& y, int64_t rotary_dim,
                  bool interleaved, bool inverse, int multiprocessors, Address stream);

}  // namespace gptkern
