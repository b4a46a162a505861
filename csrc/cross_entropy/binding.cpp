#include "binding.h"
#include "cross_entropy/launchers.h"

namespace gptkern {

static const Binding BINDING([](pybind11::module_& module) {
    bind_launcher(module, "cross_entropy_forward", &cross_entropy_forward);
    bind_launcher(module, "cross_entropy_backward", &cross_entropy_backward);
});

}  // namespace gptkern
