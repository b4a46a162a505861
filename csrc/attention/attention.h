// What the launchers of forward.cu and backward.cu share.
#pragma once

#include "attention/launchers.h"

namespace gptkern {

inline constexpr double LOG2E = 1.4426950408889634;

// The stride of a dimension, 0 where nothing steps along it.
inline int64_t step_of(const Tensor& tensor, int dimension) {
    return tensor.shape[dimension] > 1 ? tensor.strides[dimension] : 0;
}

// Whether the kernels can read (batch, heads, length, head_dim) in place: rows come by 16 bytes, and offsets within a
// tile of at most 128 rows are 32-bit.
inline bool is_readable(const Tensor& tensor) {
    constexpr int VECTOR = 8, VECTOR_BYTES = 16;
    constexpr int64_t LARGEST_ROW_STRIDE = (int64_t(1) << 31) / 128;
    int64_t together = step_of(tensor, 0) | step_of(tensor, 1) | step_of(tensor, 2);
    return tensor.strides[3] == 1 && together % VECTOR == 0 && step_of(tensor, 2) < LARGEST_ROW_STRIDE &&
           tensor.address % VECTOR_BYTES == 0;
}

}  // namespace gptkern
