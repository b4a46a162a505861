"""int8_linear: sizes, inputs, plain mathematics, bytes and operations; what is checked, timed, tuned and counted.

The reference multiplies with the int8 values themselves (w8a8: those of the input too), so that what quantisation costs
in accuracy is no error of the kernel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from gptkern.backends.problem import (
    BFLOAT16,
    BITS,
    FLOAT16,
    FLOAT32,
    FLOAT32_BYTES,
    FORWARD,
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

# One sequence, a few, the last row of "auto"'s w8a16 and the first of its w8a8, prompts, training.
ROWS = (1, 4, 16, 17, 64, 512, 4096, 16384)
# GPT-3 6.7B, 175B; GPT-2 124M.
MODEL_WIDTHS = (4096, 12288, 768)
# The linear layers of a GPT block, (in_features, out_features) in widths: expand, qkv, project, contract.
LAYERS = ((1, 4), (1, 3), (1, 1), (4, 1))
MODES = ("w8a8", "w8a16", "auto")
# "auto" is w8a16 up to so many rows (the contract's AUTO_W8A16_ROWS), and is measured at one width.
AUTO_ROWS, AUTO_WIDTH = 16, 4096
# GPT-2 124M's widest layer, and one whose float weight no cache holds: mode, rows, in_features, out_features, dtype.
ON_CPU = (
    *((mode, rows, 768, 3072) for mode, rows in (("w8a16", 1), ("w8a8", 64), ("w8a8", 512), ("w8a8", 16))),
    *((mode, 1, 4096, 4096) for mode in ("w8a8", "w8a16")),
    *((mode, rows, 768, 3072) for mode, rows in (("w8a8", 1), ("w8a16", 16), ("w8a16", 256), ("w8a8", 256))),
    *(("auto", rows, 768, 3072) for rows in (16, 17)),
    *(("w8a16", *shape, "bfloat16") for shape in ((1, 4096, 4096), (16, 768, 3072), (64, 768, 3072))),
    ("w8a8", 64, 768, 3072, "bfloat16"),
)
# Up to here reading the weight takes longer than multiplying, on every device that has been looked at: a row is two
# operations a byte, and GPUs do hundreds for each byte that they copy. Reasoned, not measured.
COPY_BOUND_ROWS = 64
# Rows and outputs that float64 has room for; all of in_features is kept, as sums grow with it.
CHECK_ROWS, CHECK_OUTPUTS = 1024, 4096
CLASS_ROWS = (1, 16, 64, 512, None)


class Sizes(NamedTuple):
    rows: int
    in_features: int
    out_features: int
    activation: str | None
    mode: str


class Int8Linear(Problem):
    coverage = "float16, bfloat16, float32 activations; int8 weight"
    classes = Classes(
        dict(bits=BITS, mode=("w8a8", "w8a16"), rows=CLASS_ROWS),
        lambda call: (bits(call.input), call.mode, least_size(CLASS_ROWS, math.prod(call.input.shape[:-1]))),
    )
    # The weight is what a w8a16 product streams; the w8a8 kernel reads a tile of it for each tile of rows.
    counted = (
        Counted(Sizes(256, 512, 512, None, "w8a8"), limit=None, backward=False),
        Counted(Sizes(128, 1024, 256, "gelu", "w8a8"), FLOAT16, None, False),
        Counted(Sizes(100, 256, 200, None, "w8a8"), FLOAT32, None, False),
        Counted(Sizes(1, 1024, 512, None, "w8a16"), backward=False),
        Counted(Sizes(8, 1024, 512, None, "w8a16"), backward=False),
    )

    def inputs(self, sizes: Sizes, dtype, generator) -> Inputs:
        rows, in_features, out_features, activation, mode = sizes
        device = generator.device
        # Every int8 value, -128 included; the scale brings the result back to the input's range.
        weight = torch.randint(-128, 128, (out_features, in_features), generator=generator, device=device)
        weight = weight.to(torch.int8)
        weight_scale = torch.rand(out_features, generator=generator, device=device) / (64 * math.sqrt(in_features))
        tensors = dict(
            input=normal(generator, rows, in_features, dtype=dtype), bias=normal(generator, out_features, dtype=dtype)
        )

        def reference(x, bias):
            if resolved(mode, rows) == "w8a8":
                # Quotients in float32 and halves to even, whatever the precision.
                x32 = x.detach().float()
                largest = x32.abs().amax(-1, keepdim=True)
                # By a tensor: on a GPU PyTorch multiplies by a number's reciprocal, which is an ulp off.
                scale = torch.where(largest == 0, 1.0, largest / torch.full_like(largest, 127))
                q = torch.round(x32 / scale).clamp(-127, 127)
                # What is left of the input after the rounding; `x - x.detach()` is 0, and passes gradients through.
                x = (q * scale.to(x.dtype)).to(x.dtype) + (x - x.detach())
            z = (x @ weight.to(x.dtype).T) * weight_scale.to(x.dtype) + bias
            if activation == "gelu":
                return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
            if activation == "gelu_tanh":
                return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
            return z

        constants = dict(weight=weight, weight_scale=weight_scale)
        return Inputs(tensors, constants, dict(activation=activation, mode=mode), reference)

    def checks(self):
        return {
            "small": {
                "w8a8, tails": Check(Sizes(19, 70, 37, "gelu_tanh", "w8a8")),
                "w8a16, tails": Check(Sizes(5, 70, 37, "gelu_tanh", "w8a16")),
                "w8a16, one row": Check(Sizes(1, 200, 80, None, "w8a16")),
                "w8a8": Check(Sizes(33, 256, 144, "gelu", "w8a8")),
                "w8a16, many rows": Check(Sizes(70, 80, 48, "gelu", "w8a16")),
            },
            "realistic": {
                "w8a8, GPT-2": Check(Sizes(4096, 768, 3072, "gelu_tanh", "w8a8")),
                "w8a16, one row": Check(Sizes(1, 4096, 4096, None, "w8a16")),
                "w8a16, batch 16": Check(Sizes(16, 1600, 6400, "gelu_tanh", "w8a16")),
                "w8a8, square": Check(Sizes(2048, 4096, 4096, None, "w8a8")),
                "w8a8, tails": Check(Sizes(1001, 1023, 999, "gelu", "w8a8")),
                "w8a16, tails": Check(Sizes(9, 1023, 999, "gelu", "w8a16")),
                "w8a16, many rows": Check(Sizes(1000, 768, 3072, None, "w8a16")),
            },
        }

    def label(self, sizes: Sizes) -> str:
        return f"{sizes.rows}x{sizes.in_features}->{sizes.out_features}"

    def bytes(self, sizes: Sizes, itemsize: int, direction: str) -> int:
        """The int8 weight and its float32 scales, the input once, the bias and the output in the input's precision.

        The same for w8a8 and w8a16: w8a8's quantised input exists between its two passes alone, and would not be
        written where one pass did both.
        """
        rows, in_features, out_features, *_ = sizes
        weight = in_features * out_features + out_features * FLOAT32_BYTES
        return weight + (rows * (in_features + out_features) + out_features) * itemsize

    def flops(self, sizes: Sizes, direction: str) -> float:
        """2 * M * N * K, whatever the multiplication's precision: int8 operations are counted as FLOPs are.

        Quantisation, scales and bias do not count. Source: the convention of cuBLAS and CUTLASS for a product.
        """
        return 2.0 * sizes.rows * sizes.in_features * sizes.out_features

    def cells(self, kind: str, extent: str) -> list[Timed]:
        usual = "bfloat16" if kind == "cuda" else "float32"

        def cell(mode, rows, in_features, out_features, dtype=usual):
            return Timed(FORWARD, dtype, Sizes(rows, in_features, out_features, None, mode))

        if extent == "smoke":
            return [cell(mode, rows, 32, 48) for mode, rows in (("w8a16", 2), ("w8a8", 24))]
        if kind == "cpu":
            shapes = ON_CPU if extent == "full" else ON_CPU[:2]
            return [cell(*shape) for shape in shapes]
        if extent == "quick":
            return [cell(mode, rows, AUTO_WIDTH, 4 * AUTO_WIDTH) for mode, rows in (("w8a16", 1), ("w8a8", 4096))]
        return [
            cell(mode, rows, width * scale_in, width * scale_out)
            for width in MODEL_WIDTHS
            for scale_in, scale_out in LAYERS
            for rows in middle_first(ROWS, 1, 4096)
            for mode in MODES
            if mode != "auto" or width == AUTO_WIDTH
        ]

    def shown(self, sizes: Sizes):
        rows, in_features, out_features, _, mode = sizes
        return ("M", rows), ("in_features", in_features), ("out_features", out_features), ("mode", mode)

    def panel(self, sizes: Sizes, dtype: str) -> str:
        return f"int8_linear {sizes.mode}, {sizes.in_features} to {sizes.out_features}"

    def x(self, sizes: Sizes) -> str:
        return "M"

    def ceiling(self, sizes: Sizes, dtype: str) -> str:
        if sizes.rows <= COPY_BOUND_ROWS:
            return "copy"
        return "int8" if resolved(sizes.mode, sizes.rows) == "w8a8" else dtype

    def for_float64(self, sizes: Sizes) -> Sizes:
        rows, outputs = min(sizes.rows, CHECK_ROWS), min(sizes.out_features, CHECK_OUTPUTS)
        return sizes._replace(rows=rows, out_features=outputs)

    def row(self, backend: str, kernel: str, most: int | None, share: int | None = None) -> Tuned:
        dtype = FLOAT32 if kernel == "w8a32" else BFLOAT16
        mode = "w8a8" if kernel == "w8a8" else "w8a16"
        # Few rows are most often one, of a model that generates.
        timed = 4096 if most is None else 1 if most <= 16 else most
        size = 1024 if dtype == FLOAT32 else 4096
        outputs = size
        if backend == "cuda" and kernel == "w8a16" and most is not None:
            # Of 16 rows a multiprocessor of many has so few results: 4096, 8192 and 16384 outputs.
            outputs = {511: 4096, 1023: 8192}.get(share, 16384)
        if backend == "cuda" and kernel == "w8a8" and share is not None:
            timed = 128
        checked = Sizes(200 if most is None else most - 1, 300, 200, "gelu_tanh", mode)
        return Tuned(FORWARD, dtype, checked, Sizes(min(timed, size), size, outputs, None, mode))

    def class_tasks(self) -> dict[tuple, Tuned]:
        def task(mode, rows):
            return Tuned(
                FORWARD, BFLOAT16, Sizes(min(rows, 70), 300, 200, None, mode), Sizes(rows, 4096, 4096, None, mode)
            )

        return {
            (16, mode, most): task(mode, 4096 if most is None else most)
            for mode, bounds in (("w8a16", (1, 16, 64)), ("w8a8", (64, 512, None)))
            for most in bounds
        }

    def shared_memory(self, backend: str, key: tuple, candidate) -> int:
        # Tiles of input and weight come in stages.
        bytes_of_input = {"w8a8": 1, "w8a16": 2, "w8a32": 4}[key[0]]
        block_m, block_n, block_k, _, stages = candidate
        return stages * block_k * (bytes_of_input * block_m + block_n)

    def products(self, sizes: Sizes, direction: str) -> int | None:
        return sizes.rows * sizes.in_features * sizes.out_features if direction == FORWARD else None


def resolved(mode: str, rows: int) -> str:
    """ "w8a8" or "w8a16"."""
    if mode == "auto":
        return "w8a16" if rows <= AUTO_ROWS else "w8a8"
    return mode


PROBLEM = Int8Linear()
