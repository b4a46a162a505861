"""softmax: sizes, inputs, plain mathematics, bytes and operations; what is checked, timed, tuned and counted."""

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
    FLOAT32,
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

# Tokens of a training step.
ROWS = 16384
VOCABULARY = 50257  # GPT-2's
# GPT-2's and GPT-3's widths, as layer_norm's.
MODEL_WIDTHS = (768, 1024, 1280, 1600, 2048, 4096, 5120, 12288)
# Causal scores: square matrices, together as many elements as 128 of length 1024.
CAUSAL_LENGTHS = (512, 1024, 2048, 4096)
CAUSAL_ELEMENTS = 128 * 1024**2
# The scale of attention with head_dim 64.
CAUSAL_SCALE = 0.125
# Rows, and length of a causal matrix, that float64 has room for.
CHECK_ROWS, CHECK_LENGTH = 128, 1024
# gptkern calls PyTorch's operator on a CPU: what it adds is the twin's own host time.
CPU_LIMITS = {"float32": (("eager", 1.05),)}

# Operations an element: the maximum, the subtraction, the exponential, the sum, the division; and backward
# dx = y * (dy - sum(dy * y)): two for the sum, a subtraction, a multiplication. A scale adds one to each.
_FORWARD, _BACKWARD = 5, 4

# Wider than any row that a Triton program holds in registers, over the last dimension and over another one.
_WIDE, _WIDE_LANES = 65536, 2048
# Of a row that neither registers nor shared memory hold the rest is read twice.
_COUNTED_WIDE = 1.45


class Sizes(NamedTuple):
    shape: tuple[int, ...]
    dim: int = -1
    scale: float = 1.0
    mask: str | None = None  # "bool" or "additive"
    is_causal: bool = False

    @property
    def width(self) -> int:
        return self.shape[self.dim]

    @property
    def rows(self) -> int:
        return math.prod(self.shape) // self.width


def _causal(matrices: int, length: int) -> Sizes:
    return Sizes((matrices, length, length), scale=CAUSAL_SCALE, is_causal=True)


def _class_of(call) -> tuple:
    dimensions = call.input.dim()
    width = call.input.shape[call.dim] if dimensions else 1
    is_last = call.dim in (-1, max(dimensions, 1) - 1)
    # PyTorch takes a pass over memory for each of the three.
    is_fused = call.mask is not None or call.is_causal or call.scale != 1.0
    return bits(call.input), least_size(WIDTHS, width), is_last, is_fused


class Softmax(Problem):
    coverage = "float16, bfloat16, float32, float64 (triton alone); any dim, any width; a mask without gradient"
    classes = Classes(dict(bits=BITS, width=WIDTHS, last=TRUTH, fused=TRUTH), _class_of)
    counted = (
        Counted(Sizes((64, 1024))), Counted(Sizes((16, 4096))), Counted(Sizes((2, 65536)), limit=_COUNTED_WIDE),
        Counted(Sizes((64, 1024)), FLOAT32), Counted(Sizes((33, 200))),
        Counted(Sizes((2, 256, 256), is_causal=True)), Counted(Sizes((2, 64, 512), mask="bool")),
        Counted(Sizes((2, 64, 256), dim=1)),
    )  # fmt: skip

    def inputs(self, sizes: Sizes, dtype, generator) -> Inputs:
        shape, dim, scale, kind, is_causal = sizes
        input = normal(generator, *shape, dtype=dtype, spread=3.0)
        mask = None
        if kind == "bool":
            mask = torch.rand(shape[-2:], generator=generator, device=generator.device) < 0.7
            mask[0] = False  # a row of which nothing takes part
        elif kind == "additive":
            mask = normal(generator, *shape[-2:], dtype=dtype)

        def reference(x):
            z = x * scale
            if kind == "additive":
                z = z + mask.to(z.dtype)
            if kind == "bool":
                z = z.masked_fill(~mask, -math.inf)
            if is_causal:
                z = z.masked_fill(~torch.ones(shape[-2:], dtype=torch.bool, device=z.device).tril(), -math.inf)
            largest = z.detach().amax(dim, keepdim=True)
            exponentials = torch.exp(z - largest.masked_fill(largest == -math.inf, 0.0))
            total = exponentials.sum(dim, keepdim=True)
            return exponentials / total.masked_fill(total == 0, 1.0)

        options = dict(dim=dim, scale=scale, is_causal=is_causal)
        return Inputs(dict(input=input), {}, options | dict(mask=mask), reference)

    def checks(self):
        return {
            "small": {
                "tail": Check(Sizes((7, 33)), FOUR),
                "causal": Check(_causal(2, 37)),
                "wide": Check(Sizes((2, 33001)), (FLOAT32, BFLOAT16)),
                "first dimension": Check(Sizes((33, 70), 0)),
                "bool mask": Check(Sizes((2, 9, 40), scale=0.5, mask="bool")),
                "additive mask": Check(Sizes((2, 9, 40), scale=0.5, mask="additive")),
                "wide first dimension": Check(Sizes((1100, 3), 0), (FLOAT32,)),
            },
            "realistic": {
                "attention's": Check(Sizes((4096, 1024), scale=CAUSAL_SCALE)),
                "causal": Check(_causal(12, 1024)),
                "vocabulary": Check(Sizes((256, VOCABULARY)), FOUR),
                "widest": Check(Sizes((64, 262144))),
                "first dimension": Check(Sizes((2048, 1003), 0)),
                "bool mask": Check(Sizes((12, 512, 513), scale=CAUSAL_SCALE, mask="bool")),
                "additive mask": Check(Sizes((12, 512, 513), scale=CAUSAL_SCALE, mask="additive")),
            },
        }

    def label(self, sizes: Sizes) -> str:
        return "x".join(map(str, sizes.shape))

    def bytes(self, sizes: Sizes, itemsize: int, direction: str) -> int:
        """Forward: reads x, writes y. Backward: reads y and dy, writes dx.

        Causal: of x, y and dy only the triangle has to be read, but y and dx are written whole, zeros included, as the
        caller gets a full tensor.
        """
        whole = sizes.rows * sizes.width * itemsize
        read = int(self._elements(sizes)) * itemsize
        forward, backward = read + whole, 2 * read + whole
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[direction]

    def flops(self, sizes: Sizes, direction: str) -> float:
        """An exponential counts as one operation; causal: of the triangle only. Source: our own count."""
        elements, scaled = self._elements(sizes), sizes.scale != 1.0
        forward, backward = elements * (_FORWARD + scaled), elements * (_BACKWARD + scaled)
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[direction]

    def _elements(self, sizes: Sizes) -> float:
        """How many take part; causal: of square matrices the triangle with its diagonal."""
        rows, width = sizes.rows, sizes.width
        if not sizes.is_causal:
            return float(rows * width)
        if sizes.shape[-2] != width:
            raise ValueError(f"softmax: shape is {sizes.shape}; causal, its last two dimensions need to be equal")
        return rows // width * width * (width + 1) / 2

    def cells(self, kind: str, extent: str) -> list[Timed]:
        if extent == "smoke":
            dtype = "bfloat16" if kind == "cuda" else "float32"
            plain = [Timed(direction, dtype, Sizes((16, 65))) for direction in (FORWARD, BOTH)]
            return [*plain, Timed(BOTH, dtype, _causal(2, 16))]
        if kind == "cpu":
            # All over 1 MB, where the limit holds.
            shapes = [("float32", 1024, 1024), ("float32", 16, VOCABULARY)]
            if extent == "full":
                shapes += [("float32", 1024, 768), ("float32", 512, 4096), ("bfloat16", 512, 4096)]
            found = [
                Timed(direction, dtype, Sizes((rows, width)), CPU_LIMITS.get(dtype, ()))
                for dtype, rows, width in shapes
                for direction in (FORWARD, BACKWARD)
            ]
            if extent == "full":
                found += [Timed(direction, "float32", _causal(12, 256)) for direction in (FORWARD, BACKWARD)]
            return found
        if extent == "quick":
            return [Timed(direction, "bfloat16", Sizes((ROWS, 4096))) for direction in (FORWARD, BACKWARD)]
        widths = middle_first((*MODEL_WIDTHS, VOCABULARY), 4096, VOCABULARY, 768)
        found = [Timed(direction, "bfloat16", Sizes((ROWS, width))) for width in widths for direction in DIRECTIONS]
        found += [
            Timed(direction, "bfloat16", _causal(CAUSAL_ELEMENTS // length**2, length))
            for length in CAUSAL_LENGTHS
            for direction in (FORWARD, BACKWARD)
        ]
        return found + [Timed(direction, "float32", Sizes((ROWS, 4096))) for direction in (FORWARD, BACKWARD)]

    def shown(self, sizes: Sizes):
        if sizes.is_causal:
            return ("matrices", sizes.shape[0]), ("length", sizes.width), ("causal", True)
        return ("rows", sizes.rows), ("width", sizes.width)

    def panel(self, sizes: Sizes, dtype: str) -> str:
        return (
            f"softmax of scaled causal scores, {dtype}" if sizes.is_causal else f"softmax, {sizes.rows} rows, {dtype}"
        )

    def x(self, sizes: Sizes) -> str:
        return "length" if sizes.is_causal else "width"

    def plain(self, sizes: Sizes):
        def call(x):
            """Causal: the softmax of attention as models write it by hand."""
            if sizes.is_causal:
                hidden = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
                x = (x * sizes.scale).masked_fill(hidden, -torch.inf)
            return F.softmax(x, sizes.dim)

        # Whoever writes a softmax by hand has the mask in the scores.
        return None if sizes.mask else call

    def for_float64(self, sizes: Sizes) -> Sizes:
        if sizes.is_causal:
            return _causal(1, min(sizes.width, CHECK_LENGTH))
        return sizes._replace(shape=(min(sizes.rows, CHECK_ROWS), sizes.width))

    def row(self, backend: str, direction: str, axis: int, width: int | None) -> Tuned:
        timed = (_WIDE if axis == 1 else _WIDE_LANES) if width is None else width
        checked = timed + 3 if width is None else max(1, width - 1)
        if axis == 1:
            small, large = Sizes((5, checked)), Sizes((max(1, ELEMENTS // timed), timed))
        else:
            lanes = 1024
            small, large = Sizes((2, checked, 70), 1), Sizes((max(1, ELEMENTS // (timed * lanes)), timed, lanes), 1)
        return Tuned(FORWARD if direction == "forward" else BACKWARD, BFLOAT16, small, large)

    def class_tasks(self) -> dict[tuple, Tuned]:
        return {
            (16, width, True, fused): Tuned(
                BOTH, BFLOAT16, Sizes((9, timed), scale=scale), Sizes((ELEMENTS // timed, timed), scale=scale)
            )
            for width, timed in ((1024, 1024), (4096, 4096), (16384, 16384), (None, VOCABULARY))
            for fused, scale in ((False, 1.0), (True, CAUSAL_SCALE))
        }

    def moves(self, parts: list[str], tile: list[str]):
        # A chunk and the elements of a tile that grow together, and the warps with them.
        if len(tile) > 1:
            for up in (True, False):
                yield dict.fromkeys((*tile, "num_warps"), up)

    def sensible(self, key: tuple, candidate) -> bool:
        *_, width = key
        # Fewer elements than a row has are the same tile again: one row.
        return candidate.elements >= (candidate.chunk or width or 0)

    def least(self, sizes: Sizes, itemsize: int, direction: str) -> int | None:
        return self.bytes(sizes, itemsize, direction) if sizes.is_causal else None


PROBLEM = Softmax()
