#include "adamw/launchers.h"
#include "binding.h"

namespace gptkern {

static const Binding BINDING([](pybind11::module_& module) {
    bind_launcher(module, "adamw_update", &adamw_update);
    bind_launcher(module, "adamw_update_blocks", &adamw_update_blocks);
    bind_launcher(module, "adamw_norm", &adamw_norm);
});

}  // namespace gptkern
