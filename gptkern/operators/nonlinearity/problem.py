"""nonlinearity: sizes, inputs, plain mathematics, bytes and operations; what is checked, timed and counted."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from gptkern.backends.problem import (
    BACKWARD,
    BFLOAT16,
    BITS,
    BOTH,
    DIRECTIONS,
    ELEMENTS,
    FLOAT16,
    FLOAT32,
    FORWARD,
    FOUR,
    TRUTH,
    Check,
    Classes,
    Counted,
    Inputs,
    Problem,
    Timed,
    Tuned,
    bits,
    normal,
)

# Tokens of a training step.
ROWS = 16384
# Widths of MLPs: GPT-2's and GPT-2 XL's, Llama 3's 1B and 8B (and Gemma 2's 9B).
GELU_WIDTHS = (3072, 6400)
GATED_WIDTHS = (8192, 14336)
# Rows that float64 has room for.
CHECK_ROWS = 64
# gptkern calls PyTorch's operator on a CPU: what it adds is the twin's own host time.
CPU_LIMITS = {"float32": (("eager", 1.05),)}

# Operations an element, counted from the contract's formulas; erf, exp and a division are one each.
_FORWARD = {"gelu": 5, "gelu_tanh": 8, "silu": 3}
_BACKWARD = {"gelu": 11, "gelu_tanh": 17, "silu": 8}
# f(g) * u; dy * u, f(g), dy * f(g). x + bias; that and the sum.
_GATE = {FORWARD: 1, BACKWARD: 3}
_BIAS = {FORWARD: 1, BACKWARD: 2}


class Sizes(NamedTuple):
    rows: int
    width: int
    function: str = "gelu"
    gate: str | None = None  # "pair": gate and up; "packed": halves of the rows of one tensor
    bias: bool = False


def _swiglu(rows: int, width: int, gate: str = "pair") -> Sizes:
    return Sizes(rows, width, "silu", gate)


def _geglu(rows: int, width: int, gate: str = "pair") -> Sizes:
    return Sizes(rows, width, "gelu_tanh", gate)


class Activation(Problem):
    coverage = "float16, bfloat16, float32, float64 (triton alone); any width, plain, gated, packed"
    classes = Classes(
        dict(bits=BITS, gated=TRUTH, bias=TRUTH),
        lambda call: (bits(call.input), call.packed or call.up is not None, call.bias is not None),
    )
    counted = (
        Counted(_swiglu(32, 1024)), Counted(_swiglu(32, 1024, "packed")), Counted(Sizes(32, 1024)),
        Counted(Sizes(64, 1024, "gelu_tanh", bias=True), limit=1.1), Counted(_geglu(32, 512), FLOAT32),
        Counted(_swiglu(33, 200, "packed"), FLOAT16),
    )  # fmt: skip

    def inputs(self, sizes: Sizes, dtype, generator) -> Inputs:
        rows, width, function, gate, bias = sizes
        shape = (rows, 2 * width if gate == "packed" else width)
        tensors = {"input": normal(generator, *shape, dtype=dtype, spread=2.0)}
        if gate == "pair":
            tensors["up"] = normal(generator, *shape, dtype=dtype)
        if bias:
            tensors["bias"] = normal(generator, width, dtype=dtype)

        def reference(x, other=None):
            if gate == "packed":
                x, other = x[:, :width], x[:, width:]
            if bias:
                x = x + other
            if function == "gelu":
                y = x * (1 + torch.erf(x / math.sqrt(2))) / 2
            elif function == "silu":
                y = x / (1 + torch.exp(-x))
            else:
                y = x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
            return y * other if gate else y

        return Inputs(tensors, {}, dict(function=function, packed=gate == "packed"), reference)

    def checks(self):
        return {
            "small": {
                "swiglu": Check(_swiglu(7, 64), FOUR),
                "swiglu packed": Check(_swiglu(5, 40, "packed"), FOUR),
                "swiglu tail": Check(_swiglu(3, 1031)),
                "swiglu packed tail": Check(_swiglu(7, 33, "packed")),
                "geglu": Check(_geglu(7, 65)),
                "geglu exact, packed": Check(Sizes(9, 48, "gelu", "packed")),
                "gelu": Check(Sizes(7, 33), FOUR),
                "gelu tanh": Check(Sizes(3, 1040, "gelu_tanh")),
                "silu": Check(Sizes(5, 129, "silu")),
                "bias": Check(Sizes(37, 72, bias=True), FOUR),
                "bias tail": Check(Sizes(19, 131, "gelu_tanh", bias=True)),
            },
            "realistic": {
                "swiglu": Check(_swiglu(4096, 8192)),
                "swiglu packed": Check(_swiglu(4096, 8192, "packed")),
                "swiglu packed tail": Check(_swiglu(1001, 5001, "packed")),
                "geglu": Check(_geglu(4096, 4096)),
                "geglu exact": Check(Sizes(4096, 4096, "gelu", "pair")),
                "gelu": Check(Sizes(8192, 3072), FOUR),
                "gelu tanh": Check(Sizes(8192, 3072, "gelu_tanh")),
                "silu": Check(Sizes(8191, 3071, "silu")),
                "bias": Check(Sizes(8192, 3072, "gelu_tanh", bias=True)),
                "bias tail": Check(Sizes(8191, 3071, bias=True)),
            },
        }

    def label(self, sizes: Sizes) -> str:
        return f"{sizes.rows}x{sizes.width}"

    def bytes(self, sizes: Sizes, itemsize: int, direction: str) -> int:
        """Forward: reads x, or gate and up, and the bias; writes y. Backward: reads them and dy; writes a gradient for
        each."""
        x, bias = sizes.rows * sizes.width * itemsize, sizes.width * itemsize * sizes.bias
        inputs = x * (2 if sizes.gate else 1)
        forward, backward = inputs + bias + x, 2 * (inputs + bias) + x
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[direction]

    def flops(self, sizes: Sizes, direction: str) -> float:
        """Source: our own count."""

        def operations(way, of_function):
            return of_function[sizes.function] + _GATE[way] * bool(sizes.gate) + _BIAS[way] * sizes.bias

        each = {FORWARD: operations(FORWARD, _FORWARD), BACKWARD: operations(BACKWARD, _BACKWARD)}
        each[BOTH] = each[FORWARD] + each[BACKWARD]
        return float(sizes.rows * sizes.width * each[direction])

    def cells(self, kind: str, extent: str) -> list[Timed]:
        if extent == "smoke":
            dtype = "bfloat16" if kind == "cuda" else "float32"
            return [Timed(direction, dtype, _swiglu(16, 64)) for direction in (FORWARD, BOTH)]
        if kind == "cpu":
            # All over 1 MB, where the limit holds.
            shapes = [("float32", _swiglu(256, 2048)), ("float32", Sizes(256, 3072, "gelu_tanh"))]
            if extent == "full":
                shapes += [("float32", _swiglu(256, 2048, "packed")), ("bfloat16", _swiglu(256, 2048))]
            return [
                Timed(direction, dtype, sizes, CPU_LIMITS.get(dtype, ()))
                for dtype, sizes in shapes
                for direction in (FORWARD, BACKWARD)
            ]
        if extent == "quick":
            return [Timed(direction, "bfloat16", _swiglu(ROWS, 8192)) for direction in (FORWARD, BACKWARD)]
        found = [
            Timed(direction, "bfloat16", Sizes(ROWS, width, function, gate))
            for function, gate in (("silu", "pair"), ("silu", "packed"), ("gelu_tanh", "pair"))
            for width in GATED_WIDTHS
            for direction in DIRECTIONS
        ]
        return found + [
            Timed(direction, "bfloat16", Sizes(ROWS, width, function, bias=bias))
            for function, bias in (("gelu_tanh", False), ("gelu_tanh", True), ("gelu", False))
            for width in GELU_WIDTHS
            for direction in (FORWARD, BACKWARD)
        ]

    def shown(self, sizes: Sizes):
        found = [("rows", sizes.rows), ("width", sizes.width), ("function", sizes.function)]
        return (*found, *([("gate", sizes.gate)] if sizes.gate else []), *([("bias", True)] if sizes.bias else []))

    def panel(self, sizes: Sizes, dtype: str) -> str:
        words = [sizes.function, *(["gate, packed" if sizes.gate == "packed" else "gate"] if sizes.gate else [])]
        return f"{' '.join([*words, *(['with bias'] if sizes.bias else [])])}, {sizes.rows} rows, {dtype}"

    def x(self, sizes: Sizes) -> str:
        return "width"

    def plain(self, sizes: Sizes):
        function = F.silu
        if sizes.function != "silu":
            approximate = "tanh" if sizes.function == "gelu_tanh" else "none"

            def function(x):
                return F.gelu(x, approximate=approximate)

        def gated(gate, up):
            return function(gate) * up

        if sizes.gate:
            return gated if sizes.gate == "pair" else lambda packed: gated(*packed.chunk(2, -1))
        return (lambda x, bias: function(x + bias)) if sizes.bias else function

    def for_float64(self, sizes: Sizes) -> Sizes:
        return sizes._replace(rows=min(sizes.rows, CHECK_ROWS))

    def class_tasks(self) -> dict[tuple, Tuned]:
        timed = ELEMENTS // 8192
        return {
            (16, True, False): Tuned(BOTH, BFLOAT16, _swiglu(9, 72, "packed"), _swiglu(timed, 8192, "packed")),
            (16, False, False): Tuned(BOTH, BFLOAT16, Sizes(9, 72), Sizes(timed, 8192)),
            (16, False, True): Tuned(BOTH, BFLOAT16, Sizes(9, 72, bias=True), Sizes(timed, 8192, bias=True)),
        }


PROBLEM = Activation()
