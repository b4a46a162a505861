#include "binding.h"
#include "rotary/launchers.h"

namespace gptkern {

static const Binding BINDING([](pybind11::module_& module) {
    module.def("rotary", &rotary);
});

}  // namespace gptkern
