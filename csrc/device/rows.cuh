// Rows of a tensor in vectors of 16 bytes, wherever they begin and whatever their stride, and the threads that share one.
//
//     Raw       V values as memory holds them. A row is held like this, and widened where it is worked on: 16-bit
//               values in variables of their own would take a register each
//     Line      a row, or the neighbouring lanes of a columns kernel: what load and store move vectors of
//     Columns   which vectors of a row a thread has
//     Stash     what a thread keeps in shared memory between two walks over a row
//     over_group    a sum or a maximum over the threads that share a row
//
// Elements have 1, 2 or 4 bytes; a 16-bit one is float16 or bfloat16, told apart by `is_half`, which may be known when
// the kernel is compiled or not. A vector that is whole and aligned is one or two instructions. Rows that do not begin
// at a multiple of 16 bytes: vectors are laid where what is written is aligned, `shift` columns before the row, so that
// a row's first and last ones go element by element, as do those of tensors that are aligned in another way. Where a
// launcher has seen that there are none of these, lines are WHOLE, and no code for elements is compiled.
#pragma once

#include "ptx.cuh"
#include "types.cuh"
#include "warp.cuh"

namespace gptkern {

// V values of BYTES bytes each, as memory holds them.
template <int BYTES, int V>
struct Raw {
    static constexpr int WORDS = BYTES * V / 4;
    static constexpr int PIECE = BYTES * V < 16 ? BYTES * V : 16;  // bytes that one instruction moves
    static constexpr int PIECES = BYTES * V / PIECE;
    using Piece = Vector<uint32_t, PIECE / 4>;
    uint32_t words[WORDS];
};

template <int BYTES>
struct UnsignedOf {
    using type = uint32_t;
};
template <>
struct UnsignedOf<2> {
    using type = uint16_t;
};
template <>
struct UnsignedOf<1> {
    using type = uint8_t;
};
template <int BYTES>
using Unsigned = typename UnsignedOf<BYTES>::type;

// --- Where a row lies -----------------------------------------------------------------------------------------------

// (rows, width), each row contiguous, `stride` elements from one to the next.
struct Rows {
    const void* start;
    int64_t stride;
};

// A row (or the lanes of a columns kernel) of a tensor of BYTES-byte elements. WHOLE: no vector is only partly in its
// row, and all of them are aligned.
template <int BYTES, bool WHOLE = false>
struct Line {
    char* start;
    int64_t stride;
    bool vectors;

    GPTKERN_DEVICE Line(const void* tensor, int64_t offset, int64_t stride, bool vectors)
        : start(static_cast<char*>(const_cast<void*>(tensor)) + offset * BYTES), stride(stride), vectors(vectors) {}
    // Vectors of V values, the first of which begins `shift` elements before the row.
    template <int V>
    GPTKERN_DEVICE bool takes_vectors(int shift) const {
        constexpr int ALIGNED = Raw<BYTES, V>::PIECE;
        return WHOLE || (stride == 1 && (reinterpret_cast<uintptr_t>(start) - shift * BYTES) % ALIGNED == 0);
    }
    // Elements that it begins after an address aligned to 16 bytes.
    GPTKERN_DEVICE int shift() const {
        return WHOLE ? 0 : int(reinterpret_cast<uintptr_t>(start) % 16 / BYTES);
    }
};

// Row `row` from column `begin` on, to be read in vectors of V where it is aligned for them.
template <int V, int BYTES, bool WHOLE = false>
GPTKERN_DEVICE Line<BYTES, WHOLE> line_of(const Rows& rows, int64_t row, int begin, int shift) {
    Line<BYTES, WHOLE> line(rows.start, row * rows.stride + begin, 1, false);
    line.vectors = line.template takes_vectors<V>(shift);
    return line;
}

// The columns of a thread: vectors of V, of which the row's first begins `shift` columns before it.
template <int V>
struct Columns {
    int lane;          // the thread's place among those that share the row
    const int& lanes;  // most often the launch's own parameter, of which a copy would take a register
    int shift;

    // Not from a first one by steps: with those in registers rms_norm's backward spills, and with a copy of `lanes`
    // softmax's forward (nvcc 13.0, sm_80 and sm_90a).
    GPTKERN_DEVICE int operator[](int i) const { return (i * lanes + lane) * V - shift; }
};

// --- Loads and stores -----------------------------------------------------------------------------------------------

enum class Reuse { ONCE, AGAIN, WRITTEN };

template <Reuse REUSE, class T>
GPTKERN_DEVICE T load_global_for(const T* address) {
    if constexpr (REUSE == Reuse::ONCE) return load_global_once(address);
    if constexpr (REUSE == Reuse::WRITTEN) return load_global_written(address);
    return load_global(address);
}

// V elements: n, n + step, …; what is not in 0 … end - 1 is not read, and 0. A whole vector that begins before
// `end` may be read up to `width`.
template <int V, Reuse REUSE = Reuse::AGAIN, int BYTES, bool WHOLE>
GPTKERN_DEVICE Raw<BYTES, V> load(const Line<BYTES, WHOLE>& line, int n, int end, int width, int step = 1) {
    Raw<BYTES, V> raw{};
    if (n >= end) return raw;
    if (WHOLE || (line.vectors && n >= 0 && n + V <= width)) {
        using Piece = typename Raw<BYTES, V>::Piece;
        auto* address = reinterpret_cast<const Piece*>(line.start + int64_t(n) * BYTES);
#pragma unroll
        for (int p = 0; p < Raw<BYTES, V>::PIECES; ++p) {
            Piece piece = load_global_for<REUSE>(address + p);
#pragma unroll
            for (int w = 0; w < Raw<BYTES, V>::PIECE / 4; ++w) raw.words[p * Raw<BYTES, V>::PIECE / 4 + w] = piece[w];
        }
    } else if constexpr (!WHOLE) {
        constexpr int PER_WORD = 4 / BYTES;
#pragma unroll
        for (int e = 0; e < V; ++e) {
            int m = n + e * step;
            if (m < 0 || m >= end) continue;
            auto* address = reinterpret_cast<const Unsigned<BYTES>*>(line.start) + m * line.stride;
            raw.words[e / PER_WORD] |= uint32_t(load_global_for<REUSE>(address)) << 8 * BYTES * (e % PER_WORD);
        }
    }
    return raw;
}

// The thread's vectors of a row that has `end` columns: all of them are under way before the first value is used.
template <Reuse REUSE = Reuse::AGAIN, int BYTES, int V, int SLOTS, bool WHOLE>
GPTKERN_DEVICE void load_row(Raw<BYTES, V> (&held)[SLOTS], const Line<BYTES, WHOLE>& line, const Columns<V>& columns,
                             int end) {
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) held[i] = load<V, REUSE>(line, columns[i], end, end);
}

// Elements n, n + step, … of the row; those that are not in 0 … width - 1 are not written.
template <int BYTES, int V, bool WHOLE>
GPTKERN_DEVICE void store(const Line<BYTES, WHOLE>& line, int n, int width, const Raw<BYTES, V>& raw, int step = 1) {
    if (WHOLE ? n < width : line.vectors && n >= 0 && n + V <= width) {
        using Piece = typename Raw<BYTES, V>::Piece;
        auto* address = reinterpret_cast<Piece*>(line.start + int64_t(n) * BYTES);
#pragma unroll
        for (int p = 0; p < Raw<BYTES, V>::PIECES; ++p) {
            Piece piece;
#pragma unroll
            for (int w = 0; w < Raw<BYTES, V>::PIECE / 4; ++w) piece[w] = raw.words[p * Raw<BYTES, V>::PIECE / 4 + w];
            store_global(address + p, piece);
        }
    } else if constexpr (!WHOLE) {
        constexpr int PER_WORD = 4 / BYTES;
#pragma unroll
        for (int e = 0; e < V; ++e) {
            int m = n + e * step;
            if (m < 0 || m >= width) continue;
            auto* address = reinterpret_cast<Unsigned<BYTES>*>(line.start) + m * line.stride;
            store_global(address, Unsigned<BYTES>(raw.words[e / PER_WORD] >> 8 * BYTES * (e % PER_WORD)));
        }
    }
}

// --- Values ---------------------------------------------------------------------------------------------------------

template <int BYTES, int V>
GPTKERN_DEVICE void to_floats(const Raw<BYTES, V>& raw, bool is_half, float (&values)[V]) {
    if constexpr (BYTES == 4) {
#pragma unroll
        for (int e = 0; e < V; ++e) values[e] = __int_as_float(int(raw.words[e]));
    } else {
#pragma unroll
        for (int w = 0; w < V / 2; ++w) {
            float2 pair = is_half ? unpack<float16>(raw.words[w]) : unpack<bfloat16>(raw.words[w]);
            values[2 * w] = pair.x;
            values[2 * w + 1] = pair.y;
        }
    }
}

template <int BYTES, int V>
GPTKERN_DEVICE Raw<BYTES, V> from_floats(const float (&values)[V], bool is_half) {
    Raw<BYTES, V> raw;
    if constexpr (BYTES == 4) {
#pragma unroll
        for (int e = 0; e < V; ++e) raw.words[e] = uint32_t(__float_as_int(values[e]));
    } else {
#pragma unroll
        for (int w = 0; w < V / 2; ++w)
            raw.words[w] = is_half ? pack<float16>(values[2 * w], values[2 * w + 1])
                                   : pack<bfloat16>(values[2 * w], values[2 * w + 1]);
    }
    return raw;
}

template <int BYTES, int V, bool WHOLE>
GPTKERN_DEVICE void store(const Line<BYTES, WHOLE>& line, int n, int width, const float (&values)[V], bool is_half,
                          int step = 1) {
    store(line, n, width, from_floats<BYTES>(values, is_half), step);
}

// values[e] = filling where n + e is not in 0 … end - 1.
template <int V>
GPTKERN_DEVICE void fill_outside(float (&values)[V], int n, int end, float filling) {
    if (n >= 0 && n + V <= end) return;
#pragma unroll
    for (int e = 0; e < V; ++e)
        if (n + e < 0 || n + e >= end) values[e] = filling;
}

// Between two passes over 16-bit rows: a compiler that kept what the first has widened would take twice the registers.
template <int BYTES, int V, int SLOTS>
GPTKERN_DEVICE void widen_again([[maybe_unused]] Raw<BYTES, V> (&held)[SLOTS]) {
    if constexpr (BYTES == 2)
#pragma unroll
        for (int i = 0; i < SLOTS; ++i)
#pragma unroll
            for (int w = 0; w < Raw<BYTES, V>::WORDS; ++w) held[i].words[w] = opaque(held[i].words[w]);
}

// What a thread keeps in shared memory for its second walk: its own vectors, that no other thread looks at.
template <int BYTES, int V>
struct Stash {
    using Piece = typename Raw<BYTES, V>::Piece;
    Piece* start;  // (room, PIECES, threads): neighbours in a warp are neighbours in memory
    int room;

    GPTKERN_DEVICE Piece* at(int i, int p) const {
        return start + (i * Raw<BYTES, V>::PIECES + p) * int(blockDim.x) + int(threadIdx.x);
    }
    GPTKERN_DEVICE void keep(int i, const Raw<BYTES, V>& raw) const {
        if (i >= room) return;
#pragma unroll
        for (int p = 0; p < Raw<BYTES, V>::PIECES; ++p) {
            Piece piece;
#pragma unroll
            for (int w = 0; w < Raw<BYTES, V>::PIECE / 4; ++w) piece[w] = raw.words[p * Raw<BYTES, V>::PIECE / 4 + w];
            store_shared(at(i, p), piece);
        }
    }
    GPTKERN_DEVICE Raw<BYTES, V> take(int i) const {
        Raw<BYTES, V> raw;
#pragma unroll
        for (int p = 0; p < Raw<BYTES, V>::PIECES; ++p) {
            Piece piece = load_shared(at(i, p));
#pragma unroll
            for (int w = 0; w < Raw<BYTES, V>::PIECE / 4; ++w) raw.words[p * Raw<BYTES, V>::PIECE / 4 + w] = piece[w];
        }
        return raw;
    }
};

// --- The threads that share a row -------------------------------------------------------------------------------------
// A group of threads: a part of a warp, of a power of two, or whole warps.

inline constexpr int MOST_WARPS = 32;  // of a block

// What the warps of a block tell one another in a reduction.
using Scratch = float[MOST_WARPS];

struct Largest {
    static constexpr float NONE = -__builtin_inff();
    GPTKERN_DEVICE static float of(float a, float b) { return fmaxf(a, b); }
};
struct Sum {
    static constexpr float NONE = 0.0f;
    GPTKERN_DEVICE static float of(float a, float b) { return a + b; }
};

// Over groups of `lanes` lanes of a warp (more are all 32), of those that are a multiple of `stride` apart.
template <class Of>
GPTKERN_DEVICE float over_lanes(float value, int lanes, int stride = 1) {
#pragma unroll
    for (int mask = WARP / 2; mask > 0; mask /= 2) {
        float other = shuffle_xor(value, mask);
        if (mask < lanes && mask >= stride) value = Of::of(value, other);
    }
    return value;
}

// Replaces each of N values by its sum, or maximum, over the thread's group, in a fixed order. Where groups have several
// warps all threads of the block call it, and `scratch` may be used again after another barrier.
template <class Of, int N>
GPTKERN_DEVICE void over_group(float (&values)[N], int lanes, Scratch (&scratch)[N]) {
#pragma unroll
    for (int n = 0; n < N; ++n) values[n] = over_lanes<Of>(values[n], lanes);
    if (lanes <= WARP) return;
    const int warps = lanes / WARP, first = warp_of_thread() / warps * warps;
#pragma unroll
    for (int n = 0; n < N; ++n)
        if (lane_of_thread() == 0) store_shared(&scratch[n][warp_of_thread()], values[n]);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n)
        values[n] = over_lanes<Of>(
            lane_of_thread() < warps ? load_shared(&scratch[n][first + lane_of_thread()]) : Of::NONE, WARP);
}

template <class Of>
GPTKERN_DEVICE float over_group(float value, int lanes, Scratch& scratch) {
    float values[1] = {value};
    over_group<Of>(values, lanes, reinterpret_cast<Scratch(&)[1]>(scratch));
    return values[0];
}

// --- For launchers ----------------------------------------------------------------------------------------------------

inline unsigned next_power_of_2(unsigned n) {
    unsigned power = 1;
    while (power < n) power *= 2;
    return power;
}

// Threads of a group, for a row of `vectors`: a part of a warp of as many, or whole warps, so that no thread has more
// than `slots`.
inline int lanes_of(int vectors, int slots) {
    return vectors <= WARP ? int(next_power_of_2(unsigned(vectors))) : ceil_div(vectors, slots * WARP) * WARP;
}

// How many vectors of V a row has, wherever it begins.
inline int most_vectors(int width, int vector) { return ceil_div(width + vector - 1, vector); }

}  // namespace gptkern
