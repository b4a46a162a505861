// What the matrix products with int8 weights share: copies of operands of any strides, and the epilogue.
//
//   z = total * row_scale * column_scale + bias        y = act(z)
#pragma once

#include "activation.cuh"
#include "ptx.cuh"
#include "warp.cuh"

namespace gptkern {

// --- Copies of operands ---------------------------------------------------------------------------------------------

inline constexpr int CHUNK_BYTES = 16;

// How an operand's chunks of 16 bytes come to shared memory. Chosen at launch, the same for all of the kernel.
enum Copy : int {
    BY_ELEMENT = 0,  // any strides, any width
    BY_4_BYTES = 4,  // elements side by side; address, row stride and width are multiples of 4 bytes
    BY_CHUNK = 16,   // the same of 16 bytes: cp.async of a whole chunk
};

// An operand of two dimensions, as its owner strides it.
template <class T>
struct Operand {
    const T* data;  // (rows, width)
    int64_t row_stride;
    int64_t element_stride;
    Copy copy;
};

template <class T>
Operand<T> operand(uintptr_t address, int64_t width, int64_t row_stride, int64_t element_stride) {
    Copy copy = BY_ELEMENT;
    if (element_stride == 1) {
        uintptr_t together = address | uintptr_t(width | row_stride) * sizeof(T);
        copy = together % BY_CHUNK == 0 ? BY_CHUNK : together % BY_4_BYTES == 0 ? BY_4_BYTES : BY_ELEMENT;
    }
    return {reinterpret_cast<const T*>(address), row_stride, element_stride, copy};
}

// The first `count` elements of a chunk, and zeros after them; count may be 0 or less, and `source` is then not read.
template <class T>
GPTKERN_DEVICE Vector<T, CHUNK_BYTES / sizeof(T)> gather_chunk(const T* source, int count, int64_t stride) {
    Vector<T, CHUNK_BYTES / sizeof(T)> chunk;
#pragma unroll
    for (int i = 0; i < CHUNK_BYTES / int(sizeof(T)); ++i)
        chunk[i] = i < count ? load_global(source + i * stride) : T{};
    return chunk;
}

// The same, to shared memory: it has landed after cp_async_wait, as a copy of the caller's newest group. With BY_CHUNK,
// count is a whole chunk's or not positive.
template <class T>
GPTKERN_DEVICE void copy_chunk(void* shared, const T* source, int count, int64_t stride, Copy copy) {
    if (copy == BY_CHUNK) {
        cp_async<CHUNK_BYTES>(shared, source, count > 0);
    } else if (copy == BY_4_BYTES) {
        constexpr int WORD = BY_4_BYTES / sizeof(T);
#pragma unroll
        for (int i = 0; i < CHUNK_BYTES / BY_4_BYTES; ++i)
            cp_async<BY_4_BYTES>(static_cast<unsigned char*>(shared) + i * BY_4_BYTES, source + i * WORD,
                                 i * WORD < count);
    } else {
        store_shared(static_cast<Vector<T, CHUNK_BYTES / sizeof(T)>*>(shared), gather_chunk(source, count, stride));
    }
}

// Starts the copy of ROWS rows of CHUNKS chunks by THREADS threads, row * CHUNKS + swizzle(row, chunk) being a chunk's
// place. `first` is the tile's first element; what lies beyond `rows` and `width` becomes zero.
template <int ROWS, int CHUNKS, int THREADS, class T, class Swizzle>
GPTKERN_DEVICE void copy_rows(unsigned char* tile, const Operand<T>& from, const T* first, int rows, int width,
                              Swizzle swizzle) {
    constexpr int ELEMENTS = CHUNK_BYTES / sizeof(T), TOTAL = ROWS * CHUNKS;
    static_assert(TOTAL % THREADS == 0);
    auto copy = [&](int index, Copy how) {
        int row = index / CHUNKS, chunk = index % CHUNKS;
        copy_chunk(tile + (row * CHUNKS + swizzle(row, chunk)) * CHUNK_BYTES,
                   first + row * from.row_stride + chunk * ELEMENTS * from.element_stride,
                   row < rows ? width - chunk * ELEMENTS : 0, from.element_stride, how);
    };
    if (from.copy == BY_CHUNK) {
#pragma unroll
        for (int i = 0; i < TOTAL / THREADS; ++i) copy(int(threadIdx.x) + i * THREADS, BY_CHUNK);
    } else {
#pragma unroll 1
        for (int i = 0; i < TOTAL / THREADS; ++i) copy(int(threadIdx.x) + i * THREADS, from.copy);
    }
}

// --- Values of a dtype known at launch ------------------------------------------------------------------------------

enum Type : int { TYPE_FLOAT32 = 0, TYPE_FLOAT16 = 1, TYPE_BFLOAT16 = 2 };  // as Dtype of tensor.h

GPTKERN_DEVICE float load_as_float(const void* values, int64_t index, int type) {
    if (type == TYPE_FLOAT32) return load_global(static_cast<const float*>(values) + index);
    if (type == TYPE_FLOAT16) return to_float(load_global(static_cast<const float16*>(values) + index));
    return to_float(load_global(static_cast<const bfloat16*>(values) + index));
}

GPTKERN_DEVICE void store_from_float(void* values, int64_t index, float value, int type) {
    if (type == TYPE_FLOAT32)
        store_global(static_cast<float*>(values) + index, value);
    else if (type == TYPE_FLOAT16)
        store_global(static_cast<float16*>(values) + index, from_float<float16>(value));
    else
        store_global(static_cast<bfloat16*>(values) + index, from_float<bfloat16>(value));
}

// Four neighbours; the address is aligned to them.
GPTKERN_DEVICE void store_from_floats(void* values, int64_t index, const float (&v)[4], int type) {
    if (type == TYPE_FLOAT32)
        store_global(reinterpret_cast<Vector<float, 4>*>(static_cast<float*>(values) + index),
                     {v[0], v[1], v[2], v[3]});
    else if (type == TYPE_FLOAT16)
        store_global(reinterpret_cast<Vector<uint32_t, 2>*>(static_cast<float16*>(values) + index),
                     {pack<float16>(v[0], v[1]), pack<float16>(v[2], v[3])});
    else
        store_global(reinterpret_cast<Vector<uint32_t, 2>*>(static_cast<bfloat16*>(values) + index),
                     {pack<bfloat16>(v[0], v[1]), pack<bfloat16>(v[2], v[3])});
}

// --- Epilogue -------------------------------------------------------------------------------------------------------

struct Epilogue {
    const float* row_scale;     // (M,), or null: 1
    const float* column_scale;  // (N,), column_scale_stride apart
    const void* bias;           // (N,) of bias_type, bias_stride apart; or null: 0
    void* y;                    // (M, N) of y_type, contiguous
    int64_t column_scale_stride, bias_stride;
    int bias_type, y_type;
    int activation;
};

// What a column of y is scaled by and shifted by.
GPTKERN_DEVICE float2 of_column(const Epilogue& epilogue, int n) {
    float scale = load_global(epilogue.column_scale + n * epilogue.column_scale_stride);
    return {scale, epilogue.bias ? load_as_float(epilogue.bias, n * epilogue.bias_stride, epilogue.bias_type) : 0.0f};
}

GPTKERN_DEVICE float finished(const Epilogue& epilogue, float total, float row_scale, float2 column) {
    // z = total * row_scale * column_scale + bias
    return activated(total * row_scale * column.x + column.y, epilogue.activation);
}

// A tile of sums on its way through shared memory, so that y is written by whole rows and the activation's code stands
// once and not once for each accumulator. Units of 8 columns are swizzled: accumulators are stored two at a time, or
// four, and rows are read, without bank conflicts.
template <int COLUMNS>
GPTKERN_DEVICE int place_of_sum(int row, int column) {
    static_assert(COLUMNS % 32 == 0);
    int swizzle = (row & 1) << 1 | (row >> 1 & 1);
    return row * COLUMNS + ((column / 8) ^ swizzle) * 8 + column % 8;
}

template <int ROWS, int COLUMNS, int THREADS>
GPTKERN_DEVICE void write_tile(const float* sums, const Epilogue& epilogue, int first_row, int first_column, int M,
                               int N) {
    constexpr int QUADS = COLUMNS / 4, STEP = THREADS / QUADS;
    static_assert(THREADS % QUADS == 0 && ROWS % STEP == 0);
    int in_tile = int(threadIdx.x) % QUADS * 4, column = first_column + in_tile;
    if (column >= N) return;
    float2 columns[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) columns[i] = column + i < N ? of_column(epilogue, column + i) : float2{0.0f, 0.0f};
    int rows = min(ROWS, M - first_row);
#pragma unroll 1
    for (int row = int(threadIdx.x) / QUADS; row < rows; row += STEP) {
        auto totals =
            load_shared(reinterpret_cast<const Vector<float, 4>*>(sums + place_of_sum<COLUMNS>(row, in_tile)));
        float row_scale = epilogue.row_scale ? load_global(epilogue.row_scale + first_row + row) : 1.0f;
        float y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) y[i] = finished(epilogue, totals[i], row_scale, columns[i]);
        int64_t index = int64_t(first_row + row) * N + column;
        if (N % 4 == 0) {
            store_from_floats(epilogue.y, index, y, epilogue.y_type);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (column + i < N) store_from_float(epilogue.y, index + i, y[i], epilogue.y_type);
        }
    }
}

// --- Order of the tiles ---------------------------------------------------------------------------------------------

// Rows of tiles that are walked before the next column of tiles: their operands stay in the L2 cache.
inline constexpr int GROUP_M = 8;

struct TileIndex {
    int m, n;
};

// Groups of GROUP_M rows of tiles, walked column by column.
GPTKERN_DEVICE TileIndex tile_of_block(int M, int N, int tile_m, int tile_n) {
    int block = int(blockIdx.x), tiles_m = ceil_div(M, tile_m), in_group = GROUP_M * ceil_div(N, tile_n);
    int first = block / in_group * GROUP_M, within = block % in_group;
    int height = min(tiles_m - first, GROUP_M);
    return {first + within % height, within / height};
}

}  // namespace gptkern
