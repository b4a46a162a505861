// The functions that Python calls, one declaration each. They check nothing: gptkern.ops has, and
// gptkern.cuda_kernels has allocated the outputs.
//
// Tensors arrive as addresses, with the shape and strides that the kernel needs, in elements; 0 is "no tensor". The
// last argument is the stream. A failed launch throws std::runtime_error.
#pragma once

#include <cstdint>
#include <vector>

namespace gptkern {

using Address = std::uintptr_t;

// gptkern/cuda_kernels/common.py, DTYPES.
enum Dtype : int { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

// An address as a launcher's kernels take it.
template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// Shapes and strides as PyTorch has them. mask: 0, or one that broadcasts to the shape, of the kind given: a Dtype, or
// 3 for bool. y, dx: contiguous. Rows wider than one_pass_limit are walked twice: tests alone set it.
void softmax_forward(Address x, int x_dtype, Address mask, int mask_kind, Address y, int y_dtype,
                     const std::vector<int64_t>& shape, const std::vector<int64_t>& x_strides,
                     const std::vector<int64_t>& mask_shape, const std::vector<int64_t>& mask_strides, int dim,
                     double scale, bool is_causal, int64_t one_pass_limit, Address stream);
void softmax_backward(Address dy, Address y, int y_dtype, Address dx, int dx_dtype, const std::vector<int64_t>& shape,
                      const std::vector<int64_t>& dy_strides, int dim, double scale, bool is_causal,
                      int64_t one_pass_limit, Address stream);

}  // namespace gptkern
