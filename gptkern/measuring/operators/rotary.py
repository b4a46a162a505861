"""rotary: which shapes are measured, against whom, and the plain mathematics."""

from __future__ import annotations

import torch

import gptkern.functional as G
from gptkern.measuring import conventions, peers
from gptkern.measuring.cells import Cell, Implementation, Missing

# The query of Llama 3 8B, and GPT-J's, of whose heads a quarter is turned: (heads, head_dim, rotary_dim, interleaved).
LLAMA, GPT_J = (32, 128, 128, False), (16, 256, 64, True)
# Tokens of a training step, as in the panels of attention.
TOKENS = 16384
LENGTHS = (1024, 4096, 16384)
# Positions that float64 has room for.
CHECK_LENGTH = 256


def cells(kind: str, extent: str) -> list[Cell]:
    if extent == "smoke":
        dtype = "bfloat16" if kind == "cuda" else "float32"
        return [_cell(dtype, direction, 1, 5, 2, 16, 16, False) for direction in ("forward", "both")]
    return _cpu_cells(extent) if kind == "cpu" else _gpu_cells(extent)


def _cpu_cells(extent: str) -> list[Cell]:
    models = [LLAMA] if extent == "quick" else [LLAMA, GPT_J]
    found = [_cell("float32", direction, 1, 256, *model) for model in models for direction in ("forward", "backward")]
    if extent == "full":
        found.append(_cell("bfloat16", "forward", 1, 256, *LLAMA))
    return found


def _gpu_cells(extent: str) -> list[Cell]:
    if extent == "quick":
        return [_cell("bfloat16", direction, TOKENS // 4096, 4096, *LLAMA) for direction in ("forward", "backward")]
    lengths = sorted(LENGTHS, key=lambda length: length != 4096)
    found = [
        _cell("bfloat16", direction, TOKENS // length, length, *model)
        for model in (LLAMA, GPT_J)
        for length in lengths
        for direction in conventions.DIRECTIONS
    ]
    found += [_cell("float32", direction, TOKENS // 4096, 4096, *LLAMA) for direction in ("forward", "backward")]
    return found


def _cell(dtype, direction, batch, length, heads, head_dim, rotary_dim, interleaved) -> Cell:
    itemsize = getattr(torch, dtype).itemsize
    layout = "interleaved" if interleaved else "half-split"
    return Cell(
        operator="rotary",
        direction=direction,
        dtype=dtype,
        sizes=(
            ("batch", batch), ("heads", heads), ("length", length), ("head_dim", head_dim), ("rotary_dim", rotary_dim),
            ("interleaved", interleaved),
        ),
        panel=f"rotary, {layout}, {heads} heads of {head_dim}, {batch * length} tokens, {dtype}",
        x="length",
        bytes=conventions.rotary_bytes(batch, heads, length, head_dim, rotary_dim, itemsize, direction),
        flops=conventions.rotary_flops(batch, heads, length, rotary_dim, direction),
        ceiling="copy",
    )  # fmt: skip


def inputs(cell: Cell, device) -> tuple[torch.Tensor, ...]:
    """x (batch, heads, length, head_dim), heads inside of positions as a projection leaves them; cos, sin (length,
    rotary_dim / 2) of random angles, in the input's dtype as Hugging Face's models make them."""
    batch, heads, length, head_dim = (cell.size(name) for name in ("batch", "heads", "length", "head_dim"))
    dtype = getattr(torch, cell.dtype)
    x = torch.randn((batch, length, heads, head_dim), device=device, dtype=dtype).transpose(1, 2)
    angles = 2 * torch.pi * torch.rand((length, cell.size("rotary_dim") // 2), device=device)
    return x, angles.cos().to(dtype), angles.sin().to(dtype)


def differentiable(cell: Cell) -> tuple[int, ...]:
    return (0,)


def implementations(cell: Cell, kind: str) -> dict[str, Implementation | Missing]:
    of_pytorch = _interleaved_by_hand if cell.size("interleaved") else _by_hand
    found: dict[str, Implementation | Missing] = {
        "gptkern": Implementation(_gptkern_interleaved if cell.size("interleaved") else _gptkern),
        peers.EAGER: peers.eager(of_pytorch),
    }
    if cell in cells(kind, "smoke"):
        # It shows that the bench runs; compiling would be all of its time.
        return found
    return found | {
        peers.COMPILE: peers.compiled(of_pytorch, kind),
        peers.COMPILE_MAX: peers.compiled_max_autotune(of_pytorch, kind),
    }


def _gptkern(x, cos, sin):
    return G.rotary_embedding(x, cos, sin, rotary_dim=2 * cos.shape[-1])


def _gptkern_interleaved(x, cos, sin):
    return G.rotary_embedding(x, cos, sin, rotary_dim=2 * cos.shape[-1], interleaved=True)


def _by_hand(x, cos, sin):
    """As models write it: in the input's dtype, an entry of cos for each element."""
    cos, sin = (torch.cat((angles, angles), -1).to(x.dtype) for angles in (cos, sin))
    turned, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), -1)
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def _interleaved_by_hand(x, cos, sin):
    cos, sin = (angles.repeat_interleave(2, -1).to(x.dtype) for angles in (cos, sin))
    turned, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), -1)
    swapped = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    turned = turned * cos + swapped * sin
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def reference(cell: Cell, inputs: tuple[torch.Tensor, ...], precision: torch.dtype) -> torch.Tensor:
    """(x_a cos - x_b sin, x_a sin + x_b cos) of each pair (a, b); the other elements stay."""
    x, cos, sin = (tensor.to(precision) for tensor in inputs)
    pair = torch.arange(cos.shape[-1], device=x.device)
    a = 2 * pair if cell.size("interleaved") else pair
    b = a + 1 if cell.size("interleaved") else a + cos.shape[-1]
    x_a, x_b = x[..., a], x[..., b]
    return x.index_copy(-1, a, x_a * cos - x_b * sin).index_copy(-1, b, x_a * sin + x_b * cos)


def check_cell(cell: Cell) -> Cell:
    sizes = (cell.size(name) for name in ("heads", "head_dim", "rotary_dim", "interleaved"))
    return _cell(cell.dtype, cell.direction, 1, min(cell.size("length"), CHECK_LENGTH), *sizes)
