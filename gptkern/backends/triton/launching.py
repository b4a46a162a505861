"""Whether Triton, where it is installed, can launch a kernel on this machine's NVIDIA GPUs.

It brings a compiler for kernels and none for C. What hands a kernel to the driver it builds at the first launch, as an
extension module of Python (3.6: one for each signature of a kernel as well), which needs

    a C compiler      CC, else gcc or clang on PATH; what it has built stays in TRITON_CACHE_DIR
    Python.h          python3-dev, python3-devel
    libcuda.so.1      in the folder TRITON_LIBCUDA_PATH, else as /sbin/ldconfig knows it, else in LD_LIBRARY_PATH

Containers often lack one of them, beside a GPU that PyTorch uses well.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMPILERS = ("gcc", "clang")


@functools.cache
def missing() -> str | None:
    """Why Triton cannot launch kernels in this process, or None. Only for where PyTorch sees an NVIDIA GPU.

    Triton is asked to do what its first launch begins with, which then finds it done.
    """

    def active() -> Any:
        import triton

        return triton.runtime.driver.active

    return missing_for(active)


def missing_for(made: Callable[[], Any]) -> str | None:
    """Why launches by a Triton driver would fail, or None.

    Args:
        made: makes the driver, which is what a first launch does.
    """
    try:
        utils = made().utils
        from triton import knobs

        _ = knobs.nvidia.ptxas
    except Exception as error:
        return f"Triton cannot launch kernels here: {_in_words(error)}"
    # Up to 3.6 a kernel's launcher is built when the kernel is first launched, whatever is built by now.
    reason = None if hasattr(utils, "launch") else _no_compiler() or _no_headers()
    return reason and f"Triton cannot launch kernels here: {reason}"


def _in_words(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.filename == "/sbin/ldconfig":
        return (
            "it asks /sbin/ldconfig for libcuda.so.1, and there is none: set TRITON_LIBCUDA_PATH to the folder that "
            "holds libcuda.so.1"
        )
    if isinstance(error, AssertionError) and "libcuda.so" in str(error):
        return (
            "it does not find the driver, libcuda.so.1: run ldconfig as root, or set TRITON_LIBCUDA_PATH to the folder "
            "that holds it"
        )
    reason = None
    if isinstance(error, (RuntimeError, FileNotFoundError)):
        reason = _no_compiler()
    elif isinstance(error, subprocess.CalledProcessError):
        command = error.cmd if isinstance(error.cmd, str) else error.cmd[0]
        failed = f"it builds its launcher with {command}, which ended with {error.returncode}"
        reason = _no_headers() or _no_driver() or failed
    first, *_ = str(error).splitlines() or [""]
    return reason or f"{type(error).__name__}: {first}"


def _no_compiler() -> str | None:
    given = os.environ.get("CC")
    if given is None and not any(shutil.which(name) for name in COMPILERS):
        return "it builds its launcher with a C compiler, and there is none: install gcc or clang, or set CC"
    # Taken as the name of one program, whatever is in it.
    if given is not None and not shutil.which(given):
        return f"it builds its launcher with CC, which is {given!r} and is not found"
    return None


def _no_driver() -> str | None:
    folder = os.environ.get("TRITON_LIBCUDA_PATH")
    if not folder or Path(folder, "libcuda.so.1").is_file():
        return None
    return f"TRITON_LIBCUDA_PATH is {folder!r}, and there is no libcuda.so.1 in it"


def _no_headers() -> str | None:
    scheme = sysconfig.get_default_scheme()
    # As Triton has it: 'posix_local' of Debian's Python has no headers.
    include = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if Path(include, "Python.h").is_file():
        return None
    return (
        f"it builds its launcher with Python's own headers, and there is no Python.h in {include}: install your "
        "system's python3-dev or python3-devel"
    )
