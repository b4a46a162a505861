// How a room binds its launchers: a Binding of its own in its binding.cpp, which the module runs when it is loaded. So a
// new operator compiles its own files alone.
#pragma once

#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
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

// A launcher as Python calls it, by position. Not by pybind11's own dispatcher, which looks for overloads and keywords
// and allocates: as long again as ten arguments take.
template <class... Parameters>
class Bound {
public:
    using Launcher = Unreadable (*)(Parameters...);

    // A function of the module, and for good: it is never freed.
    static pybind11::object function(const char* name, Launcher launcher, pybind11::handle module_name) {
        auto* bound = new Bound{{name, nullptr, METH_FASTCALL, nullptr}, launcher};
        bound->method_.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Bound::call));
        pybind11::capsule self(bound);
        return pybind11::reinterpret_steal<pybind11::object>(
            PyCFunction_NewEx(&bound->method_, self.ptr(), module_name.ptr()));
    }

private:
    Bound(PyMethodDef method, Launcher launcher) : method_(method), launcher_(launcher) {}

    static PyObject* call(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
        const auto& bound = *static_cast<Bound*>(PyCapsule_GetPointer(self, nullptr));
        try {
            constexpr size_t NEEDED = sizeof...(Parameters);
            if (count != Py_ssize_t(NEEDED))
                throw pybind11::type_error(bound.method_.ml_name + (": it needs " + std::to_string(NEEDED)) +
                                           " arguments and got " + std::to_string(count));
            return bound.run(arguments, std::index_sequence_for<Parameters...>());
        } catch (pybind11::error_already_set& error) {
            error.restore();
        } catch (const pybind11::builtin_exception& error) {
            error.set_error();
        } catch (const std::invalid_argument& error) {
            PyErr_SetString(PyExc_ValueError, error.what());
        } catch (const std::bad_alloc&) {
            PyErr_NoMemory();
        } catch (const std::exception& error) {
            PyErr_SetString(PyExc_RuntimeError, error.what());
        }
        return nullptr;
    }

    template <size_t... I>
    PyObject* run(PyObject* const* arguments, std::index_sequence<I...>) const {
        std::tuple<pybind11::detail::make_caster<Parameters>...> casters;
        (check(std::get<I>(casters).load(arguments[I], true), I, arguments[I]), ...);
        Unreadable unreadable;
        {
            Unlocked unlocked;
            unreadable = launcher_(pybind11::detail::cast_op<Parameters>(std::get<I>(casters))...);
        }
        return Py_NewRef(unreadable ? static_cast<PyObject*>(unreadable->object) : Py_None);
    }

    void check(bool is_loaded, size_t index, PyObject* argument) const {
        if (!is_loaded)
            throw pybind11::type_error(method_.ml_name + (": argument " + std::to_string(index)) + " is a " +
                                       Py_TYPE(argument)->tp_name + ", which it cannot be");
    }

    // A launcher runs without Python's lock: it calls nothing of Python, and what it reads of its arguments they hold.
    // Other threads go on while a launch waits for the driver.
    struct Unlocked {
        PyThreadState* state = PyEval_SaveThread();
        ~Unlocked() { PyEval_RestoreThread(state); }
    };

    PyMethodDef method_;
    Launcher launcher_;
};

template <class... Parameters>
void bind_launcher(pybind11::module_& module, const char* name, Unreadable (*launcher)(Parameters...)) {
    if (pybind11::hasattr(module, name)) throw std::logic_error(std::string("gptkern: two launchers are named ") + name);
    module.attr(name) = Bound<Parameters...>::function(name, launcher, module.attr("__name__"));
}

}  // namespace gptkern
