#include "binding.h"
#include "quantize_int8/launchers.h"

namespace gptkern {

static const Binding BINDING([](pybind11::module_& module) {
    bind_launcher(module, "quantize_int8", &quantize_int8);
});

}  // namespace gptkern
