// Kernels of which it is known what nvcc makes of them: tests/test_cuda_resources.py.
#include "device/memory.cuh"
#include "device/ptx.cuh"

namespace gptkern::testing {

// More values live at a time than the registers that it may have.
__global__ void __launch_bounds__(1024) spilling_kernel(const float* in, float* out) {
    float values[128];
#pragma unroll
    for (int i = 0; i < 128; ++i) values[i] = load_global_written(in + i * 1024 + threadIdx.x);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 128; ++i) store_global(out + i * 1024 + threadIdx.x, values[i] * values[127 - i]);
}

// An array whose index is not known when it is compiled lives on the stack.
template <int N>
__global__ void indexing_kernel(const float* in, float* out, int count) {
    float values[N] = {};
    for (int i = 0; i < count; ++i) values[__float_as_int(load_global(in + i)) % N] += 1.0f;
    for (int i = 0; i < count; ++i) store_global(out + i, values[__float_as_int(load_global(in + i)) % N]);
}

template <int N>
__global__ void copy_kernel(const Vector<float, N>* in, Vector<float, N>* out) {
    store_global(out + threadIdx.x, load_global(in + threadIdx.x));
}

template <class T, bool TRANSPOSED>
__global__ void product_kernel(const T* in, float* out) {
    struct alignas(16) Rows {
        T values[32 * 8];
    };
    auto& rows = shared_memory<Rows>();
    cp_async<16>(rows.values + threadIdx.x * 8, in + threadIdx.x * 8);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    uint32_t a[4];
    if constexpr (TRANSPOSED)
        ldmatrix_x4_transposed(a, rows.values + threadIdx.x * 8);
    else
        ldmatrix_x4(a, rows.values + threadIdx.x * 8);
    float d[4] = {};
    mma_m16n8k16<T>(d, a, {a[0], a[1]});
    for (int i = 0; i < 4; ++i) store_global(out + 4 * threadIdx.x + i, d[i]);
}

__global__ void int8_kernel(const uint32_t* in, int32_t* out) {
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; ++i) a[i] = load_global(in + 4 * threadIdx.x + i);
    for (int i = 0; i < 2; ++i) b[i] = load_global(in + 128 + 2 * threadIdx.x + i);
    int32_t d[4] = {};
    mma_m16n8k32_s8(d, a, b);
    for (int i = 0; i < 4; ++i) store_global(out + 4 * threadIdx.x + i, d[i]);
}

template __global__ void indexing_kernel<8>(const float*, float*, int);
template __global__ void copy_kernel<1>(const Vector<float, 1>*, Vector<float, 1>*);
template __global__ void copy_kernel<4>(const Vector<float, 4>*, Vector<float, 4>*);
template __global__ void product_kernel<float16, true>(const float16*, float*);
template __global__ void product_kernel<bfloat16, false>(const bfloat16*, float*);

}  // namespace gptkern::testing
