// What the launchers share. A room's launchers.h declares the functions that Python calls, and its binding.cpp binds
// them. They run without Python's lock (binding.h), and check no argument: the operator's contract has, and its cuda.py
// has allocated the outputs.
//
// Each answers null once its kernels are started, or a tensor that they cannot read in place: nothing has been started
// then, and Python copies that one, contiguous and aligned, and calls again. Where there is nothing to compute, null.
// The last argument is the stream. A failed launch throws std::runtime_error.
#pragma once

#include "tensor.h"

namespace gptkern {

using Unreadable = const Tensor*;

// An address as a launcher's kernels take it.
template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace gptkern
