"""What the Triton kernels share: the interpreter's gaps, rows, the choice of a configuration by architecture."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


if INTERPRETED:
    from gptkern.backends.triton import interpreter

    interpreter.mend()


@triton.jit
def dot(a, b, accumulator, INPUT_PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """accumulator + a @ b in float32.

    WIDEN is True under the interpreter alone: its tl.dot multiplies the bit patterns of bfloat16 (errors of 1e10,
    seen in Triton 3.6 to 3.9), and is right for float32, to which 16-bit operands widen without loss.
    """
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator, input_precision=INPUT_PRECISION)


# triton.cdiv and triton.next_power_of_2 take 5 µs of the host's time each.
def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


def architecture(device: torch.device) -> int:
    """80, 90, 100, …: the row of a configuration table. Under the interpreter any row is as good: 80."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def float32_precision() -> str:
    """tl.dot's input_precision for float32 operands, as torch.set_float32_matmul_precision asks."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """(…, width) -> (rows, width) whose rows are contiguous: a view wherever strides allow one."""
    width = tensor.shape[-1]
    if width > 0 and (tensor.stride(-1) == 1 or width == 1):
        return tensor.reshape(-1, width)
    return tensor.contiguous().view(-1 if width else tensor.shape[:-1].numel(), width)


def with_row_stride(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A tensor (…, width) whose rows are contiguous, and elements from a row to the next: no view where none is needed.

    A view takes as long on the host as an allocation.
    """
    if tensor.is_contiguous():
        return tensor, tensor.shape[-1]
    tensor = as_rows(tensor)
    return tensor, tensor.stride(0)


class CompileCase(NamedTuple):
    """One kernel of one shipped configuration, as `compile_cases(architecture)` of each kernel module lists them.

    The tests compile each of them ahead of time, without a GPU, and read registers, spills and shared memory.
    """

    name: str  # unique within the module: "forward hd128 causal bf16"
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # every argument in order -> "*bf16", "*fp32", "i32", "i64", "fp32" or "constexpr"
    constants: dict[str, Any]  # the constexpr arguments' values
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = ()  # integer arguments that are multiples of 16 in this case; pointers always are
    matrix_product: bool = False  # whether the PTX must hold the architecture's matrix instruction
    allowed_spill_bytes: int = 0  # with the reason in the configuration table where it is not 0
