// Tiles of 16-bit values in shared memory, and how they become operands of mma_m16n8k16.
//
// Shared memory has 32 banks of 4 bytes: 128 bytes, eight chunks of 16, in one go. ldmatrix reads eight rows of a matrix
// at one column (a chunk each), and a copy from global memory writes neighbouring chunks of a row. For both to hit eight
// different groups of four banks, without padding, a tile is cut into panels of 64 columns, and chunk c of row r lies
// where chunk c ^ s(r) would:
//
//   panel        bytes a row   s(r)
//   64 columns   128           r % 8          eight rows lie in eight lines: each at a chunk of its own
//   32 columns   64            r / 2 % 4      two rows share a line, four lines: so do pairs of rows
//   16 columns   32            r / 4 % 2      four rows share a line, two lines: so do fours
//
// A width that is no multiple of 64 ends in one narrower panel. In every case s depends on r % 8 alone.
#pragma once

#include "memory.cuh"
#include "ptx.cuh"
#include "warp.cuh"

namespace gptkern {

// (ROWS, D), in shared memory. A chunk is 8 columns: 16 bytes.
template <class T, int ROWS_, int D_>
struct alignas(128) Tile {
    static constexpr int ROWS = ROWS_, D = D_;
    static constexpr int CHUNK = 8, CHUNKS = D / CHUNK;
    static constexpr int PANEL = 64, PANEL_CHUNKS = PANEL / CHUNK;
    static_assert(sizeof(T) == 2);
    static_assert(ROWS % 8 == 0 && D % 16 == 0 && D % PANEL != 48);

    T values[ROWS * D];

    // Chunks in a row of the panel that holds `chunk`.
    static constexpr GPTKERN_DEVICE int panel_chunks(int chunk) {
        return chunk < CHUNKS / PANEL_CHUNKS * PANEL_CHUNKS ? PANEL_CHUNKS : CHUNKS % PANEL_CHUNKS;
    }

    // Where chunk `chunk` of a row begins, in elements.
    static constexpr GPTKERN_DEVICE int offset(int row, int chunk) {
        int width = panel_chunks(chunk), panel = chunk / PANEL_CHUNKS * PANEL_CHUNKS;
        int swizzle = row % 8 / (PANEL_CHUNKS / width);
        return CHUNK * (panel * ROWS + row * width + ((chunk - panel) ^ swizzle));
    }

    // The same for row `base + row` and chunk `even + odd`, base a multiple of 8, even of 2, odd 0 or 1. What varies by lane
    // (row, odd) is one value, which an unrolled loop changes by an exclusive or (even) and by adding constants (the
    // panel, base): a few registers hold the addresses of all the loop's loads.
    static constexpr GPTKERN_DEVICE int offset(int base, unsigned row, int even, unsigned odd) {
        int width = panel_chunks(even), panel = even / PANEL_CHUNKS * PANEL_CHUNKS;
        unsigned of_lane = CHUNK * (row * unsigned(width) + (odd ^ row % 8 / unsigned(PANEL_CHUNKS / width)));
        return CHUNK * (panel * ROWS + base * width) + int(of_lane ^ unsigned(CHUNK * (even - panel)));
    }

    // 16 bytes: columns 8 * chunk .. 8 * chunk + 7 of a row.
    GPTKERN_DEVICE Vector<T, CHUNK>* chunk(int row, int chunk) {
        return reinterpret_cast<Vector<T, CHUNK>*>(values + offset(row, chunk));
    }

    // Two neighbouring values, column even. A warp's accumulators, stored by pairs, meet no bank conflict.
    GPTKERN_DEVICE uint32_t* pair(int row, int column) {
        return reinterpret_cast<uint32_t*>(values + offset(row, column / CHUNK) + column % CHUNK);
    }
};

namespace detail {

// visit(row, chunk, where it lies in global memory, and in the tile) for the chunks of rows [0, ROWS) that fall to `thread`
// of THREADS: neighbouring threads take neighbouring chunks of one panel, so that eight of them meet no bank conflict.
// A thread's offset in the tile has 32 bits, so that few registers hold it.
template <class Tile, int ROWS, int THREADS, class Element, class Visit>
GPTKERN_DEVICE void for_chunks(Element* global, int row_stride, int thread, Visit visit) {
    constexpr int FULL = Tile::D / Tile::PANEL, REST = Tile::CHUNKS % Tile::PANEL_CHUNKS;
    static_assert(THREADS % Tile::PANEL_CHUNKS == 0);
    if constexpr (FULL > 0) {
        constexpr int STEP = THREADS / Tile::PANEL_CHUNKS;
        const int thread_row = thread / Tile::PANEL_CHUNKS, column = thread % Tile::PANEL_CHUNKS;
        const int offset = thread_row * row_stride + column * Tile::CHUNK;
#pragma unroll
        for (int first = 0; first < ROWS; first += STEP)
            if (ROWS % STEP == 0 || first + thread_row < ROWS) {
                // A step of whole eights leaves the swizzle as it is.
                const int shared = STEP % 8 == 0 ? Tile::offset(thread_row, column) + first * Tile::PANEL
                                                 : Tile::offset(first + thread_row, column);
#pragma unroll
                for (int panel = 0; panel < FULL; ++panel)
                    visit(first + thread_row, panel * Tile::PANEL_CHUNKS + column,
                          global + (offset + first * row_stride) + panel * Tile::PANEL,
                          shared + panel * Tile::PANEL * Tile::ROWS);
            }
    }
    if constexpr (REST > 0) {
        constexpr int STEP = THREADS / REST;
        const int thread_row = thread / REST, column = FULL * Tile::PANEL_CHUNKS + thread % REST;
        const int offset = thread_row * row_stride + column * Tile::CHUNK;
#pragma unroll
        for (int first = 0; first < ROWS; first += STEP)
            if (ROWS % STEP == 0 || first + thread_row < ROWS)
                visit(first + thread_row, column, global + (offset + first * row_stride),
                      STEP % 8 == 0 ? Tile::offset(thread_row, column) + first * REST * Tile::CHUNK
                                    : Tile::offset(first + thread_row, column));
    }
}

}  // namespace detail

// Starts the copy of a tile from global memory, by THREADS threads; `thread` counts them. Rows from `rows` on and columns
// from `columns` on become zero, and nothing is read there (`rows` may be 0 or less). The caller commits and waits.
//   global       (rows, columns)   the tile's first element, aligned to 16 bytes
//   row_stride   in elements, a multiple of 8; a tile's offsets have to lie below 2^31
//   columns      a multiple of 8, at most D
template <int THREADS, class T, int ROWS, int D>
GPTKERN_DEVICE void load_tile(Tile<T, ROWS, D>& tile, const T* global, int row_stride, int rows, int columns,
                              int thread) {
    detail::for_chunks<Tile<T, ROWS, D>, ROWS, THREADS>(
        global, row_stride, thread, [&](int row, int chunk, const T* from, int to) {
            cp_async<16>(tile.values + to, from, row < rows && chunk * tile.CHUNK < columns);
        });
}

// Stores ROWS rows of a tile, from `first` on (a multiple of 8), to global memory, 16 bytes a thread: the reverse of
// load_tile. `global` is where row `first` goes.
template <int ROWS, int THREADS, class T, int TILE_ROWS, int D>
GPTKERN_DEVICE void store_tile(Tile<T, TILE_ROWS, D>& tile, int first, T* global, int row_stride, int rows,
                               int columns, int thread) {
    using Chunk = Vector<T, Tile<T, TILE_ROWS, D>::CHUNK>;
    detail::for_chunks<Tile<T, TILE_ROWS, D>, ROWS, THREADS>(
        global, row_stride, thread, [&](int row, int chunk, T* to, int from) {
            from += first * tile.panel_chunks(chunk) * tile.CHUNK;
            Chunk values = load_shared(reinterpret_cast<const Chunk*>(tile.values + from));
            if (row < rows && chunk * tile.CHUNK < columns) store_global(reinterpret_cast<Chunk*>(to), values);
        });
}

// --- Operands of mma_m16n8k16 ---------------------------------------------------------------------------------------
// Called by all lanes of a warp; rows are multiples of 8 and columns of 16. One ldmatrix each. A loop short of
// registers passes not_hoisted(lane_of_thread(), pass).

// A (16×16), A[m][k] = tile[row + m][column + k].
template <class T, int ROWS, int D>
GPTKERN_DEVICE void load_a(uint32_t (&a)[4], const Tile<T, ROWS, D>& tile, int row, int column,
                           unsigned lane = unsigned(lane_of_thread())) {
    ldmatrix_x4(a, tile.values + tile.offset(row, lane % 16, column / tile.CHUNK, lane / 16));
}

// A (16×16), A[m][k] = tile[row + k][column + m]: the transpose of what the tile holds.
template <class T, int ROWS, int D>
GPTKERN_DEVICE void load_a_transposed(uint32_t (&a)[4], const Tile<T, ROWS, D>& tile, int row, int column,
                                      unsigned lane = unsigned(lane_of_thread())) {
    ldmatrix_x4_transposed(
        a, tile.values + tile.offset(row, lane / 16 * 8 + lane % 8, column / tile.CHUNK, lane / 8 % 2));
}

// Two operands B (16×8) side by side, b[j]: B[k][n] = tile[row + 8 j + n][column + k]. The tile is (n, k), as K is in
// Q Kᵀ.
template <class T, int ROWS, int D>
GPTKERN_DEVICE void load_b(uint32_t (&b)[2][2], const Tile<T, ROWS, D>& tile, int row, int column,
                           unsigned lane = unsigned(lane_of_thread())) {
    uint32_t r[4];
    ldmatrix_x4(r, tile.values + tile.offset(row, lane / 16 * 8 + lane % 8, column / tile.CHUNK, lane / 8 % 2));
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

// Two operands B (16×8) side by side, b[j]: B[k][n] = tile[row + k][column + 8 j + n]. The tile is (k, n), as V is in
// P V.
template <class T, int ROWS, int D>
GPTKERN_DEVICE void load_b_transposed(uint32_t (&b)[2][2], const Tile<T, ROWS, D>& tile, int row, int column,
                                      unsigned lane = unsigned(lane_of_thread())) {
    uint32_t r[4];
    ldmatrix_x4_transposed(r, tile.values + tile.offset(row, lane % 16, column / tile.CHUNK, lane / 16));
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

}  // namespace gptkern
