"""Triton that is installed and cannot launch: what its first launch needs is made to be missing, each for real."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from simulated_gpus import simulate
from small_calls import a_call

import gptkern
import gptkern.functional as G
from gptkern.backends import dispatch
from gptkern.backends.triton import launching
from gptkern.commands import info

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.usefixtures("automatic_choice")

needs_a_compiler = pytest.mark.skipif(
    not any(map(shutil.which, launching.COMPILERS)), reason="there is no C compiler, which is what Triton needs too"
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A folder with a libcuda.so.1 whose functions do nothing."""
    folder = tmp_path_factory.mktemp("driver")
    nvidia = Path(triton.__file__).parent / "backends" / "nvidia"
    names = set(re.findall(r"\b(cu[A-Z]\w+)\(", (nvidia / "driver.c").read_text()))
    (folder / "stub.c").write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names)))
    compiler = next(filter(None, map(shutil.which, launching.COMPILERS)))
    options = ["-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1", "stub.c"]
    subprocess.run([compiler, *options], cwd=folder, check=True)
    return folder


@pytest.fixture
def said(driver, tmp_path):
    """said(first, **environment): what a new process finds missing, after some statements of its own."""

    def run(first: str = "", **environment: str) -> str:
        program = """
            from gptkern.backends.triton import launching

            def made():
                from triton.backends.nvidia.driver import CudaDriver
                return CudaDriver()

            print(launching.missing_for(made))
        """
        clean = {name: value for name, value in os.environ.items() if name not in ("CC", "TRITON_INTERPRET")}
        there = dict(TRITON_CACHE_DIR=str(tmp_path / "cache"), TRITON_LIBCUDA_PATH=str(driver))
        there["LD_LIBRARY_PATH"] = str(driver)
        command = [sys.executable, "-c", first + textwrap.dedent(program)]
        done = subprocess.run(command, env={**clean, **there, **environment}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().removeprefix("Triton cannot launch kernels here: ")

    return run


@pytest.fixture
def without_compilers(tmp_path):
    """A PATH that has no compiler, and `file`: by what that says Triton names what it has built."""
    folder = tmp_path / "bin"
    folder.mkdir()
    if found := shutil.which("file"):
        (folder / "file").symlink_to(found)
    return str(folder)


NO_COMPILER = "it builds its launcher with a C compiler, and there is none: install gcc or clang, or set CC"


@needs_a_compiler
def test_nothing_is_missing_and_what_was_built_needs_no_compiler(said, without_compilers, tmp_path):
    assert said() == "None"
    assert len(list((tmp_path / "cache").rglob("cuda_utils*.so"))) == 1
    one_for_all = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
    assert said(PATH=without_compilers) == ("None" if one_for_all else NO_COMPILER)


@needs_a_compiler
def test_no_c_compiler(said, without_compilers):
    assert said(PATH=without_compilers) == NO_COMPILER
    assert said(CC="no-such-cc") == "it builds its launcher with CC, which is 'no-such-cc' and is not found"


@needs_a_compiler
def test_no_headers_of_python(said, tmp_path):
    elsewhere = f"""
import sysconfig
paths = sysconfig.get_paths
sysconfig.get_paths = lambda *given, **named: paths(*given, **named) | {{"include": {str(tmp_path)!r}}}
"""
    assert said(elsewhere) == (
        f"it builds its launcher with Python's own headers, and there is no Python.h in {tmp_path}: install your "
        "system's python3-dev or python3-devel"
    )


@needs_a_compiler
def test_no_driver(said, tmp_path):
    found = said(TRITON_LIBCUDA_PATH=str(tmp_path))
    assert found == f"TRITON_LIBCUDA_PATH is {str(tmp_path)!r}, and there is no libcuda.so.1 in it"
    # As on a machine whose ldconfig knows none.
    unknown = "import subprocess\nsubprocess.check_output = lambda *_: b''\n"
    assert said(unknown, TRITON_LIBCUDA_PATH="", LD_LIBRARY_PATH=str(tmp_path)) == (
        "it does not find the driver, libcuda.so.1: run ldconfig as root, or set TRITON_LIBCUDA_PATH to the folder "
        "that holds it"
    )


def test_no_ldconfig():
    def made():
        raise FileNotFoundError(2, "No such file or directory", "/sbin/ldconfig")

    assert "set TRITON_LIBCUDA_PATH to the folder" in launching.missing_for(made)


def test_a_compiler_that_fails_is_named():
    def made():
        raise subprocess.CalledProcessError(4, ["/usr/bin/gcc", "main.c"])

    assert launching.missing_for(made).endswith("it builds its launcher with /usr/bin/gcc, which ended with 4")


def test_a_triton_that_builds_a_launcher_for_each_kernel_needs_the_compiler_later_too(monkeypatch, tmp_path):
    each, one = SimpleNamespace(utils=SimpleNamespace()), SimpleNamespace(utils=SimpleNamespace(launch=None))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launching.missing_for(lambda: one) is None
    assert launching.missing_for(lambda: each).endswith("there is none: install gcc or clang, or set CC")


# --- What dispatch and `gptkern info` make of it ----------------------------------------------------------------------

REASON = "Triton cannot launch kernels here: it builds its launcher with a C compiler, and there is none"


@pytest.fixture
def a_gpu_that_triton_cannot_use(monkeypatch):
    device = simulate(monkeypatch, ("NVIDIA H200", (9, 0)))
    monkeypatch.setattr(launching, "missing", lambda: REASON)
    yield device
    dispatch.forget()


def test_dispatch_has_the_reason_and_does_not_launch(a_gpu_that_triton_cannot_use):
    device = a_gpu_that_triton_cannot_use
    assert dispatch.unavailable("triton", device) == REASON
    with torch._subclasses.FakeTensorMode():
        call = a_call("softmax", "cuda")
        with pytest.warns(UserWarning, match=f"not triton: {REASON}"):
            assert G.softmax(*call).device.type == "cuda"
        with gptkern.backend("triton"), pytest.raises(gptkern.BackendError, match=REASON):
            G.softmax(*call)


def test_info_has_the_reason(a_gpu_that_triton_cannot_use):
    backends = info._backends(a_gpu_that_triton_cannot_use)
    assert {reasons["triton"] for reasons in backends.values()} == {REASON}
    assert info._reasons(backends)["triton"] == REASON


def test_a_cpu_is_not_asked_what_launches_need(monkeypatch):
    def asked():
        raise AssertionError("Triton was asked to launch")

    monkeypatch.setattr(launching, "missing", asked)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.unavailable("triton", torch.device("cpu")) is None
