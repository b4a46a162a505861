"""The build of the CUDA kernels: what it finds, what it decides, what it compiles, and what a GPU can run of it.

Most of it runs on a tree of its own with two small kernels, and an nvcc that hands them to g++.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from building import toolchain  # noqa: E402
from building.toolchain import BuildError, Gpus, Nvcc  # noqa: E402
from gptkern.backends.cuda import common, sources  # noqa: E402

NO_COMPILER = shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file()
needs_compiler = pytest.mark.skipif(NO_COMPILER, reason="there is no g++, or Python's headers are missing")
needs_ninja = pytest.mark.skipif(toolchain.find_ninja() is None, reason="ninja is not installed")
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="CUDA kernels are built on Linux alone")

VARIABLES = ("GPTKERN_CUDA", "GPTKERN_CUDA_ARCHS", "CUDA_HOME", "CXX", "MAX_JOBS")
NVCC = Nvcc(Path("/cuda/bin/nvcc"), "13.0.88", Path("/cuda"), ".", (75, 80, 86, 89, 90, 100, 120))
NO_GPU = Gpus((), None)


REAL_CUDA_HOME = os.environ.get("CUDA_HOME", "")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


# --- Architectures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("80;90a", ("80", "90a")),
        ("8.0 9.0a", ("80", "90a")),
        ("80, 86,80", ("80", "86")),
        ("90+PTX", ("90+PTX",)),
        ("12.0;100f;100a+PTX", ("120", "100f", "100a+PTX")),
        (toolchain.DEFAULT_ARCHITECTURES, ("80", "86", "89", "90a", "90+PTX")),
    ],
)
def test_architectures_are_read(text, expected):
    assert toolchain.parse_architectures(text, NVCC) == expected


@pytest.mark.parametrize(
    "text, words",
    [
        ("sm_80", "'sm_80' is no architecture"),
        ("80;Ampere", "'Ampere' is no architecture"),
        ("90a+ptx", "is no architecture"),
        ("8", "'8' is no architecture"),
        ("75", "'75' is too old"),
        ("80;99", "nvcc 13.0.88 does not know '99', but 80, 86, 89, 90, 100, 120"),
    ],
)
def test_a_wrong_architecture_is_named(text, words):
    with pytest.raises(BuildError) as error:
        toolchain.parse_architectures(text, NVCC)
    message = str(error.value)
    # The variable, what it got, what is wrong, what it needs.
    assert message.startswith(f"GPTKERN_CUDA_ARCHS is {text!r}") and words in message and '"80;90a"' in message


@pytest.mark.parametrize(
    "architectures, codes",
    [
        (("80",), ["arch=compute_80,code=sm_80"]),
        (("90a",), ["arch=compute_90a,code=sm_90a"]),
        # PTX alone where the list has the machine code in another form.
        (("90a", "90+PTX"), ["arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"]),
        (("80", "90+PTX"), ["arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]"]),
    ],
)
def test_nvcc_is_told_the_architectures(architectures, codes):
    assert toolchain.gencode(architectures) == [part for code in codes for part in ("-gencode", code)]


@pytest.mark.parametrize(
    "asked, present, nvcc, expected",
    [
        ("80;86", (90,), NVCC, ("80", "86")),
        ("", (90,), NVCC, ("90a",)),
        (" ", (80, 89), NVCC, ("80", "89")),
        ("", (75, 86), NVCC, ("86",)),
        ("", (75,), NVCC, ("80", "86", "89", "90a", "90+PTX")),
        ("", (), NVCC, ("80", "86", "89", "90a", "90+PTX")),
        ("", (130,), NVCC, ("120+PTX",)),
        ("", (130,), None, ("130",)),
    ],
)
def test_architectures_are_those_asked_for_else_those_present(asked, present, nvcc, expected):
    assert toolchain.choose_architectures(asked, present, nvcc) == expected


@pytest.mark.parametrize(
    "architectures, runs, runs_not",
    [
        ("80", (80, 86, 89), (75, 90, 120)),
        ("86", (86, 89), (80, 90)),
        ("90a", (90,), (80, 89, 100)),
        ("100f", (100, 103), (90, 120)),
        ("90+PTX", (90, 100, 120), (80, 89)),
        ("90a+PTX", (90,), (100,)),
        ("80;90a", (80, 89, 90), (100,)),
        ("80;86;89;90a;90+PTX", (80, 86, 89, 90, 100, 120), (75,)),
    ],
)
def test_what_compiled_code_runs_on(architectures, runs, runs_not):
    assert [capability for capability in runs if not common.covers(architectures, capability)] == []
    assert [capability for capability in runs_not if common.covers(architectures, capability)] == []


def test_an_old_driver_compiles_no_new_ptx():
    assert common.covers("80;90+PTX", 86, ptx=False)
    assert not common.covers("80;90+PTX", 120, ptx=False)


# --- What is found ----------------------------------------------------------------------------------------------------


def plant_nvcc(root: Path, version: str = "13.0.88") -> Path:
    """A toolkit: `nvcc` leaves a line in $NVCC_LOG for each source, and g++ compiles it."""
    for name in ("bin", "include", "lib"):
        (root / name).mkdir(parents=True)
    (root / "include" / "cuda_runtime.h").write_text("#define PLANTED_RUNTIME 1\n")
    (root / "lib" / "libcudart_static.a").write_bytes(b"!<arch>\n")
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(f"""#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {version[:4]}, V{version}"; exit;;
--dryrun) echo "#$ _TARGET_DIR_="; echo "#$ TOP={root}/bin/.."; exit;;
--list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\n'; exit;;
esac
echo "$@" >>"$NVCC_LOG"
echo "ptxas info    : what ptxas says"
left=$#
while [ $left -gt 0 ]; do
    word=$1
    shift
    left=$((left - 1))
    case "$word" in
    -Xptxas|-gencode|-Xcompiler) shift; left=$((left - 1));;
    --compress*) ;;
    *) set -- "$@" "$word";;
    esac
done
exec g++ -x c++ -fPIC "$@"
""")
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No nvcc anywhere; the place where one may be planted for PATH."""
    folder = tmp_path / "on_path" / "bin"
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path, "nvidia", "cu13").is_dir()])
    return folder


def test_nvcc_is_cuda_homes_then_paths_then_that_of_wheels(tmp_path, nowhere, monkeypatch):
    assert toolchain.find_nvcc() == (None, ["CUDA_HOME is not set", "none on PATH"])
    site = tmp_path / "site"
    from_wheels = plant_nvcc(site / "nvidia" / "cu13")
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    nvcc, passed_over = toolchain.find_nvcc()
    assert nvcc.path == from_wheels and passed_over == ["CUDA_HOME is not set", "none on PATH"]
    assert (nvcc.version, nvcc.root, nvcc.capabilities) == ("13.0.88", site / "nvidia" / "cu13", (75, 80, 90))
    on_path = plant_nvcc(nowhere.parent, "12.9.86")
    assert toolchain.find_nvcc()[0].path == on_path
    home = tmp_path / "home"
    monkeypatch.setenv("CUDA_HOME", str(home))
    nvcc, passed_over = toolchain.find_nvcc()
    assert nvcc.path == on_path and passed_over == [f"none in CUDA_HOME ({home})"]
    assert toolchain.find_nvcc()[0].path != plant_nvcc(home).parent
    assert toolchain.find_nvcc()[0].path == home / "bin" / "nvcc"


def test_an_old_nvcc_is_passed_over(tmp_path, nowhere, monkeypatch):
    old = plant_nvcc(nowhere.parent, "11.5.119")
    nvcc, passed_over = toolchain.find_nvcc()
    assert nvcc is None and passed_over[-1] == f"{old} is nvcc 11.5.119, and C++20 needs 12.0"
    old.write_text("#!/bin/sh\necho nothing\n")
    assert toolchain.find_nvcc()[1][-1] == f"{old} does not say its version"


@needs_linux
@needs_compiler
def test_gpus_are_those_of_nvml(tmp_path, monkeypatch):
    source = tmp_path / "nvml.c"
    source.write_text("""
#include <stddef.h>
int shut = 0;
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { shut = 1; return 0; }
int nvmlDeviceGetCount_v2(unsigned* count) { *count = 4; return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int* version) { *version = 12080; return 0; }
/* The first GPU is lost. */
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) { *device = (void*)(size_t)index; return index == 0; }
int nvmlDeviceGetCudaComputeCapability(void* device, int* major, int* minor) {
    *major = device == (void*)2 ? 8 : 9;
    *minor = device == (void*)2 ? 6 : 0;
    return 0;
}
""")
    library = tmp_path / "nvml.so"
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", source, "-o", library], check=True)
    load = ctypes.CDLL
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: asked.append(name) or load(str(library)))
    assert toolchain.gpus() == Gpus((86, 90), 12)
    assert asked == ["libnvidia-ml.so.1"] and ctypes.c_int.in_dll(load(str(library)), "shut").value == 1
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(str(tmp_path / "none.so")))
    assert toolchain.gpus() == NO_GPU


def test_a_compiler_that_was_named_is_taken_or_missed(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent -m64")
    assert sources.host_compiler() is None
    assert sources.no_host_compiler().startswith("CXX is '/nonexistent -m64', which is not found")
    monkeypatch.setenv("CXX", f"{sys.executable} -x")
    assert sources.host_compiler() == [sys.executable, "-x"]
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert sources.host_compiler() is None and "install g++" in sources.no_host_compiler()


# --- What is decided --------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A Linux machine with a compiler, whose nvcc and GPUs a test sets."""
    found = types.SimpleNamespace(nvcc=None, gpus=NO_GPU, compiler=["g++"], kernels=[1], pybind11="/a", ninja="/b")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: (found.nvcc, ["CUDA_HOME is not set", "none on PATH"]))
    monkeypatch.setattr(toolchain, "gpus", lambda: found.gpus)
    monkeypatch.setattr(toolchain, "find_ninja", lambda: found.ninja)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: found.ninja)
    monkeypatch.setattr(toolchain.os, "uname", lambda: types.SimpleNamespace(machine="x86_64"))
    files = types.SimpleNamespace(
        folder=lambda: tmp_path,
        kernel_units=lambda csrc: found.kernels,
        host_compiler=lambda: found.compiler,
        no_host_compiler=sources.no_host_compiler,
        pybind11_include=lambda: found.pybind11,
    )
    monkeypatch.setattr(toolchain, "sources", lambda: files)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path))
    return found


WHEELS = set(toolchain.NVCC_WHEELS)


def test_without_nvcc_and_gpu_the_kernels_are_left_out(machine):
    plan = toolchain.plan(fetching=True)
    assert plan.requirements == () and not plan.forced
    assert plan.missing.startswith("there is no nvcc; CUDA_HOME is not set; none on PATH; and no NVIDIA GPU")


def test_a_toolkit_is_enough(machine):
    machine.nvcc = NVCC
    plan = toolchain.plan(fetching=True)
    assert plan.missing is None and plan.nvcc == NVCC and plan.requirements == ("pybind11>=2.13",)
    assert plan.architectures == ("80", "86", "89", "90a", "90+PTX")
    machine.ninja = None
    assert set(toolchain.plan(fetching=True).requirements) == {"pybind11>=2.13", "ninja>=1.11"}
    assert "pip install ninja" in toolchain.plan(fetching=False).missing
    machine.pybind11 = None
    assert "pip install pybind11" in toolchain.plan(fetching=False).missing


def test_nvcc_is_fetched_for_a_gpu_and_where_it_is_asked_for(machine, monkeypatch):
    machine.gpus = Gpus((90,), 13)
    plan = toolchain.plan(fetching=True)
    assert plan.missing is None and set(plan.requirements) == {"pybind11>=2.13", *WHEELS}
    assert plan.architectures == ("90a",)
    assert "without build isolation, do `pip install nvidia-cuda-nvcc==" in toolchain.plan(fetching=False).missing
    machine.gpus = NO_GPU
    monkeypatch.setenv("GPTKERN_CUDA", "1")
    assert set(toolchain.plan(fetching=True).requirements) >= WHEELS


def test_nvcc_is_not_fetched_for_a_gpu_that_cannot_run_its_code(machine, monkeypatch):
    machine.gpus = Gpus((90,), 12)
    plan = toolchain.plan(fetching=True)
    assert plan.requirements == () and "update the driver, or install a CUDA 12 toolkit" in plan.missing
    machine.gpus = Gpus((75,), 13)
    plan = toolchain.plan(fetching=True)
    assert plan.requirements == () and "compute capability 7.5, and the kernels need 8.0" in plan.missing
    monkeypatch.setenv("GPTKERN_CUDA", "1")
    assert toolchain.plan(fetching=True).missing is None, "it may be built for another machine"


def test_nothing_is_built_or_fetched_when_switched_off(machine, monkeypatch):
    machine.nvcc, machine.gpus = NVCC, Gpus((90,), 13)
    monkeypatch.setenv("GPTKERN_CUDA", "0")
    plan = toolchain.plan(fetching=True)
    assert plan.missing == "it was built with GPTKERN_CUDA=0" and plan.requirements == () and plan.nvcc is None


@pytest.mark.parametrize(
    "what, value, words",
    [
        ("compiler", None, "there is no C++ compiler: install g++"),
        ("kernels", [], "no CUDA kernels (csrc/*/*.cu)"),
        ("header", None, "Python's own headers are missing"),
        ("platform", "darwin", "built on Linux alone, and this is darwin"),
    ],
)
@pytest.mark.parametrize("asked", ["", "1"])
def test_what_is_missing_is_named_and_fetches_nothing(machine, what, value, words, asked, tmp_path, monkeypatch):
    machine.gpus = Gpus((90,), 13)
    if what == "header":
        (tmp_path / "Python.h").unlink()
    elif what == "platform":
        monkeypatch.setattr(sys, "platform", value)
    else:
        setattr(machine, what, value)
    monkeypatch.setenv("GPTKERN_CUDA", asked)
    plan = toolchain.plan(fetching=True)
    assert words in plan.missing and plan.requirements == () and plan.forced == (asked == "1")
    # Whoever must have the kernels is told what is missing, and how to go on without them.
    with pytest.raises(BuildError, match="GPTKERN_CUDA=0") as error:
        plan.check()
    assert words in str(error.value)


def test_wrong_variables_are_named(machine, monkeypatch):
    monkeypatch.setenv("GPTKERN_CUDA", "yes")
    with pytest.raises(BuildError, match="GPTKERN_CUDA must be 0, 1 or unset, and is 'yes'"):
        toolchain.plan(fetching=True)
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(ValueError, match="MAX_JOBS must be a number from 1 on, and is 'many'"):
        sources.jobs()
    monkeypatch.setenv("MAX_JOBS", "3")
    assert sources.jobs() == 3


def test_the_wheels_of_nvcc_are_of_one_version():
    versions = dict(wheel.split("==") for wheel in toolchain.NVCC_WHEELS)
    assert len({versions[name] for name in ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm")}) == 1
    assert len({version.rpartition(".")[0] for version in versions.values()}) == 1


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
    seen = [sources.digest(csrc)]
    for name in (
        "first/one.cu",
        "second/binding.cpp",
        "second/launchers.h",
        "bindings.cpp",
        "binding.h",
        "device/shared.cuh",
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
    )
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
    assert asked == [torch.Tensor]


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
