// A kernel that is over when somebody outside of it writes to memory: tests/test_cuda_launch.py.
#include "binding.h"
#include "device/launch.cuh"
#include "device/memory.cuh"

namespace gptkern::testing {

// Says in memory[0] that it runs, looks for memory[1] at most `looks` times, and says in memory[2] whether it came.
__global__ void waiting_kernel(int* memory, int looks) {
    if (threadIdx.x != 0) return;
    store_global(memory, 1);
    while (looks-- > 0)
        if (load_global(memory + 1) != 0) {
            store_global(memory + 2, 1);
            return;
        }
}

Unreadable wait(Address memory, int looks) {
    GPTKERN_LAUNCH((waiting_kernel), (LaunchShape{.threads = WARP}), nullptr, at<int>(memory), looks);
    return nullptr;
}

}  // namespace gptkern::testing

#ifdef GPTKERN_EMULATED
#include "emulator/bindings.h"

PYBIND11_MODULE(test_waiting, module) {
    gptkern::emulator::bind(module);
    gptkern::bind_launcher(module, "wait", &gptkern::testing::wait);
}
#endif
