"""A driver without a GPU for Triton: its own launcher runs, on the addresses of CPU tensors, and starts nothing.

`activate` compiles stub_libcuda.c, loads it under libcuda's name, and makes Triton believe in one H100 (sm_90). The
launcher of Triton then packs its arguments as it always does, and hands them to the stub's cuLaunchKernelEx, of which
`launched` tells what it got. For this process alone, for which there is no way back.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_name("stub_libcuda.c")
_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8, "i1": 1, "u1": 1} | {
    f"{sign}{bits}": bits // 8 for sign in "iu" for bits in (8, 16, 32, 64)
}


def missing() -> str | None:
    """Why there is no stub on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _compiler() is None:
        return "there is no C compiler, which Triton's launcher and the stub need"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "Python.h is missing, which Triton's launcher needs"
    return None


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


@functools.cache
def activate() -> ctypes.CDLL:
    """Makes the stub Triton's driver in this process, for good; returns the library."""
    # Triton 3.6 links a launcher for each kernel's signature with it.
    folder = Path(tempfile.mkdtemp(prefix="gptkern-stub-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "libcuda.so.1"
    flags = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([_compiler(), *flags, "-o", path, SOURCE], check=True)
    # By its soname every later dlopen("libcuda.so.1") of this process finds this one.
    library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)

    import triton
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class Stub(CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_device_capability = lambda device=0: (9, 0)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.set_current_device = lambda device: None

    triton.runtime.driver.set_active(Stub())
    return library


class Launched(NamedTuple):
    """What cuLaunchKernelEx was called with."""

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    parameters: bytes


def launches() -> int:
    """How many launches there were."""
    return ctypes.c_ulong.in_dll(activate(), "launches").value


def record(signature: dict) -> None:
    """From here on a launch keeps the parameters of a kernel with this signature (`CompiledKernel.src.signature`)."""
    sizes = [8 if kind.startswith("*") else _BYTES[kind] for kind in signature.values() if kind != "constexpr"]
    activate().stub_record((ctypes.c_uint * len(sizes))(*sizes), len(sizes))


def launched() -> Launched:
    """The last launch."""
    library = activate()
    words = (ctypes.c_uint * 7).in_dll(library, "last")
    size = ctypes.c_uint.in_dll(library, "recorded").value
    parameters = bytes((ctypes.c_ubyte * size).in_dll(library, "record"))
    function = ctypes.c_void_p.in_dll(library, "last_function").value
    return Launched(function, tuple(words[:3]), words[3], words[6], parameters)
