"""The package as a whole: what importing it does, who imports whom, what is documented, what is built."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import gptkern
from gptkern import autograd, functional, nn
from gptkern.backends.cuda import emulated
from gptkern.version import __version__

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gptkern"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def run_python(program: str, **options) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done


# --- Importing --------------------------------------------------------------------------------------------------------


def test_imports_and_computes_without_triton():
    run_python(
        """
import sys
sys.modules["triton"] = None  # an import of it now raises ModuleNotFoundError
import torch
import gptkern
import gptkern.functional as F
x = torch.randn(2, 3, 4, 8)
F.scaled_dot_product_attention(x, x, x, is_causal=True)
F.layer_norm(x, (8,))
F.softmax(x, -1, is_causal=True)
q, scale = F.quantize_int8(torch.randn(5, 8))
F.int8_linear(x, q, scale)
try:
    with gptkern.backend("triton"):
        F.softmax(x, -1)
except gptkern.BackendError as error:
    assert "triton is not installed" in str(error), error
else:
    raise AssertionError("a backend that is not there was used")
"""
    )


def test_importing_brings_in_nothing_and_using_pytorch_alone():
    done = run_python(
        """
import sys
def packages(before):
    return sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
before = set(sys.modules)
import gptkern, gptkern.cli
print(packages(before))
import torch
before = set(sys.modules) - {"gptkern"}
for name in gptkern.__all__:
    getattr(gptkern, name)
print(packages(before))
"""
    )
    assert done.stdout.splitlines() == ["['gptkern']", "['gptkern']"]


def test_public_names_are_imported_at_their_first_use():
    run_python(
        """
import pickle, sys
import gptkern
assert set(gptkern.__all__) <= set(dir(gptkern)) and not hasattr(gptkern, "polish")
assert "torch" not in sys.modules
import torch
# Known by PyTorch's function before any operator was named.
gptkern.backend
from gptkern.backends.dispatch import explain
assert explain(torch.nn.functional.softmax, torch.ones(2, 3), -1).backend == "torch"
# A first use while a graph is traced.
assert "gptkern.nn" not in sys.modules
compiled = torch.compile(lambda x: gptkern.nn.F.layer_norm(x, (8,)), fullgraph=True, backend="eager")
assert compiled(torch.randn(2, 8)).shape == (2, 8)
names = {}
exec("from gptkern import *", names)
assert set(gptkern.__all__) <= set(names) and names["swap"] is gptkern.swap
report = pickle.loads(pickle.dumps(gptkern.swap(torch.nn.LayerNorm(8))))
assert type(report) is gptkern.SwapReport
"""
    )


def test_the_lists_of_public_names_agree():
    """The names that a type checker sees, those that Python finds, and __all__."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {
        alias.name: None if node.module == "gptkern" else node.module for node in block.body for alias in node.names
    }
    assert seen == gptkern._HOMES
    assert sorted([*seen, "__version__"]) == gptkern.__all__


def test_importing_changes_no_global_state():
    run_python(
        """
import os, random, signal, logging, warnings
import torch
import torch.nn.functional as F

def state():
    return [
        torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), torch.get_rng_state().tolist(),
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark,
        F.layer_norm, F.softmax, F.scaled_dot_product_attention, torch.softmax, torch.Tensor.softmax,
        torch.nn.LayerNorm.forward, torch.nn.Softmax.forward,
        dict(os.environ), random.getstate(), list(warnings.filters), logging.getLogger().handlers,
        signal.getsignal(signal.SIGINT),
    ]

before = state()
import gptkern, gptkern.cli
for name in gptkern.__all__:
    getattr(gptkern, name)
for index, (was, is_now) in enumerate(zip(before, state())):
    assert was == is_now, (index, was, is_now)
"""
    )


# --- Documentation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", functional.__all__)
def test_operators_are_documented(name):
    function = getattr(functional, name)
    text = inspect.getdoc(function) or ""
    for part in ("Args:", "Returns:", "Raises", "Backends:"):
        assert part in text, f"{name}'s docstring has no {part}"
    for argument in inspect.signature(function).parameters:
        if not argument.startswith("_"):
            assert re.search(rf"\b{argument}\b", text), f"{name}'s docstring says nothing about {argument}"
    assert re.search(r"\((\*|…|\w+, )|shape", text), f"{name}'s docstring gives no shapes"


def public(module) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__.startswith("gptkern.") and not name.startswith("_")
    ]


@pytest.mark.parametrize("name", public(autograd))
def test_autograd_functions_are_documented(name):
    function = getattr(autograd, name)
    assert name in autograd.__all__
    text = inspect.getdoc(function)
    assert "apply(" in text
    for argument in list(inspect.signature(function.forward).parameters)[1:]:
        assert re.search(rf"\b{argument}\b", text), f"{name}'s docstring says nothing about {argument}"


@pytest.mark.parametrize("name", public(nn))
def test_modules_are_documented(name):
    assert "__doc__" in vars(getattr(nn, name)) and inspect.getdoc(getattr(nn, name))


def test_every_module_and_public_function_has_a_docstring():
    for path in MODULES:
        tree = ast.parse(path.read_text())
        if tree.body:
            assert ast.get_docstring(tree), f"{path} has no docstring"
    for name in gptkern.__all__:
        if name != "__version__":
            assert inspect.getdoc(getattr(gptkern, name)), f"gptkern.{name} has no docstring"


# --- Building ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """(wheel, sdist), built from a copy: a build writes into the tree that it builds."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("gptkern", "csrc", "building"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    # What builds leave behind in a tree, and later ones must not take.
    for name in ("gptkern/_cuda.cpython-39-x86_64-linux-gnu.so", "build/lib/gptkern/deleted.py"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("left behind")
    # The build backend itself, as pip calls it: no build environment, so nothing is downloaded.
    run_python(
        f"from building import backend; backend.build_sdist({str(folder)!r}); backend.build_wheel({str(folder)!r})",
        cwd=source,
        env={**os.environ, "GPTKERN_CUDA": "0"},
    )
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def test_wheel_and_sdist_hold_everything(built):
    wheel, sdist = built
    modules = {f"gptkern/{path.relative_to(PACKAGE).as_posix()}" for path in MODULES}
    modules |= {f"gptkern/backends/tables/{path.name}" for path in PACKAGE.glob("tables/*.json")}
    csrc = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert {"csrc/bindings.cpp", "csrc/emulator/runtime.cpp"} <= csrc
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
        entry_points = archive.read(f"gptkern-{__version__}.dist-info/entry_points.txt").decode()
    assert modules | {name.replace("csrc/", "gptkern/_csrc/", 1) for name in csrc} <= in_wheel
    assert not [name for name in in_wheel if name.endswith((".so", "deleted.py"))]
    assert any(name.endswith("LICENSE") for name in in_wheel)
    assert not [name for name in in_wheel if not name.startswith(("gptkern/", f"gptkern-{__version__}.dist-info/"))]
    assert "gptkern = gptkern.cli:main" in entry_points
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    building = {path.relative_to(ROOT).as_posix() for path in (ROOT / "building").glob("*.py")}
    files = {"LICENSE", "README.md", "pyproject.toml", "setup.py", "MANIFEST.in", "building/backend.py"}
    assert modules | csrc | building | files <= in_sdist
    assert not [name for name in in_sdist if name.endswith((".so", "not_built.txt"))]


def test_one_version(built):
    wheel, sdist = built
    assert wheel.name.startswith(f"gptkern-{__version__}-py3-none-any")
    assert sdist.name == f"gptkern-{__version__}.tar.gz"
    assert gptkern.__version__ == __version__
    assert re.search(rf"^## .*\b{re.escape(__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_wheel_works_where_it_is_installed(built, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(built[0]) as archive:  # a pure wheel: to unpack it is to install it
        archive.extractall(site)
    done = run_python(
        """
import sys
# An editable installation of this environment would offer its own compiled module.
sys.meta_path = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
import torch
import gptkern
y = gptkern.functional.layer_norm(torch.randn(2, 8), (8,))
assert y.shape == (2, 8)
model = torch.nn.Sequential(torch.nn.LayerNorm(8))
gptkern.swap(model)
from gptkern.backends.cuda import common, sources
assert common.not_built().endswith("it was built with GPTKERN_CUDA=0"), common.not_built()
print(gptkern.__file__, sources.folder())
""",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    package, csrc = map(Path, done.stdout.split())
    assert package.is_relative_to(site) and csrc == site / "gptkern" / "_csrc"


@pytest.mark.skipif(emulated.missing() is not None, reason=f"no emulated CUDA kernels: {emulated.missing()}")
def test_the_emulator_is_built_from_an_installed_package(built, tmp_path):
    with zipfile.ZipFile(built[0]) as archive:
        archive.extractall(tmp_path / "site")
    # Objects are cached by what they are made of: what this clone has compiled is not compiled again.
    done = run_python(
        """
from gptkern.backends.cuda import emulated
print(emulated.load().architectures, emulated.build(quiet=True), emulated.__file__)
""",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )
    architectures, path, module = done.stdout.split()
    assert architectures == "emulated" and Path(module).is_relative_to(tmp_path)
    assert Path(path) == emulated.build(quiet=True), "the packed sources are not those of this clone"


# --- The project's files ----------------------------------------------------------------------------------------------


def test_ci_runs_the_tests_of_the_makefile():
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^test:.*\n\t.*pytest", makefile, re.MULTILINE)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_no_file_names_a_machine():
    """No path of one person's machine and no package registry's host: the project installs from anywhere."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("the files of the project are listed by git, and this is no clone")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    # Written in two parts, so that this file does not find itself.
    forbidden = re.compile(
        r"(?<![\w/.])/(?:wo" r"rk|ho" r"me|ro" r"ot|opt/py" r"pi)\b|pypi\.o" r"rg|pythonho" r"sted|pytorch\.org/wh" r"l"
    )
    found = []
    for name in listed.split("\0"):
        path = ROOT / name
        if not name or not path.is_file():
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # an image
        found += [f"{name}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if forbidden.search(line)]
    assert not found, "\n".join(found)
