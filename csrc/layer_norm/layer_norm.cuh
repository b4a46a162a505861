// How layer_norm.cu and layer_norm_backward.cu see a row: the vectors of it that a thread has, and how they come from
// memory and go there.
//
// A row belongs to a group of threads: a part of a warp, a warp, or several warps of one block. Every thread holds
// SLOTS vectors of 16 bytes of it in registers, so memory is read once.
//
// Rows are aligned where every tensor has all of its rows at multiples of 16 bytes, of such a length. Else vectors begin
// up to 7 columns before the row, where memory is aligned: of a row of odd width only the first and the last vector are
// moved in pieces. Where tensors are not aligned alike, what is written decides and the others are read in pieces.
#pragma once

#include <algorithm>
#include <type_traits>

#include "layer_norm/launchers.h"
#include "device/ptx.cuh"
#include "device/warp.cuh"

namespace gptkern {

inline constexpr int MOST_WARPS = 32;  // of a block

// The columns of this thread: vectors of V, the first at `first`, the next `step` on. WHOLE: no vector is only partly
// in its row, and all of them are aligned in every tensor.
template <bool WHOLE>
struct Span {
    int shift = 0;  // columns from the first vector's start to the row's, so that vectors are aligned to 16 bytes
    int first;      // -shift at the earliest
    int step;       // from a vector to the thread's next
    int end;        // the row's width; 0 for a group that has no row, which loads zeros and stores nothing
};

// Columns that `row` begins after an address aligned to 16 bytes.
template <class T>
GPTKERN_DEVICE int misaligned_columns(const T* row) {
    return int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}

// Whether vectors of V columns of `row` are aligned to their bytes, or to 16 where they have more.
template <int V, bool WHOLE, class E>
GPTKERN_DEVICE bool is_aligned(const E* row, const Span<WHOLE>& span) {
    if constexpr (WHOLE) return true;
    constexpr int BYTES = V * int(sizeof(E)) < 16 ? V * int(sizeof(E)) : 16;
    return (reinterpret_cast<uintptr_t>(row) - uintptr_t(span.shift) * sizeof(E)) % BYTES == 0;
}

enum class Reuse { ONCE, AGAIN, WRITTEN };

template <Reuse REUSE, class V>
GPTKERN_DEVICE V load_as(const V* address) {
    if constexpr (REUSE == Reuse::ONCE) return load_global_once(address);
    if constexpr (REUSE == Reuse::WRITTEN) return load_global_written(address);
    return load_global(address);
}

// Whether columns [column, column + V) are in the row, all of them.
template <int V, bool WHOLE>
GPTKERN_DEVICE bool covers(const Span<WHOLE>& span, int column) {
    return WHOLE ? column < span.end : column >= 0 && column + V <= span.end;
}

// V values of T, packed into words as they are in memory. A row is held like this, and widened where it is worked on:
// 16-bit values in variables of their own would take a register each.
template <class T, int V = VECTOR<T>>
using Packed = Vector<uint32_t, V * int(sizeof(T)) / 4>;

template <class T, int V>
GPTKERN_DEVICE void unpack_to(float (&values)[V], const Packed<T, V>& packed) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int e = 0; e < V; ++e) values[e] = __int_as_float(int(packed[e]));
    } else {
#pragma unroll
        for (int e = 0; e < V; e += 2) {
            float2 pair = unpack<T>(packed[e / 2]);
            values[e] = pair.x;
            values[e + 1] = pair.y;
        }
    }
}

template <class T, int V>
GPTKERN_DEVICE Packed<T, V> packed(const float (&values)[V]) {
    Packed<T, V> result;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int e = 0; e < V; ++e) result[e] = uint32_t(__float_as_int(values[e]));
    } else {
#pragma unroll
        for (int e = 0; e < V; e += 2) result[e / 2] = pack<T>(values[e], values[e + 1]);
    }
    return result;
}

// The same values, of which the compiler does not know it: else it would keep what it has widened for the next pass.
template <class T, int SLOTS>
GPTKERN_DEVICE void stay_packed(Packed<T> (&held)[SLOTS]) {
    if constexpr (sizeof(T) == 2)
#pragma unroll
        for (int i = 0; i < SLOTS; ++i)
#pragma unroll
            for (int word = 0; word < 4; ++word) held[i][word] = opaque(held[i][word]);
}

template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;

// Columns [column, column + V) of a row; zeros beyond it.
template <Reuse REUSE, int V, bool WHOLE, class T>
GPTKERN_DEVICE Packed<T, V> load_columns(const T* row, int column, const Span<WHOLE>& span, bool aligned) {
    Packed<T, V> result{};
    if (aligned && covers<V>(span, column)) {
        result = load_as<REUSE>(reinterpret_cast<const Packed<T, V>*>(row + column));
    } else if constexpr (!WHOLE) {
        constexpr int IN_WORD = 4 / int(sizeof(T));
#pragma unroll
        for (int e = 0; e < V; ++e)
            if (unsigned(column + e) < unsigned(span.end))
                result[e / IN_WORD] |= uint32_t(load_as<REUSE>(reinterpret_cast<const Bits<T>*>(row) + (column + e)))
                                       << e % IN_WORD * 16;
    }
    return result;
}

template <class T, int V, bool WHOLE>
GPTKERN_DEVICE void store_columns(T* row, int column, const Span<WHOLE>& span, bool aligned,
                                  const Packed<T, V>& values) {
    if (aligned && covers<V>(span, column)) {
        store_global(reinterpret_cast<Packed<T, V>*>(row + column), values);
    } else if constexpr (!WHOLE) {
        constexpr int IN_WORD = 4 / int(sizeof(T));
#pragma unroll
        for (int e = 0; e < V; ++e)
            if (unsigned(column + e) < unsigned(span.end))
                store_global(reinterpret_cast<Bits<T>*>(row) + (column + e),
                             Bits<T>(values[e / IN_WORD] >> e % IN_WORD * 16));
    }
}

// The thread's vectors of a row; zeros beyond it.
template <Reuse REUSE, class T, int SLOTS, bool WHOLE>
GPTKERN_DEVICE void load_row(Packed<T> (&held)[SLOTS], const T* row, const Span<WHOLE>& span) {
    bool aligned = is_aligned<VECTOR<T>>(row, span);
#pragma unroll
    for (int i = 0; i < SLOTS; ++i)
        held[i] = load_columns<REUSE, VECTOR<T>>(row, span.first + i * span.step, span, aligned);
}

// As load_row, of 16-bit elements that are held as float32.
template <class E, int SLOTS, bool WHOLE>
GPTKERN_DEVICE void load_row_widened(Packed<float> (&held)[SLOTS], const E* row, const Span<WHOLE>& span) {
    constexpr int V = VECTOR<float>;
    bool aligned = is_aligned<V>(row, span);
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
        float values[V];
        unpack_to<E, V>(values, load_columns<Reuse::ONCE, V>(row, span.first + i * span.step, span, aligned));
        held[i] = packed<float>(values);
    }
}

// As load_row, of elements of any dtype that T holds exactly.
template <Reuse REUSE, class T, int SLOTS, bool WHOLE>
GPTKERN_DEVICE void load_row_of(Packed<T> (&held)[SLOTS], const void* tensor, int64_t offset, int dtype,
                                const Span<WHOLE>& span) {
    if constexpr (sizeof(T) == 4) {
        if (dtype == FLOAT16) return load_row_widened(held, static_cast<const float16*>(tensor) + offset, span);
        if (dtype == BFLOAT16) return load_row_widened(held, static_cast<const bfloat16*>(tensor) + offset, span);
    }
    load_row<REUSE, T>(held, static_cast<const T*>(tensor) + offset, span);
}

// Columns [column, column + V) of a (width,) parameter of T or float32, widened; all `absent` where there is none.
template <class T, int V, bool WHOLE>
GPTKERN_DEVICE void load_parameter(float (&values)[V], const void* parameter, int dtype, float absent, int column,
                                   const Span<WHOLE>& span) {
    if (!parameter) {
#pragma unroll
        for (int e = 0; e < V; ++e) values[e] = absent;
    } else if (sizeof(T) == 4 || dtype == FLOAT32) {
        auto* row = static_cast<const float*>(parameter);
        bool aligned = is_aligned<V>(row, span);
        constexpr int FLOATS = VECTOR<float>;
#pragma unroll
        for (int part = 0; part < V; part += FLOATS) {
            auto four = load_columns<Reuse::AGAIN, FLOATS>(row, column + part, span, aligned);
#pragma unroll
            for (int e = 0; e < FLOATS; ++e) values[part + e] = __int_as_float(int(four[e]));
        }
    } else {
        auto* row = static_cast<const T*>(parameter);
        unpack_to<T, V>(values, load_columns<Reuse::AGAIN, V>(row, column, span, is_aligned<V>(row, span)));
    }
}

// Replaces each of N values by its sum over the thread's group of `lanes` threads, in a fixed order. Groups of several
// warps: all threads of the block call it, and `scratch` may be used again after another barrier.
template <int N>
GPTKERN_DEVICE void group_sums(float (&values)[N], int lanes, float (*scratch)[MOST_WARPS]) {
#pragma unroll
    for (int n = 0; n < N; ++n) values[n] = warp_sum(values[n], lanes);
    if (lanes <= WARP) return;
    int warps = lanes / WARP, first = int(threadIdx.x) / lanes * warps;
#pragma unroll
    for (int n = 0; n < N; ++n)
        if (lane_of_thread() == 0) store_shared(&scratch[n][warp_of_thread()], values[n]);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n)
        values[n] = warp_sum(lane_of_thread() < warps ? load_shared(&scratch[n][first + lane_of_thread()]) : 0.0f);
}

// --- For launchers ---------------------------------------------------------------------------------------------------

inline size_t bytes_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

// Whether a tensor's rows, `stride` elements apart, are made of whole vectors that are aligned to their bytes: 16, or 8
// where 16-bit elements are widened. No tensor has no vectors.
inline bool is_whole(const Tensor& tensor, int64_t stride, int vector) {
    size_t bytes = std::min(bytes_of(tensor.dtype) * size_t(vector), size_t(16));
    return tensor.address % bytes == 0 && stride % vector == 0;
}

inline int round_up(int n, int multiple) { return ceil_div(n, multiple) * multiple; }

inline int next_power_of_2(int n) {
    int power = 1;
    while (power < n) power *= 2;
    return power;
}

// A group of up to 32 threads is a power of two, so that it is a part of a warp.
inline int lanes_of(int vectors, int slots) {
    int lanes = ceil_div(vectors, slots);
    return lanes <= WARP ? next_power_of_2(lanes) : round_up(lanes, WARP);
}

// Calls `with` with std::true_type where rows are WHOLE, else std::false_type; and how many vectors a row has, wherever
// it begins.
template <class T, class Function>
void by_alignment(bool whole, int width, Function with) {
    if (whole)
        with(std::true_type{}, width / VECTOR<T>);
    else
        with(std::false_type{}, ceil_div(width + VECTOR<T> - 1, VECTOR<T>));
}

}  // namespace gptkern
