// A PyTorch tensor as a launcher sees it, and how its dimensions lie in memory. For the host alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

namespace gptkern {

using Address = std::uintptr_t;

// gptkern/backends/cuda/common.py, DTYPES, has the first three. OTHER: what no kernel reads.
enum Dtype : int { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, BOOL = 3, INT8 = 4, OTHER = -1 };

// Bytes of an element that kernels compute with.
inline size_t bytes_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

// Valid while the launcher's call lasts: shape and strides are the tensor's own, not copies.
struct Tensor {
    Address address = 0;               // of the first element; 0: no tensor, or one without elements
    const int64_t* shape = nullptr;    // (rank,)
    const int64_t* strides = nullptr;  // (rank,), in elements
    int rank = 0;
    Dtype dtype = OTHER;
    void* object = nullptr;  // Python's

    int64_t elements() const {
        int64_t count = object != nullptr;
        for (int d = 0; d < rank; ++d) count *= shape[d];
        return count;
    }
};

// The stride of a tensor's dimensions [first, end) seen as one, 0 where they hold one place or none; nothing where their
// places do not lie one step apart.
inline std::optional<int64_t> merged_stride(const Tensor& tensor, int first, int end) {
    int64_t stride = 0, outer = 0;
    bool found = false;
    for (int d = end - 1; d >= first; --d) {
        if (tensor.shape[d] == 0) return 0;
        if (tensor.shape[d] == 1) continue;
        if (found && tensor.strides[d] != outer) return std::nullopt;
        if (!found) stride = tensor.strides[d];
        found = true;
        outer = tensor.strides[d] * tensor.shape[d];
    }
    return stride;
}

// Of (…, width): elements from a row to the next, as above; also nothing where a row is not contiguous.
inline std::optional<int64_t> row_stride(const Tensor& tensor) {
    if (tensor.rank == 0) return 0;
    int last = tensor.rank - 1;
    if (tensor.shape[last] > 1 && tensor.strides[last] != 1) return std::nullopt;
    return merged_stride(tensor, 0, last);
}

inline bool is_contiguous(const Tensor& tensor) {
    int64_t stride = 1;
    for (int d = tensor.rank - 1; d >= 0; --d) {
        if (tensor.shape[d] > 1 && tensor.strides[d] != stride) return false;
        stride *= tensor.shape[d];
    }
    return true;
}

}  // namespace gptkern
