"""How the package is built: who imports whom, who names an operator, and what a new operator costs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import throwaway_operator

from gptkern import operators

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gptkern"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)

# Who may import whom: only what stands further right, and what is in the same place (docs/design.md, section 2). The
# list of operators itself, which imports no room before it is asked for one, is below all of them.
LAYERS = (
    {"cli", "__main__"},
    {"commands"},
    {"measuring", "training"},
    {"integrations"},
    {"swapping", "quantizing"},
    {"nn"},
    {"functional", "autograd", "optim"},
    {"rooms"},
    {"backends"},
    {"operators", "models", "version", "formatting"},
)
# What may name an operator: the public faces, swap's map of PyTorch's functions, the peers' adapters; and the choice
# of cells and compile cases that are predicted.
MAY_NAME = {
    "functional.py", "nn.py", "autograd.py", "optim.py", "swapping/twins.py", "measuring/peers.py",
    "bench/predict_cells.py", "bench/predict_rows.py", "bench/host_path.py",
}  # fmt: skip


def layer(name: str) -> int:
    parts = name.split(".")
    top = "rooms" if parts[0] == "operators" and len(parts) > 1 and parts[1] in operators.NAMES else parts[0]
    return next(index for index, names in enumerate(LAYERS) if top in names)


def imports(path: Path) -> set[str]:
    """The modules of gptkern that a file imports anywhere, functions included: "operators.softmax.contract", "nn", …"""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import, which this test does not follow"
            package = node.module == "gptkern" or (ROOT / node.module.replace(".", "/")).is_dir()
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if package else {node.module}
    return {name.removeprefix("gptkern.") for name in found if name.startswith("gptkern.")}


def place_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_imports_upwards(path):
    place = place_of(path)
    if place == "__init__":
        return  # the public names: it may import anything
    for name in imports(path) - {"version.__version__", "version"}:
        if place.startswith("models"):
            assert name.startswith("models"), f"{place} imports gptkern.{name}; the models are stock PyTorch"
        assert layer(name) >= layer(place), f"{place} imports gptkern.{name}, which is above it"


@pytest.mark.parametrize("room", operators.NAMES)
def test_a_room_imports_no_other(room):
    for path in sorted((PACKAGE / "operators" / room).glob("*.py")):
        for name in imports(path):
            assert not name.startswith("operators.") or name.split(".")[1] == room, f"{path} imports gptkern.{name}"
            if path.name == "problem.py":
                assert name.startswith("backends.problem"), f"{path} imports gptkern.{name}: a problem is data"


def test_the_layer_test_sees_imports_in_functions(tmp_path):
    path = tmp_path / "module.py"
    lines = ["from gptkern.operators.softmax import contract", "import gptkern.nn", "from gptkern import cli"]
    path.write_text("def f():\n" + "".join(f"    {line}\n" for line in lines))
    assert imports(path) == {"operators.softmax.contract", "nn", "cli"}
    assert layer("cli") < layer("nn") < layer("operators.softmax.contract") < layer("backends.dispatch")
    assert layer("backends.dispatch") < layer("operators")


def named_in(path: Path) -> set[str]:
    """What a file says of an operator in code: a room that it imports, a string that is an operator's name."""
    tree = ast.parse(path.read_text())
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    strings = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation
    }
    rooms = {name.split(".")[1] for name in imports(path) if layer(name) == layer("operators.softmax")}
    paths = set(re.findall(r"\boperators\.(\w+)", " ".join(strings)))
    return {name for name in operators.NAMES if name in rooms | strings | paths}


def test_only_the_short_list_names_an_operator():
    scripts = [path for folder in ("bench", "building") for path in sorted((ROOT / folder).glob("*.py"))]
    for path in [*MODULES, *scripts]:
        where = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).as_posix()
        if where not in MAY_NAME and not where.startswith("operators/"):
            assert not named_in(path), f"{where} names {', '.join(sorted(named_in(path)))}"


def test_a_name_in_code_is_seen(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('"""Of softmax."""\nif operator == "rotary":\n    from gptkern.operators.layer_norm import cuda\n')
    assert named_in(path) == {"rotary", "layer_norm"}
    path.write_text('import importlib\nimportlib.import_module("gptkern.operators.softmax.contract")\n')
    assert named_in(path) == {"softmax"}


# --- A new operator ---------------------------------------------------------------------------------------------------


def test_a_new_operator_needs_its_rooms_and_four_lines(tmp_path):
    """A scaled ReLU with two variants of Triton, in a copy of the tree: it is found, checked, timed and tuned."""
    shutil.copytree(PACKAGE, tmp_path / "gptkern", ignore=shutil.ignore_patterns("__pycache__", "_cuda*.so"))
    added = throwaway_operator.add_to(tmp_path / "gptkern")
    assert added <= 4, f"{added} lines outside of its room"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1", "GPTKERN_CACHE": str(tmp_path)}
    environment.pop("GPTKERN_EMULATE_CUDA", None)
    program = [sys.executable, "-W", "ignore::RuntimeWarning", throwaway_operator.__file__, str(tmp_path)]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for what in ("found", "checked on triton", "checked on triton:doubled", "timed", "tuned", "explained"):
        assert f"{what}\n" in done.stdout, done.stdout
