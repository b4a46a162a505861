"""Which cells of CUDA C++ are predicted, what the emulator counts of each, and what tells a kernel's branches apart.

The emulator runs each cell made small: it says which instances the launchers start, with how many threads and bytes of
shared memory, and how much they multiply and move.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(ROOT / "tests")]

from sass import WARP, Marks  # noqa: E402

ITEMSIZES = {"bfloat16": 2, "float32": 4}
# Of averages in 8 bits: elements that share two scales of float32, which are read and written.
_AVERAGES_BLOCK, _SCALES_BYTES = 256, 16

# --- Marks of branches ------------------------------------------------------------------------------------------------

# What 16 bits are widened and rounded by is told apart at run time: of a bfloat16 cell not float16's.
_NO_FLOAT16 = (r"^HADD2\.F32 ", r"^F2FP\.(F16\.F32\.)?PACK_AB")
# csrc/device/activation.cuh: √½ of erf's argument, and the cubic's factor. SiLU has neither.
_ERF, _CUBIC = r"0\.7071067", r"0\.0447149"
# csrc/device/philox.cuh, the first multiplier; columns 13 and 14 of adamw's table, which rounding in a run reads not;
# the table; with averages in 8 bits the scales, and four codes a thread.
_TABLE, _SCALES, _CODES = r"^LDG\.E\.\S*CONSTANT", r"^LD\.E", 4
_PHILOX, _ANYWHERE = r"0xd2511f53|-0x2daee0ad", r"\[.*\+0x(68|70)\]"
# csrc/cross_entropy/cross_entropy.cuh: a factor of tanh's series. Weights of classes, which label smoothing reads.
_TANH, _WEIGHTS = r"-0\.0539682", r"^LDG\.E\.\S*CONSTANT"
# Weights and biases of norms: each vector reads them.
_PARAMETERS = Marks((r"^LDG\.E\.128\.CONSTANT",))
_ACTIVATIONS = {
    "silu": Marks((), (_ERF, _CUBIC)),
    "gelu": Marks((_ERF,), (_CUBIC,)),
    "gelu_tanh": Marks((_CUBIC,), (_ERF,)),
}


class Cell(NamedTuple):
    """small: the sizes that the emulator runs; smaller: a second run, where products are no multiple of the first's.

    Args:
        said: of what the sizes do not say, for the label. options: of gptkern.optim.AdamW, which then makes the call.
        marks: of the instructions that the call executes.
    """

    operator: str
    direction: str
    sizes: Any
    small: Any
    smaller: Any = None
    dtype: str = "bfloat16"
    said: str = ""
    options: dict[str, Any] | None = None
    marks: Marks = Marks()

    @property
    def label(self) -> str:
        words = [problem(self.operator).label(self.sizes)]
        for name in ("kind", "mode"):
            words += [getattr(self.sizes, name)] if hasattr(self.sizes, name) else []
        return " ".join([self.direction, *words, *([self.said] if self.said else [])])

    @property
    def least(self) -> float:
        """Bytes that the cell has to move."""
        itemsize = ITEMSIZES[self.dtype]
        if self.options is None:
            return problem(self.operator).bytes(self.sizes, itemsize, self.direction)
        coded = self.options.get("state_dtype") == "int8"
        # The gradient is read, the parameter and both averages are read and written (adamw/contract.py has the table).
        each = 3 * itemsize + 4 * (1 if coded else itemsize) + coded * _SCALES_BYTES / _AVERAGES_BLOCK
        return each * self.sizes.rows * self.sizes.width


def problem(operator: str):
    from gptkern import operators

    return operators.problem(operator)


def cells() -> Iterator[Cell]:
    """One for each instance of a kernel that the bench's cells in bfloat16 start, of each direction."""
    from gptkern.backends.problem import BACKWARD, FORWARD

    def of(operator, direction, dtype="bfloat16", **wanted):
        for timed in problem(operator).cells("cuda", "full"):
            sizes = timed.sizes
            if (timed.direction, timed.dtype) == (direction, dtype) and all(
                getattr(sizes, name) == value for name, value in wanted.items()
            ):
                return sizes
        raise LookupError(f"no cell of {operator} {direction} has {wanted}")

    both = FORWARD, BACKWARD
    for direction in both:
        for head_dim in (64, 80, 96, 128):
            sizes = of("attention", direction, head_dim=head_dim, length_q=4096, kind="causal")
            small = [sizes._replace(batch=1, heads=1, kv_heads=1, length_q=n, length_k=n) for n in (512, 256)]
            yield Cell("attention", direction, sizes, *small)
    for operator, widths in (("layer_norm", (4096, 768, 12288)), ("rms_norm", (4096, 128, 16384))):
        for direction in both:
            for width in widths:
                sizes = of(operator, direction, width=width)
                yield Cell(operator, direction, sizes, sizes._replace(rows=64), marks=_PARAMETERS)
        sizes = of(operator, FORWARD, width=4096, residual=True)
        small = sizes._replace(rows=64)
        yield Cell(operator, FORWARD, sizes, small, said="with a residual", marks=_PARAMETERS)
    for direction in both:
        for width in (4096, 50257):
            sizes = of("softmax", direction, shape=(16384, width))
            yield Cell("softmax", direction, sizes, sizes._replace(shape=(64 if width == 4096 else 8, width)))
    for direction in both:
        sizes = of("rotary", direction, length=4096, interleaved=False)
        yield Cell("rotary", direction, sizes, sizes._replace(batch=1, length=32))
    for mode, rows, small in (("w8a16", 1, 1), ("w8a16", 4096, 256), ("w8a8", 4096, 256)):
        sizes = of("int8_linear", FORWARD, mode=mode, rows=rows, in_features=4096, out_features=16384)
        columns = dict(in_features=256, out_features=256) if rows > 1 else dict(out_features=64)
        yield Cell("int8_linear", FORWARD, sizes, sizes._replace(rows=small, **columns))
    for direction in both:
        plain = Marks((), _NO_FLOAT16)
        softcap = Marks((_TANH,), (*_NO_FLOAT16, _WEIGHTS))
        for classes, softcapped in ((50257, False), (128256, False), (50257, True)):
            sizes = of("cross_entropy", direction, classes=classes, softcap=30.0 if softcapped else None)
            # One row, as the second is ignored; of as many threads as a wide row has where there are many.
            small = sizes._replace(rows=1, classes=8000 + classes % 8)
            said, marks = ("with softcap and z-loss", softcap) if softcapped else ("", plain)
            yield Cell("cross_entropy", direction, sizes, small, said=said, marks=marks)
    swiglu = of("nonlinearity", FORWARD, function="silu", gate="pair")
    gelu = of("nonlinearity", FORWARD, function="gelu", gate=None)
    for said, sizes in (
        ("swiglu", swiglu), ("geglu, tanh", swiglu._replace(function="gelu_tanh")),
        ("geglu", swiglu._replace(function="gelu")), ("silu", gelu._replace(function="silu")), ("gelu", gelu),
        ("gelu, tanh", gelu._replace(function="gelu_tanh")),
        ("gelu, tanh, with a bias", gelu._replace(function="gelu_tanh", bias=True)),
    ):  # fmt: skip
        for direction in both:
            # Of columns that whole blocks share.
            small = sizes._replace(rows=64, width=4096)
            marks = _ACTIVATIONS[sizes.function]
            yield Cell("nonlinearity", direction, sizes, small, said=said, marks=marks)
    at_random = dict(stochastic_rounding=True)
    for dtype, said, options in (
        ("float32", "float32", {}), ("bfloat16", "bfloat16", {}), ("bfloat16", "bfloat16, at random", at_random),
        ("float32", "float32, 8 bits", dict(state_dtype="int8")),
        ("bfloat16", "bfloat16, at random, 8 bits", at_random | dict(state_dtype="int8")),
    ):  # fmt: skip
        sizes = of("adamw", FORWARD, dtype, width=768)
        marks = Marks((_PHILOX,), (_ANYWHERE,)) if "at random" in said else Marks((), (_PHILOX,))
        if dtype == "bfloat16":
            marks = marks._replace(avoided=marks.avoided + _NO_FLOAT16)
        marks = marks._replace(same=(_TABLE,))
        if "state_dtype" in options:
            marks = marks._replace(same=(_TABLE, _SCALES), least=_CODES)
        small = sizes._replace(rows=64)
        yield Cell("adamw", FORWARD, sizes, small, dtype=dtype, said=said, options=options, marks=marks)


# --- What the emulator counts -----------------------------------------------------------------------------------------


class Counted(NamedTuple):
    """What a kernel did in a small cell: bytes of all tensors, and of the large ones.

    Args:
        large_once: of those that are loaded. warps: of all blocks. loads, stores: requests of all of them.
    """

    threads: int
    shared: int
    products: int
    loaded: int
    stored: int
    large_loaded: int
    large_stored: int
    large_once: int
    warps: int
    loads: int
    stores: int


def counted(cell: Cell, sizes: Any) -> dict[str, Counted]:
    """Kernel -> what it did, of the emulator's run of one call of the cell with these sizes."""
    import count_cuda
    from disassemble_cuda import plain

    import gptkern

    calls: list = []
    with gptkern.backend("cuda"):
        large = (_update if cell.options is not None else _twin)(cell, sizes, count_cuda, calls)
    found: dict[str, Counted] = {}
    for _, kernels, touched in calls:
        for name, counts in kernels.items():
            pairs = [(counts["regions"].get(each), tensor) for each, tensor in touched.items()]
            pairs = [(region, tensor) for region, tensor in pairs if region and tensor.numel() >= large]
            regions = [region for region, _ in pairs]
            found[plain(name)] = Counted(
                counts["threads"],
                counts["shared_bytes"],
                sum(counts[kind] * each for kind, each in count_cuda.PRODUCTS.items()),
                counts["load"]["bytes"] + counts["async"]["bytes"],
                counts["store"]["bytes"],
                sum(region["loaded"] for region in regions),
                sum(region["stored"] for region in regions),
                sum(tensor.nbytes for region, tensor in pairs if region["loaded"]),
                counts["blocks"] * counts["threads"] // WARP,
                counts["load"]["requests"],
                counts["store"]["requests"],
            )
    return found


def _twin(cell: Cell, sizes: Any, count_cuda, calls: list) -> int:
    """A call of the operator's twin; -> elements of its largest tensor."""
    import torch

    from gptkern import operators
    from gptkern.backends.problem import BACKWARD

    dtype = getattr(torch, cell.dtype)
    made = problem(cell.operator).inputs(sizes, dtype, torch.Generator().manual_seed(0))
    tensors = {name: value.detach().requires_grad_(cell.direction == BACKWARD) for name, value in made.tensors.items()}

    def call():
        result = operators.contract(cell.operator).TWIN(**tensors, **made.constants, **made.options)
        return result[0] if isinstance(result, tuple) else result

    if cell.direction == BACKWARD:
        result = call()
        with count_cuda._counting(calls):
            result.backward(torch.randn_like(result))
    else:
        with count_cuda._counting(calls):
            call()
    return max(tensor.numel() for tensor in made.arguments)


def _update(cell: Cell, sizes: Any, count_cuda, calls: list) -> int:
    """A step of gptkern.optim.AdamW; -> elements of the parameter."""
    import torch

    import gptkern.optim

    param = torch.nn.Parameter(torch.randn(sizes.rows, sizes.width, generator=torch.Generator().manual_seed(0)))
    param.data = param.data.to(getattr(torch, cell.dtype))
    param.grad = torch.ones_like(param)
    optimizer = gptkern.optim.AdamW([param], **cell.options)
    with count_cuda._counting(calls):
        optimizer.step()
    return param.numel()
