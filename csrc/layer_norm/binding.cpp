#include "binding.h"
#include "layer_norm/launchers.h"

namespace gptkern {

static const Binding BINDING([](pybind11::module_& module) {
    bind_launcher(module, "layer_norm_forward", &layer_norm_forward);
    bind_launcher(module, "layer_norm_backward", &layer_norm_backward);
});

}  // namespace gptkern
