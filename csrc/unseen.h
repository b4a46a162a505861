// What gptkern.backends.dispatch.is_unseen asks at every call of an operator, asked from C, where all of it takes two
// thirds of what it does from Python. The questions are Python's, given to ask(). What has no memory at an address, as
// a tensor that a transform of torch.func has left behind, and on which device one is, DLPack's table says at once.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor_caster.h"

namespace gptkern::unseen {

// Tuples of Python's, kept for good; null until ask() was called.
struct Questions {
    PyObject* of_thread = nullptr;  // functions of nothing
    PyObject* of_tensor = nullptr;  // functions of a tensor
    PyObject* tensors = nullptr;    // the types of tensors that are asked
    PyObject* others = nullptr;     // the types of what need not be asked
};

inline Questions questions;

inline void ask(pybind11::tuple of_thread, pybind11::tuple of_tensor, pybind11::tuple tensors, pybind11::tuple others) {
    // What was asked before is not freed: another thread may be asking it.
    questions = {of_thread.release().ptr(), of_tensor.release().ptr(), tensors.release().ptr(), others.release().ptr()};
}

inline bool is_one_of(PyTypeObject* type, PyObject* types) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(types); ++i)
        if (reinterpret_cast<PyObject*>(type) == PyTuple_GET_ITEM(types, i)) return true;
    return false;
}

// 1 where the answer is true, 0 where it is not, -1 where Python's exception is set.
inline int answer(PyObject* found) {
    if (!found) return -1;
    int is_true = PyObject_IsTrue(found);
    Py_DECREF(found);
    return is_true;
}

// 1 where every answer about the call is false, 0 where one is not, -1 where Python's exception is set.
// one_device: whether the call's tensors need to be on one.
inline int look(PyObject* call, bool one_device) {
    const Questions asked = questions;
    int device_type = -1, device_id = 0;  // of the first tensor; no type is negative
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(asked.of_thread); ++i)
        if (int seen = answer(PyObject_CallNoArgs(PyTuple_GET_ITEM(asked.of_thread, i)))) return seen < 0 ? -1 : 0;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(call); ++i) {
        PyObject* argument = PyTuple_GET_ITEM(call, i);
        if (!is_one_of(Py_TYPE(argument), asked.tensors)) {
            if (!is_one_of(Py_TYPE(argument), asked.others)) return 0;
            continue;
        }
        for (Py_ssize_t q = 0; q < PyTuple_GET_SIZE(asked.of_tensor); ++q)
            if (int seen = answer(PyObject_CallOneArg(PyTuple_GET_ITEM(asked.of_tensor, q), argument)))
                return seen < 0 ? -1 : 0;
        dlpack::DLTensor tensor;
        if (dlpack::table->tensor_from_object(argument, &tensor) != 0) {
            PyErr_Clear();
            return 0;
        }
        if (one_device && device_type >= 0 && (device_type != tensor.device_type || device_id != tensor.device_id))
            return 0;
        device_type = tensor.device_type;
        device_id = tensor.device_id;
    }
    return 1;
}

inline PyObject* is_unseen(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (!questions.of_thread || !dlpack::table) {
        PyErr_SetString(PyExc_RuntimeError, "gptkern: is_unseen was called before ask_whether_unseen");
        return nullptr;
    }
    if (count != 2 || !PyTuple_Check(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "is_unseen needs a tuple, and the device of its tensors or None");
        return nullptr;
    }
    int found = look(arguments[0], arguments[1] != Py_None);
    return found < 0 ? nullptr : PyBool_FromLong(found);
}

inline void bind(pybind11::module_& module) {
    module.def("ask_whether_unseen", &ask);
    // Not by pybind11, whose own work in a call is as long as this.
    static PyMethodDef method{"is_unseen", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&is_unseen)),
                              METH_FASTCALL, nullptr};
    module.attr("is_unseen") = pybind11::reinterpret_steal<pybind11::object>(
        PyCFunction_NewEx(&method, nullptr, module.attr("__name__").ptr()));
}

}  // namespace gptkern::unseen
