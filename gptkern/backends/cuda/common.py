"""What the CUDA launchers share: which compiled module runs a tensor, and the call of one of its functions."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from gptkern.backends import unseen
from gptkern.backends.cuda import sources

# csrc/tensor.h, enum Dtype.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# csrc/device/activation.cuh, enum Activation.
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}
# The norms.
# Blocks a multiprocessor that share the rows of a backward: with 256 threads of at most 128 registers, as many as fit.
BLOCKS_PER_MULTIPROCESSOR = 2
# Of wider rows one block takes more of a multiprocessor, and its partial sums more memory: there are fewer of them.
FULL_BLOCKS_WIDTH = 8192
# Of a width that is no multiple of this, groups of threads walk in steps of as many rows, which are aligned alike.
ROWS_OF_ONE_ALIGNMENT = 8


@functools.cache
def compiled() -> ModuleType:
    """gptkern._cuda: the kernels as nvcc compiled them.

    Raises:
        ImportError: this build has none, or it cannot be loaded.
    """
    return importlib.import_module("gptkern._cuda")


@functools.cache
def _emulated() -> ModuleType:
    # An import statement costs 0.7 µs, also of what is imported.
    from gptkern.backends.cuda import emulated

    return emulated


def library(tensor: torch.Tensor) -> ModuleType:
    """The compiled module that runs a tensor: the emulated one for the CPU."""
    return compiled() if tensor.is_cuda else _emulated().load()


# Launchers of the compiled module by their names, once they were called, with what finds the current device and its
# stream, which not every build of PyTorch has.
_launchers: dict[str, tuple[Callable, Callable, Callable]] = {}


def start(name: str, *arguments, written: tuple[torch.Tensor, ...] = ()) -> None:
    """Starts the kernels of a launcher `name` that a room of csrc/ binds. The first argument is a tensor on its device.

    Tensors go to it as they are, or None, and one that its kernels cannot read in place is copied: shapes, strides and
    alignments are looked at in C++ alone, where that costs a tenth of what it does here.

    Args:
        written: those of the arguments that are a caller's own and are written: a copy of one goes back.
    """
    first = arguments[0]
    known = _launchers.get(name) if first.is_cuda else None
    if known is not None and (index := first.get_device()) == known[1]():
        # What `call` does, without its frame.
        unreadable = known[0](*arguments, known[2](index))
    else:
        unreadable = call(name, first, *arguments)
    if unreadable is not None:
        _start_with_copies(name, list(arguments), unreadable, written)


def _start_with_copies(name: str, arguments: list, unreadable: torch.Tensor, written: tuple) -> None:
    copies = []
    # A copy can be read, so it takes at most one for each argument.
    for _ in range(len(arguments)):
        # Not contiguous(): a contiguous view may begin anywhere. One tensor may be several arguments.
        copy = unreadable.clone(memory_format=torch.contiguous_format)
        copies.append((unreadable, copy))
        arguments = [copy if argument is unreadable else argument for argument in arguments]
        unreadable = call(name, arguments[0], *arguments)
        if unreadable is None:
            for original, copy in copies:
                if any(original is tensor for tensor in written):
                    original.copy_(copy)
            return
    raise RuntimeError(f"{name} cannot read a contiguous copy: of shape {tuple(unreadable.shape)}")


def call(name: str, tensor: torch.Tensor, *arguments) -> torch.Tensor | None:
    """Calls the launcher `name` of csrc/ with the arguments and a stream: PyTorch's current one on the tensor's device.

    Returns:
        None, or which of the arguments the kernels cannot read in place: nothing has been started then.

    Raises:
        RuntimeError: the launch failed; the message has the kernel's name and its configuration.
    """
    if not tensor.is_cuda:
        return getattr(library(tensor), name)(*arguments, 0)
    known = _launchers.get(name)
    if known is None:
        launcher = getattr(library(tensor), name)
        known = _launchers[name] = launcher, torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream
    launcher, current_device, current_stream = known
    index = tensor.get_device()
    stream = current_stream(index)
    if index == current_device():
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
def most_partials(width: int, device: torch.device) -> int:
    """How many partial sums of the norms' parameter gradients are made, of enough rows."""
    partials = BLOCKS_PER_MULTIPROCESSOR * multiprocessors(device)
    if width > FULL_BLOCKS_WIDTH:
        partials = partials * FULL_BLOCKS_WIDTH // width
    return max(partials, ROWS_OF_ONE_ALIGNMENT if width % ROWS_OF_ONE_ALIGNMENT else 1)


def as_read(parameter: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A parameter of `dtype` or float32, as the kernels of the norms read it."""
    if parameter is None or (of := parameter.dtype) is dtype or of is torch.float32:
        return parameter
    # 16-bit parameters beside a sum that a residual has widened, or beside the other 16-bit dtype.
    return parameter.float()


@functools.cache
def not_built() -> str | None:
    """Why there is no compiled module that can be used in this process, whatever the GPU; or None.

    The build leaves a note where it compiled nothing.
    """
    if importlib.util.find_spec("gptkern._cuda") is None:
        note = Path(__file__).with_name("not_built.txt")
        reason = f": {note.read_text(encoding='utf-8').strip()}" if note.is_file() else ""
        return f"there are no CUDA kernels in this build{reason}"
    try:
        module = compiled()
    except ImportError as error:
        return f"the CUDA kernels cannot be loaded: {error}"
    csrc = sources.folder()
    # Launchers and kernels that differ in their arguments would read wrong memory.
    if csrc is not None and module.sources != sources.digest(csrc):
        return f"the CUDA kernels were not compiled from {csrc} as it is now: install gptkern again"
    reason = module.use_tensors_of(torch.Tensor)
    if reason is None:
        unseen.ask(module)
    return reason


@functools.cache
def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver knows, (13, 0); None where there is no driver.

    Asked of the driver itself: PyTorch has no function for it.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(version)) or version.value == 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


@functools.cache
def unavailable(index: int | None) -> str | None:
    """Why the compiled module cannot run on this GPU, or None."""
    reason = not_built()
    if reason is not None:
        return reason
    module = compiled()
    built_with = tuple(map(int, re.search(r"(\d+)\.(\d+)", module.compiler).groups()))
    driver_has = driver_cuda()
    if driver_has is None:
        return "the CUDA driver (libcuda.so.1) cannot be loaded, or does not say its version"
    # The CUDA runtime in the module runs on a driver of its own major version, whatever the minor one.
    if driver_has[0] < built_with[0]:
        return (
            f"the CUDA kernels were built with CUDA {built_with[0]}.{built_with[1]} and this driver is for CUDA "
            f"{driver_has[0]}.{driver_has[1]}: update the driver, or build with a CUDA {driver_has[0]} toolkit"
        )
    major, minor = torch.cuda.get_device_capability(index)
    # PTX is compiled by the driver, which knows none newer than itself.
    if not covers(module.architectures, major * 10 + minor, ptx=driver_has >= built_with):
        return (
            f"the CUDA kernels were built for {module.architectures} and this GPU has compute capability "
            f"{major}.{minor}: install gptkern again on this machine, or with GPTKERN_CUDA_ARCHS={major}{minor}"
        )
    return None


def covers(architectures: str, capability: int, *, ptx: bool = True) -> bool:
    """Whether code for the architectures ("80;90a;90+PTX") runs on a GPU of this compute capability (90, say).

    Machine code runs on its own major version from its minor version on ("f" as well); with an "a", on that GPU alone.
    PTX runs on that and on everything newer; with an "a" or "f", where its machine code would.
    (CUDA C++ Programming Guide, "Application Compatibility")

    Args:
        ptx: whether the driver can compile PTX as new as this.
    """
    for name in architectures.split(";"):
        number = name.removesuffix("+PTX")
        built = int(number.rstrip("af"))
        if number.endswith("a"):
            runs = capability == built
        else:
            runs = capability // 10 == built // 10 and capability >= built
        if name.endswith("+PTX"):
            # Machine code comes with it, unless another entry gives it: building/toolchain.py.
            runs = ptx and (runs or (number == str(built) and capability >= built))
        if runs:
            return True
    return False
