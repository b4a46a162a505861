"""What the build of the CUDA kernels finds, and what it decides: architectures, nvcc, GPUs, compilers, requirements."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import types
from pathlib import Path

import pytest
from planted_nvcc import VARIABLES, needs_compiler, needs_linux, plant_nvcc

from building import toolchain
from building.toolchain import BuildError, Gpus, Nvcc
from gptkern.backends.cuda import common, sources

NVCC = Nvcc(Path("/cuda/bin/nvcc"), "13.0.88", Path("/cuda"), ".", (75, 80, 86, 89, 90, 100, 120))
NO_GPU = Gpus((), None)


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
        # Nothing is compiled twice, in whatever order and under whatever name it was asked for.
        (("90", "90+PTX"), ["arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"]),
        (("100+PTX", "100f"), ["arch=compute_100,code=compute_100", "arch=compute_100f,code=sm_100f"]),
        (("90a", "90a+PTX"), ["arch=compute_90a,code=sm_90a", "arch=compute_90a,code=compute_90a"]),
        (("100a", "100f+PTX"), ["arch=compute_100a,code=sm_100a", "arch=compute_100f,code=compute_100f"]),
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
