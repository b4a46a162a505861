#include "binding.h"
#include "rotary/launchers.h"

namespace gptkern {

static const Binding BINDING([](pybind11::module_& module) {
    bind_launcher(module, "rotary", &rotary);
});

}  // namespace gptkern
