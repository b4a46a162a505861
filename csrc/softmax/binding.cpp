#include "binding.h"
#include "softmax/launchers.h"

namespace gptkern {

static const Binding BINDING([](pybind11::module_& module) {
    module.def("softmax_forward", &softmax_forward);
    module.def("softmax_backward", &softmax_backward);
});

}  // namespace gptkern
