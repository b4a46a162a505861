// quantize_int8: one float32 scale and int8 values for each row.
//
//     scale = max|x| / 127        q = clamp(round(x / scale), -127, 127), halves to even
//
// Along the last dimension: device/quantize.cuh. Along another dimension neighbouring lanes take neighbouring columns,
// and read them twice, the second time from the caches while a block's columns fit there.
#include "device/quantize.cuh"
#include "quantize_int8/launchers.h"

namespace gptkern {
namespace {

// --- Along another dimension ----------------------------------------------------------------------------------------

constexpr int COLUMN_WARPS = 8;

struct ColumnLayout {
    int largest[COLUMN_WARPS][WARP];
};

template <class T>
__global__ void __launch_bounds__(COLUMN_WARPS* WARP)
    quantize_columns_kernel(const T* x,     // (outer, width, inner), any strides
                            int8_t* q,      // (outer, width, inner), contiguous
                            float* scales,  // (outer, inner)
                            int width, int64_t inner, int64_t outer_stride, int64_t width_stride,
                            int64_t inner_stride) {
    ColumnLayout& shared = shared_memory<ColumnLayout>();
    int lane = lane_of_thread(), warp = warp_of_thread();
    int64_t blocks_a_slice = ceil_div<int64_t>(inner, WARP);
    int64_t outer = blockIdx.x / blocks_a_slice, column = blockIdx.x % blocks_a_slice * WARP + lane;
    bool inside = column < inner;
    const T* x_column = x + outer * outer_stride + (inside ? column : 0) * inner_stride;
    int mine = inside ? width : 0;

    int largest = 0;
#pragma unroll 4
    for (int i = warp; i < mine; i += COLUMN_WARPS)
        largest = max(largest, magnitude_bits(to_float(load_global(x_column + i * width_stride))));
    store_shared(&shared.largest[warp][lane], largest);
    __syncthreads();
    for (int other = 0; other < COLUMN_WARPS; ++other)
        largest = max(largest, load_shared(&shared.largest[other][lane]));

    float scale = scale_of(largest), inverse = inverse_of(scale);
    if (inside && warp == 0) store_global(scales + outer * inner + column, scale);
    int8_t* q_column = q + outer * width * inner + column;
#pragma unroll 4
    for (int i = warp; i < mine; i += COLUMN_WARPS) {
        float value = to_float(load_global(x_column + i * width_stride));
        store_global(q_column + i * inner, int8_t(quantized(value, scale, inverse)));
    }
}

template <class T>
void quantize_columns(Address x, Address q, Address scale, int64_t outer, int64_t width, int64_t inner,
                      int64_t outer_stride, int64_t width_stride, int64_t inner_stride, void* stream) {
    LaunchShape shape{.grid_x = outer * ceil_div<int64_t>(inner, WARP),
                      .threads = COLUMN_WARPS * WARP,
                      .shared_bytes = sizeof(ColumnLayout)};
    GPTKERN_LAUNCH((quantize_columns_kernel<T>), shape, stream, at<T>(x), at<int8_t>(q), at<float>(scale), int(width),
                   inner, outer_stride, width_stride, inner_stride);
}

}  // namespace

// --- Launcher -------------------------------------------------------------------------------------------------------

Unreadable quantize_int8(const Tensor& x, const Tensor& q, const Tensor& scale, int dim, Address stream) {
    if (q.elements() == 0) return nullptr;
    auto outer_stride = merged_stride(x, 0, dim), inner_stride = merged_stride(x, dim + 1, x.rank);
    if (!outer_stride || !inner_stride) return &x;
    int64_t outer = 1, inner = 1, width = x.shape[dim];
    for (int d = 0; d < dim; ++d) outer *= x.shape[d];
    for (int d = dim + 1; d < x.rank; ++d) inner *= x.shape[d];
    if (dim == x.rank - 1) {
        quantize_rows_of(x.dtype, x.address, q.address, scale.address, outer, width, *outer_stride, x.strides[dim],
                         width, at<void>(stream));
        return nullptr;
    }
    auto* launch = x.dtype == FLOAT32   ? &quantize_columns<float>
                   : x.dtype == FLOAT16 ? &quantize_columns<float16>
                                        : &quantize_columns<bfloat16>;
    launch(x.address, q.address, scale.address, outer, width, inner, *outer_stride, x.strides[dim], *inner_stride,
           at<void>(stream));
    return nullptr;
}

}  // namespace gptkern
