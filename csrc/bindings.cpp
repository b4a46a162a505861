// The Python module: gptkern._cuda, or gptkern._cuda_emulated where it is built for the emulator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding.h"
#include "unseen.h"

#ifdef GPTKERN_EMULATED
#include "emulator/bindings.h"
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

#ifndef GPTKERN_EMULATED
namespace gptkern {
// What the module was compiled from, as gptkern.backends.cuda.sources.digest says; defined by the build.
extern const char SOURCES[];
}  // namespace gptkern
#endif

PYBIND11_MODULE(GPTKERN_MODULE, module) {
    module.attr("architectures") = GPTKERN_ARCHITECTURES;
    module.attr("compiler") = GPTKERN_COMPILER;
    module.def("use_tensors_of", &gptkern::dlpack::use_tensors_of);
    gptkern::unseen::bind(module);
    for (auto bind : gptkern::Binding::all()) bind(module);
#ifdef GPTKERN_EMULATED
    gptkern::emulator::bind(module);
#else
    module.attr("sources") = pybind11::str(gptkern::SOURCES);
#endif
}
