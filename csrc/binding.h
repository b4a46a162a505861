// How a room binds its launchers: a Binding of its own in its binding.cpp, which the module runs when it is loaded. So a
// new operator compiles its own files alone.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

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

}  // namespace gptkern
