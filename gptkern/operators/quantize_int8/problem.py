"""quantize_int8: sizes, inputs and plain mathematics; what is checked and tuned."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gptkern.backends.problem import (
    BFLOAT16,
    BITS,
    ELEMENTS,
    FORWARD,
    WIDTHS,
    Check,
    Classes,
    Inputs,
    Problem,
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

    def class_tasks(self) -> dict[tuple, Tuned]:
        return {
            (16, width): Tuned(FORWARD, BFLOAT16, Sizes(9, timed), Sizes(ELEMENTS // timed, timed))
            for width, timed in ((1024, 768), (4096, 4096), (16384, 16384), (None, 32768))
        }


PROBLEM = QuantizeInt8()
