"""Compiles csrc/ into gptkern._cuda: writes a ninja file and runs ninja.

    build/cuda/<nvcc>-<architectures>/
        build.ninja
        <unit>.o, <unit>.ptxas.txt     of each kernel unit; what ptxas says of registers, shared memory and spills
        bindings.<python>.o, <room>_binding.<python>.o
                                       the Python module: the only part that depends on the version of Python
        _cuda.<python>.so

The folder outlives pip's build environment. The paths into that environment (nvcc, pybind11) change with each build and
would compile everything again, so commands reach them through links in the folder; versions.txt, which everything
depends on, and versions.<python>.txt say what they point at.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from building import toolchain
from building.toolchain import WITHOUT, BuildError, Nvcc, Plan

NAME = "_cuda"
_PYTHON = sysconfig.get_config_var("SOABI")

# No fast math: divisions and square roots are IEEE's, as the tolerances ask. -v: ptxas reports resources.
_NVCC_FLAGS = ("-std=c++20", "-O3", "-Xptxas", "-v")
_HOST_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden")
# The static CUDA runtime's symbols stay inside, as PyTorch's process has a runtime of its own; that of CUDA 13.0 hides
# them itself. -s: no debug information.
_LINK_FLAGS = ("-shared", "-s", "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections")
_LINK_LIBRARIES = ("-ldl", "-lrt", "-lpthread")
# nvcc has --compress-mode from 12.8 on. What it makes needs a driver for CUDA 12.4, and a module has to run on every
# driver of its own major version: those for CUDA 13 all read it.
_COMPRESSES = (13, 0)


def compile_into(plan: Plan, package: Path) -> Path:
    """Compiles what changed and puts the module into the package's folder; the module's path.

    Raises:
        BuildError: a compiler failed; what it said has been printed.
    """
    plan.check()
    nvcc = plan.nvcc
    try:
        jobs = toolchain.sources().jobs()
    except ValueError as error:
        raise BuildError(str(error)) from error
    csrc = toolchain.sources().folder()
    folder = toolchain.ROOT / "build" / "cuda" / f"{nvcc.version}-{'-'.join(plan.architectures)}".replace("+", "_")
    folder.mkdir(parents=True, exist_ok=True)
    _link(folder / "toolkit", nvcc.root)
    _link(folder / "pybind11", Path(toolchain.sources().pybind11_include()))
    _write(folder / "versions.txt", _versions(nvcc))
    _write(folder / f"versions.{_PYTHON}.txt", _python_versions())
    digest = toolchain.sources().digest(csrc)
    _write(folder / "sources.cpp", f'namespace gptkern {{ extern const char SOURCES[] = "{digest}"; }}\n')
    _write(folder / "build.ninja", ninja_file(plan, csrc, folder))
    print(
        f"gptkern: CUDA kernels with nvcc {nvcc.version} ({nvcc.path}) for {';'.join(plan.architectures)}, in {folder}",
        flush=True,
    )
    command = [toolchain.find_ninja(), "-C", str(folder), "-j", str(jobs)]
    if subprocess.run(command, env={**os.environ, "NINJA_STATUS": "[%f/%t, %es] "}).returncode:
        raise BuildError(f"the CUDA kernels could not be compiled: what failed is above.\n{WITHOUT}")
    # A new file: a process may have the old one open.
    target = package / module_name()
    partial = package / f".{target.name}.partial"
    shutil.copyfile(folder / module_name(), partial)
    os.chmod(partial, 0o755)
    os.replace(partial, target)
    note(package, None)
    return target


def note(package: Path, missing: str | None) -> None:
    """Leaves a note in a package without the module: why there is none. gptkern.backends.cuda.common reads it."""
    path = package / "backends" / "cuda" / "not_built.txt"
    if missing is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(f"{missing}\n", encoding="utf-8")


def module_name() -> str:
    return f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"


def ninja_file(plan: Plan, csrc: Path, folder: Path) -> str:
    """The text of build.ninja. Its commands run in `folder`."""
    nvcc, sources = plan.nvcc, toolchain.sources()
    program = "toolkit/bin/nvcc" if (nvcc.root / "bin" / "nvcc").is_file() else str(nvcc.path)
    host = sources.host_compiler()
    version = tuple(map(int, nvcc.version.split(".")))
    kernel = [
        program, *_NVCC_FLAGS, *toolchain.gencode(plan.architectures), f"-I{csrc}",
        # As system headers, CUDA's are no dependencies: they come anew with each build environment.
        *_system_headers(nvcc),
        "-Xcompiler", "-fPIC,-fvisibility=hidden",
        *(["--compress-mode=size"] if version >= _COMPRESSES else []),
        *(["-ccbin", _without_cache(host)] if os.environ.get("CXX") else []),
    ]  # fmt: skip
    bindings = [
        *host, *_HOST_FLAGS, f"-I{csrc}", "-isystem", "pybind11", "-isystem", sysconfig.get_path("include"),
        f'-DGPTKERN_ARCHITECTURES="{";".join(plan.architectures)}"', f'-DGPTKERN_COMPILER="nvcc {nvcc.version}"',
    ]  # fmt: skip
    link = [*host, *_LINK_FLAGS]
    report = "> $unit.ptxas.txt 2>&1 || { cat $unit.ptxas.txt; exit 1; }"
    text = [
        "ninja_required_version = 1.5",
        "rule kernel",
        f"  command = {_command(kernel)} $defines -MMD -MF $out.d -MT $out -c $in -o $out {report}",
        "  description = nvcc $unit",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule host",
        f"  command = {_command(bindings)} -MMD -MF $out.d -MT $out -c $in -o $out",
        "  description = c++ $unit",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {_command(link)} $in -o $out {_command([_static_runtime(nvcc, host), *_LINK_LIBRARIES])}",
        "  description = link $out",
    ]
    objects = []
    for unit in sources.kernel_units(csrc):
        objects.append(f"{unit.name}.o")
        text += [
            f"build {_path(objects[-1])}: kernel {_path(unit.source)} | versions.txt",
            f"  unit = {unit.name}",
            f"  defines = {_command([f'-D{define}' for define in unit.defines])}",
        ]
    units = [*sources.host_units(csrc, emulated=False), sources.Unit("sources", Path("sources.cpp"), ())]
    for unit in units:
        objects.append(f"{unit.name}.{_PYTHON}.o")
        text += [
            f"build {_path(objects[-1])}: host {_path(unit.source)} | versions.txt versions.{_PYTHON}.txt",
            f"  unit = {unit.name}",
        ]
    text += [f"build {module_name()}: link {' '.join(map(_path, objects))}", f"default {module_name()}"]
    return "\n".join(text) + "\n"


def _system_headers(nvcc: Nvcc) -> list[str]:
    folder = nvcc.root / nvcc.target / "include"
    # Not the system's own folder: the compiler finds its standard library by the order of these.
    if not (folder / "cuda_runtime.h").is_file() or folder.resolve() == Path("/usr/include"):
        return []
    return ["-isystem", f"toolkit/{nvcc.target}/include"]


def _static_runtime(nvcc: Nvcc, host: list[str]) -> str:
    """libcudart_static.a as the link command names it."""
    for folder in (f"{nvcc.target}/lib", "lib64", "lib"):
        if (nvcc.root / folder / "libcudart_static.a").is_file():
            return f"toolkit/{folder}/libcudart_static.a"
    command = [*host, "-print-file-name=libcudart_static.a"]
    found = Path(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    if not found.is_absolute():
        raise BuildError(
            f"the toolkit {nvcc.root} has no libcudart_static.a: install the CUDA runtime's development files "
            f"(cuda-cudart-dev), or the wheel nvidia-cuda-runtime.\n{WITHOUT}"
        )
    return str(found)


def _versions(nvcc: Nvcc) -> str:
    """What everything is compiled again for, beside the commands and the sources."""
    host = subprocess.run([*toolchain.sources().host_compiler(), "--version"], capture_output=True, text=True).stdout
    lines = [f"nvcc {nvcc.version}", *host.splitlines()[:1]]
    # nvcc reads these by itself.
    lines += [f"{name}={os.environ.get(name, '')}" for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]
    return "\n".join(lines) + "\n"


def _python_versions() -> str:
    """What the Python module is compiled again for."""
    header = Path(toolchain.sources().pybind11_include(), "pybind11", "detail", "common.h").read_text(encoding="utf-8")
    pybind11 = re.findall(r"^#define PYBIND11_VERSION_\w+ .*$", header, re.MULTILINE)
    return "\n".join([sys.version, *pybind11]) + "\n"


def _without_cache(host: list[str]) -> str:
    """The compiler of "ccache g++": nvcc's -ccbin takes one program."""
    caches = len(host) > 1 and Path(host[0]).name in ("ccache", "sccache", "distcc")
    return host[1] if caches else host[0]


def _link(link: Path, target: Path) -> None:
    if link.is_symlink() or link.exists():
        link.unlink()
    link.symlink_to(target, target_is_directory=True)


def _write(path: Path, text: str) -> None:
    """Only where it changes: ninja looks at the file's time."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _command(words: list[str]) -> str:
    """For a shell, inside a ninja file."""
    return shlex.join(words).replace("$", "$$")


def _path(path: str | Path) -> str:
    return re.sub(r"([$: ])", r"$\1", str(path))
