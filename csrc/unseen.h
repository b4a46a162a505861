// What gptkern.backends.unseen asks at every call of an operator, asked from C, where all of it takes two
// thirds of what it does from Python. The questions are Python's, given to ask(). What has no memory at an address, as
// a tensor that a transform of torch.func has left behind, and on which device one is, DLPack's table says at once.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

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

template <class T>
void append(std::string& bytes, const T& value) {
    bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
}

// 1 where every answer about the tensor is false, 0 where one is not, -1 where Python's exception is set.
inline int look_at(PyObject* object, const Questions& asked, dlpack::DLTensor& tensor) {
    for (Py_ssize_t q = 0; q < PyTuple_GET_SIZE(asked.of_tensor); ++q)
        if (int seen = answer(PyObject_CallOneArg(PyTuple_GET_ITEM(asked.of_tensor, q), object)))
            return seen < 0 ? -1 : 0;
    if (dlpack::table->tensor_from_object(object, &tensor) == 0) return 1;
    PyErr_Clear();
    return 0;
}

// The same about this thread.
inline int look_around(const Questions& asked) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(asked.of_thread); ++i)
        if (int seen = answer(PyObject_CallNoArgs(PyTuple_GET_ITEM(asked.of_thread, i)))) return seen < 0 ? -1 : 0;
    return 1;
}

// 1 where every answer about the call is false, 0 where one is not, -1 where Python's exception is set.
// one_device: whether the call's tensors need to be on one.
inline int look(PyObject* call, bool one_device) {
    const Questions asked = questions;
    int device_type = -1, device_id = 0;  // of the first tensor; no type is negative
    if (int found = look_around(asked); found != 1) return found;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(call); ++i) {
        PyObject* argument = PyTuple_GET_ITEM(call, i);
        if (!is_one_of(Py_TYPE(argument), asked.tensors)) {
            if (!is_one_of(Py_TYPE(argument), asked.others)) return 0;
            continue;
        }
        dlpack::DLTensor tensor;
        if (int found = look_at(argument, asked, tensor); found != 1) return found;
        if (one_device && device_type >= 0 && (device_type != tensor.device_type || device_id != tensor.device_id))
            return 0;
        device_type = tensor.device_type;
        device_id = tensor.device_id;
    }
    return 1;
}

// Appends what tells a value from others; false where it is of no kind that a call of an operator usually has.
inline bool append_value(std::string& bytes, PyObject* value, const Questions& asked) {
    if (value == Py_None || PyBool_Check(value)) {
        append(bytes, value);  // one object each, for as long as Python runs
    } else if (PyFloat_CheckExact(value)) {
        bytes += 'f';
        append(bytes, PyFloat_AS_DOUBLE(value));
    } else if (PyLong_CheckExact(value)) {
        int overflow = 0;
        long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
        if (overflow) return false;
        bytes += 'i';
        append(bytes, number);
    } else if (PyUnicode_CheckExact(value)) {
        Py_ssize_t length = 0;
        const char* text = PyUnicode_AsUTF8AndSize(value, &length);
        if (!text) {
            PyErr_Clear();
            return false;
        }
        bytes += 's';
        append(bytes, length);
        bytes.append(text, static_cast<size_t>(length));
    } else if (is_one_of(Py_TYPE(value), asked.others)) {
        append(bytes, value);  // a dtype, which is one object too
    } else {
        return false;
    }
    return true;
}

// The same of a call's argument, a tensor's shape, strides, dtype and device: 1, or 0 where it has no signature; -1
// where Python's exception is set.
inline int append_argument(std::string& bytes, PyObject* argument, const Questions& asked) {
    if (!is_one_of(Py_TYPE(argument), asked.tensors)) {
        if (!PyTuple_Check(argument)) return append_value(bytes, argument, asked);
        bytes += '(';
        append(bytes, PyTuple_GET_SIZE(argument));
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(argument); ++i)
            if (!PyLong_CheckExact(PyTuple_GET_ITEM(argument, i)) ||
                !append_value(bytes, PyTuple_GET_ITEM(argument, i), asked))
                return 0;
        return 1;
    }
    dlpack::DLTensor tensor;
    if (int found = look_at(argument, asked, tensor); found != 1) return found;
    bytes += 't';
    append(bytes, tensor.device_type);
    append(bytes, tensor.device_id);
    append(bytes, tensor.rank);
    bytes += static_cast<char>(tensor.code);
    bytes += static_cast<char>(tensor.bits);
    append(bytes, tensor.lanes);
    bytes.append(reinterpret_cast<const char*>(tensor.shape), tensor.rank * sizeof(int64_t));
    bytes.append(reinterpret_cast<const char*>(tensor.strides), tensor.rank * sizeof(int64_t));
    return 1;
}

// Of two calls the same bytes only where a contract's checks, and what kernels cover, say the same of both: None where
// is_unseen would be false, or an argument is of another kind. What counts beside the arguments is not in it.
inline PyObject* signature(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (!questions.of_thread || !dlpack::table || count != 1 || !PyTuple_Check(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "signature needs a tuple, after ask_whether_unseen");
        return nullptr;
    }
    const Questions asked = questions;
    std::string bytes;
    bytes.reserve(512);
    int found = look_around(asked);
    for (Py_ssize_t i = 0; found == 1 && i < PyTuple_GET_SIZE(arguments[0]); ++i)
        found = append_argument(bytes, PyTuple_GET_ITEM(arguments[0], i), asked);
    if (found < 0) return nullptr;
    if (found == 0) Py_RETURN_NONE;
    return PyBytes_FromStringAndSize(bytes.data(), static_cast<Py_ssize_t>(bytes.size()));
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
    static PyMethodDef methods[]{
        {"is_unseen", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&is_unseen)), METH_FASTCALL, nullptr},
        {"signature", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&signature)), METH_FASTCALL, nullptr},
    };
    for (PyMethodDef& method : methods)
        module.attr(method.ml_name) = pybind11::reinterpret_steal<pybind11::object>(
            PyCFunction_NewEx(&method, nullptr, module.attr("__name__").ptr()));
}

}  // namespace gptkern::unseen
