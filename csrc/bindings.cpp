// The Python module: gptkern._cuda, or gptkern._cuda_emulated where it is built for the emulator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "launchers.h"
#include "tensor_caster.h"

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
// What the module was compiled from, as gptkern.cuda_kernels.sources.digest says; defined by the build.
extern const char SOURCES[];
}  // namespace gptkern
#endif

PYBIND11_MODULE(GPTKERN_MODULE, module) {
    module.attr("architectures") = GPTKERN_ARCHITECTURES;
    module.attr("compiler") = GPTKERN_COMPILER;
    module.def("attention_backward", &gptkern::attention_backward);
    module.def("rotary", &gptkern::rotary);
    module.def("softmax_forward", &gptkern::softmax_forward);
    module.def("softmax_backward", &gptkern::softmax_backward);
    module.def("quantize_int8", &gptkern::quantize_int8);
    module.def("int8_linear_forward", &gptkern::int8_linear_forward);
    module.def("int8_linear_backward", &gptkern::int8_linear_backward);
    module.def("layer_norm_forward", &gptkern::layer_norm_forward);
    module.def("layer_norm_backward", &gptkern::layer_norm_backward);
    module.def("rms_norm_forward", &gptkern::rms_norm_forward);
    module.def("rms_norm_backward", &gptkern::rms_norm_backward);
    module.def("attention_forward", &gptkern::attention_forward);
#ifdef GPTKERN_EMULATED
    gptkern::emulator::bind(module);
#else
    module.attr("sources") = pybind11::str(gptkern::SOURCES);
#endif
}
