// rotary: pairs (a, b) of a head's elements turned by the angles of their position.
//
//     y_a = x_a * cos - x_b * sin
//     y_b = x_b * cos + x_a * sin
//
// of pair i < half: half-split a = i, b = i + half; interleaved a = 2 i, b = 2 i + 1. Elements from 2 half on are copied.
// Backward: the same by the negative angle, so forward and backward are one launcher.
//
// A row, a head at a position, is cut into slots of a thread each: two vectors half apart that are turned together
// (half-split), one vector of whole pairs (interleaved), or one that is copied. Neighbouring lanes have neighbouring
// slots. A thread loads the angles of its slot once, then walks the heads of its block, several of them under way at a time.
//
// For n elements of b bytes: 2 n b bytes moved, the least possible, and the angles of each position besides. At 4.8 TB/s,
// 132 multiprocessors and 1.755 GHz a multiprocessor has 48 instructions of a thread for each pair of 2-byte elements
// (H200, datasheet), of which it takes some ten. If each head read its own float32 angles, from the L2 cache, they would
// be as many bytes as the elements; a block's eight heads make that an eighth.
#include <algorithm>

#include "device/launch.cuh"
#include "device/memory.cuh"
#include "device/types.cuh"
#include "rotary/launchers.h"

namespace gptkern {
namespace {

constexpr int MOST_THREADS = 256;
// Vectors that a thread has under way at a time, of several heads: 64 bytes loaded before the first is used.
constexpr int UNDER_WAY = 4;
constexpr int HEADS_A_BLOCK = 8;
// A block has fewer heads where there would be fewer blocks than that: one has 16 KB under way, and a multiprocessor of
// an H200 needs some 25 for its share of 4.8 TB/s at 700 ns (reasoned, not measured).
constexpr int BLOCKS_A_MULTIPROCESSOR = 2;

// cos or sin: (batch, length, half) in any strides.
struct Angles {
    const void* data;
    int dtype;
    bool whole;  // vectors of a slot's angles may be loaded
    int64_t batch_stride, row_stride, pair_stride;
};

struct Strides {
    int64_t batch, head, row;
};

struct Call {
    int heads, length, heads_a_block;
    int groups, tiles;     // blocks over the heads, and over the slots of all positions
    int turned, slots;     // slots of a row that are turned, and all of them
    int turned_elements;   // 2 half
    int step, gap;         // pair i of a slot is at step * i, and at gap beyond it
    float sign;            // of the angle
    Strides x, y;
};

template <class A, int COUNT>
GPTKERN_DEVICE void load_angles_of(const A* data, int64_t stride, bool whole, float (&angles)[COUNT]) {
    constexpr int EACH = COUNT < VECTOR<A> ? COUNT : VECTOR<A>;
    if (whole) {
#pragma unroll
        for (int i = 0; i < COUNT; i += EACH) {
            auto loaded = load_global(reinterpret_cast<const Vector<A, EACH>*>(data + i));
#pragma unroll
            for (int j = 0; j < EACH; ++j) angles[i + j] = to_float(loaded[j]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) angles[i] = to_float(load_global(data + i * stride));
    }
}

template <int COUNT>
GPTKERN_DEVICE void load_angles(const Angles& of, int64_t batch, int64_t row, int64_t pair, float (&angles)[COUNT]) {
    int64_t offset = batch * of.batch_stride + row * of.row_stride + pair * of.pair_stride;
    if (of.dtype == FLOAT32)
        load_angles_of(static_cast<const float*>(of.data) + offset, of.pair_stride, of.whole, angles);
    else if (of.dtype == FLOAT16)
        load_angles_of(static_cast<const float16*>(of.data) + offset, of.pair_stride, of.whole, angles);
    else
        load_angles_of(static_cast<const bfloat16*>(of.data) + offset, of.pair_stride, of.whole, angles);
}

template <class T>
GPTKERN_DEVICE void turn(T& a, T& b, float cos, float sin) {
    float x_a = to_float(a), x_b = to_float(b);
    // y_a = x_a * cos - x_b * sin
    a = from_float<T>(x_a * cos - x_b * sin);
    // y_b = x_b * cos + x_a * sin
    b = from_float<T>(x_b * cos + x_a * sin);
}

// Slots of V elements. WITHIN: the pairs are neighbours within one vector; else of two vectors, `gap` apart.
template <class T, int V, bool WITHIN>
__global__ void __launch_bounds__(MOST_THREADS)
    rotary_kernel(const T* x,  // (batch, heads, length, head_dim), any strides with a contiguous last dimension
                  Angles cos, Angles sin,
                  T* y,  // (batch, heads, length, head_dim), as x
                  Call call) {
    using Slot = Vector<T, V>;
    constexpr int PAIRS = WITHIN ? V / 2 : V, UNROLLED = WITHIN ? UNDER_WAY : UNDER_WAY / 2;
    int group = int(blockIdx.x % call.groups), block = int(blockIdx.x / call.groups);
    int index = block % call.tiles * int(blockDim.x) + int(threadIdx.x);
    int64_t batch = block / call.tiles;
    if (index >= call.length * call.slots) return;
    int64_t row = index / call.slots;
    int slot = index % call.slots;
    int first = group * call.heads_a_block, heads = min(call.heads - first, call.heads_a_block);
    x += batch * call.x.batch + first * call.x.head + row * call.x.row;
    y += batch * call.y.batch + first * call.y.head + row * call.y.row;

    if (slot >= call.turned) {
        int column = call.turned_elements + (slot - call.turned) * V;
        for (int head = 0; head < heads; head += UNROLLED) {
            Slot copied[UNROLLED];
#pragma unroll
            for (int i = 0; i < UNROLLED; ++i)
                if (head + i < heads)
                    copied[i] = load_global_once(reinterpret_cast<const Slot*>(x + (head + i) * call.x.head + column));
#pragma unroll
            for (int i = 0; i < UNROLLED; ++i)
                if (head + i < heads)
                    store_global(reinterpret_cast<Slot*>(y + (head + i) * call.y.head + column), copied[i]);
        }
        return;
    }

    float c[PAIRS], s[PAIRS];
    load_angles(cos, batch, row, int64_t(slot) * PAIRS, c);
    load_angles(sin, batch, row, int64_t(slot) * PAIRS, s);
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) s[i] *= call.sign;
    int column = slot * V * call.step;
    for (int head = 0; head < heads; head += UNROLLED) {
        Slot a[UNROLLED], b[UNROLLED];
#pragma unroll
        for (int i = 0; i < UNROLLED; ++i) {
            if (head + i >= heads) continue;
            const T* source = x + (head + i) * call.x.head + column;
            a[i] = load_global_once(reinterpret_cast<const Slot*>(source));
            if constexpr (!WITHIN) b[i] = load_global_once(reinterpret_cast<const Slot*>(source + call.gap));
        }
#pragma unroll
        for (int i = 0; i < UNROLLED; ++i) {
            if (head + i >= heads) continue;
            T* target = y + (head + i) * call.y.head + column;
#pragma unroll
            for (int j = 0; j < PAIRS; ++j) {
                if constexpr (WITHIN)
                    turn(a[i][2 * j], a[i][2 * j + 1], c[j], s[j]);
                else
                    turn(a[i][j], b[i][j], c[j], s[j]);
            }
            store_global(reinterpret_cast<Slot*>(target), a[i]);
            if constexpr (!WITHIN) store_global(reinterpret_cast<Slot*>(target + call.gap), b[i]);
        }
    }
}

// --- The host's part ------------------------------------------------------------------------------------------------

// Whether every row of a tensor begins at a multiple of so many elements; strides along a single element do not count.
bool aligned(const Tensor& tensor, int elements, int element_bytes) {
    if (tensor.address % (elements * element_bytes) != 0) return false;
    for (int d = 0; d + 1 < tensor.rank; ++d)
        if (tensor.shape[d] > 1 && tensor.strides[d] % elements != 0) return false;
    return true;
}

struct Options {
    int64_t rotary_dim;
    bool interleaved, inverse;
    int multiprocessors;
};

// cos or sin. Of an entry for each element interleaved pairs have two.
Angles angles_of(const Tensor& tensor, const Options& options, int pairs_a_slot) {
    int last = tensor.rank - 1, bytes = tensor.dtype == FLOAT32 ? 4 : 2;
    int64_t step = options.interleaved && tensor.shape[last] == options.rotary_dim ? 2 : 1;
    int each = std::min(pairs_a_slot, 16 / bytes);
    return {.data = at<void>(tensor.address),
            .dtype = tensor.dtype,
            .whole = step * tensor.strides[last] == 1 && aligned(tensor, each, bytes),
            .batch_stride = last == 2 && tensor.shape[0] > 1 ? tensor.strides[0] : 0,
            .row_stride = tensor.strides[last - 1],
            .pair_stride = step * tensor.strides[last]};
}

template <class T, int V, bool WITHIN>
void launch(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& y, const Options& options,
            void* stream) {
    int64_t batch = x.shape[0], heads = x.shape[1], length = x.shape[2], head_dim = x.shape[3];
    int64_t rotary_dim = options.rotary_dim, half = rotary_dim / 2;
    int64_t turned = (WITHIN ? rotary_dim : half) / V, slots = turned + (head_dim - rotary_dim) / V;
    // Whole warps, and no more of them than there are slots for.
    int64_t threads = std::min<int64_t>(MOST_THREADS, ceil_div<int64_t>(length * slots, WARP) * WARP);
    int64_t tiles = ceil_div<int64_t>(length * slots, threads);
    int64_t groups = ceil_div<int64_t>(heads, HEADS_A_BLOCK);
    while (groups < heads && batch * tiles * groups < BLOCKS_A_MULTIPROCESSOR * options.multiprocessors) groups *= 2;
    // As even as it goes.
    int64_t heads_a_block = ceil_div(heads, groups);
    groups = ceil_div(heads, heads_a_block);
    bool neighbours = options.interleaved && !WITHIN;
    Call call{.heads = int(heads),
              .length = int(length),
              .heads_a_block = int(heads_a_block),
              .groups = int(groups),
              .tiles = int(tiles),
              .turned = int(turned),
              .slots = int(slots),
              .turned_elements = int(rotary_dim),
              .step = neighbours ? 2 : 1,
              .gap = neighbours ? 1 : int(half),
              .sign = options.inverse ? -1.0f : 1.0f,
              .x = {x.strides[0], x.strides[1], x.strides[2]},
              .y = {y.strides[0], y.strides[1], y.strides[2]}};
    constexpr int PAIRS = WITHIN ? V / 2 : V;
    LaunchShape shape{.grid_x = batch * tiles * groups, .threads = unsigned(threads)};
    GPTKERN_LAUNCH((rotary_kernel<T, V, WITHIN>), shape, stream, at<T>(x.address), angles_of(cos, options, PAIRS),
                   angles_of(sin, options, PAIRS), at<T>(y.address), call);
}

// With the widest vectors that fit: 16 bytes, a pair of 16-bit elements, or one element.
template <class T>
auto launch_of(const Tensor& x, const Tensor& y, const Options& options) {
    auto fits = [&](int elements) {
        int64_t turned_together = options.interleaved ? options.rotary_dim : options.rotary_dim / 2;
        return x.shape[3] % elements == 0 && turned_together % elements == 0 && aligned(x, elements, sizeof(T)) &&
               aligned(y, elements, sizeof(T));
    };
    constexpr int WIDEST = VECTOR<T>;
    if (fits(WIDEST)) return options.interleaved ? &launch<T, WIDEST, true> : &launch<T, WIDEST, false>;
    if constexpr (sizeof(T) == 2)
        if (fits(2)) return options.interleaved ? &launch<T, 2, true> : &launch<T, 2, false>;
    return &launch<T, 1, false>;
}

}  // namespace

// --- Launcher -------------------------------------------------------------------------------------------------------

Unreadable rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& y, int64_t rotary_dim,
                  bool interleaved, bool inverse, int multiprocessors, Address stream) {
    if (x.elements() == 0) return nullptr;
    if (x.strides[3] != 1 && x.shape[3] > 1) return &x;
    Options options{rotary_dim, interleaved, inverse, multiprocessors};
    auto* choose = x.dtype == FLOAT32   ? &launch_of<float>
                   : x.dtype == FLOAT16 ? &launch_of<float16>
                                        : &launch_of<bfloat16>;
    choose(x, y, options)(x, cos, sin, y, options, at<void>(stream));
    return nullptr;
}

}  // namespace gptkern
