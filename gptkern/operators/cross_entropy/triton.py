"""cross_entropy on Triton: tiles and launchers. The mathematics and the kernels are in triton_kernels.py."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gptkern.backends.losses import first_largest
from gptkern.backends.triton.common import CompileCase, cdiv, next_power_of_2
from gptkern.backends.triton.row_sums import compile_case as row_sums_case
from gptkern.backends.triton.row_sums import row_sums
from gptkern.backends.triton.strides import layout
from gptkern.operators.cross_entropy.contract import Call, Gradient, row_shape
from gptkern.operators.cross_entropy.triton_kernels import (
    _backward_row_kernel,
    _backward_tile_kernel,
    _forward_row_kernel,
    _forward_tile_kernel,
)

# --- Tiles ----------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """How the logits are walked. Rows: LANES is 1. Tiles: LANES x BLOCK_N elements, the classes on AXIS."""

    by_rows: bool
    axis: int
    lanes: int
    block_n: int
    warps: int


# Rows of at least so many classes have a program of their own; 16 elements a thread of a step. Reasoned, compiled
# under Triton 3.7.1; not measured.
WIDE_ROW, _ROW_STEP, _ROW_WARPS = 1024, 4096, 8
# Elements of a tile; where neighbouring threads read neighbouring positions, of which a warp reads whole sectors.
_TILE, _TILE_WARPS = 2048, 8
_POSITIONS_TILE, _POSITIONS_STEP, _POSITIONS_WARPS = 2048, 32, 8
# A grid's second dimension, which is a backward's steps along the classes, has 65,535 programs; rows are counted in 32
# bits, and run over by less than a tile.
_MAX_CLASSES, _MAX_ROWS = 65_535 * _POSITIONS_STEP, 2**31 - 2**20
_VECTOR_BYTES = 16


def tile(classes: int, lanes: int, is_contiguous: bool) -> Tile:
    """Args: is_contiguous: whether a row's classes are neighbours."""
    if is_contiguous and classes >= WIDE_ROW:
        return Tile(True, 1, 1, _ROW_STEP, _ROW_WARPS)
    if is_contiguous or lanes == 1:
        block_n = min(next_power_of_2(classes), _ROW_STEP)
        return Tile(False, 1, min(max(1, _TILE // block_n), next_power_of_2(lanes)), block_n, _TILE_WARPS)
    block_n = min(next_power_of_2(classes), _POSITIONS_STEP)
    lanes = min(_POSITIONS_TILE // block_n, next_power_of_2(lanes))
    return Tile(False, 0, lanes, block_n, _POSITIONS_WARPS)


class _Walk(NamedTuple):
    """The logits as (groups, lanes, classes), and the strides of them and of what is walked with them."""

    groups: int
    lanes: int
    strides: list[tuple[int, int, int]]


def _walk(*tensors: torch.Tensor) -> _Walk | None:
    """None where too many dimensions lie behind the classes for two strides."""
    found = layout(1, *tensors)
    if found is None or found.size_0 != 1:
        return None
    return _Walk(found.size_1, found.lanes, [strides[1:] for strides in found.strides])


def _peels(classes: int, strides: list[tuple[int, int, int]], tensors: tuple[torch.Tensor, ...]) -> tuple[bool, int]:
    """(whether edges are loaded by themselves, elements of a vector of the first tensor).

    They are where rows begin between vectors, of all tensors alike; what begins otherwise has no vectors together.
    """
    vector = _VECTOR_BYTES // tensors[0].element_size()
    addresses = {tensor.data_ptr() % _VECTOR_BYTES for tensor in tensors}
    offsets = {tuple(stride % vector for stride in of_one[:2]) for of_one in strides}
    sizes = {tensor.element_size() for tensor in tensors}
    if addresses == {0} and offsets == {(0, 0)} and len(sizes) == 1 and classes % 16 == 0:
        # Triton sees by itself that every vector is whole.
        return False, vector
    return len(addresses) == len(offsets) == len(sizes) == 1, vector


# --- Launchers ------------------------------------------------------------------------------------------------------


_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported(call: Call) -> str | None:
    input, target, weight = call.input, call.target, call.weight
    for name, tensor in (("input", input), ("target", target), ("weight", weight)):
        if tensor is None or (name == "target" and not tensor.is_floating_point()):
            continue
        if tensor.dtype not in _DTYPES:
            return f"{name} is {tensor.dtype}; the kernels cover float16, bfloat16 and float32"
        if name != "input" and tensor.requires_grad and torch.is_grad_enabled():
            return f"the {name} requires a gradient, which the kernels do not compute"
    classes = input.shape[1]
    if classes == 0:
        return "there are no classes"
    if classes > _MAX_CLASSES:
        return f"there are {classes} classes; the kernels count up to {_MAX_CLASSES}"
    if input.numel() > classes * _MAX_ROWS:
        return f"the input has shape {tuple(input.shape)}; the kernels count up to {_MAX_ROWS} rows"
    return None


def _options(call: Call) -> tuple:
    """The numbers of a call, as the kernels take them."""
    return call.ignore_index, call.label_smoothing, call.z_loss, call.softcap or 1.0, call.logit_scale


def _constants(call: Call) -> dict[str, bool]:
    classes = not call.target.is_floating_point()
    spread = not classes or call.label_smoothing > 0.0
    return dict(CLASSES=classes, SPREAD=spread, Z_LOSS=call.z_loss > 0.0, SOFTCAP=call.softcap is not None)


def _read(input: torch.Tensor, target: torch.Tensor, *written: torch.Tensor):
    """-> input, target, written and how they are walked together: copied where no strides do, which is seldom."""
    probabilities = target.is_floating_point()
    if not probabilities:
        target = target.contiguous()
    walked = (input, target, *written) if probabilities else (input, *written)
    walk = _walk(*walked)
    if walk is None:
        input, written = input.contiguous(), tuple(map(torch.empty_like, (input.contiguous() for _ in written)))
        target = target.contiguous()
        walked = (input, target, *written) if probabilities else (input, *written)
        walk = _walk(*walked)
    return input, target, written, walk


def _tile(walk: _Walk, classes: int, *tensors: torch.Tensor) -> tuple[Tile, dict]:
    """The tile, and the constants that follow from it. `tensors`: what is walked."""
    found = tile(classes, walk.lanes, classes == 1 or all(strides[2] == 1 for strides in walk.strides))
    if found.by_rows:
        peel, vector = _peels(classes, walk.strides, tensors)
        return found, dict(VECTOR=vector, PEEL=peel)
    return found, dict(AXIS=found.axis, LANES=found.lanes)


def _strides(walk: _Walk, is_class: bool) -> list[int]:
    """As the kernels take them: the logits', the target's, of which a class a row has none, what is written's."""
    of_input, *others = walk.strides
    return [stride for strides in (of_input, *([(0, 0, 0)] if is_class else ()), *others) for stride in strides]


def forward(call: Call):
    """-> loss, statistics (4, rows), denominator, lse, entropy, correct: the contract's."""
    input, target, weight = call.input, call.target, call.weight
    shape, classes, device = row_shape(call), input.shape[1], input.device
    rows = input.numel() // classes
    each = call.reduction == "none"
    is_class = not target.is_floating_point()
    losses = torch.empty(rows, dtype=call.dtype if each else torch.float32, device=device)
    statistics = torch.empty((4, rows), dtype=torch.float32, device=device)
    own = torch.empty(rows, dtype=torch.float32, device=device) if call.reduction == "mean" and is_class else None
    lse = entropy = correct = None
    if call.need_stats:
        lse, entropy = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
        # Of probabilities the likeliest class, which their own is then compared with.
        correct = torch.empty(shape, dtype=torch.bool if is_class else torch.int32, device=device)
    if rows:
        x, t, _, walk = _read(input, target)
        found, constants = _tile(walk, classes, *((x,) if is_class else (x, t)))
        constants |= _constants(call) | dict(STATS=call.need_stats)
        pointers = x, t, weight, losses, own, statistics, lse, entropy, correct
        numbers = rows, walk.lanes, classes, *_strides(walk, is_class), *_options(call)
        if found.by_rows:
            groups = found.block_n // constants["VECTOR"]
            _forward_row_kernel[(rows,)](*pointers, *numbers, GROUPS=groups, **constants, num_warps=found.warps)
        else:
            grid = (walk.groups * cdiv(walk.lanes, found.lanes),)
            _forward_tile_kernel[grid](*pointers, *numbers, BLOCK_N=found.block_n, **constants, num_warps=found.warps)
    if call.need_stats and not is_class:
        correct = correct == first_largest(target, 1)
    if each:
        return losses.view(shape), statistics, None, lse, entropy, correct
    divisor = float(rows) if call.reduction == "mean" and own is None else 1.0
    loss, denominator = row_sums(losses, own, divisor, call.dtype)
    return loss, statistics, denominator, lse, entropy, correct


def backward(gradient: Gradient, call: Call):
    """-> dinput (N, C, d1, …) in the input's strides, or None where it was written over the logits."""
    grad_output, statistics, denominator, written = gradient
    input, target, weight = call.input, call.target, call.weight
    classes = input.shape[1]
    dx = torch.empty_like(input) if written is None else written
    rows = input.numel() // classes
    if rows == 0:
        return dx if written is None else None
    x, t, (out,), walk = _read(input, target, dx)
    is_class = not target.is_floating_point()
    found, constants = _tile(walk, classes, *((x, out) if is_class else (x, t, out)))
    constants |= _constants(call) | dict(EACH=call.reduction == "none", BLOCK_N=found.block_n)
    divisor = float(rows) if call.reduction == "mean" and denominator is None else 1.0
    chunks = cdiv(classes, found.block_n)
    numbers = rows, walk.lanes, classes, *_strides(walk, is_class), *_options(call)
    kernel, programs = _backward_row_kernel, rows
    if not found.by_rows:
        kernel, programs = _backward_tile_kernel, walk.groups * cdiv(walk.lanes, found.lanes)
    kernel[(programs, chunks)](
        grad_output.contiguous(), denominator, statistics, x, t, weight, out, *numbers, divisor,
        **constants, num_warps=found.warps,
    )  # fmt: skip
    if out is not dx:
        # Past the version counter, which is moved on where the launcher was started.
        dx.data.copy_(out)
    return dx if written is None else None


# --- Ahead-of-time compilation --------------------------------------------------------------------------------------

_KERNELS = {
    ("forward", True): _forward_row_kernel, ("forward", False): _forward_tile_kernel,
    ("backward", True): _backward_row_kernel, ("backward", False): _backward_tile_kernel,
}  # fmt: skip


def compile_cases(architecture: int) -> list[CompileCase]:
    """Each kernel with nothing that a call can leave out, and with everything."""
    plain = [
        _case(direction, classes, lanes, True, dtype, peel=peel)
        for direction in ("forward", "backward")
        for classes, lanes, dtype, peel in (
            (50257, 1, "bf16", True), (128256, 1, "bf16", False), (50257, 1, "fp32", True), (64, 4096, "bf16", False),
        )
    ]  # fmt: skip
    full = [
        _case(direction, classes, lanes, contiguous, "bf16", peel=classes == 50257, full=True, **kind)
        for direction in ("forward", "backward")
        for classes, lanes, contiguous in ((50257, 1, True), (64, 4096, True), (1024, 4096, False))
        for kind in ({}, {"probabilities": True})
    ]
    return [*plain, *full, row_sums_case()]


def _case(direction, classes, lanes, contiguous, dtype, peel=False, full=False, probabilities=False):
    found = tile(classes, lanes, contiguous)
    kernel = _KERNELS[direction, found.by_rows]
    vector = _VECTOR_BYTES // (4 if dtype == "fp32" else 2)
    constants = dict(
        CLASSES=not probabilities, SPREAD=full or probabilities, Z_LOSS=full, SOFTCAP=full, STATS=full, EACH=False,
        VECTOR=vector, PEEL=peel, GROUPS=found.block_n // vector, AXIS=found.axis, LANES=found.lanes,
        BLOCK_N=found.block_n,
    )  # fmt: skip
    # What a call does not have, and the stride along which neighbouring threads read: a launch makes it a constant.
    constants |= dict.fromkeys(() if full else ("weight_ptr", "lse_ptr", "entropy_ptr", "correct_ptr"))
    constants |= {name: 1 for name in kernel.arg_names if name.endswith("stride_n" if found.axis else "stride_lane")}
    types = {
        "target_ptr": f"*{dtype}" if probabilities else "*i64", "correct_ptr": "*i32" if probabilities else "*i1",
        **dict.fromkeys(("x_ptr", "dx_ptr", "weight_ptr"), f"*{dtype}"),
        **dict.fromkeys(("smoothing", "z_loss", "softcap", "logit_scale", "divisor"), "fp32"),
    }  # fmt: skip
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    constants = {name: value for name, value in constants.items() if name in signature}
    words = [direction, "row" if found.by_rows else "tile" if found.axis else "tile of positions", str(classes), dtype]
    words += [word for word, is_so in (("odd", peel), ("full", full), ("probabilities", probabilities)) if is_so]
    strides = tuple(name for name in kernel.arg_names if "_stride_" in name and name not in constants)
    aligned = ("x_stride_group",) if peel else ("classes", *strides)
    return CompileCase(" ".join(words), kernel, signature, constants, found.warps, num_stages=3, aligned=aligned)
