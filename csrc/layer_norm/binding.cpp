#include "binding.h"
#include "layer_norm/launchers.h"

namespace gptkern {

static const Binding BINDING([](pybind11::module_& module) {
    module.def("layer_norm_forward", &layer_norm_forward);
    module.def("layer_norm_backward", &layer_norm_backward);
});

}  // namespace gptkern
