// What a Python module of emulated kernels offers beside them: seeds, bounds and counters.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "counters.h"

namespace gptkern::emulator {

inline pybind11::dict to_dict(const GlobalCounts& counts) {
    using namespace pybind11::literals;
    return pybind11::dict("requests"_a = counts.requests, "bytes"_a = counts.bytes, "sectors"_a = counts.sectors);
}

inline pybind11::dict to_dict(const SharedCounts& counts) {
    using namespace pybind11::literals;
    return pybind11::dict("requests"_a = counts.requests, "wavefronts"_a = counts.wavefronts,
                          "least"_a = counts.least);
}

inline pybind11::dict to_dict(const KernelCounts& counts) {
    using namespace pybind11::literals;
    pybind11::dict regions;
    for (const auto& [name, region] : counts.regions)
        regions[pybind11::str(name)] = pybind11::dict(
            "loaded"_a = region.loaded, "stored"_a = region.stored, "loaded_sectors"_a = region.loaded_sectors,
            "stored_sectors"_a = region.stored_sectors);
    return pybind11::dict(
        "launches"_a = counts.launches, "blocks"_a = counts.blocks, "threads"_a = counts.threads,
        "shared_bytes"_a = counts.shared_bytes, "barriers"_a = counts.barriers,
        "shuffles"_a = counts.shuffles, "mma_16bit"_a = counts.mma_16bit, "mma_int8"_a = counts.mma_int8,
        "load"_a = to_dict(counts.load), "store"_a = to_dict(counts.store), "atomic"_a = to_dict(counts.atomic),
        "async"_a = to_dict(counts.async), "shared_load"_a = to_dict(counts.shared_load),
        "shared_store"_a = to_dict(counts.shared_store), "ldmatrix"_a = to_dict(counts.ldmatrix),
        "async_store"_a = to_dict(counts.async_store), "regions"_a = regions);
}

inline void bind(pybind11::module_& module) {
    // Each waits until a launch in another thread is over, which may take long: Python goes on meanwhile.
    using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
    module.def("set_seed", &set_seed, Unlocked());
    module.def("seed", &seed, Unlocked());
    module.def("skip_launches", &skip_launches, Unlocked());
    module.def("run_last_blocks", &run_last_blocks, Unlocked());
    module.def("check_races", &check_races, Unlocked());
    module.def("set_bounds", &set_bounds, Unlocked());
    module.def(
        "start_counting",
        [](const std::map<std::string, std::pair<std::uintptr_t, size_t>>& watched) {
            std::vector<Region> regions;
            for (const auto& [name, extent] : watched) regions.push_back({name, extent.first, extent.second});
            start_counting(std::move(regions));
        },
        Unlocked());
    module.def("stop_counting", [] {
        std::map<std::string, KernelCounts> counted;
        {
            pybind11::gil_scoped_release unlocked;
            counted = stop_counting();
        }
        pybind11::dict kernels;
        for (const auto& [name, counts] : counted) kernels[pybind11::str(name)] = to_dict(counts);
        return kernels;
    });
}

}  // namespace gptkern::emulator
