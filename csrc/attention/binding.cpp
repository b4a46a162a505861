#include "binding.h"
#include "attention/launchers.h"

namespace gptkern {

static const Binding BINDING([](pybind11::module_& module) {
    module.def("attention_forward", &attention_forward);
    module.def("attention_backward", &attention_backward);
});

}  // namespace gptkern
