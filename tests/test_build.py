"""The build of the CUDA kernels: what it compiles, and what a GPU can run of it.

It runs on a tree of its own with two small kernels, and an nvcc that hands them to g++.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from planted_nvcc import ROOT, VARIABLES, needs_compiler, needs_linux, needs_ninja, plant_nvcc

from building import toolchain
from gptkern.backends import unseen
from gptkern.backends.cuda import common, sources

REAL_CUDA_HOME = os.environ.get("CUDA_HOME", "")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


# --- What is compiled -------------------------------------------------------------------------------------------------


# csrc/ in small: a room binds itself, and shares device/ with the others.
TREE = {
    "device/shared.cuh": "#define SHARED 1\n",
    "first/launchers.h": "int one();\n",
    "first/one.cu": '#include "device/shared.cuh"\n#include "first/launchers.h"\nint one() { return 100 * SHARED; }\n',
    "first/binding.cpp": '#include "binding.h"\n#include "first/launchers.h"\nstatic Binding bound(one);\n',
    "second/launchers.h": "int two();\nint part();\n",
    "second/two.cu": """// parts: PART = 7
#include "second/launchers.h"
#ifdef PART
int part() { return PART; }
#else
int two() { return 20; }
#endif
""",
    "second/binding.cpp": """
#include "binding.h"
#include "second/launchers.h"
static Binding bound_two(two), bound_part(part);
""",
    "binding.h": """
struct Binding {
    explicit Binding(int (*launcher)()) { total() += launcher(); }
    static int& total() { static int sum; return sum; }
};
""",
    "bindings.cpp": """
#include <Python.h>
#include "binding.h"
namespace gptkern { extern const char SOURCES[]; }
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__cuda() {
    PyObject* module = PyModule_Create(&definition);
    PyModule_AddStringConstant(module, "architectures", GPTKERN_ARCHITECTURES);
    PyModule_AddStringConstant(module, "compiler", GPTKERN_COMPILER);
    PyModule_AddStringConstant(module, "sources", gptkern::SOURCES);
    PyModule_AddIntConstant(module, "total", Binding::total());
    return module;
}
""",
}


@pytest.fixture
def tree(tmp_path) -> Path:
    """A source tree of two rooms, of which one's kernel comes in two parts, and a module that needs no pybind11."""
    root = tmp_path / "tree"
    shutil.copytree(ROOT / "building", root / "building", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("gptkern/backends/cuda/sources.py", "gptkern/version.py", "setup.py", "pyproject.toml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for name in ("gptkern/__init__.py", "README.md", "LICENSE"):
        (root / name).touch()
    for name, text in TREE.items():
        (root / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "csrc" / name).write_text(text)
    # A build that imports PyTorch fails.
    (tmp_path / "poison" / "torch").mkdir(parents=True)
    (tmp_path / "poison" / "torch" / "__init__.py").write_text("raise RuntimeError('the build imported torch')\n")
    return root


@pytest.fixture
def build(tree, tmp_path):
    """Runs `python -m building` in the tree; the names of the units that the planted nvcc compiled.

    `run.host` has those that the host's compiler did.
    """
    log = tmp_path / "nvcc.log"
    nvcc = plant_nvcc(tmp_path / "toolkit")
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "poison"),
        "CUDA_HOME": str(nvcc.parents[1]),
        "GPTKERN_CUDA_ARCHS": "80;90a",
        "NVCC_LOG": str(log),
    }

    def run(fails: bool = False, **variables) -> list[str]:
        log.write_text("")
        command = [sys.executable, "-m", "building"]
        done = subprocess.run(command, cwd=tree, env=environment | variables, capture_output=True, text=True)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        commands = [line.split() for line in log.read_text().splitlines()]
        run.commands = {Path(words[words.index("-o") + 1]).stem: words for words in commands}
        run.output = done.stdout + done.stderr
        run.host = sorted(re.findall(r"\] c\+\+ (\w+)$", run.output, re.MULTILINE))
        return sorted(run.commands)

    run.nvcc = nvcc
    return run


def module_of(tree: Path) -> dict:
    """What the tree's module says, in a Python without gptkern and torch."""
    (path,) = (tree / "gptkern").glob("_cuda.*.so")
    program = "import _cuda; print({name: value for name, value in vars(_cuda).items() if name[0] != '_'})"
    done = subprocess.run([sys.executable, "-S", "-c", program], cwd=path.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return eval(done.stdout)


@needs_linux
@needs_compiler
@needs_ninja
def test_a_build_compiles_every_unit_and_then_what_changed(build, tree):
    everything = ["first_one", "second_two", "second_two_7"]
    assert build() == everything
    assert build.host == ["bindings", "first_binding", "second_binding", "sources"]
    command = build.commands["second_two_7"]
    for part in ("-std=c++20", "-O3", "-DPART=7", "arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a"):
        assert part in command
    assert not [part for part in command if "fast" in part]
    (folder,) = (tree / "build" / "cuda").iterdir()
    assert folder.name == "13.0.88-80-90a"
    assert (folder / "second_two_7.ptxas.txt").read_text() == "ptxas info    : what ptxas says\n"
    assert module_of(tree) == {
        "architectures": "80;90a", "compiler": "nvcc 13.0.88", "sources": sources.digest(tree / "csrc"), "total": 127
    }  # fmt: skip

    assert build() == [] and build.host == [], "nothing changed"
    os.utime(tree / "csrc" / "second" / "two.cu")
    assert build() == ["second_two", "second_two_7"] and build.host == []
    (tree / "csrc" / "device" / "shared.cuh").write_text("#define SHARED 3\n")
    assert build() == ["first_one"] and build.host == ["sources"], "it alone includes the header"
    assert (module_of(tree)["total"], module_of(tree)["sources"]) == (327, sources.digest(tree / "csrc"))
    os.utime(tree / "csrc" / "first" / "launchers.h")
    assert build() == ["first_one"] and build.host == ["first_binding"], "a room's header is its own"
    # A new operator is compiled alone.
    (tree / "csrc" / "third").mkdir()
    (tree / "csrc" / "third" / "three.cu").write_text("int three() { return 1000; }\n")
    (tree / "csrc" / "third" / "binding.cpp").write_text(
        '#include "binding.h"\nint three();\nstatic Binding bound(three);\n'
    )
    assert build() == ["third_three"] and build.host == ["sources", "third_binding"]
    assert module_of(tree)["total"] == 1327
    shutil.rmtree(tree / "csrc" / "third")
    assert build() == [] and module_of(tree)["total"] == 327, "a room that is gone is linked no longer"
    # Another environment of pip's: the same tools, in another place.
    moved = build.nvcc.parents[1].rename(build.nvcc.parents[1].with_name("elsewhere"))
    (moved / "bin" / "nvcc").write_text((moved / "bin" / "nvcc").read_text().replace("/toolkit/", "/elsewhere/"))
    assert build(CUDA_HOME=str(moved)) == []
    # Other flags, by which nvcc compiles something else.
    assert build(CUDA_HOME=str(moved), NVCC_APPEND_FLAGS="-DX") == everything
    # Each choice of architectures keeps what it has compiled.
    assert build(CUDA_HOME=str(moved), GPTKERN_CUDA_ARCHS="80") == everything
    assert build(CUDA_HOME=str(moved), NVCC_APPEND_FLAGS="-DX") == []
    assert module_of(tree)["architectures"] == "80;90a"


@needs_linux
@needs_compiler
@needs_ninja
def test_a_compiler_that_fails_is_an_error_that_says_how_to_go_on(build, tree):
    (tree / "csrc" / "second" / "two.cu").write_text("int two() { return nonsense; }\n")
    build(fails=True)
    assert "nonsense" in build.output and "two.cu" in build.output
    assert "gptkern: the CUDA kernels could not be compiled" in build.output and "set GPTKERN_CUDA=0" in build.output
    assert not list((tree / "gptkern").glob("_cuda*"))
    build(fails=True, MAX_JOBS="0")
    assert "MAX_JOBS must be a number from 1 on, and is '0'" in build.output


@needs_linux
@needs_compiler
@needs_ninja
@pytest.mark.skipif(toolchain.find_nvcc()[0] is None, reason="there is no nvcc in CUDA_HOME or on PATH")
def test_nvccs_module_is_built_and_imported_without_torch(build, tree):
    (tree / "csrc" / "second" / "two.cu").unlink()
    (tree / "csrc" / "first" / "one.cu").write_text("""
#include <cuda_runtime.h>
#include "device/shared.cuh"
__global__ void kernel(float* x) { x[threadIdx.x] /= 3.0f; }
// Needs the runtime, and no GPU: a failed launch is an error like another.
int one() { kernel<<<1, 32>>>(nullptr); return cudaGetLastError() == cudaSuccess ? 1 : 100 * SHARED; }
int two() { return 20; }
int part() { return 7; }
""")
    # Debug information for which somebody may have a reason is no part of the module.
    build(CUDA_HOME=REAL_CUDA_HOME, GPTKERN_CUDA_ARCHS="80", NVCC_APPEND_FLAGS="-Xcompiler -g")
    module = module_of(tree)
    assert module["architectures"] == "80" and module["compiler"].startswith("nvcc ") and module["total"] == 127
    (report,) = (tree / "build" / "cuda").glob("*/first_one.ptxas.txt")
    assert "Compiling entry function '_Z6kernelPf' for 'sm_80'" in report.read_text()
    assert "Used " in report.read_text()
    # PyTorch's process has a CUDA runtime of its own: this one's must not take its place.
    (path,) = (tree / "gptkern").glob("_cuda.*.so")
    exported = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    assert "PyInit__cuda" in exported and "cudaGetLastError" not in exported and "_Z3onev" not in exported
    assert ".debug_info" not in subprocess.run(["readelf", "-S", path], capture_output=True, text=True).stdout


def test_the_digest_is_of_all_that_the_module_is_made_of(tree):
    csrc = tree / "csrc"
    (csrc / "emulator").mkdir()
    (csrc / "third").mkdir()
    with open(csrc / "device" / "shared.cuh", "a") as file:
        file.write('#include "device/inner.cuh"\n')
    (csrc / "device" / "inner.cuh").touch()
    seen = [sources.digest(csrc)]
    for name in (
        "first/one.cu",
        "second/binding.cpp",
        "second/launchers.h",
        "bindings.cpp",
        "binding.h",
        "device/shared.cuh",
        "device/inner.cuh",
        "third/new.cu",
        "third/binding.cpp",
    ):
        with open(csrc / name, "a") as file:
            file.write("// more")
        seen.append(sources.digest(csrc))
    assert len(set(seen)) == len(seen)
    (csrc / "emulator" / "runtime.cpp").write_text("no part of it")
    assert sources.digest(csrc) == seen[-1]


BACKEND = "from building import backend; print('asked for', backend.get_requires_for_build_wheel())"


@needs_linux
@needs_compiler
def test_pip_is_asked_for_compilers_only_where_they_are_wanted(tree, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("g++", "ninja"):
        if shutil.which(name):
            (folder / name).symlink_to(shutil.which(name))

    def run(**variables) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "poison"), "PATH": str(folder), **variables}
        done = subprocess.run(
            [sys.executable, "-c", BACKEND], cwd=tree, env=environment, capture_output=True, text=True
        )
        return f"{done.returncode} {done.stdout}{done.stderr}"

    off = run(GPTKERN_CUDA="0")
    assert off.startswith("0 ") and "pybind11" not in off and "nvidia" not in off
    on = run(GPTKERN_CUDA="1")
    assert on.startswith("0 ") and "pybind11" in on and all(wheel in on for wheel in toolchain.NVCC_WHEELS)
    for name in ("g++", "ninja"):
        (folder / name).unlink(missing_ok=True)
    failed = run(GPTKERN_CUDA="1")
    assert failed.startswith("1 ") and "there is no C++ compiler" in failed and "set GPTKERN_CUDA=0" in failed


# --- What is used of it -----------------------------------------------------------------------------------------------


@pytest.fixture
def module(monkeypatch):
    """A compiled module, a driver and a GPU that fit one another."""
    found = types.SimpleNamespace(
        architectures="80;90a;90+PTX",
        compiler="nvcc 13.0.88",
        sources=sources.digest(sources.folder()),
        use_tensors_of=lambda type: None,
        ask_whether_unseen=lambda *questions: None,
        is_unseen=lambda call, device: False,
        signature=lambda arguments: None,
    )
    monkeypatch.setattr(unseen, "look", unseen.look)
    monkeypatch.setattr(unseen, "signature", unseen.signature)
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(common, "compiled", lambda: found)
    set_machine(monkeypatch, 13000, (9, 0))
    for function in (common.not_built, common.unavailable):
        function.cache_clear()
    yield found
    for function in (common.not_built, common.unavailable, common.driver_cuda):
        function.cache_clear()


def set_machine(monkeypatch, driver: int, capability: tuple[int, int]) -> None:
    """A driver as it answers cuDriverGetVersion: 13000 is CUDA 13.0; 0: there is none."""

    def get_version(version):
        version._obj.value = driver
        return 0

    def load(name):
        assert name == "libcuda.so.1"
        if not driver:
            raise OSError(name)
        return types.SimpleNamespace(cuDriverGetVersion=get_version)

    monkeypatch.setattr(common.ctypes, "CDLL", load)
    common.driver_cuda.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)


def test_a_module_that_fits_is_used(module):
    assert common.unavailable(0) is None
    assert (unseen.look, unseen.signature) == (module.is_unseen, module.signature)


@pytest.mark.parametrize(
    "driver, capability, words",
    [
        (12080, (9, 0), "built with CUDA 13.0 and this driver is for CUDA 12.8: update the driver"),
        (13000, (7, 5), "built for 80;90a;90+PTX and this GPU has compute capability 7.5"),
        (13000, (8, 9), None),
        (13020, (12, 0), None),
        (0, (9, 0), "the CUDA driver (libcuda.so.1) cannot be loaded"),
    ],
)
def test_a_gpu_or_driver_that_the_module_is_not_for_is_named(module, driver, capability, words, monkeypatch):
    set_machine(monkeypatch, driver, capability)
    assert (words is None) == (common.unavailable(0) is None) and (words or "") in (common.unavailable(0) or "")


def test_a_pytorch_whose_tensors_the_module_cannot_take_is_named_once(module, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "use_tensors_of", lambda type: asked.append(type) or "tensors are of another kind")
    assert common.unavailable(0) == common.unavailable(0) == "tensors are of another kind"
    assert asked == [torch.Tensor] and unseen.look is not module.is_unseen


def test_a_driver_older_than_nvcc_compiles_none_of_its_ptx(module, monkeypatch):
    module.compiler = "nvcc 13.1.115"
    assert common.unavailable(0) is None, "machine code needs no newer driver of the same major version"
    set_machine(monkeypatch, 13000, (12, 0))
    common.unavailable.cache_clear()
    assert "compute capability 12.0" in common.unavailable(0)


def test_what_is_taken_from_pytorchs_private_names_is_used_by_pytorch_itself():
    # A build of PyTorch for the CPU has none of them, and no test without a GPU would miss one that is gone.
    names = set(re.findall(r"torch\._C\.(_cuda_\w+)", Path(common.__file__).read_text(encoding="utf-8")))
    assert names == {"_cuda_getCurrentRawStream", "_cuda_getDevice"}
    folder = Path(torch.__file__).parent
    users = [folder / "cuda" / "__init__.py", *(folder / "_inductor" / "codegen").glob("*.py")]
    used = "\n".join(path.read_text(encoding="utf-8") for path in users)
    assert not [name for name in names if not re.search(rf"torch\._C\.{name}\b", used)]


def test_a_module_of_other_sources_is_not_used(module):
    module.sources = "0" * 16
    assert common.not_built().endswith("install gptkern again")
    assert common.unavailable(0) == common.not_built()


def test_the_builds_note_says_why_there_is_no_module(module, tmp_path, monkeypatch):
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    assert common.not_built() == "there are no CUDA kernels in this build"
    common.not_built.cache_clear()
    (tmp_path / "not_built.txt").write_text("there is no nvcc\n")
    assert common.not_built() == "there are no CUDA kernels in this build: there is no nvcc"


def test_a_module_that_cannot_be_loaded_is_no_crash(module, monkeypatch):
    def fails():
        raise ImportError("libstdc++.so.6: version `GLIBCXX_3.4.32' not found")

    monkeypatch.setattr(common, "compiled", fails)
    assert (
        common.unavailable(0) == "the CUDA kernels cannot be loaded: libstdc++.so.6: version `GLIBCXX_3.4.32' not found"
    )


def test_headers_of_pybind11_are_its_own_else_pytorchs(monkeypatch):
    found = importlib.util.find_spec
    torchs = Path(torch.__file__).parent / "include"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pybind11" else found(name))
    expected = str(torchs) if (torchs / "pybind11" / "pybind11.h").is_file() else None
    assert sources.pybind11_include() == expected
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert sources.pybind11_include() is None
