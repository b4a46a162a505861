"""layer_norm: sizes, inputs, plain mathematics, bytes and operations; what is checked, timed, tuned and counted."""

from __future__ import annotations

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
    FLOAT32_BYTES,
    FORWARD,
    FOUR,
    TRUTH,
    WIDTHS,
    Check,
    Classes,
    Counted,
    Inputs,
    Problem,
    Timed,
    Tuned,
    bits,
    least_size,
    middle_first,
    normal,
)

EPS = 1e-5
# Tokens of a training step.
ROWS = 16384
# GPT-2 124M, 350M, 774M and 1558M, and GPT-3 1.3B, 6.7B, 13B and 175B.
MODEL_WIDTHS = (768, 1024, 1280, 1600, 2048, 4096, 5120, 12288)
# Rows that float64 has room for.
CHECK_ROWS = 128
# gptkern calls PyTorch's operator on a CPU: what it adds is the twin's own host time. In 16 bits it computes in
# float32, which takes longer and is what PyTorch's own gradients lack.
CPU_LIMITS = {"float32": (("eager", 1.05),)}

# Operations an element, counted from the contract's formulas. Forward: the sum, the subtraction, the square and its
# sum, rstd; then weight and bias one each. Backward: x_hat (2), avg(g) (1), avg(g * x_hat) (2), and
# dx = rstd * (g - avg(g) - x_hat * avg(g * x_hat)) (4); weight: g = dy * weight (1) and its gradient (2); bias: 1.
_FORWARD, _FORWARD_PARAMETER = 5, 1
_BACKWARD, _BACKWARD_WEIGHT, _BACKWARD_BIAS = 9, 3, 1

# Wider than any row that a Triton program holds in registers.
_WIDE = 65536
# Of a row that registers do not hold, and whose backward has a kernel for ds and one for the parameters' gradients.
_COUNTED_WIDE = 2.2


class Sizes(NamedTuple):
    rows: int
    width: int
    residual: bool = False
    parameters: bool = True  # weight and bias


class LayerNorm(Problem):
    coverage = "float16, bfloat16, float32, float64 (triton alone); any width"
    classes = Classes(
        dict(bits=BITS, width=WIDTHS, residual=TRUTH),
        lambda call: (bits(call.input), least_size(WIDTHS, call.input.shape[-1]), call.residual is not None),
    )
    counted = (
        *(Counted(Sizes(rows, width)) for rows, width in ((64, 768), (64, 1024), (16, 4096), (8, 12288))),
        Counted(Sizes(2, 65536), limit=_COUNTED_WIDE), Counted(Sizes(64, 1024), FLOAT32),
        Counted(Sizes(16, 1600), FLOAT16), Counted(Sizes(32, 1024, residual=True)), Counted(Sizes(33, 200)),
    )  # fmt: skip

    def inputs(self, sizes: Sizes, dtype, generator) -> Inputs:
        rows, width, residual, parameters = sizes
        # A mean of twice the spread: a variance computed as E[x²] - E[x]² would show.
        tensors = {"input": normal(generator, rows, width, dtype=dtype) + 2}
        if parameters:
            tensors["weight"] = normal(generator, width, dtype=dtype) + 1
            tensors["bias"] = normal(generator, width, dtype=dtype)
        if residual:
            tensors["residual"] = normal(generator, rows, width, dtype=dtype)

        def reference(*given):
            x, weight, bias, other = _named(sizes, given)
            s = x if other is None else x + other
            if other is not None and s.dtype == torch.float32:
                # The yardstick: y is the normalised s as it is returned, rounded to the inputs' dtype.
                s = s + (s.to(dtype).float() - s).detach()
            centred = s - s.mean(1, keepdim=True)
            # y = (s - mean) / sqrt(var + eps) * weight + bias
            y = centred / torch.sqrt(centred.square().mean(1, keepdim=True) + EPS)
            if weight is not None:
                y = y * weight + bias
            return y if other is None else (y, s)

        return Inputs(tensors, {}, dict(normalized_shape=(width,), eps=EPS), reference)

    def checks(self):
        return {
            "small": {
                "tail": Check(Sizes(7, 33), FOUR),
                "residual": Check(Sizes(5, 100, residual=True)),
                "GPT-2": Check(Sizes(9, 768)),
                "wide": Check(Sizes(2, 16411), (FLOAT32,)),
                "wide, residual": Check(Sizes(1, 16390, residual=True), (BFLOAT16,)),
                "no weight": Check(Sizes(6, 65, parameters=False)),
                "narrow": Check(Sizes(40, 3)),
            },
            "realistic": {
                "GPT-2": Check(Sizes(8192, 768)),
                "residual": Check(Sizes(4096, 1600, residual=True)),
                "tail": Check(Sizes(3001, 1023), FOUR),
                "GPT-3": Check(Sizes(1024, 12288)),
                "wide": Check(Sizes(256, 50257), FOUR),
                "widest": Check(Sizes(64, 262144)),
                "narrow": Check(Sizes(100_003, 8)),
            },
        }

    def label(self, sizes: Sizes) -> str:
        return f"{sizes.rows}x{sizes.width}"

    def bytes(self, sizes: Sizes, itemsize: int, direction: str) -> int:
        """Forward: reads input (and residual), weight and bias; writes the output (and the sum). Backward: reads input,
        dy, weight and each row's mean and rstd; writes dx, dweight and dbias. Both: the forward writes the statistics.

        Source: llm.c's layernorm_forward benchmark counts input and output; parameters and statistics are added here.

        Raises:
            ValueError: a residual's backward (dx once more, and the gradient of the sum) is not counted.
        """
        rows, width, residual, parameters = sizes
        if residual and direction != FORWARD:
            raise ValueError(f"layer_norm: direction is {direction!r}; with a residual it needs 'forward'")
        x, parameter, statistics = rows * width * itemsize, width * itemsize * parameters, 2 * rows * FLOAT32_BYTES
        forward = x * (4 if residual else 2) + 2 * parameter
        # The weight is read and its gradient written; of the bias the gradient alone.
        backward = 3 * x + statistics + 3 * parameter
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + statistics + backward}[direction]

    def flops(self, sizes: Sizes, direction: str) -> float:
        """Additions and multiplications, all alike; divisions and roots a row are left out. Source: our own count."""
        elements, parameters = float(sizes.rows * sizes.width), sizes.parameters
        forward = elements * (_FORWARD + 2 * _FORWARD_PARAMETER * parameters + sizes.residual)
        backward = elements * (_BACKWARD + (_BACKWARD_WEIGHT + _BACKWARD_BIAS) * parameters)
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[direction]

    def cells(self, kind: str, extent: str) -> list[Timed]:
        if extent == "smoke":
            dtype = "bfloat16" if kind == "cuda" else "float32"
            return [Timed(FORWARD, dtype, Sizes(16, 64)), Timed(BOTH, dtype, Sizes(16, 64))]
        if kind == "cpu":
            # All over 1 MB, where the limit holds; the first is GPT-2's.
            shapes = [("float32", 1024, 768), ("float32", 512, 4096)]
            if extent == "full":
                shapes += [("float32", 1024, width) for width in (1024, 1600)] + [("bfloat16", 512, 4096)]
            found = [
                Timed(direction, dtype, Sizes(rows, width), CPU_LIMITS.get(dtype, ()))
                for dtype, rows, width in shapes
                for direction in (FORWARD, BACKWARD)
            ]
            if extent == "full":
                found.append(Timed(FORWARD, "float32", Sizes(1024, 768, residual=True)))
            return found
        if extent == "quick":
            return [Timed(direction, "bfloat16", Sizes(ROWS, 4096)) for direction in (FORWARD, BACKWARD)]
        widths = middle_first(MODEL_WIDTHS, 4096, 768, 12288)
        found = [Timed(direction, "bfloat16", Sizes(ROWS, width)) for width in widths for direction in DIRECTIONS]
        found += [Timed(FORWARD, "bfloat16", Sizes(ROWS, width, residual=True)) for width in widths]
        return found + [Timed(direction, "float32", Sizes(ROWS, 4096)) for direction in (FORWARD, BACKWARD)]

    def shown(self, sizes: Sizes):
        residual = (("residual", True),) if sizes.residual else ()
        return (("rows", sizes.rows), ("width", sizes.width), *residual)

    def panel(self, sizes: Sizes, dtype: str) -> str:
        return f"layer_norm{' with a residual' if sizes.residual else ''}, {sizes.rows} rows, {dtype}"

    def x(self, sizes: Sizes) -> str:
        return "width"

    def plain(self, sizes: Sizes):
        def call(*given):
            x, weight, bias, other = _named(sizes, given)
            s = x if other is None else x + other
            y = F.layer_norm(s, (sizes.width,), weight, bias, EPS)
            return y if other is None else (y, s)

        return call

    def for_float64(self, sizes: Sizes) -> Sizes:
        return sizes._replace(rows=min(sizes.rows, CHECK_ROWS))

    def row(self, backend: str, kernel: str, width: None) -> Tuned:
        # Beyond the registers two kernels share the backward: what is differentiated says which one runs.
        wrt = {"forward": (), "backward": ("input",), "parameters": ("weight", "bias")}[kernel]
        direction = FORWARD if kernel == "forward" else BACKWARD
        return Tuned(direction, BFLOAT16, Sizes(5, _WIDE + 3), Sizes(ELEMENTS // _WIDE, _WIDE), wrt)

    def class_tasks(self) -> dict[tuple, Tuned]:
        return {
            (16, width, residual): Tuned(
                BOTH, BFLOAT16, Sizes(9, timed, residual), Sizes(ELEMENTS // timed, timed, residual)
            )
            for width, timed in ((1024, 768), (4096, 4096), (16384, 8192), (None, 32768))
            for residual in (False, True)
        }

    def sensible(self, key: tuple, candidate) -> bool:
        # A row walked in chunks is a program's only one.
        return candidate.block_rows == 1 or key[0] == "parameters"


def _named(sizes: Sizes, given: tuple) -> tuple:
    """-> input, weight, bias, residual, of which the call may have none."""
    input, *rest = given
    weight, bias = (rest.pop(0), rest.pop(0)) if sizes.parameters else (None, None)
    return input, weight, bias, rest[0] if sizes.residual else None


PROBLEM = LayerNorm()
