"""What is known of an operator besides how it is computed: the types of a room's problem.py.

Said once there, it is what `check`, `bench`, `tune`, `info`, the emulator's counters, the sanitizers' runs and tests
iterate over. A room's problem.py has a subclass of `Problem` and an instance of it, PROBLEM; what it leaves out, it
has not: an operator without cells is not timed, one without classes has no measured order.

    direction   forward      what inference calls; nothing is kept for a backward
                backward     the gradients, from what the forward kept
                both         forward, what it keeps included, then backward

Operations are those of the mathematics, not of an implementation: a backward that recomputes the scores is credited
with the same number as one that kept them. Bytes are the least that has to cross the memory's bus if nothing were read
or written twice (the compulsory traffic of Williams, Waterman, Patterson, "Roofline", 2009).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

FORWARD, BACKWARD, BOTH = DIRECTIONS = ("forward", "backward", "both")
FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
THREE = (FLOAT32, FLOAT16, BFLOAT16)
FOUR = (*THREE, FLOAT64)
# Statistics that a forward keeps for its backward (mean, rstd, log-sum-exp), and the scales of int8, are float32.
FLOAT32_BYTES = 4
# Elements of an input that only memory bounds: some tens of microseconds on a large GPU.
ELEMENTS = 2**25

# Sizes of classes of calls: of each the largest that a class serves; None: any.
BITS = (16, 32, 64)
HEAD_DIMS = (64, 128, 256, None)
WIDTHS = (1024, 4096, 16384, None)
TRUTH = (False, True)


class Inputs(NamedTuple):
    """A call of the twin, made of sizes.

    Args:
        tensors: name of the argument -> floating-point tensor that gradients are taken of.
        constants: name -> tensor that is not differentiated.
        options: name -> what is no tensor.
        reference: reference(*tensors) -> the results as plain mathematics, on float64 or float32 copies of `tensors`.
        exact: the first result is integers that have to be equal.
    """

    tensors: dict[str, torch.Tensor]
    constants: dict[str, torch.Tensor]
    options: dict[str, Any]
    reference: Callable
    exact: bool = False

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        """The tensors, those that are differentiated first."""
        return *self.tensors.values(), *self.constants.values()

    @property
    def names(self) -> tuple[str, ...]:
        return *self.tensors, *self.constants


class Check(NamedTuple):
    """Sizes that are compared with float64, in these dtypes."""

    sizes: Any
    dtypes: tuple[torch.dtype, ...] = THREE


class Timed(NamedTuple):
    """A cell of the bench. limits: (peer, the ratio of gptkern's time to the peer's that is promised)."""

    direction: str
    dtype: str
    sizes: Any
    limits: tuple[tuple[str, float], ...] = ()


class Tuned(NamedTuple):
    """What is run to choose: `checked` against float64, then `timed`.

    Args:
        wrt: the arguments that a backward differentiates, which decide which kernels run; None: all.
    """

    direction: str
    dtype: torch.dtype
    checked: Any
    timed: Any
    wrt: tuple[str, ...] | None = None


class Counted(NamedTuple):
    """A call whose bytes and instructions the emulator counts.

    Args:
        limit: how often the least bytes of the large tensors may be moved; None: not limited.
        backward: whether the backward is counted too.
    """

    sizes: Any
    dtype: torch.dtype = BFLOAT16
    limit: float | None = 1.05
    backward: bool = True


class Classes(NamedTuple):
    """The classes of calls that a measured order of backends tells apart: coarse, since within one the fastest is one.

    Args:
        parts: {name of a part: the values that it may have}. Of a size: the largest that a class serves; None: any.
        of: of(call) -> the values, in the order of the parts: comparisons and nothing else, so that torch.compile can
            trace them with sizes that vary.
    """

    parts: dict[str, tuple]
    of: Callable[[Any], tuple]

    def described(self, key: tuple) -> str:
        """ "16 bits, head_dim up to 128, length above 8192, causal": a class in words."""
        words = []
        for (name, values), value in zip(self.parts.items(), key):
            if values is TRUTH:
                words.append(name if value else f"not {name}")
            elif name == "bits":
                words.append(f"{value} bits")
            elif isinstance(value, str):
                words.append(value)
            else:
                words.append(f"{name} above {values[-2]}" if value is None else f"{name} up to {value}")
        return ", ".join(words)


class Problem:
    """All that is known of one operator. `Sizes` is a NamedTuple class of its own; `sizes` below is one of these.

    coverage: what the kernels cover, in a line.
    classes: how calls are told apart by a measured order of the backends.
    """

    coverage = ""
    classes: Classes | None = None
    # Which calls the emulator counts.
    counted: tuple[Counted, ...] = ()

    def inputs(self, sizes: Any, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        """A call with random tensors, on the generator's device."""
        raise NotImplementedError

    def checks(self) -> dict[str, dict[str, Check]]:
        """{"small": {class of shapes: check}, "realistic": …}: what reaches each variant of a kernel.

        Small shapes are for interpreted and emulated kernels, realistic ones for GPUs.
        """
        raise NotImplementedError

    def label(self, sizes: Any) -> str:
        """ "7x33": sizes as they are printed."""
        return "x".join(str(size) for size in sizes if type(size) is int)

    def bytes(self, sizes: Any, itemsize: int, direction: str) -> int | None:
        """The least bytes of a call whose tensors have elements of `itemsize` bytes."""
        return None

    def flops(self, sizes: Any, direction: str) -> float | None:
        """Operations of a call."""
        return None

    # Timing

    def cells(self, kind: str, extent: str) -> list[Timed]:
        """What is timed, the most important first. kind: "cuda" or "cpu"; extent: "smoke", "quick" or "full"."""
        return []

    def shown(self, sizes: Any) -> tuple[tuple[str, Any], ...]:
        """The sizes of a cell by name, in the order in which they are read."""
        return tuple(sizes._asdict().items())

    def panel(self, sizes: Any, dtype: str) -> str:
        """The plot and the table that a cell belongs to, without the direction."""
        return dtype

    def x(self, sizes: Any) -> str:
        """Which of the shown sizes the panel's plot runs over."""
        return self.shown(sizes)[0][0]

    def ceiling(self, sizes: Any, dtype: str) -> str:
        """The measured rate that a cell's is a share of: "copy", "float32", "bfloat16" or "int8"."""
        return "copy"

    def plain(self, sizes: Any) -> Callable | None:
        """plain(*tensors, *constants) -> the result, or a tuple that begins with it, as PyTorch's users write it.

        None where they cannot.
        """
        return None

    def written_out(self, sizes: Any) -> Callable | None:
        """The same from smaller operators, for a compiler to fuse."""
        return self.plain(sizes)

    def for_float64(self, sizes: Any) -> Any:
        """Sizes that float64 has room for, as hard as these."""
        return sizes

    # Tuning

    def row(self, backend: str, *key) -> Tuned:
        """What exercises a row of the backend's table of tiles: the widest or longest call that it serves."""
        raise NotImplementedError

    def class_tasks(self) -> dict[tuple, Tuned]:
        """For each class of calls that a GPT makes, what stands for it."""
        return {}

    def moves(self, parts: list[str], tile: list[str]) -> Iterator[dict[str, bool]]:
        """Neighbours of a configuration beside the usual ones: {part: doubled or halved}."""
        return iter(())

    def sensible(self, key: tuple, candidate: Any) -> bool:
        """Whether a configuration is one that the row's kernel can run with, and no other one in disguise."""
        return True

    def shared_memory(self, backend: str, key: tuple, candidate: Any) -> int:
        """Bytes of shared memory that a configuration needs, by an estimate; what is more, the launch refuses."""
        return 0

    # Counting

    def least(self, sizes: Any, itemsize: int, direction: str) -> int | None:
        """Bytes of the large tensors that a result depends on, where that is not each of them once."""
        return None

    def products(self, sizes: Any, direction: str) -> int | None:
        """Multiplications of the matrix products of a call, of the triangle alone where it is causal."""
        return None


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype, spread: float = 1.0) -> torch.Tensor:
    """Normal numbers on the generator's device."""
    return (torch.randn(shape, generator=generator, device=generator.device) * spread).to(dtype)


def least_size(sizes: tuple, size: Any) -> int | None:
    """The least of `sizes` that is not below `size`; the last one is None."""
    for most in sizes:
        if most is None or size <= most:
            return most
    raise LookupError(f"{sizes} does not end with None")


def bits(tensor: Any) -> int:
    return 8 * tensor.dtype.itemsize


def middle_first(sizes: tuple[int, ...], *important: int) -> list[int]:
    """The sizes, the important ones first: a run that is cut short has seen these."""
    return sorted(sizes, key=lambda size: important.index(size) if size in important else len(important))
