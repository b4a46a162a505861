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

inline const ExchangeApi* exchange_api(pybind11::handle tensor) {
    constexpr uint32_t MAJOR = 1;
    pybind11::object capsule = pybind11::type::of(tensor).attr("__dlpack_c_exchange_api__");
    auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw pybind11::error_already_set();
    if (api->major != MAJOR || !api->tensor_from_object)
        throw std::runtime_error("gptkern: the CUDA kernels take tensors by DLPack 1.2 or newer of its major version, "
                                 "which this PyTorch has not");
    return api;
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
        // Tensors are of one library: all types of it have the same table.
        static const gptkern::dlpack::ExchangeApi* api = gptkern::dlpack::exchange_api(source);
        gptkern::dlpack::DLTensor tensor;
        if (api->tensor_from_object(source.ptr(), &tensor) != 0) throw error_already_set();
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
