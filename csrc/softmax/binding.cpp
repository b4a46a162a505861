#include "binding.h"
#include "softmax/launchers.h"

namespace gptkern {

static const Binding BINDING([](pybind11::module_& module) {
    bind_launcher(module, "softmax_forward", &softmax_forward);
    bind_launcher(module, "softmax_backward", &softmax_backward);
});

}  // namespace gptkern
