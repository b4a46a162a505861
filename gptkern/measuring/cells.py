"""What is measured: a cell of the tables, and the implementations that are compared in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Cell:
    """One operator in one direction on one shape: gptkern and its peers are timed on it in one run.

    Args:
        operator: of gptkern.operators.NAMES, or "model".
        direction: "forward", "backward" or "both"; for "model" what one call does, "training step" or "generation".
        dtype: of the inputs, "bfloat16".
        sizes: (("rows", 32768), ("width", 1024)), in the order in which they are read.
        panel: the plot and the table that the cell belongs to, without the direction.
        x: which of the sizes the panel's plot runs over.
        bytes: the least that one call has to read and write; flops: the operations of one call (backends.problem).
        ceiling: the measured rate that this cell's is a share of: "copy", "float32", "bfloat16" or "int8".
        tokens: for "model", how many one call trains on or generates.
        limits: (peer, the ratio of gptkern's time to the peer's that is promised).
        of: the sizes as the operator's problem has them.
    """

    operator: str
    direction: str
    dtype: str
    sizes: tuple[tuple[str, int | str | bool], ...]
    panel: str
    x: str
    bytes: int | None = None
    flops: float | None = None
    ceiling: str | None = None
    tokens: int | None = None
    limits: tuple[tuple[str, float], ...] = ()
    of: Any = field(default=None, compare=False, repr=False)

    def size(self, name: str) -> Any:
        return dict(self.sizes)[name]

    @property
    def label(self) -> str:
        """The sizes as they are printed: "4x16x4096x128 causal"; a size that is True shows its name."""
        flags = {name: isinstance(value, (bool, str)) for name, value in self.sizes}
        numbers = "x".join(str(value) for name, value in self.sizes if not flags[name])
        words = [name if value is True else value for name, value in self.sizes if flags[name] and value is not False]
        return " ".join([numbers, *words]).strip()

    @property
    def key(self) -> str:
        """Unique within a results file."""
        return f"{self.operator} {self.direction} {self.dtype} {self.panel} {self.label}"

    def record(self) -> dict[str, Any]:
        """The cell's own part of a results file."""
        sizes, limits = dict(self.sizes), dict(self.limits)
        kept = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "of"}
        return kept | {"key": self.key, "label": self.label, "sizes": sizes, "limits": limits}


@dataclass(frozen=True)
class Implementation:
    """One way to compute a cell.

    Args:
        call: call(*inputs) -> the output, or a tuple whose first is the output.
        prepare: prepare(*inputs) -> the inputs that `call` takes, run once for each set of inputs and not timed
            (packing a weight, say). Inputs that are differentiated come back as the same objects at the same places.
        graph: whether a CUDA graph can capture the call.
        or_events: where the capture fails plain calls are timed, and the record says why; else that is its failure.
    """

    call: Callable[..., Any]
    prepare: Callable[..., tuple] | None = None
    graph: bool = True
    or_events: bool = False


class Missing(NamedTuple):
    """In place of an Implementation: why it is not measured here."""

    reason: str
