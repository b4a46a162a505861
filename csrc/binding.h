// How a room binds its launchers: a Binding of its own in its binding.cpp, which the module runs when it is loaded. So a
// new operator compiles its own files alone.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "launcher.h"
#include "tensor_caster.h"

namespace gptkern {

struct Binding {
    using Bind = void (*)(pybind11::module_&);

    explicit Binding(Bind bind) { all().push_back(bind); }

    static std::vector<Bind>& all() {
        static std::vector<Bind> bindings;
        return bindings;
    }
};

// A launcher, without Python's lock while it runs: it calls nothing of Python, and what it reads of its arguments they
// hold. Other threads go on while a launch waits for the driver.
template <class... Parameters>
void bind_launcher(pybind11::module_& module, const char* name, Unreadable (*launcher)(Parameters...)) {
    // pybind11 would take a second one for an overload of the first.
    if (pybind11::hasattr(module, name)) throw std::logic_error(std::string("gptkern: two launchers are named ") + name);
    module.def(name, launcher, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace gptkern
