// Kernels with faults that the sanitizers report: tests/test_cuda_sanitized.py. `broken` 0 is sound.
#include "device/launch.cuh"
#include "device/ptx.cuh"
#include "device/warp.cuh"
#include "launcher.h"

namespace gptkern::testing {

struct Values {
    alignas(16) float values[64];
};

// 1: loads one element past the end of `in`; 2: stores one past `out`; 3: the sum of two int32 overflows; 4: a float is
// read at an address that is no multiple of 4, past the helpers; 5: a copy starts past the end of `in`; 6: a shift by
// more bits than the type has; 7: a local array's index is beyond it.
__global__ void faulty_kernel(
    const float* in,  // (count,)
    float* out,       // (count,)
    int count, int broken) {
    auto& shared = shared_memory<Values>();
    int thread = int(threadIdx.x);
    int last = count - 1;
    for (int i = thread; i < count; i += int(blockDim.x)) {
        float value = load_global(in + i + (broken == 1 && i == last));
        int large = i + (broken == 3 ? 2147483647 : 0);
        if (broken == 4) value += *reinterpret_cast<const float*>(reinterpret_cast<const char*>(in) + 1);
        if (broken == 6) large = 1 << (large + 40);
        float local[4] = {value, value, value, value};
        value = local[broken == 7 ? i % 4 + 4 : i % 4];
        store_global(out + i + (broken == 2 && i == last), large < 0 ? 0.0f : value);
    }
    int first = broken == 5 ? count : 0;
    cp_async<4>(shared.values + thread, in + first + thread % (broken == 5 ? 1 : count));
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    warp_sum(load_shared(shared.values + thread));
}

void faulty(Address in, Address out, int count, int broken) {
    LaunchShape shape{.threads = 64, .shared_bytes = sizeof(Values)};
    GPTKERN_LAUNCH((faulty_kernel), shape, nullptr, at<float>(in), at<float>(out), count, broken);
}

// 1: threads fail, with most of the others' stacks in use.
__global__ void failing_kernel(int broken) {
    if (broken == 1 && threadIdx.x == 40) shuffle_xor(1.0f, 1);
    __syncthreads();
}

void failing(int broken) {
    GPTKERN_LAUNCH((failing_kernel), (LaunchShape{.threads = 64}), nullptr, broken);
}

}  // namespace gptkern::testing

#ifdef GPTKERN_EMULATED
#include "emulator/bindings.h"

PYBIND11_MODULE(test_sanitized, module) {
    using namespace gptkern::testing;
    gptkern::emulator::bind(module);
    module.def("faulty", &faulty);
    module.def("failing", &failing);
}
#endif
