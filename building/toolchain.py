"""Whether the CUDA kernels are built, with which nvcc and for which GPUs.

    GPTKERN_CUDA=0        they are not built
    GPTKERN_CUDA=1        they are built, or the build fails; nvcc is fetched as wheels where there is none
    unset                 they are built where there is an nvcc; where there is none but a GPU, nvcc is fetched; else
                          the package is built without them, and says why
    GPTKERN_CUDA_ARCHS    "80;90a;90+PTX": see `parse_architectures`; default: those of the GPUs present, else
                          DEFAULT_ARCHITECTURES
    CUDA_HOME             the toolkit to use; else the nvcc on PATH, else the one that wheels brought
    CXX                   the C++ compiler; default: g++, else clang++
    MAX_JOBS              how many compilers run at a time; default: one for each core

What can be known to be missing before anything is compiled (nvcc, a compiler, Python's headers) leaves the package
without CUDA kernels, unless GPTKERN_CUDA=1. A compiler that fails is always an error: pip shows nothing of a build that
succeeds, so a fallback would go unseen.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# One version for the whole family: nvcc asks for crt and nvvm of any version, and fails with newer ones. CUDA 13.0 runs
# on every driver that knows CUDA 13. The runtime's and cccl's wheels count their patches by themselves.
NVCC_WHEELS = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
)
_WHEELS_CUDA = 13
_WHEELS_NVCC = Path("nvidia", "cu13", "bin", "nvcc")  # in site-packages
_WHEELS_MACHINES = ("x86_64", "aarch64")
_PYBIND11 = "pybind11>=2.13"
_NINJA = "ninja>=1.11"

# Machine code for the GPUs that kernels run on, and PTX, which the driver compiles, for newer ones.
DEFAULT_ARCHITECTURES = "80;86;89;90a;90+PTX"
LEAST_CAPABILITY = 80
# C++20.
_LEAST_NVCC = (12, 0)

WITHOUT = "To install without CUDA kernels (Triton and PyTorch remain), set GPTKERN_CUDA=0."


class BuildError(Exception):
    """The CUDA kernels cannot be built as asked; the message says what is missing."""


class Nvcc(NamedTuple):
    """A CUDA toolkit's compiler."""

    path: Path  # nvcc, or a script that calls it
    version: str  # "13.0.88"
    root: Path  # the toolkit
    target: str  # the folder of include/ and lib/ in root: "targets/x86_64-linux", or "." for nvcc of wheels
    capabilities: tuple[int, ...]  # what it has machine code for: 80, 90, …


class Gpus(NamedTuple):
    """The NVIDIA GPUs of this machine."""

    capabilities: tuple[int, ...]  # 90 for 9.0; each once
    driver_cuda: int | None  # the driver's CUDA, major version


class Plan(NamedTuple):
    """What the build does about the CUDA kernels."""

    forced: bool  # GPTKERN_CUDA=1
    missing: str | None  # why they are not built, or None
    nvcc: Nvcc | None
    architectures: tuple[str, ...]
    requirements: tuple[str, ...]  # what pip is to install for the build

    def check(self) -> None:
        """Raises BuildError where the kernels must be built (`forced`) and cannot."""
        if self.missing is not None:
            raise BuildError(f"the CUDA kernels cannot be built: {self.missing}.\n{WITHOUT}")


def plan(*, fetching: bool) -> Plan:
    """What to build.

    Args:
        fetching: requirements can still be installed. Otherwise what is missing now is missing.

    Raises:
        BuildError: a variable's value is wrong.
    """
    asked = os.environ.get("GPTKERN_CUDA", "")
    if asked not in ("", "0", "1"):
        raise BuildError(f"GPTKERN_CUDA must be 0, 1 or unset, and is {asked!r}")
    forced = asked == "1"
    if asked == "0":
        return Plan(False, "it was built with GPTKERN_CUDA=0", None, (), ())
    nvcc, passed_over = find_nvcc()
    present = gpus()
    architectures = choose_architectures(os.environ.get("GPTKERN_CUDA_ARCHS", ""), present.capabilities, nvcc)
    missing = _missing_always(present, forced) or _missing_nvcc(nvcc, passed_over, present, forced, fetching)
    requirements = []
    if missing is None and fetching:
        # A ninja of the system's is good enough. pybind11 has to be in the build's own environment.
        requirements += [
            _PYBIND11,
            *([] if shutil.which("ninja") else [_NINJA]),
            *(NVCC_WHEELS if nvcc is None else []),
        ]
    elif missing is None:
        missing = _missing_tools()
    return Plan(forced, missing, nvcc, architectures, tuple(requirements))


def _missing_always(present: Gpus, forced: bool) -> str | None:
    if not sys.platform.startswith("linux"):
        return f"CUDA kernels are built on Linux alone, and this is {sys.platform}"
    csrc = sources().folder()
    if csrc is None or not any(sources().kernel_units(csrc)):
        return "the source tree has no CUDA kernels (csrc/*/*.cu)"
    if present.capabilities and max(present.capabilities) < LEAST_CAPABILITY and not forced:
        best = max(present.capabilities)
        return f"the GPU has compute capability {best // 10}.{best % 10}, and the kernels need 8.0"
    if sources().host_compiler() is None:
        return sources().no_host_compiler()
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        return f"Python's own headers are missing ({header}): install your system's python3-dev or python3-devel"
    return None


def _missing_nvcc(nvcc: Nvcc | None, passed_over: list[str], present: Gpus, forced: bool, fetching: bool) -> str | None:
    if nvcc is not None:
        return None
    nowhere = "; ".join(["there is no nvcc", *passed_over])
    if not forced and not present.capabilities:
        return f"{nowhere}; and no NVIDIA GPU, so that none was fetched (GPTKERN_CUDA=1 fetches it)"
    if os.uname().machine not in _WHEELS_MACHINES:
        return f"{nowhere}; and no wheel brings one for {os.uname().machine}"
    if not forced and present.driver_cuda is not None and present.driver_cuda < _WHEELS_CUDA:
        return (
            f"{nowhere}; the one that wheels bring needs a driver for CUDA {_WHEELS_CUDA}, and this driver is for CUDA "
            f"{present.driver_cuda}: update the driver, or install a CUDA {present.driver_cuda} toolkit"
        )
    if not fetching:
        return f"{nowhere}; without build isolation, do `pip install {' '.join(NVCC_WHEELS)}`"
    return None


def _missing_tools() -> str | None:
    for name, found in (("pybind11", sources().pybind11_include()), ("ninja", find_ninja())):
        if found is None:
            return f"{name} is not installed: without build isolation, do `pip install {name}`"
    return None


# --- What is here -----------------------------------------------------------------------------------------------------


@functools.cache
def sources():
    """gptkern.backends.cuda.sources: by its path, for gptkern imports PyTorch."""
    path = ROOT / "gptkern" / "backends" / "cuda" / "sources.py"
    spec = importlib.util.spec_from_file_location("gptkern_sources", path)
    module = importlib.util.module_from_spec(spec)
    # NamedTuple looks its module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def find_nvcc() -> tuple[Nvcc | None, list[str]]:
    """(nvcc or None, why each place was passed over): CUDA_HOME's, PATH's, that of wheels."""
    passed_over = []
    home = os.environ.get("CUDA_HOME")
    on_path = shutil.which("nvcc")
    places = [
        (f"CUDA_HOME ({home})" if home else "CUDA_HOME", Path(home, "bin", "nvcc") if home else None),
        ("PATH", Path(on_path) if on_path else None),
        *(("wheels", Path(folder, _WHEELS_NVCC)) for folder in sys.path if Path(folder, _WHEELS_NVCC).is_file()),
    ]
    for name, path in places:
        if path is None:
            passed_over.append("CUDA_HOME is not set" if name == "CUDA_HOME" else f"none on {name}")
            continue
        if not path.is_file():
            passed_over.append(f"none in {name}")
            continue
        found = describe_nvcc(path)
        if isinstance(found, Nvcc):
            return found, passed_over
        passed_over.append(f"{path} {found}")
    return None, passed_over


def describe_nvcc(path: Path) -> Nvcc | str:
    """The nvcc at this path, or what is wrong with it."""
    version = re.search(r"\bV(\d+\.\d+\.\d+)", _output([str(path), "--version"]))
    if version is None:
        return "does not say its version"
    if tuple(map(int, version[1].split(".")))[:2] < _LEAST_NVCC:
        return f"is nvcc {version[1]}, and C++20 needs {'.'.join(map(str, _LEAST_NVCC))}"
    # Where it takes the rest of the toolkit from: nvcc may be a script, and toolkits differ in their folders.
    settings = dict(
        re.findall(r"^#\$ (\w+)=(.*?)\s*$", _output([str(path), "--dryrun", "-c", "none.cu"]), re.MULTILINE)
    )
    if "TOP" not in settings:
        return "does not say where its toolkit is (nvcc --dryrun)"
    known = re.findall(r"sm_(\d+)\b", _output([str(path), "--list-gpu-code"]))
    if not known:
        return "does not say which GPUs it knows (nvcc --list-gpu-code)"
    return Nvcc(
        path,
        version[1],
        Path(settings["TOP"]).resolve(),
        settings.get("_TARGET_DIR_") or ".",
        tuple(sorted({int(number) for number in known})),
    )


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout + done.stderr


def find_ninja() -> str | None:
    """The ninja on PATH, else the ninja wheel's."""
    found = shutil.which("ninja")
    if found is None and importlib.util.find_spec("ninja") is not None:
        import ninja

        found = shutil.which("ninja", path=ninja.BIN_DIR)
    return found


def gpus() -> Gpus:
    """What NVML, the driver's library, says; nothing where there is no driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return Gpus((), None)
    if nvml.nvmlInit_v2():
        return Gpus((), None)
    with contextlib.ExitStack() as stack:
        stack.callback(nvml.nvmlShutdown)
        count, version = ctypes.c_uint(0), ctypes.c_int(0)
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        failed = nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version))
        found = set()
        for index in range(count.value):
            device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)):
                continue  # no permission, or lost
            if not nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)):
                found.add(major.value * 10 + minor.value)
        return Gpus(tuple(sorted(found)), None if failed else version.value // 1000)


# --- Architectures ----------------------------------------------------------------------------------------------------


def choose_architectures(asked: str, present: tuple[int, ...], nvcc: Nvcc | None) -> tuple[str, ...]:
    """GPTKERN_CUDA_ARCHS, else those of the GPUs that kernels can run on, else DEFAULT_ARCHITECTURES."""
    if asked.strip():
        return parse_architectures(asked, nvcc)
    able = [capability for capability in present if capability >= LEAST_CAPABILITY]
    if able:
        return tuple(dict.fromkeys(_own(capability, nvcc) for capability in able))
    return parse_architectures(DEFAULT_ARCHITECTURES, nvcc)


def _own(capability: int, nvcc: Nvcc | None) -> str:
    """The architecture for a GPU that is here."""
    if capability == 90:
        # Hopper's own instructions exist under this name alone.
        return "90a"
    if nvcc is None or capability in nvcc.capabilities:
        return str(capability)
    # A GPU newer than nvcc: PTX, which the driver compiles.
    return f"{max(known for known in nvcc.capabilities if known < capability)}+PTX"


def parse_architectures(text: str, nvcc: Nvcc | None = None) -> tuple[str, ...]:
    """GPTKERN_CUDA_ARCHS as a list: "80;9.0a;90+PTX" -> ("80", "90a", "90+PTX").

    A compute capability gives machine code for it; with an "a" or "f", with the instructions of that GPU or family
    alone; with "+PTX" also PTX, for it and all newer GPUs, and the machine code only where no other entry gives it.

    Raises:
        BuildError: it cannot be read, is too old for the kernels, or unknown to this nvcc.
    """

    def wrong(what: str) -> BuildError:
        return BuildError(
            f'GPTKERN_CUDA_ARCHS is {text!r}: {what}. It needs compute capabilities from 8.0 on, such as "80;90a" or '
            f'"{DEFAULT_ARCHITECTURES}"'
        )

    found = {}
    for word in re.split(r"[;,\s]+", text.strip("; ,\t")):
        match = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", word)
        if match is None:
            raise wrong(f"{word!r} is no architecture")
        capability = int(match[1] + match[2])
        if capability < LEAST_CAPABILITY:
            raise wrong(f"{word!r} is too old for the kernels")
        if nvcc is not None and capability not in nvcc.capabilities:
            known = ", ".join(str(known) for known in nvcc.capabilities if known >= LEAST_CAPABILITY)
            raise wrong(f"nvcc {nvcc.version} does not know {word!r}, but {known}")
        found[f"{capability}{match[3]}{match[4] or ''}"] = None
    return tuple(found)


def gencode(architectures: tuple[str, ...]) -> list[str]:
    """nvcc's options for `parse_architectures`'s list."""
    numbers = [name.removesuffix("+PTX").rstrip("af") for name in architectures if not name.endswith("+PTX")]
    options = []
    for name in architectures:
        number = name.removesuffix("+PTX")
        if name == number:
            code = f"sm_{number}"
        elif number.rstrip("af") in numbers:
            code = f"compute_{number}"
        else:
            code = f"[sm_{number},compute_{number}]"
        options += ["-gencode", f"arch=compute_{number},code={code}"]
    return options
