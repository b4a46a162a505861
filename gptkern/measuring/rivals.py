"""Which peers an operator is timed against, beside PyTorch eager and compiled: the one list that names operators here.

An operator that is not in it is timed against PyTorch alone.
"""

from __future__ import annotations

from typing import Any

import torch

from gptkern.measuring import peers
from gptkern.measuring.cells import Cell, Implementation, Missing

Found = dict[str, Any]

# Attention written out keeps the scores: a model that does so does not get longer than this.
LONGEST_WRITTEN_OUT = 4096


def all_of(operator: str, found: Found, cell: Cell, kind: str) -> Found:
    """`found` (gptkern, and PyTorch eager and compiled where there is such a thing) with the operator's other peers."""
    found = uncompiled(operator, found, cell)
    return _OF[operator](found, cell, kind) if operator in _OF else found


def uncompiled(operator: str, found: Found, cell: Cell) -> Found:
    """`found` with what stands for PyTorch eager where no function of PyTorch's is the operator's twin."""
    if operator == "int8_linear":
        # What the weight was before it was quantised; under the name that says its precision.
        name = peers.BF16_LINEAR if cell.dtype == "bfloat16" else peers.EAGER
        return found | {name: _of_float_weight(peers.linear_unquantised(), cell)}
    return found


def _attention(found: Found, cell: Cell, kind: str) -> Found:
    _, heads, kv_heads, length, _, head_dim, shape = cell.of
    causal, grouped, dtype = shape == "causal", kv_heads != heads, getattr(torch, cell.dtype)
    # A compiler that tries many kernels finds none for attention that is written out.
    del found[peers.COMPILE_MAX]
    if length > LONGEST_WRITTEN_OUT:
        reason = f"attention written out keeps the scores: not beyond length {LONGEST_WRITTEN_OUT}"
        found[peers.COMPILE] = Missing(reason)
    for backend, name in peers.SDPA.items():
        found[name] = peers.sdpa(backend, kind, dtype, head_dim, causal, grouped, square=True)
    found[peers.FLEX] = peers.flex_attention(kind, length, length, head_dim, causal, grouped)
    for generation, name in peers.FLASH_ATTN.items():
        found[name] = peers.flash_attn(generation, kind, dtype, head_dim, causal, True, cell.direction)
    return found


def _layer_norm(found: Found, cell: Cell, kind: str) -> Found:
    eps, residual = 1e-5, cell.of.residual
    liger, quack = (
        peers.liger_layer_norm(kind, eps, residual),
        peers.quack_layer_norm(kind, eps, cell.direction, residual),
    )
    return found | {peers.LIGER: liger, peers.QUACK: quack}


def _rms_norm(found: Found, cell: Cell, kind: str) -> Found:
    eps = 1e-6
    return found | {peers.LIGER: peers.liger_rms_norm(kind, eps), peers.QUACK: peers.quack_rms_norm(kind, eps)}


def _softmax(found: Found, cell: Cell, kind: str) -> Found:
    causal = cell.of.is_causal
    return found | {peers.LIGER: peers.liger_softmax(kind, causal), peers.QUACK: peers.quack_softmax(kind, causal)}


def _int8_linear(found: Found, cell: Cell, kind: str) -> Found:
    rows, in_features, out_features, _, asked = cell.of
    # "auto" is one of the other two: what both are measured as.
    mode = cell_mode(asked, rows)
    listed = {
        peers.COMPILE: peers.compiled_int8(kind, mode, rows, in_features, out_features),
        peers.INT_MM: peers.int_mm(kind, mode, rows, in_features, out_features),
        peers.TORCHAO: peers.torchao(kind, mode),
        peers.BITSANDBYTES: peers.bitsandbytes(kind, mode),
    }
    return found | {name: _of_float_weight(peer, cell) for name, peer in listed.items()}


def cell_mode(asked: str, rows: int) -> str:
    from gptkern import operators

    module = operators.contract("int8_linear")
    return asked if asked != "auto" else "w8a16" if rows <= module.AUTO_W8A16_ROWS else "w8a8"


def _of_float_weight(peer: Implementation | Missing, cell: Cell) -> Implementation | Missing:
    """A peer that packs (input, float weight, bias) in its own way, on gptkern's (input, bias, int8 weight, scales)."""
    if isinstance(peer, Missing):
        return peer
    dtype, pack = getattr(torch, cell.dtype), peer.prepare or (lambda *arguments: arguments)

    def prepare(input, bias, weight, weight_scale):
        return pack(input, (weight.float() * weight_scale[:, None]).to(dtype), bias)

    return Implementation(peer.call, prepare, peer.graph)


_OF = {
    "attention": _attention,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "softmax": _softmax,
    "int8_linear": _int8_linear,
}
