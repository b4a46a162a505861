// Kernels that are broken on purpose, each in the ways that `broken` numbers; 0 is the sound kernel.
// tests/test_emulator_broken.py says what has to find each.
#include "device/launch.cuh"
#include "device/ptx.cuh"
#include "device/warp.cuh"
#include "launcher.h"

namespace gptkern::testing {

constexpr int THREADS = 128;

struct Square {
    float values[32][33];
};

// 1: no barrier between the stores and the loads.
__global__ void transpose_kernel(
    const float* in,  // (32, 32)
    float* out,       // (32, 32)
    int broken) {
    auto& shared = shared_memory<Square>();
    for (int i = int(threadIdx.x); i < 1024; i += THREADS)
        store_shared(&shared.values[i / 32][i % 32], load_global(in + i));
    if (broken != 1) __syncthreads();
    for (int i = int(threadIdx.x); i < 1024; i += THREADS)
        store_global(out + i, load_shared(&shared.values[i % 32][i / 32]));
}

struct Pipeline {
    alignas(16) float stages[2][THREADS][4];
};

// Thread i sums, over the tiles, what thread i + 37 copied. Two stages: one is read while the other is filled.
// 1: no wait; 2: the wait covers one group too few; 3: no barrier after the wait; 4: the next copy is issued before
// everybody has read the stage that it overwrites; 5: the last copy is never waited for.
__global__ void staged_sum_kernel(
    const float* in,  // (tiles, THREADS, 4)
    float* out,       // (THREADS, 4)
    int tiles, int broken) {
    auto& shared = shared_memory<Pipeline>();
    int thread = int(threadIdx.x);
    auto copy = [&](int tile) {
        cp_async<16>(shared.stages[tile % 2][thread], in + (tile * THREADS + thread) * 4, true);
        cp_async_commit();
    };
    Vector<float, 4> sum{};
    copy(0);
    for (int tile = 0; tile < tiles; ++tile) {
        bool more = tile + 1 < tiles;
        if (more) copy(tile + 1);
        if (broken == 2 || (broken != 1 && more))
            cp_async_wait<1>();
        else if (broken != 1)
            cp_async_wait<0>();
        if (broken == 2 && more) cp_async_wait<2>();
        if (broken != 3) __syncthreads();
        auto there = load_shared(reinterpret_cast<Vector<float, 4>*>(shared.stages[tile % 2][(thread + 37) % THREADS]));
        for (int i = 0; i < 4; ++i) sum[i] += there[i];
        if (broken != 4) __syncthreads();
    }
    if (broken == 5) copy(0);
    if (broken == 1) cp_async_wait<0>();
    if (broken == 2) cp_async_wait<0>();
    store_global(reinterpret_cast<Vector<float, 4>*>(out + 4 * thread), sum);
}

// 1: loads one element too many; 2: stores one too many; 3: loads one before the first; 4: 16 bytes across the end.
__global__ void tail_kernel(const float* in, float* out, int64_t length, int broken) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    float value = 0;
    if (i < length + (broken == 1)) value = load_global(in + i - (broken == 3));
    if (broken == 4 && i == length - 1) value = load_global(reinterpret_cast<const Vector<float, 4>*>(in + i))[0];
    if (i < length + (broken == 2)) store_global(out + i, value);
}

struct alignas(16) Bytes {
    unsigned char values[1024];
};

// A 16-byte access at an address that is a multiple of 4: 1: global load; 2: global store; 3: shared; 4: the copy's
// source; 5: its destination; 6: ldmatrix.
__global__ void misaligned_kernel(const unsigned char* in, unsigned char* out, int broken) {
    auto& shared = shared_memory<Bytes>();
    using V = Vector<float, 4>;
    int at = 16 * int(threadIdx.x);
    auto shifted = [&](int kind) { return at + (broken == kind ? 4 : 0); };
    V value = load_global(reinterpret_cast<const V*>(in + shifted(1)));
    store_shared(reinterpret_cast<V*>(shared.values + shifted(3)), value);
    warp_sync();
    uint32_t r[4];
    ldmatrix_x4(r, shared.values + shifted(6));
    warp_sync();
    cp_async<16>(shared.values + shifted(5), in + shifted(4));
    cp_async_commit();
    cp_async_wait<0>();
    store_global(reinterpret_cast<V*>(out + shifted(2)), load_shared(reinterpret_cast<V*>(shared.values + at)));
}

// 1: half of the threads wait at another barrier; 2: half of them finish without it; 3: one thread goes round it.
__global__ void divergent_kernel(float* out, int broken) {
    int thread = int(threadIdx.x);
    if (broken == 2 && thread >= THREADS / 2) return;
    if (broken == 1 && thread < THREADS / 2)
        __syncthreads();
    else if (broken != 3 || thread != 70)
        __syncthreads();
    store_global(out + thread, 1.0f);
}

// 1: lane 5 does not come to the shuffle; 2: it comes to another one; 3: half of the warp calls it at another place.
__global__ void missing_lane_kernel(const float* in, float* out, int broken) {
    int lane = int(threadIdx.x);
    float value = load_global(in + lane);
    if (broken == 2 && lane == 5)
        value = shuffle(value, 3);
    else if (broken == 3 && lane < 16)
        value = warp_sum(value);
    else if (broken != 1 || lane != 5)
        value = warp_sum(value);
    store_global(out + lane, value);
}

// 1: lane 7's value is not written to shared memory.
__global__ void unwritten_kernel(const float* in, float* out, int broken) {
    auto& shared = shared_memory<Square>();
    int lane = int(threadIdx.x);
    if (broken != 1 || lane != 7) store_shared(&shared.values[0][lane], load_global(in + lane));
    warp_sync();
    store_global(out + lane, load_shared(&shared.values[0][31 - lane]));
}

// 1: the last lane stores beyond the block's shared memory; 2: it loads there; 3: a copy goes there; 4: ldmatrix reads
// there; 5: a load of global memory reads shared memory.
__global__ void beyond_shared_kernel(const float* in, float* out, int broken) {
    auto& shared = shared_memory<Bytes>();
    int lane = int(threadIdx.x);
    auto at = [&](int kind) { return shared.values + 16 * lane + (broken == kind ? sizeof(Bytes) - 16 * 31 : 0); };
    auto value = load_global(reinterpret_cast<const Vector<float, 4>*>(in) + lane);
    store_shared(reinterpret_cast<Vector<float, 4>*>(at(1)), value);
    warp_sync();
    cp_async<16>(at(3) + (broken == 3 ? 0 : 512), in + 4 * lane);
    cp_async_commit();
    cp_async_wait<0>();
    warp_sync();
    uint32_t r[4];
    ldmatrix_x4(r, at(4));
    value = load_shared(reinterpret_cast<Vector<float, 4>*>(at(2)));
    if (broken == 5) value = load_global(reinterpret_cast<const Vector<float, 4>*>(shared.values) + lane);
    store_global(reinterpret_cast<Vector<float, 4>*>(out) + lane, value);
}

// Neighbours in a warp exchange values through shared memory. 1: no warp_sync; 2: a shuffle in its place, which orders
// no memory; 3: none between the loads and the next stores.
__global__ void warp_exchange_kernel(const float* in, float* out, int broken) {
    auto& shared = shared_memory<Square>();
    int lane = int(threadIdx.x);
    float value = load_global(in + lane);
    for (int turn = 0; turn < 2; ++turn) {
        store_shared(&shared.values[0][lane], value);
        if (broken == 2)
            shuffle_xor(value, 1);
        else if (broken != 1)
            warp_sync();
        value = load_shared(&shared.values[0][(lane + 9) % 32]);
        if (broken != 3) warp_sync();
    }
    store_global(out + lane, value);
}

struct Scratch {
    float values[THREADS / WARP];
};

// Two sums of the block. 1: the second uses the scratch of the first while some thread may still read it.
__global__ void block_total_kernel(const float* in, float* out, int broken) {
    auto& scratch = shared_memory<Scratch>();
    int thread = int(threadIdx.x);
    float value = load_global(in + thread);
    float first = block_sum<THREADS / WARP>(value, scratch.values);
    if (broken != 1) __syncthreads();
    float second = block_sum<THREADS / WARP>(value * value, scratch.values);
    store_global(out + 2 * thread, first);
    store_global(out + 2 * thread + 1, second);
}

// 1: load_global of what the thread has stored; 2: blocks store to the same place; 3: a block loads what another stored;
// 4: threads add to one place without an atomic; 5: a thread loads what another of its block stored, with no barrier.
__global__ void global_order_kernel(
    float* out,    // (blocks, THREADS)
    float* total,  // (1,) zero
    int broken) {
    int thread = int(threadIdx.x);
    float* own = out + int64_t(blockIdx.x) * THREADS;
    store_global((broken == 2 ? out : own) + thread, float(thread));
    if (broken == 1)
        load_global(own + thread);
    if (broken == 3) load_global_written(out + (int64_t(blockIdx.x) + 1) % gridDim.x * THREADS + thread);
    if (broken != 5) __syncthreads();
    float other = load_global_written(own + (thread + 1) % THREADS);
    if (broken == 4)
        store_global(total, load_global_written(total) + other);
    else
        atomic_add(total, other);
}

// Two lanes write a half each of the same word, and read their own: sound. 1: a lane reads the other's half.
__global__ void halves_kernel(uint16_t* out, int broken) {
    auto& shared = *reinterpret_cast<uint16_t(*)[32]>(&shared_memory<Bytes>());
    int lane = int(threadIdx.x);
    store_shared(shared + lane, uint16_t(lane));
    store_global(out + lane, load_shared(shared + (broken == 1 ? lane ^ 1 : lane)));
}

__global__ void empty_kernel(float* out) {
    if (threadIdx.x == 0) store_global(out, 1.0f);
}

// --- Launchers --------------------------------------------------------------------------------------------------------

constexpr LaunchShape BLOCK{.threads = THREADS}, LANES{.threads = WARP};

LaunchShape with_shared(LaunchShape shape, size_t bytes) {
    shape.shared_bytes = bytes;
    return shape;
}

void transpose(Address in, Address out, int broken) {
    GPTKERN_LAUNCH((transpose_kernel), with_shared(BLOCK, sizeof(Square)), nullptr, at<float>(in), at<float>(out),
                   broken);
}

void staged_sum(Address in, Address out, int tiles, int broken) {
    GPTKERN_LAUNCH((staged_sum_kernel), with_shared(BLOCK, sizeof(Pipeline)), nullptr, at<float>(in), at<float>(out),
                   tiles, broken);
}

void tail(Address in, Address out, int64_t length, int broken) {
    LaunchShape shape = BLOCK;
    shape.grid_x = length / THREADS + 1;
    GPTKERN_LAUNCH((tail_kernel), shape, nullptr, at<float>(in), at<float>(out), length, broken);
}

void misaligned(Address in, Address out, int broken) {
    GPTKERN_LAUNCH((misaligned_kernel), with_shared(LANES, sizeof(Bytes)), nullptr, at<unsigned char>(in),
                   at<unsigned char>(out), broken);
}

void divergent(Address out, int broken) {
    GPTKERN_LAUNCH((divergent_kernel), BLOCK, nullptr, at<float>(out), broken);
}

void missing_lane(Address in, Address out, int broken) {
    GPTKERN_LAUNCH((missing_lane_kernel), LANES, nullptr, at<float>(in), at<float>(out), broken);
}

void unwritten(Address in, Address out, int broken) {
    GPTKERN_LAUNCH((unwritten_kernel), with_shared(LANES, sizeof(Square)), nullptr, at<float>(in), at<float>(out),
                   broken);
}

void beyond_shared(Address in, Address out, int broken) {
    GPTKERN_LAUNCH((beyond_shared_kernel), with_shared(LANES, sizeof(Bytes)), nullptr, at<float>(in), at<float>(out),
                   broken);
}

// 1: the launch asks for less shared memory than the kernel lays out.
void small_layout(Address in, Address out, int broken) {
    GPTKERN_LAUNCH((unwritten_kernel), with_shared(LANES, sizeof(Square) - (broken == 1)), nullptr, at<float>(in),
                   at<float>(out), 0);
}

void warp_exchange(Address in, Address out, int broken) {
    GPTKERN_LAUNCH((warp_exchange_kernel), with_shared(LANES, sizeof(Square)), nullptr, at<float>(in), at<float>(out),
                   broken);
}

void block_total(Address in, Address out, int broken) {
    GPTKERN_LAUNCH((block_total_kernel), with_shared(BLOCK, sizeof(Scratch)), nullptr, at<float>(in), at<float>(out),
                   broken);
}

void global_order(Address out, Address total, int blocks, int broken) {
    LaunchShape shape = BLOCK;
    shape.grid_x = blocks;
    GPTKERN_LAUNCH((global_order_kernel), shape, nullptr, at<float>(out), at<float>(total), broken);
}

void halves(Address out, int broken) {
    GPTKERN_LAUNCH((halves_kernel), with_shared(LANES, sizeof(Bytes)), nullptr, at<uint16_t>(out), broken);
}

void launched_with(Address out, int64_t grid_x, int64_t grid_y, unsigned threads, int64_t shared_bytes) {
    LaunchShape shape{grid_x, grid_y, 1, threads, size_t(shared_bytes)};
    GPTKERN_LAUNCH((empty_kernel), shape, nullptr, at<float>(out));
}

}  // namespace gptkern::testing

#ifdef GPTKERN_EMULATED
#include "emulator/bindings.h"

PYBIND11_MODULE(test_broken, module) {
    using namespace gptkern::testing;
    gptkern::emulator::bind(module);
    module.def("transpose", &transpose);
    module.def("staged_sum", &staged_sum);
    module.def("tail", &tail);
    module.def("misaligned", &misaligned);
    module.def("divergent", &divergent);
    module.def("missing_lane", &missing_lane);
    module.def("unwritten", &unwritten);
    module.def("beyond_shared", &beyond_shared);
    module.def("small_layout", &small_layout);
    module.def("warp_exchange", &warp_exchange);
    module.def("block_total", &block_total);
    module.def("global_order", &global_order);
    module.def("halves", &halves);
    // Without the interpreter's lock: several threads may launch at a time.
    module.def("launched_with", &launched_with, pybind11::call_guard<pybind11::gil_scoped_release>());
}
#endif
