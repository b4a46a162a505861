"""The CUDA kernels on a CPU: builds csrc/ for its emulator with a host compiler, at first use, and loads it.

    GPTKERN_EMULATE_CUDA=1          CPU tensors may run the cuda backend
    GPTKERN_EMULATE_CUDA_SEED=n     the schedule of the first launch (default 1); later launches count on from it
    GPTKERN_SANITIZE=1              built with AddressSanitizer and UndefinedBehaviorSanitizer, whose libraries have
                                    to be loaded before Python: see `sanitizer_environment`
    CXX                             the compiler, for C++20 (default: g++, else clang++)
    MAX_JOBS                        how many of them run at a time (default: one for each core)

Objects are kept in gptkern's cache by a hash of what they are made of, so a change compiles what it touches. What
nobody has used for UNUSED_DAYS is removed when something new is built.
`python -m gptkern.backends.cuda.emulated` builds and says where.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

from gptkern.backends.cuda import sources
from gptkern.backends.tables import user

NAME = "_cuda_emulated"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
# -O1: kernels are compiled four times as fast as with -O2 and a test calls each of them but a few times. The emulator's
# own files are few and run all the time.
_FLAGS = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-DGPTKERN_EMULATED", "-Wno-unknown-pragmas", "-g1")

UNUSED_DAYS = 30


class CompilerError(ImportError):
    """The emulated kernels cannot be built here; the message says why."""


def sanitized() -> bool:
    return os.environ.get("GPTKERN_SANITIZE") == "1"


@functools.cache
def compiler() -> str | None:
    """The host compiler, or None where there is none."""
    command = sources.host_compiler()
    return None if command is None else " ".join(command)


def missing() -> str | None:
    """Why the emulated module cannot be built here, or None."""
    if sources.folder() is None:
        return "the sources of the CUDA kernels (csrc) are not installed"
    if compiler() is None:
        return sources.no_host_compiler()
    if sources.pybind11_include() is None:
        return "the emulated CUDA kernels need pybind11: pip install pybind11"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's own headers are missing: install your system's python3-dev or python3-devel"
    if user.folder() is None:
        return "this system names no folder for caches: set GPTKERN_CACHE"
    # What the module itself finds out at its first use, and more exactly: building it takes minutes.
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return "the emulated CUDA kernels need PyTorch 2.11 or newer"
    return None


@functools.cache
def load() -> ModuleType:
    """The emulated module, built now if it is not in the cache.

    Raises:
        CompilerError: something is missing (see `missing`), or the compiler failed.
        ImportError: it cannot take this PyTorch's tensors.
    """
    return taking_tensors(loaded(NAME, build(quiet=False)))


def taking_tensors(module: ModuleType) -> ModuleType:
    """The module of csrc/, whose launchers take PyTorch's tensors from now on."""
    reason = module.use_tensors_of(torch.Tensor)
    if reason is not None:
        raise ImportError(reason)
    return module


def loaded(name: str, path: Path) -> ModuleType:
    """The module of a path that `build_units` returned."""
    loader = importlib.machinery.ExtensionFileLoader(f"gptkern.{name}", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(loader.name, path, loader=loader))
    loader.exec_module(module)
    module.set_seed(int(os.environ.get("GPTKERN_EMULATE_CUDA_SEED", "1")))
    return module


def build(*, quiet: bool) -> Path:
    """Compiles what the cache does not hold and returns the module's path."""
    csrc = _csrc()
    return build_units(NAME, [*sources.kernel_units(csrc), *sources.host_units(csrc, emulated=True)], quiet=quiet)


def build_with(name: str, own: Iterable[Path], *, quiet: bool) -> Path:
    """As `build`, of a module that holds the emulator and the given sources in place of csrc's kernels: for tests.

    One of them defines the Python module `name`.
    """
    return build_units(
        name, [*sources.emulator_units(_csrc()), *(sources.Unit(path.stem, path, ()) for path in own)], quiet=quiet
    )


def _csrc() -> Path:
    csrc = sources.folder()
    if csrc is None:
        raise CompilerError("the sources of the CUDA kernels (csrc) are not installed")
    return csrc


def build_units(name: str, units: Iterable[sources.Unit], *, quiet: bool) -> Path:
    reason = missing()
    if reason is not None:
        raise CompilerError(reason)
    command, pybind11 = compiler(), Path(sources.pybind11_include())
    folder = user.folder() / "emulated"
    folder.mkdir(parents=True, exist_ok=True)

    extra = SANITIZERS if sanitized() else ()
    system = (f"-isystem{pybind11}", f"-isystem{sysconfig.get_path('include')}")
    common = hashlib.sha256(repr((command, _version(command), _FLAGS, extra, sys.version)).encode())
    # It holds pybind11's version.
    common.update((pybind11 / "pybind11" / "detail" / "common.h").read_bytes())

    jobs = []
    for unit in units:
        # The sanitizers' checks make kernels compile three times as long with -O1 as without.
        kernels_level = "-O0" if sanitized() else "-O1"
        optimise = "-O3" if unit.source.parent.name == "emulator" else kernels_level
        csrc = _tree_of(unit.source)
        flags = [*_FLAGS, optimise, *extra, f"-I{csrc}", *system, *(f"-D{define}" for define in unit.defines)]
        digest = common.copy()
        digest.update(repr((unit.defines, optimise)).encode())
        for path in sources.included(unit.source, csrc):
            digest.update(path.name.encode() + path.read_bytes())
        target = folder / f"{unit.name}-{digest.hexdigest()[:16]}.o"
        jobs.append((target, [*command.split(), *flags, "-x", "c++", "-c", str(unit.source), "-o"]))

    new = [job for job in jobs if not _used(job[0])]
    if new and not quiet:
        print(
            f"gptkern: compiling {len(new)} of {len(jobs)} parts of the emulated CUDA kernels: minutes, once",
            file=sys.stderr,
        )
    with ThreadPoolExecutor(sources.jobs()) as pool:
        list(pool.map(lambda job: _once(*job), new))
    names = " ".join(target.name for target, _ in jobs)
    module = (
        folder / f"{name}-{hashlib.sha256(names.encode()).hexdigest()[:16]}{sysconfig.get_config_var('EXT_SUFFIX')}"
    )
    link = [*command.split(), "-shared", *extra, *(str(target) for target, _ in jobs), "-o"]
    if not _used(module):
        _once(module, link)
        _prune(folder)
    return module


def _tree_of(source: Path) -> Path:
    """The csrc/ whose headers a source includes: the one it is in, which may be a changed copy, or the package's."""
    return next((parent for parent in source.parents if (parent / "bindings.cpp").is_file()), sources.folder())


def _used(path: Path) -> bool:
    """Whether the file is there; if so it counts as used today, which is what `_prune` goes by."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # somebody else's cache, which may be used all the same
        pass
    return True


def _prune(folder: Path) -> None:
    """Removes what nobody has used for UNUSED_DAYS, and what a build that was killed has left so long ago."""
    oldest = time.time() - UNUSED_DAYS * 24 * 60 * 60
    for path in folder.iterdir():
        # Another process may prune too.
        with contextlib.suppress(OSError):
            if path.is_file() and path.stat().st_mtime < oldest:
                path.unlink()


@functools.cache
def _version(command: str) -> str:
    return subprocess.run([*command.split(), "--version"], capture_output=True, text=True).stdout


def _once(target: Path, command: list[str]) -> None:
    """Makes `target`, which appears whole or not at all; several processes may try at a time, and one does the work."""
    with _locked(target):
        if target.exists():
            return
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        try:
            # What is loaded before Python for the sanitizers has no business in a compiler.
            environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
            done = subprocess.run([*command, name], capture_output=True, text=True, env=environment)
            if done.returncode:
                raise CompilerError(f"{' '.join(command)} failed:\n{done.stderr}")
            os.chmod(name, 0o755)
            os.replace(name, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    lock = target.with_name(f"{target.name}.lock")
    with open(lock, "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except ImportError:  # not on this system: the work may be done twice, the result is the same
            pass
        yield
    with contextlib.suppress(OSError):
        lock.unlink()


def sanitizer_environment() -> dict[str, str]:
    """What a Python process needs in its environment to load a module built with the sanitizers."""
    command = compiler()
    if command is None:
        raise CompilerError(sources.no_host_compiler())
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        found = subprocess.run([*command.split(), f"-print-file-name={name}"], capture_output=True, text=True)
        path = Path(found.stdout.strip())
        if not path.is_absolute():
            raise CompilerError(f"{command} has no {name}")
        libraries.append(str(path.resolve()))
    return {
        "GPTKERN_EMULATE_CUDA": "1",
        "GPTKERN_SANITIZE": "1",
        "LD_PRELOAD": " ".join(libraries),
        # Python frees little at its end, and a module opened twice holds each symbol twice.
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


if __name__ == "__main__":
    try:
        print(build(quiet=False))
    except CompilerError as error:
        sys.exit(f"gptkern: {error}")
