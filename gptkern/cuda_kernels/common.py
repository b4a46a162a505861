"""What the CUDA launchers share: which compiled module runs a tensor, and the call of one of its functions."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch

# csrc/launchers.h, enum Dtype.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@functools.cache
def compiled() -> ModuleType:
    """gptkern._cuda: the kernels as nvcc compiled them.

    Raises:
        ImportError: this build has none, or it cannot be loaded.
    """
    return importlib.import_module("gptkern._cuda")


def library(tensor: torch.Tensor) -> ModuleType:
    """The compiled module that runs a tensor: the emulated one for the CPU."""
    if tensor.is_cuda:
        return compiled()
    from gptkern.cuda_kernels import emulated

    return emulated.load()


def call(name: str, tensor: torch.Tensor, *arguments) -> None:
    """Calls the launcher `name` of csrc/ with the arguments and a stream: PyTorch's current one on the tensor's device.

    Raises:
        RuntimeError: the launch failed; the message has the kernel's name and its configuration.
    """
    launcher = getattr(library(tensor), name)
    if not tensor.is_cuda:
        return launcher(*arguments, 0)
    index = tensor.get_device()
    stream = torch._C._cuda_getCurrentRawStream(index)
    if index == torch._C._cuda_getDevice():
        return launcher(*arguments, stream)
    with torch.cuda.device(index):
        return launcher(*arguments, stream)


def address(tensor: torch.Tensor | None) -> int:
    """The address of the first element; 0 where there is no tensor."""
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; under the emulator 2, so that blocks have several shares of the work."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def unavailable(index: int | None) -> str | None:
    """Why the compiled module cannot run on this GPU, or None."""
    try:
        module = compiled()
    except ImportError as error:
        if importlib.util.find_spec("gptkern._cuda") is None:
            return "there are no CUDA kernels in this build"
        return f"the CUDA kernels cannot be loaded: {error}"
    major, minor = torch.cuda.get_device_capability(index)
    if not covers(module.architectures, major * 10 + minor):
        return (
            f"the CUDA kernels were built for {module.architectures} and this GPU has compute capability "
            f"{major}.{minor}"
        )
    return None


def covers(architectures: str, capability: int) -> bool:
    """Whether code for the architectures ("80;90a;90+PTX") runs on a GPU of this compute capability (90, say).

    Machine code runs on its own major version from its minor version on; with an "a", on that GPU alone; PTX, on
    everything newer. (CUDA C++ Programming Guide, "Application Compatibility")
    """
    for name in architectures.split(";"):
        built = int(name.removesuffix("+PTX").rstrip("af"))
        if name.endswith("+PTX"):
            if capability >= built:
                return True
        elif name.endswith("a"):
            if capability == built:
                return True
        elif capability // 10 == built // 10 and capability >= built:
            return True
    return False
