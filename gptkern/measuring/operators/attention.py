"""attention: which shapes are measured, against whom, and the plain mathematics."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import gptkern.functional as G
from gptkern.measuring import conventions, peers
from gptkern.measuring.cells import Cell, Implementation, Missing

# Lengths of a panel on a GPU. Batch x length is held at this many tokens, of a model about 2048 wide: the shapes of
# published numbers. Beyond, there is one row.
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
TOKENS = 16384
# head_dim -> heads: GPT-2's and GPT-3's 64 and 128 in a model 2048 wide, GPT-3 2.7B's 80 and 760M's 96.
HEADS = {64: 32, 80: 32, 96: 16, 128: 16}
# Query heads for each head of key and value in the panel of grouped heads.
GROUP = 4
# Where the quick table looks.
QUICK_LENGTH = 4096
# gptkern calls PyTorch's operator on a CPU: what it adds is the twin's own host time.
CPU_LIMITS = (("eager", 1.05),)
# Attention written out keeps the scores: a model that does so does not get longer than this.
LONGEST_WRITTEN_OUT = 4096
# What float64 has room for: of the same head_dim, limit and grouping, this long, with so many heads of key and value.
CHECK_LENGTH, CHECK_KV_HEADS = 512, 2


def cells(kind: str, extent: str) -> list[Cell]:
    if extent == "smoke":
        dtype = "bfloat16" if kind == "cuda" else "float32"
        return [_cell(dtype, direction, 1, 2, 2, 32, 16, True) for direction in ("forward", "both")]
    return _cpu_cells(extent) if kind == "cpu" else _gpu_cells(extent)


def _cpu_cells(extent: str) -> list[Cell]:
    lengths = (256,) if extent == "quick" else (256, 512, 1024)
    return [
        _cell("float32", direction, 1, 12, 12, length, 64, causal, CPU_LIMITS)
        for length in lengths
        for causal in (True, False)
        for direction in ("forward", "backward")
    ]


def _gpu_cells(extent: str) -> list[Cell]:
    if extent == "quick":
        return [_gpu_cell("forward", 128), _gpu_cell("backward", 128)]
    # The middle of each panel first, so that a run that is cut short has seen all of them.
    lengths = sorted(LENGTHS, key=lambda length: abs(length.bit_length() - QUICK_LENGTH.bit_length()))
    found = []
    for length in lengths:
        for direction in ("forward", "backward"):
            for causal in (True, False):
                found += [_gpu_cell(direction, head_dim, length, causal) for head_dim in (128, 64, 80, 96)]
            found.append(_gpu_cell(direction, 128, length, group=GROUP))
        found.append(_gpu_cell("both", 128, length))
    return found


def _gpu_cell(direction, head_dim, length=QUICK_LENGTH, causal=True, group=1) -> Cell:
    heads = HEADS[head_dim]
    return _cell("bfloat16", direction, max(1, TOKENS // length), heads, heads // group, length, head_dim, causal)


def _cell(dtype, direction, batch, heads, kv_heads, length, head_dim, causal, limits=()) -> Cell:
    panel = f"attention, {'causal' if causal else 'full'}, head_dim {head_dim}"
    sizes = [("batch", batch), ("heads", heads)]
    if kv_heads != heads:
        panel += f", {heads // kv_heads} heads a group"
        sizes.append(("kv_heads", kv_heads))
    itemsize = getattr(torch, dtype).itemsize
    return Cell(
        operator="attention",
        direction=direction,
        dtype=dtype,
        sizes=(*sizes, ("length", length), ("head_dim", head_dim), ("causal", causal)),
        panel=panel,
        x="length",
        bytes=conventions.attention_bytes(batch, heads, kv_heads, length, length, head_dim, itemsize, direction),
        flops=conventions.attention_flops(batch, heads, length, length, head_dim, causal, direction),
        ceiling=dtype,
        limits=limits,
    )


def _sizes(cell: Cell) -> tuple[int, int, int, int, int, bool]:
    """batch, heads, kv_heads, length, head_dim, causal"""
    sizes = dict(cell.sizes)
    heads = sizes["heads"]
    return sizes["batch"], heads, sizes.get("kv_heads", heads), sizes["length"], sizes["head_dim"], sizes["causal"]


def inputs(cell: Cell, device) -> tuple[torch.Tensor, ...]:
    """query, key, value: (batch, heads, length, head_dim), views of (batch, length, heads, head_dim) as in a GPT."""
    batch, heads, kv_heads, length, head_dim, _ = _sizes(cell)
    return tuple(
        torch.randn(batch, length, count, head_dim, device=device, dtype=getattr(torch, cell.dtype)).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads)
    )


def differentiable(cell: Cell) -> tuple[int, ...]:
    return 0, 1, 2


def implementations(cell: Cell, kind: str) -> dict[str, Implementation | Missing]:
    _, heads, kv_heads, length, head_dim, causal = _sizes(cell)
    grouped = kv_heads != heads
    dtype = getattr(torch, cell.dtype)
    options = {"is_causal": causal, "enable_gqa": grouped}
    found: dict[str, Implementation | Missing] = {
        "gptkern": Implementation(lambda *tensors: G.scaled_dot_product_attention(*tensors, **options)),
        peers.EAGER: peers.eager(lambda *tensors: F.scaled_dot_product_attention(*tensors, **options)),
    }
    if cell in cells(kind, "smoke"):
        # It shows that the bench runs; compiling would be all of its time.
        return found
    if length > LONGEST_WRITTEN_OUT:
        reason = f"attention written out keeps the scores: not beyond length {LONGEST_WRITTEN_OUT}"
        found[peers.COMPILE] = Missing(reason)
    else:
        found[peers.COMPILE] = peers.compiled(lambda *tensors: _written_out(*tensors, causal), kind)
    for backend, name in peers.SDPA.items():
        found[name] = peers.sdpa(backend, kind, dtype, head_dim, causal, grouped, square=True)
    found[peers.FLEX] = peers.flex_attention(kind, length, length, head_dim, causal, grouped)
    for generation, name in peers.FLASH_ATTN.items():
        found[name] = peers.flash_attn(generation, kind, dtype, head_dim, causal, True, cell.direction)
    return found


def _written_out(query, key, value, causal):
    """Attention as models write it by hand."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return F.softmax(scores, -1) @ value


def reference(cell: Cell, inputs: tuple[torch.Tensor, ...], precision: torch.dtype) -> torch.Tensor:
    """softmax(query @ key^T / sqrt(head_dim)) @ value, the exponentials and their sums written out."""
    query, key, value = (tensor.to(precision) for tensor in inputs)
    *_, head_dim, causal = _sizes(cell)
    # Query head h reads key and value of head h // group.
    group = query.shape[1] // key.shape[1]
    head = torch.arange(query.shape[1], device=query.device) // group
    scores = query @ key[:, head].transpose(-1, -2) / head_dim**0.5
    if causal:
        row = torch.arange(query.shape[2], device=query.device)[:, None]
        column = torch.arange(key.shape[2], device=query.device)
        scores = torch.where(column <= row, scores, -torch.inf)
    # A shift changes nothing in exact arithmetic: the maximum is a constant to the gradient.
    exponentials = torch.exp(scores - scores.detach().amax(-1, keepdim=True))
    return exponentials @ value[:, head] / exponentials.sum(-1, keepdim=True)


def check_cell(cell: Cell) -> Cell:
    _, heads, kv_heads, length, head_dim, causal = _sizes(cell)
    few = min(kv_heads, CHECK_KV_HEADS)
    length = min(length, CHECK_LENGTH)
    return _cell(cell.dtype, cell.direction, 1, few * (heads // kv_heads), few, length, head_dim, causal)
