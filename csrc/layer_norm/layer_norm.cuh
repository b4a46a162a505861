// What forward.cu and backward.cu of layer_norm share.
//
// Rows are WHOLE (device/rows.cuh) where every tensor has all of its rows at multiples of 16 bytes, of such a length.
// Else vectors begin up to 7 columns before the row, and of a row of odd width the first and the last one are moved in
// pieces; where tensors are not aligned alike, what is written decides and the others are read in pieces.
#pragma once

#include <algorithm>
#include <type_traits>

#include "device/norm.cuh"
#include "layer_norm/launchers.h"

namespace gptkern {

template <class T>
inline constexpr bool IS_HALF = std::is_same_v<T, float16>;

// --- For launchers ---------------------------------------------------------------------------------------------------


// Whether a tensor's rows, `stride` elements apart, are made of whole vectors that are aligned to their bytes: 16, or 8
// where 16-bit elements are widened. No tensor has no vectors.
inline bool is_whole(const Tensor& tensor, int64_t stride, int vector) {
    size_t bytes = std::min(bytes_of(tensor.dtype) * size_t(vector), size_t(16));
    return tensor.address % bytes == 0 && stride % vector == 0;
}

// Calls `with` with std::true_type where rows are WHOLE, else std::false_type; and how many vectors a row has, wherever
// it begins.
template <class T, class Function>
void by_alignment(bool whole, int width, Function with) {
    if (whole)
        with(std::true_type{}, width / VECTOR<T>);
    else
        with(std::false_type{}, most_vectors(width, VECTOR<T>));
}

}  // namespace gptkern
