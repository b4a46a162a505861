// Starting a kernel, on the host. A launch that fails is an exception with the kernel's name and its configuration.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "platform.cuh"

namespace gptkern {

// The numbers of a grid are counted in 64 bits, so that one beyond CUDA's limits is seen and not cut off.
struct LaunchShape {
    int64_t grid_x = 1, grid_y = 1, grid_z = 1;
    unsigned threads = 1;  // a block's, in one dimension
    size_t shared_bytes = 0;
};

// (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")
inline constexpr int64_t MOST_GRID_X = 0x7fffffff, MOST_GRID_YZ = 65535;

namespace detail {

// A kernel's name with its template arguments, "attention_kernel<float16, 64>": for reports alone.
template <auto KERNEL>
const char* kernel_name() {
    static const std::string name = [](std::string function) {
        // g++ says "… [with auto KERNEL = gptkern::attention_kernel<…>]", clang++ "… [KERNEL = &gptkern::…]".
        const std::string before = "KERNEL = ";
        size_t first = function.find(before) + before.size();
        std::string found = function.substr(first, function.rfind(']') - first);
        if (found[0] == '&') found.erase(0, 1);
        // What g++, clang++ and nvcc say of where it stands; nvcc's "_GLOBAL__N__" goes on with a hash and the file.
        for (const std::string scope : {"gptkern::", "{anonymous}::", "(anonymous namespace)::", "_GLOBAL__N__"})
            for (size_t at; (at = found.find(scope)) != std::string::npos;)
                found.erase(at, scope.back() == ':' ? scope.size() : found.find("::", at) + 2 - at);
        return found;
    }(__PRETTY_FUNCTION__);
    return name.c_str();
}

inline std::string describe(const char* kernel, const LaunchShape& shape) {
    char text[256];
    std::snprintf(text, sizeof text, "%s, grid (%lld, %lld, %lld), %u threads, %zu bytes of shared memory", kernel,
                  static_cast<long long>(shape.grid_x), static_cast<long long>(shape.grid_y),
                  static_cast<long long>(shape.grid_z), shape.threads, shape.shared_bytes);
    return text;
}

inline void check_limits(const char* kernel, const LaunchShape& shape) {
    constexpr unsigned MOST_THREADS = 1024;
    if (shape.threads == 0 || shape.threads > MOST_THREADS || shape.grid_x > MOST_GRID_X ||
        std::max(shape.grid_y, shape.grid_z) > MOST_GRID_YZ ||
        std::min({shape.grid_x, shape.grid_y, shape.grid_z}) < 0)
        throw std::runtime_error("gptkern: a launch failed: invalid configuration (" + describe(kernel, shape) +
                                 "); a grid is at most (2147483647, 65535, 65535) and a block 1024 threads");
}

#ifndef GPTKERN_EMULATED

inline void check(cudaError_t error, const char* what, const char* kernel, const LaunchShape& shape) {
    if (error == cudaSuccess) return;
    // An error of a launch is sticky no longer than this: the next launch has its own.
    (void)cudaGetLastError();
    throw std::runtime_error("gptkern: " + std::string(what) + " failed: " + cudaGetErrorString(error) + " (" +
                             describe(kernel, shape) + ")");
}

// More than 48 KB of shared memory has to be asked for, once for a kernel and a device.
template <auto KERNEL>
void allow_shared_memory(const char* name, const LaunchShape& shape) {
    constexpr size_t WITHOUT_ASKING = 48 * 1024;
    if (shape.shared_bytes <= WITHOUT_ASKING) return;
    // Bytes allowed so far, by device.
    static std::atomic<size_t> allowed[64];
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice", name, shape);
    std::atomic<size_t>* entry = device < 64 ? &allowed[device] : nullptr;
    if (entry && entry->load(std::memory_order_relaxed) >= shape.shared_bytes) return;
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(KERNEL), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shape.shared_bytes)),
          "cudaFuncSetAttribute", name, shape);
    if (entry) entry->store(shape.shared_bytes, std::memory_order_relaxed);
}

#endif

template <auto KERNEL>
struct Launcher;

template <class... Parameters, void (*KERNEL)(Parameters...)>
struct Launcher<KERNEL> {
    static void launch(const LaunchShape& shape, void* stream, Parameters... arguments) {
        check_limits(kernel_name<KERNEL>(), shape);
        if (shape.grid_x == 0 || shape.grid_y == 0 || shape.grid_z == 0) return;
        const unsigned grid[3] = {unsigned(shape.grid_x), unsigned(shape.grid_y), unsigned(shape.grid_z)};
#ifdef GPTKERN_EMULATED
        (void)stream;
        auto call = [&] { KERNEL(arguments...); };
        emulator::launch(kernel_name<KERNEL>(), {grid[0], grid[1], grid[2]}, shape.threads,
                         shape.shared_bytes, [](void* context) { (*static_cast<decltype(call)*>(context))(); }, &call);
#else
        allow_shared_memory<KERNEL>(kernel_name<KERNEL>(), shape);
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
        check(cudaLaunchKernel(reinterpret_cast<const void*>(KERNEL), dim3(grid[0], grid[1], grid[2]),
                               dim3(shape.threads), pointers, shape.shared_bytes, static_cast<cudaStream_t>(stream)),
              "a launch", kernel_name<KERNEL>(), shape);
#endif
    }
};

}  // namespace detail
}  // namespace gptkern

// GPTKERN_LAUNCH((kernel<T, 64>), shape, stream, arguments…): the arguments convert to the kernel's parameters.
#define GPTKERN_PLAIN(...) __VA_ARGS__
#define GPTKERN_LAUNCH(KERNEL, SHAPE, STREAM, ...) \
    ::gptkern::detail::Launcher<GPTKERN_PLAIN KERNEL>::launch(SHAPE, STREAM, __VA_ARGS__)
