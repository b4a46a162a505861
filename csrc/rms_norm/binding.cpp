#include "binding.h"
#include "rms_norm/launchers.h"

namespace gptkern {

static const Binding BINDING([](pybind11::module_& module) {
    bind_launcher(module, "rms_norm_forward", &rms_norm_forward);
    bind_launcher(module, "rms_norm_backward", &rms_norm_backward);
});

}  // namespace gptkern
