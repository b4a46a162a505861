// What forward.cu and backward.cu of nonlinearity share: where a thread's elements lie, and how they are loaded.
//
// Tensors are (rows, width), each row contiguous. A thread has V neighbouring columns: 16 bytes where every row of each
// tensor begins at a multiple of 16, else one element. With both, neighbouring lanes have neighbouring memory. Where
// all tensors are contiguous and no column has a bias, they are walked as rows of FLAT elements, whatever their width.
#pragma once

#include <type_traits>

#include "device/activation.cuh"
#include "device/norm.cuh"
#include "nonlinearity/launchers.h"

namespace gptkern {

inline constexpr int BLOCK = 256;
// A block's columns of 16-bit elements, 16 bytes a thread.
inline constexpr int FLAT = 2048;

// (rows, width), each row contiguous; start is null where there is no such tensor.
template <class T>
struct Walked {
    T* start;
    int64_t stride;
    GPTKERN_DEVICE T* at(int64_t row, int column) const { return start + (row * stride + column); }
};

// V elements, or as many of them as the row still has.
template <class T, int V>
GPTKERN_DEVICE Vector<T, V> load_part(const T* address, int count) {
    if constexpr (V > 1) {
        if (count < V) {
            Vector<T, V> values{};
#pragma unroll
            for (int e = 0; e < V; ++e)
                if (e < count) values[e] = load_global_once(address + e);
            return values;
        }
    }
    return load_global_once(reinterpret_cast<const Vector<T, V>*>(address));
}

template <class T, int V>
GPTKERN_DEVICE void store_part(T* address, const Vector<T, V>& values, int count) {
    if constexpr (V > 1) {
        if (count < V) {
#pragma unroll
            for (int e = 0; e < V; ++e)
                if (e < count) store_global(address + e, values[e]);
            return;
        }
    }
    store_global(reinterpret_cast<Vector<T, V>*>(address), values);
}

template <class T, int V>
GPTKERN_DEVICE Vector<T, V> rounded(const float (&values)[V]) {
    Vector<T, V> vector;
#pragma unroll
    for (int e = 0; e < V; ++e) vector[e] = from_float<T>(values[e]);
    return vector;
}

// The bias of columns column … column + V - 1, 0 beyond the width. dtype: float32, or T.
template <class T, int V>
GPTKERN_DEVICE void load_bias(float (&values)[V], const Parameter& bias, int column, int width) {
    if constexpr (V > 1)
        load_parameter<int(sizeof(T))>(values, bias, 0.0f, std::is_same_v<T, float16>, 0, column, width, 0);
    else if (bias.dtype == FLOAT32)
        values[0] = load_global(static_cast<const float*>(bias.values) + column);
    else
        values[0] = to_float(load_global(static_cast<const T*>(bias.values) + column));
}

template <int ACTIVATION>
struct Constant {
    static constexpr int value = ACTIVATION;
};

// body(Constant of the activation): one loop for each, without a question inside.
template <class Body>
GPTKERN_DEVICE void for_activation(int activation, Body body) {
    if (activation == GELU)
        body(Constant<GELU>{});
    else if (activation == GELU_TANH)
        body(Constant<GELU_TANH>{});
    else
        body(Constant<SILU>{});
}

// --- The host's part ------------------------------------------------------------------------------------------------

// Whether all of its rows begin at a multiple of 16 bytes.
template <int V, class T>
bool whole_vectors(const Walked<T>& walked, int64_t rows) {
    const bool first = reinterpret_cast<Address>(walked.start) % 16 == 0;
    return !walked.start || (first && (rows <= 1 || walked.stride % V == 0));
}

struct Shape {
    int64_t rows;
    int width;
};

// Of (…, width), or where it is flat of its elements in rows of FLAT, or in one row.
inline Shape shape_of(const Tensor& tensor, bool flat) {
    constexpr int64_t MOST_IN_A_ROW = 1 << 30;
    const int64_t elements = tensor.elements();
    if (flat && elements % FLAT == 0) return {elements / FLAT, FLAT};
    if (flat && elements <= MOST_IN_A_ROW) return {1, int(elements)};
    const int64_t width = tensor.rank == 0 ? 1 : tensor.shape[tensor.rank - 1];
    return {elements / width, int(width)};
}

// The tensor as rows of this shape, each contiguous.
template <class T>
Walked<T> walked(const Tensor& tensor, const Shape& shape, bool flat) {
    return {at<T>(tensor.address), flat ? shape.width : row_stride(tensor).value_or(0)};
}

// Of a packed tensor, given its first half.
template <class T>
Walked<T> second_half(const Walked<T>& first, int width) {
    return {first.start ? first.start + width : nullptr, first.stride};
}

// Threads of a block that share a row of so many vectors.
inline int lanes_of_row(int vectors) { return vectors >= BLOCK ? BLOCK : lanes_of(vectors, 1); }

}  // namespace gptkern
