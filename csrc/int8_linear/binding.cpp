#include <pybind11/stl.h>

#include "binding.h"
#include "int8_linear/launchers.h"

namespace gptkern {

static const Binding BINDING([](pybind11::module_& module) {
    bind_launcher(module, "int8_linear_forward", &int8_linear_forward);
    bind_launcher(module, "int8_linear_backward", &int8_linear_backward);
    module.def("int8_linear_tiles", &int8_linear_tiles);
});

}  // namespace gptkern
