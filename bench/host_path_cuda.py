"""The CUDA C++ backend for host_path.py: its own launchers, in C++, down to a launch that starts nothing.

Where csrc/ as it is now was compiled by nvcc (`python -m building`; build/cuda/ keeps the objects), these objects are
linked with stub_cudart.c in the place of CUDA's runtime, whose own work in a launch is then not in the numbers.
Elsewhere the module for the emulator stands in, told to skip launches: the same launchers, compiled with -O1. The lines
say which it was.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType

from host_path import as_on_a_gpu, prefer

LIMIT = 3.5
ROOT = Path(__file__).resolve().parents[1]
STUB = Path(__file__).with_name("stub_cudart.c")
_used = "none"


def prepare() -> str | None:
    global _used
    from gptkern.backends import unseen
    from gptkern.backends.cuda import common, emulated

    if (module := _nvccs()) is not None:
        _used = f"{module.compiler}'s objects on a stub of CUDA's runtime"
    elif (reason := emulated.missing()) is not None:
        return reason
    else:
        module = emulated.load()
        module.skip_launches(True)
        _used = "the emulator's build, launches skipped"
    import torch

    as_on_a_gpu(torch)
    common.compiled = functools.cache(lambda: module)
    common.unavailable = lambda index: None
    unseen.ask(module)
    prefer("cuda")
    return None


def versions() -> dict[str, str]:
    return {"module": _used}


def _nvccs() -> ModuleType | None:
    """The module of the objects in build/cuda/ that were made of the sources as they are, or None."""
    import torch

    from gptkern.backends.cuda import emulated, sources

    compiler, c_compiler = emulated.compiler(), shutil.which("gcc") or shutil.which("clang")
    digest = sources.digest(sources.folder())
    for folder in sorted(ROOT.glob("build/cuda/*")):
        notes = folder / "sources.cpp", folder / "build.ninja"
        if compiler is None or c_compiler is None or not all(note.is_file() for note in notes):
            continue
        of_sources, ninja = (note.read_text() for note in notes)
        name, objects = re.search(r"^build (_cuda\S+): link (.*)$", ninja, re.MULTILINE).groups()
        made = folder / name
        if f'"{digest}"' not in of_sources or not made.is_file():
            continue
        if any((folder / each).stat().st_mtime > made.stat().st_mtime for each in objects.split()):
            continue
        with tempfile.TemporaryDirectory(prefix="gptkern-stub-") as temporary:
            stub, module = Path(temporary, "stub.o"), Path(temporary, name)
            subprocess.run([c_compiler, "-O2", "-w", "-fPIC", "-c", str(STUB), "-o", str(stub)], check=True)
            link = [*compiler.split(), "-shared", *objects.split(), str(stub), "-o", str(module)]
            subprocess.run(link, cwd=folder, check=True)
            loader = importlib.machinery.ExtensionFileLoader("gptkern._cuda", str(module))
            spec = importlib.util.spec_from_file_location(loader.name, module, loader=loader)
            loaded = importlib.util.module_from_spec(spec)
            loader.exec_module(loaded)
        assert loaded.use_tensors_of(torch.Tensor) is None
        return loaded
    return None
