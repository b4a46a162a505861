"""quantize_int8: sizes, inputs and plain mathematics; what is checked and tuned."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gptkern.backends.problem import (
    BFLOAT16,
    BITS,
    ELEMENTS,
    FLOAT16,
    FLOAT32,
    FLOAT32_BYTES,
    FORWARD,
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
    normal,
)


class Sizes(NamedTuple):
    rows: int
    width: int
    dim: int = -1


class QuantizeInt8(Problem):
    coverage = "float16, bfloat16, float32; any dim, any width"
    classes = Classes(
        dict(bits=BITS, width=WIDTHS),
        lambda call: (bits(call.input), least_size(WIDTHS, call.input.shape[call.dim])),
    )
    counted = (
        Counted(Sizes(48, 768), backward=False), Counted(Sizes(9, 4096), FLOAT16, backward=False),
        Counted(Sizes(5, 1024), FLOAT32, backward=False), Counted(Sizes(2, 40000), backward=False),
    )  # fmt: skip

    def inputs(self, sizes: Sizes, dtype, generator) -> Inputs:
        rows, width, dim = sizes
        input = normal(generator, rows, width, dtype=dtype)
        input[0, :] = 0

        def reference(x):
            # Quotients in float32 and halves to even, whatever the precision: integers are compared.
            x32 = x.detach().float()
            largest = x32.abs().amax(dim, keepdim=True)
            # By a tensor: on a GPU PyTorch multiplies by a number's reciprocal, which is an ulp off.
            scale = torch.where(largest == 0, 1.0, largest / torch.full_like(largest, 127))
            q = torch.round(x32 / scale).clamp(-127, 127)
            return q.to(x.dtype), scale.squeeze(dim).to(x.dtype)

        return Inputs(dict(input=input), {}, dict(dim=dim), reference, exact=True)

    def checks(self):
        return {
            "small": {
                "tail": Check(Sizes(7, 33)), "wide": Check(Sizes(2, 16411)), "columns": Check(Sizes(33, 7, 0)),
            },
            "realistic": {
                "GPT-2": Check(Sizes(4096, 768)), "wide": Check(Sizes(256, 50257)),
                "columns": Check(Sizes(3001, 1023, 0)),
            },
        }  # fmt: skip

    def label(self, sizes: Sizes) -> str:
        return f"{sizes.rows}x{sizes.width}"

    def bytes(self, sizes: Sizes, itemsize: int, direction: str) -> int:
        """The input once, a byte for each of its elements, and a float32 scale for each row."""
        rows, width, dim = sizes
        return rows * width * (itemsize + 1) + (rows if dim else width) * FLOAT32_BYTES

    def flops(self, sizes: Sizes, direction: str) -> float:
        """An absolute value, a comparison, a division and a rounding of each element."""
        return 4.0 * sizes.rows * sizes.width

    def cells(self, kind: str, extent: str) -> list[Timed]:
        dtype = "bfloat16" if kind == "cuda" else "float32"
        # GPT-2 124M's and GPT-3 6.7B's widths, a row and many.
        shapes = [(4096, 4096), (4096, 768), (64, 4096), (16384, 12288)]
        if kind == "cpu":
            shapes = [(512, 768), (1, 4096), (16, 768), (512, 3072)]
        shapes = {"smoke": [(4, 64)], "quick": shapes[:1], "full": shapes}[extent]
        return [Timed(FORWARD, dtype, Sizes(*shape)) for shape in shapes]

    def shown(self, sizes: Sizes):
        return ("rows", sizes.rows), ("width", sizes.width)

    def panel(self, sizes: Sizes, dtype: str) -> str:
        return f"quantize_int8, width {sizes.width}"

    def for_float64(self, sizes: Sizes) -> Sizes:
        return sizes._replace(rows=max(1, min(sizes.rows, ELEMENTS // 4 // sizes.width)))

    def plain(self, sizes: Sizes):
        def call(x):
            largest = x.float().abs().amax(sizes.dim, keepdim=True)
            scale = torch.where(largest == 0, 1.0, largest / 127)
            return torch.round(x / scale).clamp(-127, 127).to(torch.int8), scale.squeeze(sizes.dim)

        return call

    def class_tasks(self) -> dict[tuple, Tuned]:
        return {
            (16, width): Tuned(FORWARD, BFLOAT16, Sizes(9, timed), Sizes(ELEMENTS // timed, timed))
            for width, timed in ((1024, 768), (4096, 4096), (16384, 16384), (None, 32768))
        }


PROBLEM = QuantizeInt8()
