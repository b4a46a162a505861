"""Products with a vocabulary's weight, a chunk of classes at a time: what losses share that never hold their logits.

    z    = x W_c^T          (rows, chunk), in float32 of 16-bit operands
    dW_c = G^T x            (chunk, width), in the weight's dtype: all rows in one product, whose sum is float32
    dx  += G W_c            (rows, width), in float32

On a GPU PyTorch multiplies 16-bit operands into float32 results (out_dtype). Elsewhere operands are widened first: a
CPU's 16-bit products round their results to 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

# Elements of the logits that a chunk has at least: 8192 tokens of 4096 classes are 1024 tiles of 128 x 256, some eight
# waves of a large GPU (reasoned, not measured).
LEAST_ELEMENTS = 2**25
# Logits up to this many are whole, and PyTorch's own, on the torch backend: 16 MiB in float32.
FEW_LOGITS = 2**22
# Rows of the weight in a chunk are a multiple of this many, where there are as many: tiles are whole, lines aligned.
MULTIPLE = 256


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def at_a_time(rows: int, width: int, classes: int, dtype: torch.dtype, asked: int = 0) -> int:
    """Classes of a chunk.

    Of the memory beyond inputs and gradients, half of the gradients' is what a chunk's z and G may take together with
    dx in float32, or with x without ignored rows, where that is dx's dtype (of 16 bits it lies where their dx will);
    or LEAST_ELEMENTS of z, where that is more.

        chunk = ((rows + classes) * width * size / 2 - dx) / (rows * (z + G))

    Args:
        asked: elements of z that a chunk has at most; 0: by the formula.
    """
    size, rows = dtype.itemsize, max(rows, 1)
    if asked:
        most = max(asked // rows, 1)
    else:
        # Of each row there are some sums in float32 as well: 16 numbers at most.
        beside = rows * width * max(size, 4) + rows * 64
        # G stands in z's place where their dtypes are the same.
        element = 6 if size == 2 else size
        room = ((rows + classes) * width * size // 2 - beside) // (rows * element)
        most = max(room, LEAST_ELEMENTS // rows, 1)
    if most >= classes:
        return max(classes, 1)
    if most >= MULTIPLE:
        most -= most % MULTIPLE
    # as even as they can be
    even = -(-classes // -(-classes // most))
    return min(-(-even // MULTIPLE) * MULTIPLE, most)


class Chunks(NamedTuple):
    """A weight's rows in chunks, and the memory that these share; to iterate over: (start, stop)."""

    classes: int
    each: int
    z: torch.Tensor  # (rows, each) in float32 (float64 for float64)
    widens: bool  # 16-bit operands are widened before they are multiplied

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.classes, self.each):
            yield start, min(start + self.each, self.classes)

    def widened(self, tensor: torch.Tensor) -> torch.Tensor:
        """An operand as products take it."""
        return tensor.to(self.z.dtype) if self.widens else tensor

    def buffer_of_g(self, dtype: torch.dtype) -> torch.Tensor:
        """(rows, each), in the dtype that G is multiplied in: z itself where that is its own."""
        return self.z if self.widens or dtype == self.z.dtype else torch.empty_like(self.z, dtype=dtype)


def chunks_of(x: torch.Tensor, classes: int, asked: int = 0) -> Chunks:
    """The chunks for x (rows, width) and a weight (classes, width); `asked` as in `at_a_time`."""
    each = at_a_time(*x.shape, classes, x.dtype, asked)
    z = torch.empty(x.shape[0], each, dtype=compute_dtype(x.dtype), device=x.device)
    return Chunks(classes, each, z, _widens(x))


def _widens(x: torch.Tensor) -> bool:
    return x.dtype.itemsize == 2 and not x.is_cuda


def logits(chunks: Chunks, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """z = x W_c^T, in the chunks' memory: x as `widened` has it, the chunk's weight (chunk, width) as it is."""
    z, weight = chunks.z.narrow(1, 0, weight.shape[0]), chunks.widened(weight)
    return torch.mm(x, weight.t(), **_wider(x, z), out=z)


# A gradient in float16 that was divided by the number of tokens is lost among the subnormals, class by class. So the
# largest of a row's loss becomes 2^10, of which a class has some tens at most; one of probability 1e-7 is still there.
_FLOAT16_EXPONENT = 10


def float16_unit(*of_rows: torch.Tensor) -> torch.Tensor:
    """0-d: what G in float16 is divided by, for products that are multiplied by it again in float32.

    Args:
        of_rows: (rows,) each, bounds of the rows' gradients. One that is not finite is of its own row's.
    """
    bounds = torch.stack([torch.nan_to_num(bound.abs(), 0.0, 0.0, 0.0).amax() for bound in of_rows])
    return bounds.amax().clamp_min(torch.finfo(torch.float32).tiny * 2.0**_FLOAT16_EXPONENT) * 2.0**-_FLOAT16_EXPONENT


def times(tensor: torch.Tensor, unit: torch.Tensor | None) -> torch.Tensor:
    return tensor if unit is None else tensor * unit


def weight_gradient(
    chunks: Chunks, g: torch.Tensor, x: torch.Tensor, out: torch.Tensor, unit: torch.Tensor | None = None
) -> None:
    """out (chunk, width) = G^T x, in the weight's dtype, times the unit."""
    if unit is not None:
        # The sum over the rows may be more than float16 holds, until it is in its own unit again.
        out.copy_(torch.mm(g.t(), x, out_dtype=torch.float32) * unit)
    elif chunks.widens:
        out.copy_(torch.mm(g.t(), x))
    else:
        torch.mm(g.t(), x, out=out)


def add_input_gradient(chunks: Chunks, dx: torch.Tensor, g: torch.Tensor, weight: torch.Tensor, first: bool) -> None:
    """dx += G W_c, or dx = G W_c where it is the first, in dx's own float32."""
    weight = chunks.widened(weight)
    if first:
        torch.mm(g, weight, **_wider(g, dx), out=dx)
    else:
        torch.addmm(dx, g, weight, **_wider(g, dx), out=dx)


def _wider(operand: torch.Tensor, result: torch.Tensor) -> dict:
    return {} if operand.dtype == result.dtype else {"out_dtype": result.dtype}
