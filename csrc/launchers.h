// The functions that Python calls, one declaration each. They check nothing: gptkern.ops has, and
// gptkern.cuda_kernels has allocated the outputs.
//
// Tensors arrive as addresses, with the shape and strides that the kernel needs, in elements; 0 is "no tensor". The
// last argument is the stream. A failed launch throws std::runtime_error.
#pragma once

#include <cstdint>

namespace gptkern {

using Address = std::uintptr_t;

// gptkern/cuda_kernels/common.py, DTYPES.
enum Dtype : int { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

// An address as a launcher's kernels take it.
template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace gptkern
