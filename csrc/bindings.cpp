// The Python module: gptkern._cuda, or gptkern._cuda_emulated where it is built for the emulator.
#include <pybind11/pybind11.h>

#include "launchers.h"

#ifdef GPTKERN_EMULATED
#include <pybind11/stl.h>

#include "emulator/counters.h"
#define GPTKERN_MODULE _cuda_emulated
#else
#define GPTKERN_MODULE _cuda
#endif

// What nvcc compiled for ("80;90a;90+PTX") and with, for gptkern info.
#ifndef GPTKERN_ARCHITECTURES
#define GPTKERN_ARCHITECTURES "emulated"
#endif
#ifndef GPTKERN_COMPILER
#define GPTKERN_COMPILER "a host compiler"
#endif

namespace {

#ifdef GPTKERN_EMULATED

namespace emulator = gptkern::emulator;
namespace py = pybind11;

py::dict to_dict(const emulator::GlobalCounts& counts) {
    return py::dict(py::arg("requests") = counts.requests, py::arg("bytes") = counts.bytes,
                    py::arg("sectors") = counts.sectors);
}

py::dict to_dict(const emulator::SharedCounts& counts) {
    return py::dict(py::arg("requests") = counts.requests, py::arg("wavefronts") = counts.wavefronts,
                    py::arg("least") = counts.least);
}

py::dict to_dict(const emulator::KernelCounts& counts) {
    py::dict regions;
    for (const auto& [name, region] : counts.regions)
        regions[py::str(name)] = py::dict(py::arg("loaded") = region.loaded, py::arg("stored") = region.stored);
    return py::dict(
        py::arg("launches") = counts.launches, py::arg("blocks") = counts.blocks, py::arg("barriers") = counts.barriers,
        py::arg("shuffles") = counts.shuffles, py::arg("mma_16bit") = counts.mma_16bit,
        py::arg("mma_int8") = counts.mma_int8, py::arg("load") = to_dict(counts.load),
        py::arg("store") = to_dict(counts.store), py::arg("atomic") = to_dict(counts.atomic),
        py::arg("async") = to_dict(counts.async), py::arg("shared_load") = to_dict(counts.shared_load),
        py::arg("shared_store") = to_dict(counts.shared_store), py::arg("ldmatrix") = to_dict(counts.ldmatrix),
        py::arg("async_store") = to_dict(counts.async_store), py::arg("regions") = regions);
}

void start_counting(const std::map<std::string, std::pair<std::uintptr_t, size_t>>& watched) {
    std::vector<emulator::Region> regions;
    for (const auto& [name, extent] : watched) regions.push_back({name, extent.first, extent.second});
    emulator::start_counting(std::move(regions));
}

py::dict stop_counting() {
    py::dict kernels;
    for (const auto& [name, counts] : emulator::stop_counting()) kernels[py::str(name)] = to_dict(counts);
    return kernels;
}

#endif

}  // namespace

PYBIND11_MODULE(GPTKERN_MODULE, module) {
    module.attr("architectures") = GPTKERN_ARCHITECTURES;
    module.attr("compiler") = GPTKERN_COMPILER;
#ifdef GPTKERN_EMULATED
    module.def("set_seed", &emulator::set_seed);
    module.def("seed", &emulator::seed);
    module.def("skip_launches", &emulator::skip_launches);
    module.def("set_bounds", &emulator::set_bounds);
    module.def("start_counting", &start_counting);
    module.def("stop_counting", &stop_counting);
#endif
}
