"""A scaled ReLU, y = scale · max(x, 0), as somebody would add it: its room, and the lines elsewhere.

    python tests/throwaway_operator.py FOLDER     uses the operator in every way, in the copy of the tree in FOLDER

test_structure.py adds it to a copy of the package. Two variants of one backend: the second does two elements at a time.
"""

from __future__ import annotations

import sys
from pathlib import Path

NAME = "scaled_relu"

CONTRACT = '''
"""scaled_relu: y = scale * max(x, 0)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gptkern.backends import dispatch
from gptkern.backends.registration import Operator, once_differentiable


class Call(NamedTuple):
    input: torch.Tensor
    scale: float


class Gradient(NamedTuple):
    grad_output: torch.Tensor


def scaled_relu(input, *, scale=1.0):
    """y = scale * max(x, 0)."""
    choice = dispatch.settled(input)
    if choice is None:
        call = Call(input, float(scale))
        choice, _ = dispatch.chosen("scaled_relu", call)
        if choice.backend != "torch":
            return ScaledReluFunction.apply(*call, choice.backend)
    return torch.relu(input) * scale


def unsupported(call):
    return None


def forward(call):
    return torch.relu(call.input) * call.scale


def backward(gradient, call):
    return torch.where(call.input > 0, gradient.grad_output * call.scale, 0.0)


TWIN = scaled_relu
OPERATOR = Operator(
    "scaled_relu", Call, 1, lambda call: torch.empty_like(call.input),
    Gradient, 1, lambda gradient, call: torch.empty_like(call.input),
)


class ScaledReluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, scale, backend):
        ctx.save_for_backward(input)
        ctx.options = scale, backend
        return OPERATOR.forward(Call(input, scale), backend)

    @staticmethod
    def backward(ctx, grad_output):
        (input,), (scale, backend) = ctx.saved_tensors, ctx.options
        dx = OPERATOR.backward(Gradient(grad_output), Call(input, scale), backend)
        return *once_differentiable("scaled_relu", [dx], (grad_output, input)), None, None
'''

KERNELS = '''
"""scaled_relu on Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gptkern.backends.tables.configurations import Table
from gptkern.backends.triton.common import cdiv
from gptkern.operators.scaled_relu.contract import Call, Gradient

EACH = {each}


class Tile(NamedTuple):
    block_width: int
    num_warps: int


TABLE = Table("scaled_relu", {{"elements": None}}, Tile, backend="{backend}")


@triton.jit
def _kernel(x_ptr, g_ptr, y_ptr, n, scale, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr):
    for part in range(EACH):
        at = (tl.program_id(0) * EACH + part) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, mask=at < n, other=0.0).to(tl.float32) if GRADIENT else x
        tl.store(y_ptr + at, tl.where(x > 0, g * scale, 0.0).to(y_ptr.dtype.element_ty), mask=at < n)


def unsupported(call):
    return f"{{call.input.dtype}}" if call.input.dtype == torch.float64 else None


def _launch(x, g, scale):
    x, g = x.contiguous(), g.contiguous()
    y, n = torch.empty_like(x), x.numel()
    block, warps = TABLE.find(x.device, n)
    _kernel[(cdiv(n, block * EACH),)](
        x, g, y, n, scale, GRADIENT=g is not x, BLOCK=block, EACH=EACH, num_warps=warps
    )
    return y


def forward(call):
    x = call.input
    return _launch(x, x, call.scale)


def backward(gradient, call):
    return _launch(call.input, gradient.grad_output, call.scale)
'''

PROBLEM = '''
"""scaled_relu: what is known of it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gptkern.backends.problem import BACKWARD, FLOAT32, FORWARD, Check, Classes, Inputs, Problem
from gptkern.backends.problem import Timed, Tuned, bits, normal


class Sizes(NamedTuple):
    rows: int
    width: int


class ScaledRelu(Problem):
    coverage = "all but float64"
    classes = Classes(dict(bits=(16, 32)), lambda call: (bits(call.input),))

    def inputs(self, sizes, dtype, generator):
        x = normal(generator, *sizes, dtype=dtype)
        return Inputs(dict(input=x), {}, dict(scale=3.0), lambda x: 3.0 * x * (x > 0))

    def checks(self):
        return {"small": {"tail": Check(Sizes(7, 33))}, "realistic": {"large": Check(Sizes(1024, 1023))}}

    def bytes(self, sizes, itemsize, direction):
        return {FORWARD: 2, BACKWARD: 3}[direction] * sizes.rows * sizes.width * itemsize

    def flops(self, sizes, direction):
        return 2.0 * sizes.rows * sizes.width

    def cells(self, kind, extent):
        return [Timed(direction, "float32", Sizes(16, 64)) for direction in (FORWARD, BACKWARD)]

    def panel(self, sizes, dtype):
        return f"scaled_relu, {dtype}"

    def plain(self, sizes):
        return lambda x: torch.relu(x) * 3.0

    def row(self, backend, most):
        return Tuned(FORWARD, FLOAT32, Sizes(5, 33), Sizes(64, 64))

    def class_tasks(self):
        return {(32,): Tuned(FORWARD, FLOAT32, Sizes(5, 33), Sizes(64, 64))}


PROBLEM = ScaledRelu()
'''

TILES = """{"operator": "scaled_relu", "why": ["a test"], "entries": [{"architecture": 80, "source": "reasoned",
 "rows": [{"elements": null, "block_width": 64, "num_warps": 1}]}]}"""
ORDER = """{"defaults": [{"architecture": 80, "order": ["triton:doubled", "triton", "cuda", "torch"],
 "source": "reasoned: two at a time"}], "entries": []}"""

# file -> (line that is there, line that is added behind it)
LINES = {
    "operators/__init__.py": (")", 'NAMES = ("scaled_relu", *NAMES)'),
    "functional.py": (
        "from gptkern.operators.softmax.contract import softmax",
        "from gptkern.operators.scaled_relu.contract import scaled_relu",
    ),
    "autograd.py": (
        "from gptkern.operators.softmax.contract import SoftmaxFunction",
        "from gptkern.operators.scaled_relu.contract import ScaledReluFunction",
    ),
}


def add_to(package: Path) -> int:
    """Writes the room, and the lines elsewhere; -> how many these are."""
    room = package / "operators" / NAME
    room.mkdir()
    files = {
        "__init__.py": "", "contract.py": CONTRACT, "problem.py": PROBLEM,
        "triton.py": KERNELS.format(each=1, backend="triton"), "triton.json": TILES,
        "triton_doubled.py": KERNELS.format(each=2, backend="triton:doubled"), "triton_doubled.json": TILES,
        "backends.json": ORDER,
    }  # fmt: skip
    for name, text in files.items():
        (room / name).write_text(text.lstrip("\n"))
    for name, (there, line) in LINES.items():
        path = package / name
        lines = path.read_text().splitlines()
        (place,) = (index for index, text in enumerate(lines) if text.startswith(there))
        path.write_text("\n".join([*lines[: place + 1], line, *lines[place + 1 :], ""]))
    return len(LINES)


def main(folder: str) -> None:
    """Each way to use an operator, in the tree in `folder`; prints what came out right."""
    import dataclasses

    import torch

    import gptkern
    import gptkern.functional as F
    from gptkern import operators
    from gptkern.backends import dispatch
    from gptkern.backends.tables import orders, user
    from gptkern.commands import info
    from gptkern.measuring import checking, runner, tuning, tuning_tasks

    torch.set_num_threads(1)
    assert gptkern.__file__.startswith(folder), gptkern.__file__
    assert NAME in operators.NAMES and F.scaled_relu(torch.tensor([-1.0, 2.0]), scale=3.0).tolist() == [0.0, 6.0]
    (cpu,) = info.gathered()["devices"]
    assert cpu["backends"][NAME]["triton:doubled"] is None and cpu["backends"]["softmax"].keys() == {
        "cuda",
        "triton",
        "torch",
    }
    print("found")

    for backend in ("triton", "triton:doubled"):
        results = list(checking.run([NAME], backends=[backend]))
        assert len(results) == 6 and all(result.ok and result.backend == backend for result in results), results
        print(f"checked on {backend}")

    cell, *_ = runner.cells("cpu", "smoke", [NAME])
    record, samples = runner.measure(cell, "cpu", 2, ["eager"])
    assert record["check"]["bound"] > 0 and samples.keys() == {"gptkern", "eager"}, record
    print("timed")

    device = torch.device("cpu")
    tables = tuning_tasks.tables((NAME,))
    assert [table.backend for table in tables] == ["triton:doubled", "triton"]
    tasks = [task for table in tables for task in tuning_tasks.row_tasks(table, 80, table.defaults(80))]
    tasks += tuning_tasks.class_tasks(NAME)
    assert all(len(task.candidates) > 1 for task in tasks[:2])
    h200, kept = user.Device("NVIDIA H200", 90), []
    put = tuning.keep_for_user(h200)

    def keep(task, row, key):
        kept.append(row)
        put(task, row, key)

    def clock(functions, inputs, rounds):
        for function in functions:
            function(*inputs[0])
        # The later a candidate comes, the faster: the last one wins.
        return [[1.0 / (place + 1)] * rounds for place, _ in enumerate(functions)]

    outcomes = list(tuning.tune(tasks, device, keep, rounds=3, timer=clock))
    assert [outcome.gain > 1 for outcome in outcomes] == [True] * 3, outcomes
    content = user.read(h200).content
    assert (
        set(content["configurations"]) == {f"{NAME}, triton", f"{NAME}, triton:doubled"} and NAME in content["backends"]
    )
    preference = orders.preferences(NAME, h200)[(32,)]
    assert preference.order[0] == "torch" and "measured" in preference.reason, preference
    print("tuned")

    with gptkern.backend("triton:doubled"):
        assert gptkern.explain(F.scaled_relu, torch.ones(2)).backend == "triton:doubled"
        try:
            F.softmax(torch.ones(2), -1)
        except gptkern.BackendError as error:
            assert "triton:doubled" in str(error), error
        else:
            raise AssertionError("a variant was used that the operator does not have")
    print("explained")
    assert dataclasses.is_dataclass(cell) and dispatch.orders.variants()


if __name__ == "__main__":
    main(sys.argv[1])
