"""int8_linear: which shapes are measured, against whom, and the plain mathematics.

The inputs hold the weight as it was before quantisation, in the input's dtype: each implementation packs it in its own
way, untimed. The reference multiplies with the int8 values themselves (w8a8: those of the input too), so that what
quantisation costs in accuracy is no error of the kernel.
"""

from __future__ import annotations

import torch

import gptkern.functional as G
from gptkern.measuring import conventions, peers
from gptkern.measuring.cells import Cell, Implementation, Missing
from gptkern.operators.int8_linear.contract import AUTO_W8A16_ROWS

# One sequence, a few, the last row of "auto"'s w8a16 and the first of its w8a8, prompts, training.
ROWS = (1, 4, 16, 17, 64, 512, 4096, 16384)
# GPT-3 6.7B, 175B; GPT-2 124M.
WIDTHS = (4096, 12288, 768)
# The linear layers of a GPT block: name -> (in_features, out_features) in widths.
LAYERS = {"expand": (1, 4), "qkv": (1, 3), "project": (1, 1), "contract": (4, 1)}
MODES = ("w8a8", "w8a16", "auto")
# "auto" is one of the other two, chosen by the rows: it is measured at one width.
AUTO_WIDTH = 4096
# Up to here reading the weight takes longer than multiplying, on every device that has been looked at: a row is two
# operations a byte, and GPUs do hundreds for each byte that they copy. Reasoned, not measured.
COPY_BOUND_ROWS = 64
# Rows and outputs that float64 has room for; all of in_features is kept, as sums grow with it.
CHECK_ROWS, CHECK_OUTPUTS = 1024, 4096


def cells(kind: str, extent: str) -> list[Cell]:
    dtype = "bfloat16" if kind == "cuda" else "float32"
    if extent == "smoke":
        return [_cell(dtype, mode, rows, 32, 48) for mode, rows in (("w8a16", 2), ("w8a8", 24))]
    if kind == "cpu":
        shapes = [("w8a16", 1), ("w8a8", 64)]
        if extent == "full":
            shapes += [("w8a16", 16), ("w8a16", 256), ("w8a8", 16), ("w8a8", 256), ("auto", 16), ("auto", 17)]
        return [_cell(dtype, mode, rows, 768, 3072) for mode, rows in shapes]
    if extent == "quick":
        shapes = [("w8a16", 1), ("w8a8", 4096)]
        return [_cell(dtype, mode, rows, AUTO_WIDTH, 4 * AUTO_WIDTH) for mode, rows in shapes]
    return [
        _cell(dtype, mode, rows, width * scale_in, width * scale_out)
        for width in WIDTHS
        for scale_in, scale_out in LAYERS.values()
        for rows in sorted(ROWS, key=lambda rows: rows not in (1, 4096))
        for mode in MODES
        if mode != "auto" or width == AUTO_WIDTH
    ]


def _cell(dtype, mode, rows, in_features, out_features) -> Cell:
    # On a CPU gptkern multiplies in float32.
    product = "float32" if dtype == "float32" else {"w8a8": "int8", "w8a16": dtype}[_resolved(mode, rows)]
    return Cell(
        operator="int8_linear",
        direction="forward",
        dtype=dtype,
        sizes=(("M", rows), ("in_features", in_features), ("out_features", out_features), ("mode", mode)),
        panel=f"int8_linear {mode}, {in_features} to {out_features}",
        x="M",
        bytes=conventions.int8_linear_bytes(rows, in_features, out_features, getattr(torch, dtype).itemsize),
        flops=conventions.int8_linear_flops(rows, in_features, out_features),
        ceiling="copy" if rows <= COPY_BOUND_ROWS else product,
    )


def _resolved(mode: str, rows: int) -> str:
    """ "w8a8" or "w8a16"."""
    if mode == "auto":
        return "w8a16" if rows <= AUTO_W8A16_ROWS else "w8a8"
    return mode


def _shape(cell: Cell) -> tuple[int, int, int]:
    return cell.size("M"), cell.size("in_features"), cell.size("out_features")


def inputs(cell: Cell, device) -> tuple[torch.Tensor, ...]:
    """input (M, in_features), weight (out_features, in_features), bias (out_features,), all in the cell's dtype."""
    rows, in_features, out_features = _shape(cell)
    dtype = getattr(torch, cell.dtype)
    input = torch.randn(rows, in_features, device=device, dtype=dtype)
    # So scaled, the outputs are about as large as the inputs.
    weight = torch.randn(out_features, in_features, device=device, dtype=dtype).mul_(in_features**-0.5)
    return input, weight, torch.randn(out_features, device=device, dtype=dtype)


def differentiable(cell: Cell) -> tuple[int, ...]:
    return ()


def implementations(cell: Cell, kind: str) -> dict[str, Implementation | Missing]:
    shape = _shape(cell)
    asked = cell.size("mode")
    mode = _resolved(asked, shape[0])

    def prepare(input, weight, bias):
        return input, *G.quantize_int8(weight), bias

    found: dict[str, Implementation | Missing] = {
        "gptkern": Implementation(lambda *tensors: G.int8_linear(*tensors, mode=asked), prepare)
    }
    # What the weight was before it was quantised; under the name that says its precision.
    found[peers.BF16_LINEAR if cell.dtype == "bfloat16" else peers.EAGER] = peers.linear_unquantised()
    if cell in cells(kind, "smoke"):
        # It shows that the bench runs; compiling would be all of its time.
        return found
    found[peers.COMPILE] = peers.compiled_int8(kind, mode, *shape)
    found[peers.INT_MM] = peers.int_mm(kind, mode, *shape)
    found[peers.TORCHAO] = peers.torchao(kind, mode)
    found[peers.BITSANDBYTES] = peers.bitsandbytes(kind, mode)
    return found


def _quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's scale, max|x| / 127, and q = x / scale rounded to even: in float32, as the contract says."""
    x = x.detach().float()
    largest = x.abs().amax(-1, keepdim=True)
    # By a tensor: on a GPU PyTorch multiplies with the reciprocal of a Python number, which rounds twice.
    scale = largest / torch.full_like(largest, 127)
    return torch.round(x / scale), scale


def reference(cell: Cell, inputs: tuple[torch.Tensor, ...], precision: torch.dtype) -> torch.Tensor:
    """(x @ weight^T) * weight_scale + bias with the int8 weight; w8a8: x = q * input_scale."""
    input, weight, bias = inputs
    q_weight, weight_scale = _quantised(weight)
    if _resolved(cell.size("mode"), cell.size("M")) == "w8a8":
        q, input_scale = _quantised(input)
        # Whole numbers below 2^53: exact in float64.
        product = (q.double() @ q_weight.double().t()).to(precision) * input_scale.to(precision)
    else:
        product = input.to(precision) @ q_weight.to(precision).t()
    return product * weight_scale[:, 0].to(precision) + bias.to(precision)


def check_cell(cell: Cell) -> Cell:
    rows, in_features, out_features = _shape(cell)
    rows, outputs = min(rows, CHECK_ROWS), min(out_features, CHECK_OUTPUTS)
    return _cell(cell.dtype, cell.size("mode"), rows, in_features, outputs)
