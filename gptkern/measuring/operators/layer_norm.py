"""layer_norm: which shapes are measured, against whom, and the plain mathematics."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import gptkern.functional as G
from gptkern.measuring import conventions, peers
from gptkern.measuring.cells import Cell, Implementation, Missing

# The widths of GPT-2 124M, 350M, 774M and 1558M, and of GPT-3 1.3B, 6.7B, 13B and 175B.
WIDTHS = (768, 1024, 1280, 1600, 2048, 4096, 5120, 12288)
# Tokens: a training step's rows, as in the panels of attention.
ROWS = 16384
EPS = 1e-5
# gptkern calls PyTorch's operator on a CPU: what it adds is the twin's own host time. In 16 bits it computes in
# float32, which takes longer and is what PyTorch's own gradients lack.
CPU_LIMITS = {"float32": (("eager", 1.05),)}
# Rows that float64 has room for.
CHECK_ROWS = 128


def cells(kind: str, extent: str) -> list[Cell]:
    if extent == "smoke":
        dtype = "bfloat16" if kind == "cuda" else "float32"
        return [_cell(dtype, "forward", 16, 64), _cell(dtype, "both", 16, 64)]
    return _cpu_cells(extent) if kind == "cpu" else _gpu_cells(extent)


def _cpu_cells(extent: str) -> list[Cell]:
    """All over 1 MB, where the limit holds; the first is GPT-2's."""
    shapes = [("float32", 1024, 768), ("float32", 512, 4096)]
    if extent == "full":
        shapes += [("float32", 1024, width) for width in (1024, 1600)] + [("bfloat16", 512, 4096)]
    found = [
        _cell(dtype, direction, rows, width, limits=CPU_LIMITS.get(dtype, ()))
        for dtype, rows, width in shapes
        for direction in ("forward", "backward")
    ]
    if extent == "full":
        found.append(_cell("float32", "forward", 1024, 768, residual=True))
    return found


def _gpu_cells(extent: str) -> list[Cell]:
    if extent == "quick":
        return [_cell("bfloat16", direction, ROWS, 4096) for direction in ("forward", "backward")]
    # The quick ones first, then the narrowest and the widest.
    widths = sorted(WIDTHS, key=lambda width: (width != 4096, width not in (768, 12288)))
    found = [_cell("bfloat16", direction, ROWS, width) for width in widths for direction in conventions.DIRECTIONS]
    found += [_cell("bfloat16", "forward", ROWS, width, residual=True) for width in widths]
    found += [_cell("float32", direction, ROWS, 4096) for direction in ("forward", "backward")]
    return found


def _cell(dtype, direction, rows, width, residual=False, limits=()) -> Cell:
    itemsize = getattr(torch, dtype).itemsize
    return Cell(
        operator="layer_norm",
        direction=direction,
        dtype=dtype,
        sizes=(("rows", rows), ("width", width), *((("residual", True),) if residual else ())),
        panel=f"layer_norm{' with a residual' if residual else ''}, {rows} rows, {dtype}",
        x="width",
        bytes=conventions.layer_norm_bytes(rows, width, itemsize, direction, residual=residual),
        flops=conventions.layer_norm_flops(rows, width, direction, residual=residual),
        ceiling="copy",
        limits=limits,
    )


def _has_residual(cell: Cell) -> bool:
    return dict(cell.sizes).get("residual", False)


def inputs(cell: Cell, device) -> tuple[torch.Tensor, ...]:
    """x (rows, width), weight (width,), bias (width,), and the residual (rows, width) where there is one."""
    rows, width = cell.size("rows"), cell.size("width")
    shapes = [(rows, width), (width,), (width,)] + ([(rows, width)] if _has_residual(cell) else [])
    return tuple(torch.randn(shape, device=device, dtype=getattr(torch, cell.dtype)) for shape in shapes)


def differentiable(cell: Cell) -> tuple[int, ...]:
    return 0, 1, 2


def implementations(cell: Cell, kind: str) -> dict[str, Implementation | Missing]:
    residual = _has_residual(cell)
    of_pytorch = _eager_with_residual if residual else _eager
    found: dict[str, Implementation | Missing] = {
        "gptkern": Implementation(_gptkern_with_residual if residual else _gptkern),
        peers.EAGER: peers.eager(of_pytorch),
    }
    if cell in cells(kind, "smoke"):
        # It shows that the bench runs; compiling would be all of its time.
        return found
    return found | {
        peers.COMPILE: peers.compiled(of_pytorch, kind),
        peers.COMPILE_MAX: peers.compiled_max_autotune(of_pytorch, kind),
        peers.LIGER: peers.liger_layer_norm(kind, EPS, residual),
        peers.QUACK: peers.quack_layer_norm(kind, EPS, cell.direction, residual),
    }


def _gptkern(x, weight, bias):
    return G.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _gptkern_with_residual(x, weight, bias, residual):
    return G.layer_norm(x, x.shape[-1:], weight, bias, EPS, residual=residual)


def _eager(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _eager_with_residual(x, weight, bias, residual):
    summed = x + residual
    return _eager(summed, weight, bias), summed


def reference(cell: Cell, inputs: tuple[torch.Tensor, ...], precision: torch.dtype) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, of x + residual where there is one."""
    x, weight, bias, *residual = (tensor.to(precision) for tensor in inputs)
    for other in residual:
        x = x + other
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + EPS) * weight + bias


def check_cell(cell: Cell) -> Cell:
    rows = min(cell.size("rows"), CHECK_ROWS)
    return _cell(cell.dtype, cell.direction, rows, cell.size("width"), _has_residual(cell))
