"""rms_norm: sizes, inputs, plain mathematics, bytes and operations; what is checked, timed, tuned and counted."""

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

EPS = 1e-6
# Tokens of a training step.
ROWS = 16384
# A head of Llama's and Qwen's (query and key norms), and the widths of Llama 3 1B, 3B, 8B, 70B and 405B.
MODEL_WIDTHS = (128, 2048, 3072, 4096, 8192, 16384)
# Rows that float64 has room for.
CHECK_ROWS = 128
# gptkern calls PyTorch's operator on a CPU: what it adds is the twin's own host time.
CPU_LIMITS = {"float32": (("eager", 1.05),)}

# Operations an element, counted from the contract's formulas. Forward: the square and its sum, rstd; then the weight.
# Backward: x_hat (1), avg(g * x_hat) (2), and dx = rstd * (g - x_hat * avg(g * x_hat)) (3); weight: g = dy * weight (1)
# and its gradient (2).
_FORWARD, _FORWARD_WEIGHT = 3, 1
_BACKWARD, _BACKWARD_WEIGHT = 6, 3

# Wider than any row that a Triton program holds in registers.
_WIDE = 65536
# Of a row that registers do not hold, shared memory keeps a part; the rest is read twice, and dweight has a kernel.
_COUNTED_WIDE = 2.1


class Sizes(NamedTuple):
    rows: int
    width: int
    weight: bool = True
    residual: bool = False


class RMSNorm(Problem):
    coverage = "float16, bfloat16, float32; any width"
    classes = Classes(
        dict(bits=BITS, width=WIDTHS, residual=TRUTH),
        lambda call: (bits(call.input), least_size(WIDTHS, call.input.shape[-1]), call.residual is not None),
    )
    counted = (
        *(Counted(Sizes(rows, width)) for rows, width in ((64, 128), (64, 1024), (16, 4096), (4, 16384))),
        Counted(Sizes(2, 65536), limit=_COUNTED_WIDE), Counted(Sizes(64, 1024), FLOAT32),
        Counted(Sizes(33, 200), FLOAT16), Counted(Sizes(32, 1024, residual=True)),
        Counted(Sizes(8, 4096, residual=True), FLOAT32),
    )  # fmt: skip

    def inputs(self, sizes: Sizes, dtype, generator) -> Inputs:
        rows, width, has_weight, residual = sizes
        tensors = {"input": normal(generator, rows, width, dtype=dtype) + 1}
        if has_weight:
            tensors["weight"] = normal(generator, width, dtype=dtype) + 1
        if residual:
            tensors["residual"] = normal(generator, rows, width, dtype=dtype)

        def reference(*given):
            x, weight, other = _named(sizes, given)
            s = x if other is None else x + other
            if other is not None and s.dtype == torch.float32:
                # The yardstick: y is the normalised s as it is returned, rounded to the inputs' dtype.
                s = s + (s.to(dtype).float() - s).detach()
            # y = s / sqrt(avg(s²) + eps) * weight
            y = s / torch.sqrt(s.square().mean(1, keepdim=True) + EPS)
            if weight is not None:
                y = y * weight
            return y if other is None else (y, s)

        return Inputs(tensors, {}, dict(normalized_shape=(width,), eps=EPS), reference)

    def checks(self):
        return {
            "small": {
                "tail": Check(Sizes(7, 33)),
                "Llama": Check(Sizes(9, 1024)),
                "wide": Check(Sizes(2, 33001), (FLOAT32, BFLOAT16)),
                "no weight": Check(Sizes(6, 65, weight=False)),
                "residual": Check(Sizes(5, 100, residual=True)),
                "wide, residual": Check(Sizes(1, 33001, residual=True), (BFLOAT16,)),
                "narrow": Check(Sizes(40, 3)),
            },
            "realistic": {
                "Llama 8B": Check(Sizes(8192, 4096)),
                "heads of 128": Check(Sizes(65536, 128)),
                "residual": Check(Sizes(4096, 4096, residual=True)),
                "tail": Check(Sizes(3001, 1023)),
                "Llama 405B": Check(Sizes(1024, 16384)),
                "wide": Check(Sizes(256, 50257)),
                "widest": Check(Sizes(64, 262144)),
                "narrow": Check(Sizes(100_003, 8)),
            },
        }

    def label(self, sizes: Sizes) -> str:
        return f"{sizes.rows}x{sizes.width}"

    def bytes(self, sizes: Sizes, itemsize: int, direction: str) -> int:
        """Forward: reads input (and residual) and weight, writes the output (and the sum). Backward: reads input, dy,
        weight and each row's rstd; writes dx and dweight. Both: the forward writes rstd too.

        Raises:
            ValueError: a residual's backward (dx once more, and the gradient of the sum) is not counted.
        """
        rows, width, weight, residual = sizes
        if residual and direction != FORWARD:
            raise ValueError(f"rms_norm: direction is {direction!r}; with a residual it needs 'forward'")
        x, parameter, statistics = rows * width * itemsize, width * itemsize * weight, rows * FLOAT32_BYTES
        forward = x * (4 if residual else 2) + parameter
        backward = 3 * x + statistics + 2 * parameter
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + statistics + backward}[direction]

    def flops(self, sizes: Sizes, direction: str) -> float:
        """Additions and multiplications, all alike; divisions and roots a row are left out. Source: our own count."""
        elements = float(sizes.rows * sizes.width)
        forward = elements * (_FORWARD + _FORWARD_WEIGHT * sizes.weight + sizes.residual)
        backward = elements * (_BACKWARD + _BACKWARD_WEIGHT * sizes.weight)
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[direction]

    def cells(self, kind: str, extent: str) -> list[Timed]:
        if extent == "smoke":
            dtype = "bfloat16" if kind == "cuda" else "float32"
            return [Timed(FORWARD, dtype, Sizes(16, 64)), Timed(BOTH, dtype, Sizes(16, 64))]
        if kind == "cpu":
            # All over 1 MB, where the limit holds.
            shapes = [("float32", 512, 4096)]
            if extent == "full":
                shapes += [("float32", 512, 2048), ("bfloat16", 512, 4096)]
            found = [
                Timed(direction, dtype, Sizes(rows, width), CPU_LIMITS.get(dtype, ()))
                for dtype, rows, width in shapes
                for direction in (FORWARD, BACKWARD)
            ]
            if extent == "full":
                found.append(Timed(FORWARD, "float32", Sizes(512, 4096, residual=True)))
            return found
        if extent == "quick":
            return [Timed(direction, "bfloat16", Sizes(ROWS, 4096)) for direction in (FORWARD, BACKWARD)]
        widths = middle_first(MODEL_WIDTHS, 4096, 128, 16384)
        found = [Timed(direction, "bfloat16", Sizes(ROWS, width)) for width in widths for direction in DIRECTIONS]
        found += [Timed(FORWARD, "bfloat16", Sizes(ROWS, width, residual=True)) for width in widths]
        return found + [Timed(direction, "float32", Sizes(ROWS, 4096)) for direction in (FORWARD, BACKWARD)]

    def shown(self, sizes: Sizes):
        residual = (("residual", True),) if sizes.residual else ()
        return (("rows", sizes.rows), ("width", sizes.width), *residual)

    def panel(self, sizes: Sizes, dtype: str) -> str:
        return f"rms_norm{' with a residual' if sizes.residual else ''}, {sizes.rows} rows, {dtype}"

    def x(self, sizes: Sizes) -> str:
        return "width"

    def plain(self, sizes: Sizes):
        def call(*given):
            x, weight, other = _named(sizes, given)
            s = x if other is None else x + other
            y = F.rms_norm(s, (sizes.width,), weight, EPS)
            return y if other is None else (y, s)

        return call

    def for_float64(self, sizes: Sizes) -> Sizes:
        return sizes._replace(rows=min(sizes.rows, CHECK_ROWS))

    def row(self, backend: str, kernel: str, width: None) -> Tuned:
        # Beyond the registers two kernels share the backward: what is differentiated says which one runs.
        wrt = {"forward": (), "backward": ("input",), "weight": ("weight",)}[kernel]
        direction = FORWARD if kernel == "forward" else BACKWARD
        return Tuned(direction, BFLOAT16, Sizes(5, _WIDE + 3), Sizes(ELEMENTS // _WIDE, _WIDE), wrt)

    def class_tasks(self) -> dict[tuple, Tuned]:
        return {
            (16, width, residual): Tuned(
                BOTH, BFLOAT16, Sizes(9, timed, residual=residual), Sizes(ELEMENTS // timed, timed, residual=residual)
            )
            for width, timed in ((1024, 1024), (4096, 4096), (16384, 8192), (None, 32768))
            for residual in (False, True)
        }

    def sensible(self, key: tuple, candidate) -> bool:
        # A row walked in chunks is a program's only one.
        return candidate.block_rows == 1 or key[0] == "weight"


def _named(sizes: Sizes, given: tuple) -> tuple:
    """-> input, weight, residual, of which the call may have none."""
    input, *rest = given
    weight = rest.pop(0) if sizes.weight else None
    return input, weight, rest[0] if sizes.residual else None


PROBLEM = RMSNorm()
