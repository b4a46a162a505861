// Kernels that hand each wrapper of csrc/device what a test gives them: tests/test_emulator.py.
//
// One warp, unless it says otherwise; lane i owns values[i · n .. i · n + n - 1] of an array with n values a lane.
#include "device/launch.cuh"
#include "device/ptx.cuh"
#include "device/tile.cuh"
#include "device/warp.cuh"
#include "launcher.h"

namespace gptkern::testing {

template <class T>
__global__ void mma_16bit_kernel(
    const uint32_t* a,  // (32, 4)
    const uint32_t* b,  // (32, 2)
    float* d            // (32, 4), added to
) {
    int lane = lane_of_thread();
    uint32_t a_operand[4], b_operand[2];
    float sums[4];
    for (int i = 0; i < 4; ++i) a_operand[i] = load_global(a + 4 * lane + i);
    for (int i = 0; i < 2; ++i) b_operand[i] = load_global(b + 2 * lane + i);
    for (int i = 0; i < 4; ++i) sums[i] = load_global_written(d + 4 * lane + i);
    mma_m16n8k16<T>(sums, a_operand, b_operand);
    for (int i = 0; i < 4; ++i) store_global(d + 4 * lane + i, sums[i]);
}

__global__ void mma_int8_kernel(
    const uint32_t* a,  // (32, 4)
    const uint32_t* b,  // (32, 2)
    int32_t* d          // (32, 4), added to
) {
    int lane = lane_of_thread();
    uint32_t a_operand[4], b_operand[2];
    int32_t sums[4];
    for (int i = 0; i < 4; ++i) a_operand[i] = load_global(a + 4 * lane + i);
    for (int i = 0; i < 2; ++i) b_operand[i] = load_global(b + 2 * lane + i);
    for (int i = 0; i < 4; ++i) sums[i] = load_global_written(d + 4 * lane + i);
    mma_m16n8k32_s8(sums, a_operand, b_operand);
    for (int i = 0; i < 4; ++i) store_global(d + 4 * lane + i, sums[i]);
}

struct Matrices {
    alignas(16) uint16_t rows[32][8];
};

// Row i of the shared array goes to the address that lane i gives after `order` has been applied.
__global__ void load_matrices_kernel(
    const Vector<uint16_t, 8>* rows,  // (32, 8)
    const int* order,                 // (32,) which row each lane names
    uint32_t* out,                    // (32, 4)
    int matrices, bool transposed) {
    auto& shared = shared_memory<Matrices>();
    int lane = lane_of_thread();
    store_shared(reinterpret_cast<Vector<uint16_t, 8>*>(shared.rows[lane]), load_global(rows + lane));
    warp_sync();
    const void* row = shared.rows[load_global(order + lane)];
    uint32_t four[4] = {}, two[2] = {};
    if (matrices == 4 && transposed) ldmatrix_x4_transposed(four, row);
    if (matrices == 4 && !transposed) ldmatrix_x4(four, row);
    if (matrices == 2 && transposed) ldmatrix_x2_transposed(two, row);
    if (matrices == 2 && !transposed) ldmatrix_x2(two, row);
    for (int i = 0; i < 4; ++i) store_global(out + 4 * lane + i, matrices == 4 ? four[i] : i < 2 ? two[i] : 0u);
}

__global__ void shuffles_kernel(
    const float* values,  // (32,)
    const int* lanes,     // (32,) whose value each lane asks for
    float* out,           // (32, 2)
    int mask) {
    int lane = lane_of_thread();
    float value = load_global(values + lane);
    store_global(out + 2 * lane, shuffle_xor(value, mask));
    store_global(out + 2 * lane + 1, shuffle(value, load_global(lanes + lane)));
}

__global__ void ballots_kernel(
    const int* predicates,  // (32,)
    uint32_t* out           // (32,)
) {
    int lane = lane_of_thread();
    store_global(out + lane, ballot(load_global(predicates + lane) != 0));
}

struct Scratch {
    float sums[4], maxima[4];
};

// Of four warps.
__global__ void reductions_kernel(
    const float* values,  // (128,)
    float* out            // (128, 5): sums of 32 and of 8 lanes, maximum of 32, sum and maximum of the block
) {
    auto& scratch = shared_memory<Scratch>();
    int thread = int(threadIdx.x);
    float value = load_global(values + thread);
    float* own = out + 5 * thread;
    store_global(own, warp_sum(value));
    store_global(own + 1, warp_sum<8>(value));
    store_global(own + 2, warp_max(value));
    store_global(own + 3, block_sum<4>(value, scratch.sums));
    store_global(own + 4, block_max<4>(value, scratch.maxima));
}

template <class T>
__global__ void to_floats_kernel(const T* in, float* out, float2* pairs, int64_t count) {
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
        store_global(out + i, to_float(load_global(in + i)));
        if (i % 2 == 0) store_global(pairs + i / 2, unpack<T>(load_global(reinterpret_cast<const uint32_t*>(in + i))));
    }
}

template <class T>
__global__ void of_floats_kernel(const float* in, T* out, uint32_t* pairs, int64_t count) {
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
        store_global(out + i, from_float<T>(load_global(in + i)));
        if (i % 2 == 0) store_global(pairs + i / 2, pack<T>(load_global(in + i), load_global(in + i + 1)));
    }
}

__global__ void arithmetic_kernel(const float* in, float* exponentials, int* rounded, float* quotients, int64_t count) {
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
        float x = load_global(in + i);
        store_global(exponentials + i, exp2_approx(x));
        store_global(rounded + i, round_to_int(fminf(fmaxf(x, -1e6f), 1e6f)));
        store_global(quotients + i, divide_rn(1.0f, x));
    }
}

struct Stages {
    alignas(16) unsigned char bytes[4][32][16];
};

// Every lane copies a piece of `BYTES` bytes for each of `stages` groups; after a wait for all but the newest `ahead`
// groups, what the older ones brought is stored.
template <int BYTES>
__global__ void copy_groups_kernel(
    const unsigned char* in,  // (stages, 32, 16)
    unsigned char* out,       // (stages, 32, 16)
    uint32_t in_range,        // bit i: lane i's source
    int stages, int ahead) {
    auto& shared = shared_memory<Stages>();
    int lane = lane_of_thread();
    for (int stage = 0; stage < stages; ++stage) {
        for (int i = 0; i < 16; i += BYTES) {
            const unsigned char* source = in + (stage * 32 + lane) * 16 + i;
            bool inside = in_range >> lane & 1;
            cp_async<BYTES>(&shared.bytes[stage][lane][i], inside ? source : nullptr, inside);
        }
        cp_async_commit();
    }
    if (ahead == 0) cp_async_wait<0>();
    if (ahead == 1) cp_async_wait<1>();
    if (ahead == 2) cp_async_wait<2>();
    for (int stage = 0; stage < stages - ahead; ++stage)
        for (int i = 0; i < 16; i += 4)
            store_global(reinterpret_cast<uint32_t*>(out + (stage * 32 + lane) * 16 + i),
                         load_shared(reinterpret_cast<uint32_t*>(&shared.bytes[stage][lane][i])));
    cp_async_wait<0>();
}

// What a lane finds of its own copy before it waits for it (races have to be allowed): whatever the emulator makes of it.
__global__ void before_the_wait_kernel(
    const uint32_t* in,  // (32,)
    uint32_t* out,       // (32, 3): before the commit, after it and a wait for older groups, after the wait
    int turns) {
    auto& shared = *reinterpret_cast<uint32_t(*)[32]>(&shared_memory<Stages>());
    int lane = lane_of_thread();
    store_shared(shared + lane, 7u);
    cp_async<4>(shared + lane, in + lane);
    for (int turn = 0; turn < turns; ++turn) warp_sync();
    store_global(out + 3 * lane, load_shared(shared + lane));
    cp_async_wait<0>();  // the copy belongs to no group yet
    store_global(out + 3 * lane + 1, load_shared(shared + lane));
    cp_async_commit();
    cp_async_wait<0>();
    store_global(out + 3 * lane + 2, load_shared(shared + lane));
}

// A tile goes in through load_tile and comes out by chunks, as operands A and B of every position, and by pairs.
template <int D>
__global__ void tile_kernel(
    const float16* in,        // (64, row_stride)
    float16* copied,          // (64, D)
    uint32_t* a,              // (4, D / 16, 32, 4)
    uint32_t* a_transposed,   // (4, D / 16, 32, 4)
    uint32_t* b,              // (4, D / 16, 32, 4)
    uint32_t* b_transposed,   // (4, D / 16, 32, 4)
    uint32_t* pairs,          // (64, D / 2)
    int row_stride, int rows, int columns) {
    using Tile64 = Tile<float16, 64, D>;
    auto& tile = shared_memory<Tile64>();
    load_tile<64>(tile, in, row_stride, rows, columns, int(threadIdx.x));
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    store_tile<64, 64>(tile, 0, copied, D, 64, D, int(threadIdx.x));
    int lane = lane_of_thread();
    for (int row = 32 * warp_of_thread(); row < 32 * warp_of_thread() + 32; row += 16)
        for (int column = 0; column < D; column += 16) {
            int64_t place = ((row / 16 * (D / 16) + column / 16) * 32 + lane) * 4;
            uint32_t r[4], r2[2][2];
            load_a(r, tile, row, column);
            for (int i = 0; i < 4; ++i) store_global(a + place + i, r[i]);
            load_a_transposed(r, tile, row, column);
            for (int i = 0; i < 4; ++i) store_global(a_transposed + place + i, r[i]);
            load_b(r2, tile, row, column);
            for (int i = 0; i < 4; ++i) store_global(b + place + i, r2[i / 2][i % 2]);
            load_b_transposed(r2, tile, row, column);
            for (int i = 0; i < 4; ++i) store_global(b_transposed + place + i, r2[i / 2][i % 2]);
        }
    // As a warp's accumulators lie: rows lane / 4, columns 2 · (lane % 4).
    for (int row = 32 * warp_of_thread(); row < 32 * warp_of_thread() + 32; row += 8)
        for (int column = 0; column < D; column += 8) {
            int own_row = row + lane / 4, own_column = column + 2 * (lane % 4);
            store_global(pairs + (own_row * D + own_column) / 2, load_shared(tile.pair(own_row, own_column)));
        }
}

// --- Launchers --------------------------------------------------------------------------------------------------------

void mma_16bit(Address a, Address b, Address d, bool bfloat16_operands) {
    LaunchShape shape{.threads = 32};
    if (bfloat16_operands)
        GPTKERN_LAUNCH((mma_16bit_kernel<bfloat16>), shape, nullptr, at<uint32_t>(a), at<uint32_t>(b), at<float>(d));
    else
        GPTKERN_LAUNCH((mma_16bit_kernel<float16>), shape, nullptr, at<uint32_t>(a), at<uint32_t>(b), at<float>(d));
}

void mma_int8(Address a, Address b, Address d) {
    LaunchShape shape{.threads = 32};
    GPTKERN_LAUNCH((mma_int8_kernel), shape, nullptr, at<uint32_t>(a), at<uint32_t>(b), at<int32_t>(d));
}

void load_matrices(Address rows, Address order, Address out, int matrices, bool transposed) {
    LaunchShape shape{.threads = 32, .shared_bytes = sizeof(Matrices)};
    GPTKERN_LAUNCH((load_matrices_kernel), shape, nullptr, (at<Vector<uint16_t, 8>>(rows)), at<int>(order),
                   at<uint32_t>(out), matrices, transposed);
}

void shuffles(Address values, Address lanes, Address out, int mask) {
    LaunchShape shape{.threads = 32};
    GPTKERN_LAUNCH((shuffles_kernel), shape, nullptr, at<float>(values), at<int>(lanes), at<float>(out), mask);
}

void ballots(Address predicates, Address out) {
    LaunchShape shape{.threads = 32};
    GPTKERN_LAUNCH((ballots_kernel), shape, nullptr, at<int>(predicates), at<uint32_t>(out));
}

void reductions(Address values, Address out) {
    LaunchShape shape{.threads = 128, .shared_bytes = sizeof(Scratch)};
    GPTKERN_LAUNCH((reductions_kernel), shape, nullptr, at<float>(values), at<float>(out));
}

void to_floats(Address in, Address out, Address pairs, int64_t count, bool of_bfloat16) {
    LaunchShape shape{.threads = 32};
    if (of_bfloat16)
        GPTKERN_LAUNCH((to_floats_kernel<bfloat16>), shape, nullptr, at<bfloat16>(in), at<float>(out),
                       at<float2>(pairs), count);
    else
        GPTKERN_LAUNCH((to_floats_kernel<float16>), shape, nullptr, at<float16>(in), at<float>(out), at<float2>(pairs),
                       count);
}

void of_floats(Address in, Address out, Address pairs, int64_t count, bool to_bfloat16) {
    LaunchShape shape{.threads = 32};
    if (to_bfloat16)
        GPTKERN_LAUNCH((of_floats_kernel<bfloat16>), shape, nullptr, at<float>(in), at<bfloat16>(out),
                       at<uint32_t>(pairs), count);
    else
        GPTKERN_LAUNCH((of_floats_kernel<float16>), shape, nullptr, at<float>(in), at<float16>(out),
                       at<uint32_t>(pairs), count);
}

void arithmetic(Address in, Address exponentials, Address rounded, Address quotients, int64_t count) {
    LaunchShape shape{.threads = 32};
    GPTKERN_LAUNCH((arithmetic_kernel), shape, nullptr, at<float>(in), at<float>(exponentials), at<int>(rounded),
                   at<float>(quotients), count);
}

void copy_groups(Address in, Address out, int bytes, uint32_t in_range, int stages, int ahead) {
    LaunchShape shape{.threads = 32, .shared_bytes = sizeof(Stages)};
    auto launch = [&]<int BYTES>() {
        GPTKERN_LAUNCH((copy_groups_kernel<BYTES>), shape, nullptr, at<unsigned char>(in), at<unsigned char>(out),
                       in_range, stages, ahead);
    };
    if (bytes == 4) launch.operator()<4>();
    if (bytes == 8) launch.operator()<8>();
    if (bytes == 16) launch.operator()<16>();
}

void before_the_wait(Address in, Address out, int turns) {
    LaunchShape shape{.threads = 32, .shared_bytes = sizeof(Stages)};
    GPTKERN_LAUNCH((before_the_wait_kernel), shape, nullptr, at<uint32_t>(in), at<uint32_t>(out), turns);
}

void tile(int head_dim, Address in, Address copied, Address a, Address a_transposed, Address b, Address b_transposed,
          Address pairs, int row_stride, int rows, int columns) {
    auto launch = [&]<int D>() {
        LaunchShape shape{.threads = 64, .shared_bytes = sizeof(Tile<float16, 64, D>)};
        GPTKERN_LAUNCH((tile_kernel<D>), shape, nullptr, at<float16>(in), at<float16>(copied), at<uint32_t>(a),
                       at<uint32_t>(a_transposed), at<uint32_t>(b), at<uint32_t>(b_transposed), at<uint32_t>(pairs),
                       row_stride, rows, columns);
    };
    if (head_dim == 64) launch.operator()<64>();
    if (head_dim == 80) launch.operator()<80>();
    if (head_dim == 96) launch.operator()<96>();
    if (head_dim == 128) launch.operator()<128>();
    if (head_dim == 256) launch.operator()<256>();
}

}  // namespace gptkern::testing

#ifdef GPTKERN_EMULATED
#include "emulator/bindings.h"

PYBIND11_MODULE(test_instructions, module) {
    using namespace gptkern::testing;
    gptkern::emulator::bind(module);
    module.def("mma_16bit", &mma_16bit);
    module.def("mma_int8", &mma_int8);
    module.def("load_matrices", &load_matrices);
    module.def("shuffles", &shuffles);
    module.def("ballots", &ballots);
    module.def("reductions", &reductions);
    module.def("to_floats", &to_floats);
    module.def("of_floats", &of_floats);
    module.def("arithmetic", &arithmetic);
    module.def("copy_groups", &copy_groups);
    module.def("before_the_wait", &before_the_wait);
    module.def("tile", &tile);
}
#endif
