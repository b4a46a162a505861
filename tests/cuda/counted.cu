// Kernels whose bytes, sectors, bank conflicts and instructions are known by hand: tests/test_emulator_counts.py.
#include "device/launch.cuh"
#include "device/ptx.cuh"
#include "device/warp.cuh"
#include "launcher.h"

namespace gptkern::testing {

template <int BYTES>
using Piece = Vector<unsigned char, BYTES>;

// The lanes of `mask` load BYTES bytes from offset + lane · stride, and store them side by side.
template <int BYTES>
__global__ void global_kernel(const unsigned char* in, unsigned char* out, int stride, int offset, uint32_t mask) {
    int lane = lane_of_thread();
    if (mask >> lane & 1) {
        auto piece = load_global(reinterpret_cast<const Piece<BYTES>*>(in + offset + lane * stride));
        store_global(reinterpret_cast<Piece<BYTES>*>(out + lane * BYTES), piece);
    }
}

struct Memory {
    alignas(128) unsigned char bytes[48 * 1024];
};

// The same in shared memory: a store and a load.
template <int BYTES>
__global__ void shared_kernel(int stride, uint32_t mask) {
    auto& shared = shared_memory<Memory>();
    int lane = lane_of_thread();
    if (!(mask >> lane & 1)) return;
    auto* there = reinterpret_cast<Piece<BYTES>*>(shared.bytes + lane * stride);
    if (stride >= BYTES) store_shared(there, Piece<BYTES>{});
    load_shared(there);
}

// Rows of 16 bytes, `stride` apart.
__global__ void matrix_kernel(int stride) {
    auto& shared = shared_memory<Memory>();
    uint32_t r[4];
    ldmatrix_x4(r, shared.bytes + lane_of_thread() * stride);
}

__global__ void async_kernel(const unsigned char* in, int stride, uint32_t in_range) {
    auto& shared = shared_memory<Memory>();
    int lane = lane_of_thread();
    cp_async<16>(shared.bytes + lane * stride, in + lane * 16, in_range >> lane & 1);
    cp_async_commit();
    cp_async_wait<0>();
}

__global__ void instructions_kernel(float* out, int products, int barriers, int shuffles) {
    float d[4] = {};
    int32_t d8[4] = {};
    uint32_t a[4] = {}, b[2] = {};
    for (int i = 0; i < products; ++i) mma_m16n8k16<float16>(d, a, b);
    for (int i = 0; i < products + 1; ++i) mma_m16n8k32_s8(d8, a, b);
    for (int i = 0; i < barriers; ++i) __syncthreads();
    float value = d[0];
    for (int i = 0; i < shuffles; ++i) value = shuffle_xor(value, 1);
    atomic_add(out, value);
}

template <class Launch>
void with_bytes(int bytes, Launch launch) {
    if (bytes == 1) launch.template operator()<1>();
    if (bytes == 2) launch.template operator()<2>();
    if (bytes == 4) launch.template operator()<4>();
    if (bytes == 8) launch.template operator()<8>();
    if (bytes == 16) launch.template operator()<16>();
}

void global(Address in, Address out, int bytes, int stride, int offset, uint32_t mask) {
    with_bytes(bytes, [&]<int BYTES>() {
        GPTKERN_LAUNCH((global_kernel<BYTES>), (LaunchShape{.threads = WARP}), nullptr, at<unsigned char>(in),
                       at<unsigned char>(out), stride, offset, mask);
    });
}

void shared(int bytes, int stride, uint32_t mask) {
    LaunchShape shape{.threads = WARP, .shared_bytes = sizeof(Memory)};
    with_bytes(bytes, [&]<int BYTES>() { GPTKERN_LAUNCH((shared_kernel<BYTES>), shape, nullptr, stride, mask); });
}

void matrix(int stride) {
    LaunchShape shape{.threads = WARP, .shared_bytes = sizeof(Memory)};
    GPTKERN_LAUNCH((matrix_kernel), shape, nullptr, stride);
}

void async(Address in, int stride, uint32_t in_range) {
    LaunchShape shape{.threads = WARP, .shared_bytes = sizeof(Memory)};
    GPTKERN_LAUNCH((async_kernel), shape, nullptr, at<unsigned char>(in), stride, in_range);
}

void instructions(Address out, int blocks, int threads, int products, int barriers, int shuffles) {
    LaunchShape shape{.grid_x = blocks, .threads = unsigned(threads)};
    GPTKERN_LAUNCH((instructions_kernel), shape, nullptr, at<float>(out), products, barriers, shuffles);
}

}  // namespace gptkern::testing

#ifdef GPTKERN_EMULATED
#include "emulator/bindings.h"

PYBIND11_MODULE(test_counted, module) {
    using namespace gptkern::testing;
    gptkern::emulator::bind(module);
    module.def("global_", &global);
    module.def("shared", &shared);
    module.def("matrix", &matrix);
    module.def("async_", &async);
    module.def("instructions", &instructions);
}
#endif
