#include "binding.h"
#include "attention/launchers.h"

namespace gptkern {

static const Binding BINDING([](pybind11::module_& module) {
    bind_launcher(module, "attention_forward", &attention_forward);
    bind_launcher(module, "attention_backward", &attention_backward);
});

}  // namespace gptkern
