"""Mutants: one expression is changed in a copy of a kernel, of Triton or CUDA C++, and a check has to see it."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from cuda_modules import changed_module

import gptkern
from gptkern.backends import dispatch
from gptkern.backends.cuda import emulated
from gptkern.backends.tables import configurations

PACKAGE = Path(gptkern.__file__).parent
SHARED = PACKAGE / "backends" / "triton"
# Who sees a fault: the assertion of a test, or a harness that knows which memory a kernel may touch, how and in what
# order.
HARNESS = "outside of|is not aligned|a race in shared memory"


class Mutation(NamedTuple):
    name: str
    function: str  # that is changed: of changed_triton_module or cuda_modules.changed_module, as are the two below
    old: str
    new: str
    check: Callable  # check(backend, monkeypatch)


def cases(mutations: Mapping[str, Sequence[Mutation]], sharp: Collection[str]):
    """Parametrises "operator" and "mutation"; what is not `sharp` (names) is left to `make test-deep`."""
    return pytest.mark.parametrize(
        ("operator", "mutation"),
        [
            pytest.param(
                operator,
                mutation,
                id=f"{operator}: {mutation.name}",
                marks=[] if mutation.name in sharp else [pytest.mark.deep],
            )
            for operator, of_operator in mutations.items()
            for mutation in of_operator
        ],
    )


@contextlib.contextmanager
def seen():
    """The fault is seen for what it is, and no other error ends the check."""
    with pytest.raises(Exception) as raised:
        yield
    assert isinstance(raised.value, AssertionError) or re.search(HARNESS, str(raised.value)), raised.value


def plant_in_triton(operator: str, mutation: Mutation, folder: Path, monkeypatch) -> None:
    """Until `monkeypatch` undoes it, the operator runs on the changed copy, which is made in `folder`."""
    # What is put back afterwards has to be there.
    dispatch.load("triton", operator)
    # The copy registers a table of its own.
    monkeypatch.setattr(configurations, "TABLES", dict(configurations.TABLES))
    broken = changed_triton_module(operator, mutation.function, mutation.old, mutation.new, folder, monkeypatch)
    monkeypatch.setitem(dispatch._modules, ("triton", operator), broken)


def plant_in_cuda(operator: str, mutation: Mutation, folder: Path, monkeypatch) -> None:
    """The same of its CUDA kernels, on the emulator."""
    broken = changed_module(operator, mutation.function, mutation.old, mutation.new, folder / "csrc")
    monkeypatch.setattr(emulated, "load", lambda: broken)


def changed_triton_module(operator: str, function: str, old: str, new: str, folder: Path, monkeypatch) -> ModuleType:
    """The operator's Triton module, imported anew beside a changed copy of one file; the package stays as it is.

    Args:
        function: the kernel, helper or launcher that is changed.
        old: a regular expression that matches once in the function; a space matches any white space.
        folder: where the copy is made.
    """
    source = _source_of(operator, function)
    path = folder / source.name
    path.write_text(_changed(source, function, old, new))
    changed = ".".join(source.relative_to(PACKAGE.parent).with_suffix("").parts)
    room = f"gptkern.operators.{operator}"
    for name in [changed, *(name for name in sys.modules if name.startswith(f"{room}.triton"))]:
        monkeypatch.delitem(sys.modules, name, raising=False)
        # An import sets the module on its package, too.
        package, _, stem = name.rpartition(".")
        monkeypatch.delattr(sys.modules[package], stem, raising=False)
    spec = importlib.util.spec_from_file_location(changed, path)
    sys.modules[changed] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[changed])
    planted = importlib.import_module(f"{room}.triton")
    monkeypatch.setitem(dispatch._modules, ("triton", operator), planted)
    return planted


def _source_of(operator: str, function: str) -> Path:
    """The file that has the function: one of the operator's Triton kernels, or of what the rooms share."""
    paths = [*(PACKAGE / "operators" / operator).glob("triton*.py"), *SHARED.glob("*.py")]
    return next(path for path in sorted(paths) if re.search(rf"^def {function}\(", path.read_text(), re.MULTILINE))


def _changed(path: Path, function: str, old: str, new: str) -> str:
    """The source with the expression changed, which has to stand exactly once in the function's body."""
    source = path.read_text()
    start = re.search(rf"^def {function}\(", source, re.MULTILINE)
    end = re.compile(r"\n(?=[@#A-Za-z_])").search(source, start.end())
    stop = end.start() if end else len(source)
    body, count = re.subn(old.replace(" ", r"\s+"), new, source[start.start() : stop])
    assert count == 1, f"{path.relative_to(PACKAGE)}, {function}: {count} places like {old}; it needs 1"
    return source[: start.start()] + body + source[stop:]
