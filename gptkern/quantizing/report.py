"""QuantizeReport: what `gptkern.quantize` did, as data and as a table."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn.parameter import is_lazy

from gptkern.swapping.report import table


class Quantized(NamedTuple):
    """A layer that became int8."""

    name: str  # its path in the model
    original: str  # its class before
    shape: tuple[int, int]  # (out_features, in_features)
    bytes_before: int  # weight and bias
    bytes_after: int  # weight, scales and bias
    error: float | None  # |weight - int8 * scale| / |weight|, Frobenius norms; None on the meta device


class Skipped(NamedTuple):
    """A linear layer that was left alone."""

    name: str
    original: str
    reason: str


class QuantizeReport:
    """What `quantize` did; `print(report)` shows it as a table.

    Attributes:
        quantized: the layers that became int8, by this call.
        skipped: the linear layers that were left alone, and why.
        bytes_before, bytes_after: of the layers that became int8.
        model_bytes_before, model_bytes_after: of all parameters and buffers of the model, shared ones once.
    """

    def __init__(
        self, quantized: list[Quantized], skipped: list[Skipped], model_bytes_before: int, model_bytes_after: int
    ):
        self.quantized = quantized
        self.skipped = skipped
        self.bytes_before = sum(layer.bytes_before for layer in quantized)
        self.bytes_after = sum(layer.bytes_after for layer in quantized)
        self.model_bytes_before = model_bytes_before
        self.model_bytes_after = model_bytes_after

    def __repr__(self) -> str:
        return f"QuantizeReport({len(self.quantized)} quantized, {len(self.skipped)} skipped)"

    def __str__(self) -> str:
        rows = [
            (q.name, q.original, "{} x {}".format(*q.shape), *_sizes(q.bytes_before, q.bytes_after), _percent(q.error))
            for q in self.quantized
        ]
        rows.append(("all of these", "", "", *_sizes(self.bytes_before, self.bytes_after), ""))
        rows.append(("the model", "", "", *_sizes(self.model_bytes_before, self.model_bytes_after), ""))
        heading = ("layer", "class", "out x in", "before", "after", "smaller", "error")
        lines = [f"{len(self.quantized)} layers quantized, {len(self.skipped)} skipped", *table(heading, rows)]
        if self.skipped:
            lines += ["", *table(("skipped", "class", "because"), self.skipped)]
        return "\n".join(lines)


def size_in_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers, shared ones once, those of lazy modules not yet."""
    tensors = (tensor for tensor in (*module.parameters(), *module.buffers()) if not is_lazy(tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _sizes(before: int, after: int) -> tuple[str, str, str]:
    return _size(before), _size(after), f"{before / after:.2f} x" if after else ""


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    power = min(int(math.log10(count)) // 3, 3)
    return f"{count / 1000**power:.2f} {('kB', 'MB', 'GB')[power - 1]}"


def _percent(error: float | None) -> str:
    return "" if error is None else f"{100 * error:.2f}%"
