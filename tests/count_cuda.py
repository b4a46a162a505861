"""Counts what the CUDA kernels do, under the emulator: bytes, sectors, bank conflicts and matrix instructions.

    python tests/count_cuda.py      the table docs/cuda_counters.md, on the standard output

These are facts of the kernels as they are written, not measurements: they need no GPU, and hold on every one. The cases
are data, below; each is a call of the public interface, forward and backward, and what the launchers ran is counted.

What is counted:
    bytes       that a warp's request touches in global memory, each once. What is read again later counts again.
    least       of the large tensors (`large` of the case): each byte of them that the result depends on, once. Weights,
                biases, statistics and scales are small, are read by every block, and count apart.
    sectors     32 bytes each, what a request moves; a full request of 16 bytes a lane has 16
    conflicts   rounds of shared memory beyond those that the request's bytes take
    matrix      instructions, over the products of the operator divided by the products of one instruction
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

import gptkern
import gptkern.functional as G
from gptkern.backends import dispatch
from gptkern.backends.cuda import common, emulated
from gptkern.measuring import conventions

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# Products (multiply and add) of one instruction: m16n8k16 and m16n8k32.
PRODUCTS = {"mma_16bit": 16 * 8 * 16, "mma_int8": 16 * 8 * 32}
ACCESSES = ("load", "store", "atomic", "async")
SHARED = ("shared_load", "shared_store", "ldmatrix", "async_store")


class Case(NamedTuple):
    operator: str
    shape: str  # as the table shows it
    call: Callable[[], torch.Tensor]  # builds its arguments and calls the public function
    large: int = 0  # elements that a tensor has to have to count as large; 0: bytes have no limit
    # direction -> bytes of the large tensors that the result depends on; None: all of each
    least_bytes: dict[str, int] | None = None
    products: dict[str, int] | None = None  # direction -> multiplications of the operator
    backward: bool = True
    limit: float = 1.05  # of bytes over the least


class Record(NamedTuple):
    """What one call of a launcher did."""

    launcher: str
    direction: str
    kernels: dict[str, dict[str, Any]]
    large_moved: int  # bytes of large tensors, loaded and stored
    large_least: int

    def total(self, *keys: str) -> int:
        found = 0
        for counts in self.kernels.values():
            value = counts
            for key in keys:
                value = value[key]
            found += value
        return found

    @property
    def bytes_ratio(self) -> float | None:
        return self.large_moved / self.large_least if self.large_least else None

    def conflicts(self, *kinds: str) -> int:
        return sum(self.total(kind, "wavefronts") - self.total(kind, "least") for kind in kinds or SHARED)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else -1
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


@contextlib.contextmanager
def _counting(large: int, calls: list) -> Iterator[None]:
    """Adds (launcher, kernels, tensors) to `calls` for every launcher that runs; tensors: name -> tensor."""
    address, call = common.address, common.call
    tensors: dict[int, torch.Tensor] = {}

    def note(tensor):
        if tensor is not None and tensor.numel():
            known = tensors.get(tensor.data_ptr())
            if known is None or known.numel() < tensor.numel():
                tensors[tensor.data_ptr()] = tensor

    def noted_address(tensor):
        note(tensor)
        return address(tensor)

    def counted_call(name, tensor, *arguments):
        module = common.library(tensor)
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                note(argument)
        named = {f"{i}": tensor for i, tensor in enumerate(tensors.values())}
        tensors.clear()
        module.start_counting({name: _extent(tensor) for name, tensor in named.items()})
        try:
            return call(name, tensor, *arguments)
        finally:
            calls.append((name, module.stop_counting(), named))

    common.address, common.call = noted_address, counted_call
    try:
        yield
    finally:
        common.address, common.call = address, call


@functools.cache
def counted(index: int) -> list[Record]:
    """`count` of CASES[index], once in a process."""
    return count(CASES[index])


def count(case: Case) -> list[Record]:
    """One record for each launcher that the case's forward and backward called."""
    torch.manual_seed(0)
    records = []
    emulated.load().set_seed(1)
    with gptkern.backend("cuda"):
        for direction in ("forward", "backward") if case.backward else ("forward",):
            calls: list = []
            with _counting(case.large, calls):
                if direction == "forward":
                    result = case.call()
                else:
                    gradient = torch.randn_like(result)
                    result.backward(gradient)
            for launcher, kernels, tensors in calls:
                moved = least = 0
                for name, tensor in tensors.items():
                    # A large tensor is one of the operator's own; a scratch of another shape is counted as moved.
                    if not case.large or tensor.numel() < case.large:
                        continue
                    for counts in kernels.values():
                        region = counts["regions"].get(name, {"loaded": 0, "stored": 0})
                        moved += region["loaded"] + region["stored"]
                    least += tensor.numel() * tensor.element_size()
                if case.least_bytes is not None:
                    least = case.least_bytes.get(direction, 0)
                records.append(Record(launcher, direction, kernels, moved, least))
    return records


# --- Cases ------------------------------------------------------------------------------------------------------------


def tensor(*shape: int, dtype: torch.dtype = BF16, gradient: bool = True) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_(gradient)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def layer_norm(rows: int, width: int, dtype=BF16, residual: bool = False, limit=1.05) -> Case:
    def call():
        x, other = tensor(rows, width, dtype=dtype), tensor(rows, width, dtype=dtype)
        weight, bias = tensor(width, dtype=dtype), tensor(width, dtype=dtype)
        result = G.layer_norm(x, (width,), weight, bias, **({"residual": other} if residual else {}))
        return result[0] if residual else result

    shape = f"{rows}×{width} {name_of(dtype)}{', residual' if residual else ''}"
    return Case("layer_norm", shape, call, large=rows * width, limit=limit)


def rms_norm(rows: int, width: int, dtype=BF16, limit=1.05) -> Case:
    def call():
        return G.rms_norm(tensor(rows, width, dtype=dtype), (width,), tensor(width, dtype=dtype))

    return Case("rms_norm", f"{rows}×{width} {name_of(dtype)}", call, large=rows * width, limit=limit)


def rotary(batch, heads, length, head_dim, rotary_dim=None, *, interleaved=False, packed=True, dtype=BF16) -> Case:
    rotary_dim = rotary_dim or head_dim

    def call():
        # (batch, length, heads, head_dim) in memory, alone or as the first third of a packed projection.
        if packed:
            input = tensor(batch, length, 3, heads, head_dim, dtype=dtype)[:, :, 0].transpose(1, 2)
        else:
            input = tensor(batch, heads, length, head_dim, dtype=dtype)
        cos, sin = (tensor(length, rotary_dim // 2, dtype=F32, gradient=False) for _ in range(2))
        return G.rotary_embedding(input, cos, sin, interleaved=interleaved, rotary_dim=rotary_dim)

    turned = f" ({rotary_dim})" if rotary_dim != head_dim else ""
    words = [name_of(dtype), "interleaved" if interleaved else "half-split", *(["packed"] if packed else [])]
    shape = f"{batch}×{heads}×{length}×{head_dim}{turned} {', '.join(words)}"
    return Case("rotary", shape, call, large=batch * heads * length * head_dim)


def softmax(*shape: int, dtype=BF16, dim: int = -1, causal: bool = False, mask: bool = False, limit=1.05) -> Case:
    def call():
        more = {"mask": torch.rand(shape[-2:]) < 0.9} if mask else {}
        return G.softmax(tensor(*shape, dtype=dtype), dim, is_causal=causal, **more)

    size, width, elements = dtype.itemsize, shape[dim], torch.Size(shape).numel()
    rows = elements // width
    least = None
    if causal:
        least = {
            direction: conventions.softmax_bytes(rows, width, size, direction, causal=True)
            for direction in ("forward", "backward")
        }
    words = [name_of(dtype), *(["causal"] if causal else []), *(["bool mask"] if mask else [])]
    words += [f"dim {dim}"] if dim != -1 else []
    return Case("softmax", f"{'×'.join(map(str, shape))} {', '.join(words)}", call, elements, least, limit=limit)


def attention(batch, heads, length, head_dim, *, key_heads=None, key_length=None, causal=False, dtype=BF16) -> Case:
    key_heads, key_length = key_heads or heads, key_length or length

    def call():
        query = tensor(batch, heads, length, head_dim, dtype=dtype)
        key, value = (tensor(batch, key_heads, key_length, head_dim, dtype=dtype) for _ in range(2))
        more = {"enable_gqa": True} if key_heads != heads else {}
        return G.scaled_dot_product_attention(query, key, value, is_causal=causal, **more)

    # Queries see the keys up to their own place.
    pairs = length * (length + 1) // 2 if causal else length * key_length
    # Two products forward (Q Kᵀ and P V), five backward (Q Kᵀ again, dO Vᵀ, and the three gradients).
    one = batch * heads * pairs * head_dim
    lengths = f"{length}" if key_length == length else f"{length}→{key_length}"
    grouped = f" ({key_heads})" if key_heads != heads else ""
    shape = f"{batch}×{heads}{grouped}×{lengths}×{head_dim} {name_of(dtype)}{', causal' if causal else ''}"
    return Case("attention", shape, call, products={"forward": 2 * one, "backward": 5 * one})


def int8_linear(rows, inputs, outputs, mode, dtype=BF16, activation=None) -> Case:
    def call():
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        scale = torch.rand(outputs) + 0.01
        bias = tensor(outputs, dtype=F32, gradient=False)
        x = tensor(rows, inputs, dtype=dtype, gradient=False)
        return G.int8_linear(x, weight, scale, bias, activation=activation, mode=mode)

    products = {"forward": rows * inputs * outputs}
    # The weight is what a W8A16 product streams; the W8A8 kernel reads a tile of it for each tile of rows.
    large = inputs * outputs if mode == "w8a16" else 0
    shape = f"{rows}×{inputs}→{outputs} {mode} {name_of(dtype)}{f', {activation}' if activation else ''}"
    return Case("int8_linear", shape, call, large, products=products, backward=False)


# Of a row that neither registers nor shared memory hold the rest is read twice.
WIDE_SOFTMAX = 1.45
# Of a row that registers do not hold, shared memory keeps a part; the rest is read twice, and dweight has a kernel.
WIDE_RMS_NORM = 2.1
# There the backward has a kernel for ds and one for the parameters' gradients besides.
WIDE_LAYER_NORM = 2.2

CASES = [
    layer_norm(64, 768), layer_norm(64, 1024), layer_norm(16, 4096), layer_norm(8, 12288),
    layer_norm(2, 65536, limit=WIDE_LAYER_NORM),
    layer_norm(64, 1024, F32), layer_norm(16, 1600, F16), layer_norm(32, 1024, residual=True), layer_norm(33, 200),
    rms_norm(64, 128), rms_norm(64, 1024), rms_norm(16, 4096), rms_norm(4, 16384),
    rms_norm(2, 65536, limit=WIDE_RMS_NORM), rms_norm(64, 1024, F32), rms_norm(33, 200, F16),
    rotary(2, 12, 64, 64), rotary(1, 9, 40, 128, packed=False), rotary(1, 8, 32, 128, interleaved=True),
    rotary(1, 4, 32, 256, 64, interleaved=True), rotary(1, 4, 64, 96, 24), rotary(1, 4, 32, 64, dtype=F32),
    rotary(1, 32, 1, 128, dtype=F16),
    softmax(64, 1024), softmax(16, 4096), softmax(2, 65536, limit=WIDE_SOFTMAX), softmax(64, 1024, dtype=F32),
    softmax(33, 200), softmax(2, 256, 256, causal=True), softmax(2, 64, 512, mask=True), softmax(2, 64, 256, dim=1),
    attention(1, 1, 1024, 64, causal=True), attention(1, 1, 1024, 64), attention(1, 1, 512, 128, causal=True),
    attention(1, 1, 512, 128), attention(1, 1, 512, 80, causal=True), attention(1, 1, 512, 96, causal=True),
    attention(1, 1, 256, 256, causal=True, dtype=F16), attention(1, 4, 128, 64, key_heads=2, causal=True, dtype=F16),
    attention(1, 1, 100, 64, key_length=300),
    int8_linear(256, 512, 512, "w8a8"), int8_linear(128, 1024, 256, "w8a8", F16, "gelu"),
    int8_linear(100, 256, 200, "w8a8", F32), int8_linear(1, 1024, 512, "w8a16"), int8_linear(8, 1024, 512, "w8a16"),
]  # fmt: skip


# --- The table --------------------------------------------------------------------------------------------------------


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def rows_of(index: int) -> Iterator[str]:
    """The table's lines of CASES[index]."""
    case = CASES[index]
    for record in counted(index):
        products = (case.products or {}).get(record.direction)
        executed = sum(record.total(kind) * each for kind, each in PRODUCTS.items())
        # A backward may be several launchers: each does its part of the products.
        for place, (kernel, counts) in enumerate(record.kernels.items()):
            requests = sum(counts[kind]["requests"] for kind in ACCESSES)
            sectors = sum(counts[kind]["sectors"] for kind in ACCESSES)
            size = sum(counts[kind]["bytes"] for kind in ACCESSES)
            conflicts = sum(counts[kind]["wavefronts"] - counts[kind]["least"] for kind in SHARED)
            matrix = sum(counts[kind] for kind in PRODUCTS)
            cells = [
                case.shape if place == 0 else "",
                f"`{kernel}`",
                f"{size:,}",
                ratio(record.bytes_ratio) if place == 0 else "",
                f"{sectors / requests:.1f}" if requests else "",
                f"{conflicts:,}",
                f"{matrix:,}" if matrix else "",
                ratio(executed / products) if products and executed and place == 0 else "",
            ]
            yield f"| {' | '.join(cells)} |"


def table() -> str:
    columns = ("shape", "kernel", "bytes", "over the least", "sectors per request", "bank conflicts",
               "matrix instructions", "over the least")  # fmt: skip
    lines = [
        "# What the CUDA kernels do",
        "",
        "Made by `make tables`. The emulator counts these while it runs the kernels on a CPU; they are facts of the",
        "code, the same on every GPU, and `tests/test_cuda_counters.py` holds their limits. Caches are not part of it.",
        "",
        "- Bytes are all that a kernel's requests touch in global memory.",
        "- Over the least: bytes of the large tensors (input, output and their gradients; W8A16: the weight), over",
        "  each of their bytes once. Weights, biases and statistics are not among them.",
        "- A request is an instruction of a warp and a sector 32 bytes: 16 bytes a lane, side by side, are 16 sectors.",
        "- Bank conflicts are rounds of shared memory beyond those that the bytes take.",
        "- Matrix instructions over the least: against the operator's multiplications; under a causal mask, those",
        "  of the triangle.",
        "",
        "What is over the least is that of all kernels of a launcher together, and stands in the line of the first.",
    ]
    for operator in dispatch.OPERATORS:
        lines += ["", f"## {operator}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for index, case in enumerate(CASES):
            if case.operator == operator:
                lines += rows_of(index)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    os.environ["GPTKERN_EMULATE_CUDA"] = "1"
    print(table(), end="")
