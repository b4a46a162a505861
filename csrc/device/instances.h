// The tiles that a kernel was compiled for, and the choice of one by its sizes: which, says the table that Python has.
// For the host alone.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace gptkern {

// A tile of M rows and N columns of a product.
template <int M, int N>
struct TileSize {
    static constexpr int m = M, n = N;
};

template <class... Sizes>
struct Instances {
    static std::vector<std::pair<int, int>> sizes() { return {{Sizes::m, Sizes::n}...}; }

    // Calls `launch` with the TileSize<block_m, block_n>.
    template <class Launch>
    static void choose(const char* kernel, int block_m, int block_n, Launch launch) {
        auto take = [&](auto size) {
            const bool is_it = size.m == block_m && size.n == block_n;
            if (is_it) launch(size);
            return is_it;
        };
        if ((take(Sizes{}) || ...)) return;
        std::string message = std::string("gptkern: ") + kernel + " was not compiled for tiles of " +
                              std::to_string(block_m) + "×" + std::to_string(block_n) + "; there are";
        for (auto [m, n] : sizes()) message += " " + std::to_string(m) + "×" + std::to_string(n);
        throw std::invalid_argument(message);
    }
};

}  // namespace gptkern
