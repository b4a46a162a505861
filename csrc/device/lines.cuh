// Lines of a tensor in vectors of 16 bytes, wherever they begin and whatever their stride.
//
// A line is a row, or the neighbouring lanes of a columns kernel. Its elements have 1, 2 or 4 bytes; a 16-bit one is
// float16 or bfloat16, told apart at run time. A vector that is whole and aligned is one or two instructions; the
// first and last of a line that does not begin or end on a multiple of 16 bytes, and every one of a line with strides,
// go element by element.
#pragma once

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

// A row (or the lanes of a columns kernel) of a tensor of BYTES-byte elements.
template <int BYTES>
struct Line {
    char* start;
    int64_t stride;
    bool vectors;

    GPTKERN_DEVICE Line(const void* tensor, int64_t offset, int64_t stride, bool vectors)
        : start(static_cast<char*>(const_cast<void*>(tensor)) + offset * BYTES), stride(stride), vectors(vectors) {}
    // Vectors of V values, the first of which begins `shift` elements before the row.
    template <int V>
    GPTKERN_DEVICE bool takes_vectors(int shift) const {
        return stride == 1 && (reinterpret_cast<uintptr_t>(start) - shift * BYTES) % Raw<BYTES, V>::PIECE == 0;
    }
};

// V elements: n, n + step, …; what is not in 0 … end - 1 is not read, and 0. A whole vector that begins before
// `end` may be read up to `width`.
template <int V, int BYTES>
GPTKERN_DEVICE Raw<BYTES, V> load(const Line<BYTES>& line, int n, int end, int width, int step = 1) {
    Raw<BYTES, V> raw{};
    if (n >= end) return raw;
    if (line.vectors && n >= 0 && n + V <= width) {
        using Piece = typename Raw<BYTES, V>::Piece;
        auto* address = reinterpret_cast<const Piece*>(line.start + int64_t(n) * BYTES);
#pragma unroll
        for (int p = 0; p < Raw<BYTES, V>::PIECES; ++p) {
            Piece piece = load_global(address + p);
#pragma unroll
            for (int w = 0; w < Raw<BYTES, V>::PIECE / 4; ++w) raw.words[p * Raw<BYTES, V>::PIECE / 4 + w] = piece[w];
        }
        return raw;
    }
    constexpr int PER_WORD = 4 / BYTES;
#pragma unroll
    for (int e = 0; e < V; ++e) {
        int m = n + e * step;
        if (m < 0 || m >= end) continue;
        auto* address = reinterpret_cast<const Unsigned<BYTES>*>(line.start) + m * line.stride;
        raw.words[e / PER_WORD] |= uint32_t(load_global(address)) << 8 * BYTES * (e % PER_WORD);
    }
    return raw;
}

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

// Elements n, n + step, … of the row; those that are not in 0 … width - 1 are not written.
template <int BYTES, int V>
GPTKERN_DEVICE void store(const Line<BYTES>& line, int n, int width, const float (&values)[V], bool is_half,
                          int step = 1) {
    Raw<BYTES, V> raw = from_floats<BYTES>(values, is_half);
    if (line.vectors && n >= 0 && n + V <= width) {
        using Piece = typename Raw<BYTES, V>::Piece;
        auto* address = reinterpret_cast<Piece*>(line.start + int64_t(n) * BYTES);
#pragma unroll
        for (int p = 0; p < Raw<BYTES, V>::PIECES; ++p) {
            Piece piece;
#pragma unroll
            for (int w = 0; w < Raw<BYTES, V>::PIECE / 4; ++w) piece[w] = raw.words[p * Raw<BYTES, V>::PIECE / 4 + w];
            store_global(address + p, piece);
        }
        return;
    }
    constexpr int PER_WORD = 4 / BYTES;
#pragma unroll
    for (int e = 0; e < V; ++e) {
        int m = n + e * step;
        if (m < 0 || m >= width) continue;
        auto* address = reinterpret_cast<Unsigned<BYTES>*>(line.start) + m * line.stride;
        store_global(address, Unsigned<BYTES>(raw.words[e / PER_WORD] >> 8 * BYTES * (e % PER_WORD)));
    }
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

}  // namespace gptkern
