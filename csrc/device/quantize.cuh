// Rows to int8, each with one float32 scale: for quantize_int8, and for the inputs of int8_linear's w8a8.
//
//     scale = max|x| / 127        q = clamp(round(x / scale), -127, 127), halves to even
//
// A row goes to shared memory by asynchronous copies, each chunk of 16 bytes read by the thread that has copied it:
// shared memory as registers that a row of any width may index. Memory is read once, up to ROW_BYTES_HELD bytes a row;
// what is beyond is read again.
//
// For n elements of b bytes in r rows: (b + 1) n + 4 r bytes moved, the least possible; at 4.8 TB/s, 132
// multiprocessors and 1.755 GHz a multiprocessor has 18 instructions of a thread for each element of 2 bytes (H200,
// datasheet). An IEEE division would take most of them: x is multiplied by 1 / scale, and divided only near halves,
// where that could differ.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "launcher.h"
#include "linear.cuh"

namespace gptkern {

// Each file that launches the kernel has one of its own.
namespace {

constexpr int LARGEST = 127;
// Below it float32 has too few digits for x / scale to stay within ±127.
constexpr float SMALLEST_SCALE = 0x1p-126f;
constexpr int INFINITY_BITS = 0x7f800000;

// Of |x|, as an integer: the order is the same, and a NaN is the largest of all.
GPTKERN_DEVICE int magnitude_bits(float x) { return __float_as_int(x) & 0x7fffffff; }

GPTKERN_DEVICE float scale_of(int largest_bits) {
    float largest = __int_as_float(largest_bits);
    if (largest_bits == 0) return 1.0f;
    if (largest_bits > INFINITY_BITS) return largest;
    // scale = max|x| / 127
    return fmaxf(divide_rn(largest, float(LARGEST)), SMALLEST_SCALE);
}

// q = clamp(round(x / scale), -127, 127), and `inverse` is 1 / scale
GPTKERN_DEVICE int quantized(float x, float scale, float inverse) {
    // Two roundings off the quotient, 127 * 2^-23 at most. Farther than that from a half both round to one integer.
    constexpr float NEAR_HALF = 0.4999f;
    // A NaN becomes 127.
    float quotient = fmaxf(fminf(x * inverse, float(LARGEST)), -float(LARGEST));
    int q = round_to_int(quotient);
    if (fabsf(quotient - float(q)) > NEAR_HALF) q = round_to_int(divide_rn(x, scale));
    return q;
}

// The quotients of a row whose scale is NaN or infinite are NaN, or 0; its inverse may not be taken.
GPTKERN_DEVICE float inverse_of(float scale) { return divide_rn(1.0f, scale); }

GPTKERN_DEVICE int warp_max_int(int value) {
#pragma unroll
    for (int mask = WARP / 2; mask > 0; mask /= 2) value = max(value, shuffle_xor(value, mask));
    return value;
}

// --- The kernel -----------------------------------------------------------------------------------------------------

constexpr int ROW_WARPS = 8, ROW_THREADS = ROW_WARPS * WARP;
constexpr int ROW_BYTES_HELD = 96 * 1024;
// A lane's chunks, of which that many copies are under way at a time, before a row gets more warps.
constexpr int CHUNKS_A_LANE = 4;

struct RowLayout {
    int largest[ROW_WARPS];
    alignas(CHUNK_BYTES) unsigned char chunks[CHUNK_BYTES];  // and more: held * ROW_WARPS / warps_a_row of them
};
static_assert(offsetof(RowLayout, chunks) + ROW_BYTES_HELD <= SHARED_BYTES_EVERYWHERE);

// A chunk's values as float32.
template <class T>
GPTKERN_DEVICE void chunk_to_floats(const Vector<T, VECTOR<T>>& chunk, float (&x)[VECTOR<T>]) {
#pragma unroll
    for (int i = 0; i < VECTOR<T>; ++i) x[i] = to_float(chunk[i]);
}

template <class T>
__global__ void __launch_bounds__(ROW_THREADS)
    quantize_rows_kernel(Operand<T> x,   // (rows, width)
                         int8_t* q,      // (rows, q_pitch); zeros from width on
                         float* scales,  // (rows,)
                         int rows, int width, int q_pitch,
                         int warps_a_row,  // 1, 2, 4 or 8
                         int held          // chunks of a row in shared memory
    ) {
    constexpr int ELEMENTS = VECTOR<T>;
    RowLayout& shared = shared_memory<RowLayout>();
    int lane = lane_of_thread() + warp_of_thread() % warps_a_row * WARP, lanes = warps_a_row * WARP;
    int in_block = warp_of_thread() / warps_a_row, rows_a_block = ROW_WARPS / warps_a_row;
    int64_t row = int64_t(blockIdx.x) * rows_a_block + in_block;
    bool inside = row < rows;
    const T* x_row = x.data + (inside ? row : 0) * x.row_stride;
    unsigned char* chunks = shared.chunks + in_block * held * CHUNK_BYTES;
    // A chunk beyond the width is all zeros.
    int count = inside ? ceil_div(q_pitch, ELEMENTS) : 0;
    int in_shared = min(count, held);

    for (int chunk = lane; chunk < in_shared; chunk += lanes)
        copy_chunk(chunks + chunk * CHUNK_BYTES, x_row + int64_t(chunk) * ELEMENTS * x.element_stride,
                   width - chunk * ELEMENTS, x.element_stride, x.copy);
    cp_async_commit();

    auto again = [&](int chunk, float(&values)[ELEMENTS]) {
        Vector<T, ELEMENTS> loaded;
        if (chunk < held) {
            loaded = load_shared(reinterpret_cast<const Vector<T, ELEMENTS>*>(chunks + chunk * CHUNK_BYTES));
        } else {
            const T* source = x_row + int64_t(chunk) * ELEMENTS * x.element_stride;
            int left = width - chunk * ELEMENTS;
            if (x.copy == BY_CHUNK && left > 0) {
                loaded = load_global(reinterpret_cast<const Vector<T, ELEMENTS>*>(source));
            } else {
                loaded = gather_chunk(source, left, x.element_stride);
            }
        }
        chunk_to_floats<T>(loaded, values);
    };

    int largest = 0;
    auto look_at = [&](int chunk) {
        float values[ELEMENTS];
        again(chunk, values);
#pragma unroll
        for (int i = 0; i < ELEMENTS; ++i) largest = max(largest, magnitude_bits(values[i]));
    };
    // What is not held is under way at the same time as what is.
    int first_beyond = lane + ceil_div(max(held - lane, 0), lanes) * lanes;
    for (int chunk = first_beyond; chunk < count; chunk += lanes) look_at(chunk);
    cp_async_wait<0>();
    for (int chunk = lane; chunk < in_shared; chunk += lanes) look_at(chunk);

    largest = warp_max_int(largest);
    if (warps_a_row > 1) {
        if (lane_of_thread() == 0) store_shared(shared.largest + warp_of_thread(), largest);
        __syncthreads();
        for (int warp = 0; warp < warps_a_row; ++warp)
            largest = max(largest, load_shared(shared.largest + in_block * warps_a_row + warp));
    }
    float scale = scale_of(largest), inverse = inverse_of(scale);
    if (inside && lane == 0) store_global(scales + row, scale);

    int8_t* q_row = q + row * q_pitch;
    bool whole = q_pitch % ELEMENTS == 0;
    for (int chunk = lane; chunk < count; chunk += lanes) {
        float values[ELEMENTS];
        again(chunk, values);
        Vector<int8_t, ELEMENTS> result;
#pragma unroll
        for (int i = 0; i < ELEMENTS; ++i) result[i] = int8_t(quantized(values[i], scale, inverse));
        if (whole) {
            store_global(reinterpret_cast<Vector<int8_t, ELEMENTS>*>(q_row + chunk * ELEMENTS), result);
        } else {
#pragma unroll
            for (int i = 0; i < ELEMENTS; ++i)
                if (chunk * ELEMENTS + i < q_pitch) store_global(q_row + chunk * ELEMENTS + i, result[i]);
        }
    }
}

template <class T>
void quantize_rows(Address x, Address q, Address scale, int64_t rows, int64_t width, int64_t x_row_stride,
                   int64_t x_element_stride, int64_t q_pitch, void* stream) {
    int64_t chunks = ceil_div<int64_t>(q_pitch, VECTOR<T>);
    int warps_a_row = 1;
    while (warps_a_row < ROW_WARPS && chunks > int64_t(warps_a_row) * WARP * CHUNKS_A_LANE) warps_a_row *= 2;
    int rows_a_block = ROW_WARPS / warps_a_row;
    int64_t held = chunks * CHUNK_BYTES * rows_a_block <= ROW_BYTES_HELD ? chunks : ROW_BYTES_HELD / CHUNK_BYTES;
    LaunchShape shape{.grid_x = ceil_div<int64_t>(rows, rows_a_block),
                      .threads = ROW_THREADS,
                      .shared_bytes = offsetof(RowLayout, chunks) +
                                      size_t(std::max<int64_t>(held * rows_a_block, 1) * CHUNK_BYTES)};
    GPTKERN_LAUNCH((quantize_rows_kernel<T>), shape, stream,
                   operand<T>(x, width, x_row_stride, x_element_stride), at<int8_t>(q), at<float>(scale), int(rows),
                   int(width), int(q_pitch), warps_a_row, int(held));
}

// q (rows, q_pitch) int8 and scale (rows,) of x (rows, width) of `dtype`, any strides; q is 0 from width on.
inline void quantize_rows_of(int dtype, Address x, Address q, Address scale, int64_t rows, int64_t width,
                             int64_t x_row_stride, int64_t x_element_stride, int64_t q_pitch, void* stream) {
    auto* launch = dtype == FLOAT32   ? &quantize_rows<float>
                   : dtype == FLOAT16 ? &quantize_rows<float16>
                                      : &quantize_rows<bfloat16>;
    launch(x, q, scale, rows, width, x_row_stride, x_element_stride, q_pitch, stream);
}

}  // namespace
}  // namespace gptkern
