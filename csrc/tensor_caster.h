// How a bound function takes a PyTorch tensor without knowing PyTorch: by DLPack's table of C functions, which a type
// carries as `__dlpack_c_exchange_api__` (torch.Tensor does from PyTorch 2.11 on). It costs some 50 ns a tensor, where
// each of shape, strides, dtype and address costs more from Python.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor.h"

namespace gptkern::dlpack {

// The layout of DLPack 1's structures. (https://dmlc.github.io/dlpack/latest/c_api.html)
struct DLTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t rank;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};

enum Code : uint8_t { INT = 0, FLOAT = 2, BFLOAT = 4, BOOLEAN = 6 };

struct ExchangeApi {
    uint32_t major, minor;
    void* older;
    void (*allocate)();
    void (*managed_from_object)();
    void (*object_from_managed)();
    int (*tensor_from_object)(void* object, DLTensor* result);  // not 0: Python's exception is set
    int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

// Of the tensors that launchers take: one library's, so all types of them have the same table.
inline const ExchangeApi* table = nullptr;

// From now on launchers take tensors of this type, and of those with the same table. Returns why they cannot, or null.
inline const char* use_tensors_of(pybind11::type type) {
    constexpr uint32_t MAJOR = 1;
    constexpr const char *ATTRIBUTE = "__dlpack_c_exchange_api__", *NAME = "dlpack_exchange_api";
    if (!pybind11::hasattr(type, ATTRIBUTE))
        return "the CUDA kernels take tensors by DLPack's table of C functions, which this PyTorch has not: it needs "
               "PyTorch 2.11 or newer";
    pybind11::object capsule = type.attr(ATTRIBUTE);
    auto* api = PyCapsule_IsValid(capsule.ptr(), NAME)
                    ? static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), NAME))
                    : nullptr;
    if (!api || api->major != MAJOR || !api->tensor_from_object)
        return "the CUDA kernels take tensors by version 1 of DLPack's table of C functions, and this PyTorch has "
               "another";
    table = api;
    return nullptr;
}

inline Dtype dtype_of(const DLTensor& tensor) {
    if (tensor.lanes != 1) return OTHER;
    switch (tensor.code) {
        case FLOAT: return tensor.bits == 32 ? FLOAT32 : tensor.bits == 16 ? FLOAT16 : OTHER;
        case BFLOAT: return tensor.bits == 16 ? BFLOAT16 : OTHER;
        case BOOLEAN: return BOOL;
        case INT: return tensor.bits == 8 ? INT8 : OTHER;
    }
    return OTHER;
}

}  // namespace gptkern::dlpack

namespace pybind11::detail {

// None: no tensor. A `const Tensor*` that a function returns becomes the very object that was passed.
template <>
struct type_caster<gptkern::Tensor> {
    PYBIND11_TYPE_CASTER(gptkern::Tensor, const_name("torch.Tensor | None"));

    bool load(handle source, bool) {
        if (source.is_none()) return true;
        if (!gptkern::dlpack::table) throw std::logic_error("gptkern: a launcher was called before use_tensors_of");
        gptkern::dlpack::DLTensor tensor;
        if (gptkern::dlpack::table->tensor_from_object(source.ptr(), &tensor) != 0) throw error_already_set();
        value = {reinterpret_cast<gptkern::Address>(tensor.data) + tensor.byte_offset,
                 tensor.shape,
                 tensor.strides,
                 tensor.rank,
                 gptkern::dlpack::dtype_of(tensor),
                 source.ptr()};
        return true;
    }

    static handle cast(const gptkern::Tensor& tensor, return_value_policy, handle) {
        return handle(static_cast<PyObject*>(tensor.object)).inc_ref();
    }
};

}  // namespace pybind11::detail
