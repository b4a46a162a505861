#include "binding.h"
#include "nonlinearity/launchers.h"

namespace gptkern {

static const Binding BINDING([](pybind11::module_& module) {
    bind_launcher(module, "nonlinearity_forward", &nonlinearity_forward);
    bind_launcher(module, "nonlinearity_backward", &nonlinearity_backward);
});

}  // namespace gptkern
