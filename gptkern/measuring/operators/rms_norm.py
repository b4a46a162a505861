"""rms_norm: which shapes are measured, against whom, and the plain mathematics."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import gptkern.functional as G
from gptkern.measuring import conventions, peers
from gptkern.measuring.cells import Cell, Implementation, Missing
from gptkern.measuring.operators.layer_norm import CHECK_ROWS, ROWS

# A head of Llama's and Qwen's (query and key norms), and the widths of Llama 3 1B, 3B, 8B, 70B and 405B.
WIDTHS = (128, 2048, 3072, 4096, 8192, 16384)
EPS = 1e-6
# gptkern calls PyTorch's operator on a CPU: what it adds is the twin's own host time.
CPU_LIMITS = {"float32": (("eager", 1.05),)}


def cells(kind: str, extent: str) -> list[Cell]:
    if extent == "smoke":
        dtype = "bfloat16" if kind == "cuda" else "float32"
        return [_cell(dtype, "forward", 16, 64), _cell(dtype, "both", 16, 64)]
    return _cpu_cells(extent) if kind == "cpu" else _gpu_cells(extent)


def _cpu_cells(extent: str) -> list[Cell]:
    """All over 1 MB, where the limit holds."""
    shapes = [("float32", 512, 4096)]
    if extent == "full":
        shapes += [("float32", 512, 2048), ("bfloat16", 512, 4096)]
    return [
        _cell(dtype, direction, rows, width, limits=CPU_LIMITS.get(dtype, ()))
        for dtype, rows, width in shapes
        for direction in ("forward", "backward")
    ]


def _gpu_cells(extent: str) -> list[Cell]:
    if extent == "quick":
        return [_cell("bfloat16", direction, ROWS, 4096) for direction in ("forward", "backward")]
    # The quick ones first, then the narrowest and the widest.
    widths = sorted(WIDTHS, key=lambda width: (width != 4096, width not in (128, 16384)))
    found = [_cell("bfloat16", direction, ROWS, width) for width in widths for direction in conventions.DIRECTIONS]
    return found + [_cell("float32", direction, ROWS, 4096) for direction in ("forward", "backward")]


def _cell(dtype, direction, rows, width, limits=()) -> Cell:
    return Cell(
        operator="rms_norm",
        direction=direction,
        dtype=dtype,
        sizes=(("rows", rows), ("width", width)),
        panel=f"rms_norm, {rows} rows, {dtype}",
        x="width",
        bytes=conventions.rms_norm_bytes(rows, width, getattr(torch, dtype).itemsize, direction),
        flops=conventions.rms_norm_flops(rows, width, direction),
        ceiling="copy",
        limits=limits,
    )


def inputs(cell: Cell, device) -> tuple[torch.Tensor, ...]:
    """x (rows, width), weight (width,)."""
    rows, width = cell.size("rows"), cell.size("width")
    return tuple(
        torch.randn(shape, device=device, dtype=getattr(torch, cell.dtype)) for shape in ((rows, width), width)
    )


def differentiable(cell: Cell) -> tuple[int, ...]:
    return 0, 1


def implementations(cell: Cell, kind: str) -> dict[str, Implementation | Missing]:
    found: dict[str, Implementation | Missing] = {
        "gptkern": Implementation(_gptkern),
        peers.EAGER: peers.eager(_eager),
    }
    if cell in cells(kind, "smoke"):
        # It shows that the bench runs; compiling would be all of its time.
        return found
    return found | {
        peers.COMPILE: peers.compiled(_eager, kind),
        peers.COMPILE_MAX: peers.compiled_max_autotune(_eager, kind),
        peers.LIGER: peers.liger_rms_norm(kind, EPS),
        peers.QUACK: peers.quack_rms_norm(kind, EPS),
    }


def _gptkern(x, weight):
    return G.rms_norm(x, x.shape[-1:], weight, EPS)


def _eager(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def reference(cell: Cell, inputs: tuple[torch.Tensor, ...], precision: torch.dtype) -> torch.Tensor:
    """x / sqrt(avg(x^2) + eps) * weight."""
    x, weight = (tensor.to(precision) for tensor in inputs)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def check_cell(cell: Cell) -> Cell:
    return _cell(cell.dtype, cell.direction, min(cell.size("rows"), CHECK_ROWS), cell.size("width"))
