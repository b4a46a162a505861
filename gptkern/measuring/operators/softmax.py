"""softmax: which shapes are measured, against whom, and the plain mathematics."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import gptkern.functional as G
from gptkern.measuring import conventions, peers
from gptkern.measuring.cells import Cell, Implementation, Missing
from gptkern.measuring.operators.layer_norm import ROWS, WIDTHS
from gptkern.models.gpt import GPT2_VOCABULARY

# Causal scores: square matrices, together as many elements as 128 of length 1024.
CAUSAL_LENGTHS = (512, 1024, 2048, 4096)
CAUSAL_ELEMENTS = 128 * 1024**2
# The scale of attention with head_dim 64.
CAUSAL_SCALE = 0.125
# gptkern calls PyTorch's operator on a CPU: what it adds is the twin's own host time.
CPU_LIMITS = {"float32": (("eager", 1.05),)}
# Rows, and length of a causal matrix, that float64 has room for.
CHECK_ROWS, CHECK_LENGTH = 128, 1024


def cells(kind: str, extent: str) -> list[Cell]:
    if extent == "smoke":
        dtype = "bfloat16" if kind == "cuda" else "float32"
        return [_cell(dtype, "forward", 16, 65), _cell(dtype, "both", 16, 65), _causal_cell(dtype, "both", 2, 16)]
    return _cpu_cells(extent) if kind == "cpu" else _gpu_cells(extent)


def _cpu_cells(extent: str) -> list[Cell]:
    """All over 1 MB, where the limit holds."""
    shapes = [("float32", 1024, 1024), ("float32", 16, GPT2_VOCABULARY)]
    if extent == "full":
        shapes += [("float32", 1024, 768), ("float32", 512, 4096), ("bfloat16", 512, 4096)]
    found = [
        _cell(dtype, direction, rows, width, limits=CPU_LIMITS.get(dtype, ()))
        for dtype, rows, width in shapes
        for direction in ("forward", "backward")
    ]
    if extent == "full":
        found += [_causal_cell("float32", direction, 12, 256) for direction in ("forward", "backward")]
    return found


def _gpu_cells(extent: str) -> list[Cell]:
    if extent == "quick":
        return [_cell("bfloat16", direction, ROWS, 4096) for direction in ("forward", "backward")]
    # The quick ones first, then the narrowest and the widest.
    widths = sorted((*WIDTHS, GPT2_VOCABULARY), key=lambda width: (width not in (4096, GPT2_VOCABULARY), width != 768))
    found = [_cell("bfloat16", direction, ROWS, width) for width in widths for direction in conventions.DIRECTIONS]
    found += [
        _causal_cell("bfloat16", direction, CAUSAL_ELEMENTS // length**2, length)
        for length in CAUSAL_LENGTHS
        for direction in ("forward", "backward")
    ]
    found += [_cell("float32", direction, ROWS, 4096) for direction in ("forward", "backward")]
    return found


def _cell(dtype, direction, rows, width, limits=()) -> Cell:
    itemsize = getattr(torch, dtype).itemsize
    return Cell(
        operator="softmax",
        direction=direction,
        dtype=dtype,
        sizes=(("rows", rows), ("width", width)),
        panel=f"softmax, {rows} rows, {dtype}",
        x="width",
        bytes=conventions.softmax_bytes(rows, width, itemsize, direction),
        flops=conventions.softmax_flops(rows, width, direction),
        ceiling="copy",
        limits=limits,
    )


def _causal_cell(dtype, direction, matrices, length) -> Cell:
    itemsize = getattr(torch, dtype).itemsize
    rows = matrices * length
    return Cell(
        operator="softmax",
        direction=direction,
        dtype=dtype,
        sizes=(("matrices", matrices), ("length", length), ("causal", True)),
        panel=f"softmax of scaled causal scores, {dtype}",
        x="length",
        bytes=conventions.softmax_bytes(rows, length, itemsize, direction, causal=True),
        flops=conventions.softmax_flops(rows, length, direction, causal=True, scaled=True),
        ceiling="copy",
    )


def _is_causal(cell: Cell) -> bool:
    return dict(cell.sizes).get("causal", False)


def inputs(cell: Cell, device) -> tuple[torch.Tensor, ...]:
    """x: (rows, width), or (matrices, length, length)."""
    if _is_causal(cell):
        shape = cell.size("matrices"), cell.size("length"), cell.size("length")
    else:
        shape = cell.size("rows"), cell.size("width")
    return (torch.randn(shape, device=device, dtype=getattr(torch, cell.dtype)),)


def differentiable(cell: Cell) -> tuple[int, ...]:
    return (0,)


def implementations(cell: Cell, kind: str) -> dict[str, Implementation | Missing]:
    causal = _is_causal(cell)
    of_pytorch = _by_hand if causal else _eager
    found: dict[str, Implementation | Missing] = {
        "gptkern": Implementation(_gptkern_causal if causal else _gptkern),
        peers.EAGER: peers.eager(of_pytorch),
    }
    if cell in cells(kind, "smoke"):
        # It shows that the bench runs; compiling would be all of its time.
        return found
    return found | {
        peers.COMPILE: peers.compiled(of_pytorch, kind),
        peers.COMPILE_MAX: peers.compiled_max_autotune(of_pytorch, kind),
        peers.LIGER: peers.liger_softmax(kind, causal),
        peers.QUACK: peers.quack_softmax(kind, causal),
    }


def _gptkern(x):
    return G.softmax(x, -1)


def _gptkern_causal(x):
    return G.softmax(x, -1, scale=CAUSAL_SCALE, is_causal=True)


def _eager(x):
    return F.softmax(x, -1)


def _by_hand(x):
    """The softmax of attention as models write it by hand."""
    hidden = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    return F.softmax((x * CAUSAL_SCALE).masked_fill(hidden, -torch.inf), -1)


def reference(cell: Cell, inputs: tuple[torch.Tensor, ...], precision: torch.dtype) -> torch.Tensor:
    """exp(x) / sum(exp(x)) over the row; causal: of the scaled elements j <= i of row i, the others 0."""
    x = inputs[0].to(precision)
    if _is_causal(cell):
        row = torch.arange(x.shape[-2], device=x.device)[:, None]
        column = torch.arange(x.shape[-1], device=x.device)
        x = torch.where(column <= row, x * CAUSAL_SCALE, -torch.inf)
    # A shift changes nothing in exact arithmetic: the maximum is a constant to the gradient.
    exponentials = torch.exp(x - x.detach().amax(-1, keepdim=True))
    return exponentials / exponentials.sum(-1, keepdim=True)


def check_cell(cell: Cell) -> Cell:
    if _is_causal(cell):
        return _causal_cell(cell.dtype, cell.direction, 1, min(cell.size("length"), CHECK_LENGTH))
    return _cell(cell.dtype, cell.direction, min(cell.size("rows"), CHECK_ROWS), cell.size("width"))
