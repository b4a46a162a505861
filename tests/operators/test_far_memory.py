"""Offsets past 2^31 elements, of every operand and every result of the operators that walk rows.

An operand: one dimension at a time has a stride that carries its last place past 2^31, the others lie side by side. The
results are those of the same values side by side, bit for bit. A result is contiguous and as large as that: the last
programs of its grid run alone, on a tensor that ends with the values.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import pytest
import torch
from checking import same_bits
from conftest import DEVICE, KERNEL_BACKENDS
from far_memory import ending_with, far, last_programs, sparse
from layouts import guarded

import gptkern.functional as G
from gptkern import operators
from gptkern.backends import dispatch

if DEVICE != "cpu":
    pytest.skip("there is a GPU: kernels run on it, and its memory is there or not", allow_module_level=True)
if sys.platform != "linux":
    pytest.skip("memory that is reserved and not there needs Linux's MAP_NORESERVE", allow_module_level=True)


def normal(*shape, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def far_along(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Its last place along the dimension lies past 2^31. A multiple of 64 keeps rows as aligned as they were."""
    strides = list(guarded(tensor).stride())
    strides[dim] = -(-(2**31) // (tensor.shape[dim] - 1) // 64) * 64
    return far(tensor, *strides)


def narrow(operator: str, monkeypatch) -> None:
    """Triton's kernels for wide rows run from 17 columns on, in chunks of 16."""
    kernels = dispatch.load("triton", operator)
    if operator == "softmax":
        monkeypatch.setattr(kernels, "ONE_PASS_LIMIT", 16)
    else:
        monkeypatch.setattr(kernels, "REGISTER_WIDTH", {"forward": 16, "backward": 16})
        monkeypatch.setattr(kernels, "WIDE_BLOCK", 16)


def with_gradients(call: Callable, leaves: tuple[int, ...]) -> Callable:
    """call(*tensors) and its gradients of `leaves`; the last of the tensors come in as gradients of the results."""

    def both(*tensors):
        tensors = [tensor.detach() for tensor in tensors]
        for index in leaves:
            tensors[index].requires_grad_()
        outputs, incoming = call(*tensors)
        gradients = torch.autograd.grad(outputs, [tensors[index] for index in leaves], incoming)
        return [*(output.detach() for output in outputs), *gradients]

    return both


def layer_norm(x, residual, weight, bias, dy, ds):
    return G.layer_norm(x, (x.shape[-1],), weight, bias, residual=residual), (dy, ds)


def rms_norm(x, residual, weight, dy, ds):
    return G.rms_norm(x, (x.shape[-1],), weight, residual=residual), (dy, ds)


def cross_entropy(x, grad, target):
    return (G.cross_entropy(x, target, reduction="none", label_smoothing=0.1),), (grad,)


def softmax(x, mask, dy, dim):
    return (G.softmax(x, dim, mask=mask),), (dy,)


def int8_linear(x, weight, weight_scale, bias, dy, mode):
    return (G.int8_linear(x, weight, weight_scale, bias, activation="gelu", mode=mode),), (dy,)


def _norm_operands(width: int):
    rows = [normal(4, width) for _ in range(4)]
    return rows[0], rows[1], normal(width), normal(width), rows[2], rows[3]


def _rms_norm_operands(width: int):
    rows = [normal(4, width) for _ in range(4)]
    return rows[0], rows[1], normal(width), rows[2], rows[3]


def _int8_operands(rows: int, dtype: torch.dtype):
    weight = torch.randint(-128, 128, (20, 48), dtype=torch.int8)
    return normal(rows, 48, dtype=dtype), weight, torch.rand(20) + 0.01, normal(20), normal(rows, 20, dtype=dtype)


# name -> (operator, the call, its tensors, which of them are looked at and along which dimensions)
OPERANDS = {
    f"layer_norm {width}": (
        "layer_norm", with_gradients(layer_norm, (0, 1, 2, 3)), lambda width=width: _norm_operands(width),
        [(index, 0) for index in (0, 1, 4, 5)],
    )
    for width in (64, 61)
}  # fmt: skip
OPERANDS |= {
    f"rms_norm {width}": (
        "rms_norm", with_gradients(rms_norm, (0, 1, 2)), lambda width=width: _rms_norm_operands(width),
        [(index, 0) for index in (0, 1, 3, 4)],
    )
    for width in (64, 61)
}  # fmt: skip
OPERANDS |= {
    f"cross_entropy of {classes} classes": (
        "cross_entropy", with_gradients(functools.partial(cross_entropy, target=torch.tensor([0, 60, -100, 7])), (0,)),
        lambda classes=classes: (normal(4, classes), normal(4)), [(0, 0)],
    )
    for classes in (64, 61, 1100)
}  # fmt: skip
OPERANDS |= {
    f"swiglu {width}": (
        "nonlinearity", with_gradients(lambda gate, up, dy: ((G.swiglu(gate, up),), (dy,)), (0, 1)),
        lambda width=width: [normal(4, width) for _ in range(3)], [(index, 0) for index in range(3)],
    )
    for width in (64, 61)
}  # fmt: skip
OPERANDS |= {
    f"swiglu packed {width}": (
        "nonlinearity", with_gradients(lambda packed, dy: ((G.swiglu(packed),), (dy,)), (0,)),
        lambda width=width: (normal(4, 2 * width), normal(4, width)), [(0, 0), (1, 0)],
    )
    for width in (64, 61)
}  # fmt: skip
OPERANDS |= {
    f"gelu with a bias {width}": (
        "nonlinearity", with_gradients(lambda x, bias, dy: ((G.gelu(x, bias=bias),), (dy,)), (0, 1)),
        lambda width=width: (normal(4, width), normal(width), normal(4, width)), [(0, 0), (2, 0)],
    )
    for width in (64, 61)
}  # fmt: skip
OPERANDS |= {
    f"softmax over dimension {dim}": (
        "softmax", with_gradients(functools.partial(softmax, dim=dim), (0,)),
        lambda: [normal(4, 4, 48) for _ in range(3)],
        [(index, along) for index in range(3) for along in ((0, 1) if dim == 2 else (0, 1, 2))],
    )
    for dim in (0, 1, 2)
}  # fmt: skip
OPERANDS |= {
    f"rotary{', interleaved' * interleaved}": (
        "rotary",
        with_gradients(
            lambda x, cos, sin, dy, interleaved=interleaved: (
                (G.rotary_embedding(x, cos, sin, interleaved=interleaved),), (dy,)), (0,)
        ),
        lambda: (normal(4, 4, 4, 16), normal(4, 4, 6), normal(4, 4, 6), normal(4, 4, 4, 16)),
        [(index, along) for index in (0, 3) for along in (0, 1, 2)] + [(i, along) for i in (1, 2) for along in (0, 1)],
    )
    for interleaved in (False, True)
}  # fmt: skip
OPERANDS |= {
    f"int8_linear {mode}, {rows} rows of {dtype}": (
        "int8_linear", with_gradients(functools.partial(int8_linear, mode=mode), (0, 3)),
        lambda rows=rows, dtype=dtype: _int8_operands(rows, dtype),
        [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0), (4, 0), (4, 1)],
    )
    for mode, rows, dtype in [
        ("w8a8", 18, torch.bfloat16), ("w8a16", 5, torch.bfloat16), ("w8a16", 18, torch.bfloat16),
        ("w8a16", 5, torch.float32), ("w8a16", 18, torch.float32),
    ]
}  # fmt: skip
OPERANDS |= {
    f"quantize_int8 over dimension {dim}": (
        "quantize_int8", functools.partial(G.quantize_int8, dim=dim), lambda: [normal(5, 40)], [(0, 0), (0, 1)]
    )
    for dim in (0, 1)
}  # fmt: skip
OPERANDS["quantize_int8 of wide rows"] = ("quantize_int8", G.quantize_int8, lambda: [normal(2, 17_000)], [(0, 1)])


def check_operand(name: str, index: int, along: int) -> None:
    _, call, make, _ = OPERANDS[name]
    tensors = [guarded(tensor) for tensor in make()]
    expected = call(*tensors)
    tensors[index] = far_along(tensors[index], along)
    for place, (actual, wanted) in enumerate(zip(call(*tensors), expected)):
        same_bits(f"result {place}", actual, wanted)


# One variant of each operator; the others take their time.
SHARP = {
    "layer_norm 64", "rms_norm 61", "swiglu 61", "gelu with a bias 64",
    "cross_entropy of 61 classes", "softmax over dimension 1", "rotary",
    "quantize_int8 over dimension 1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "index", "along"),
    [
        pytest.param(name, *where, marks=() if name in SHARP else pytest.mark.deep)
        for name, (*_, places) in OPERANDS.items()
        for where in places
    ],
)
def test_an_operand_of_which_one_dimension_is_far_apart(kernel_backend, name, index, along):
    check_operand(name, index, along)


@pytest.mark.deep
@pytest.mark.parametrize(
    ("name", "index", "along"),
    [
        (name, *where)
        for name, (operator, *_, places) in OPERANDS.items()
        if operator in ("layer_norm", "rms_norm", "softmax")
        for where in places
    ],
)
def test_the_same_of_wide_rows(triton_backend, monkeypatch, name, index, along):
    narrow(OPERANDS[name][0], monkeypatch)
    check_operand(name, index, along)


# --- Results --------------------------------------------------------------------------------------------------------

PAST = 2**31


def rows_past(*shape: int) -> int:
    """The least number of rows of this shape that end past 2^31, and a few more."""
    return PAST // torch.Size(shape).numel() + 5


def last_rows(results, count: int = 2):
    return [result[-count:] for result in results]


def check_results(operator, backend, direction, last, near, *, programs=16):
    """What a launcher gives for tensors that end with `last` is, in its last rows, what it gives for these alone.

    Args:
        last, near: the records of `direction`, with the tensors as they end, and as they are.
    """
    launcher = getattr(dispatch.load(backend, operator), direction)
    with last_programs(programs):
        whole = launcher(*last)
    alone = launcher(*near)
    whole, alone = (found if isinstance(found, tuple) else (found,) for found in (whole, alone))
    for actual, expected in zip(whole, alone):
        if expected.numel():
            assert actual.numel() > expected.numel()
            if actual.shape[0] == expected.shape[0]:
                # Statistics are (2, rows).
                actual, expected = actual.mT, expected.mT
            torch.testing.assert_close(actual[-2:], expected[-2:], rtol=2e-2, atol=1e-3)


# The kernels that hold rows, aligned and not, and those that walk them.
variants = pytest.mark.parametrize(
    ("kernel_backend", "width", "wide"),
    [
        pytest.param(*backend.values, width, wide, marks=backend.marks)
        for backend, found in zip(
            KERNEL_BACKENDS,
            ([(64, False), (61, False), (48, True)], [(width, False) for width in (64, 61, 6201, 12_296, 32_776)]),
        )
        for width, wide in found
    ],
    indirect=["kernel_backend"],
)


@pytest.fixture
def every_row_a_program(kernel_backend, monkeypatch):
    """Of a backward: else few programs would walk all rows."""
    from gptkern.backends.triton import norms

    if kernel_backend == "triton":
        monkeypatch.setattr(norms, "programs_of", lambda device, num_warps: 2**31)
    else:
        for operator in ("layer_norm", "rms_norm"):
            monkeypatch.setattr(dispatch.load("cuda", operator), "most_partials", lambda width, device: 2**31)


@pytest.mark.deep
@variants
def test_results_of_layer_norm(kernel_backend, monkeypatch, every_row_a_program, width, wide):
    if wide:
        narrow("layer_norm", monkeypatch)
    contract = operators.contract("layer_norm")
    x, residual, dy, ds = (normal(3, width) for _ in range(4))
    weight, bias = normal(width), normal(width)
    whole = functools.partial(ending_with, rows=rows_past(width))
    near = contract.Call(x, residual, weight, bias, 1e-5)
    last = near._replace(input=whole(x), residual=whole(residual))
    check_results("layer_norm", kernel_backend, "forward", [last], [near])

    _, s, statistics = dispatch.load(kernel_backend, "layer_norm").forward(near)
    near = contract.Gradient(dy, ds, statistics, True, False, False), contract.Call(s, None, weight, bias, 1e-5)
    far_statistics = sparse(2 * rows_past(width), statistics.dtype).view(2, -1)
    far_statistics[:, -statistics.shape[1] :] = statistics
    far_gradient = near[0]._replace(grad_output=whole(dy), grad_summed=whole(ds), statistics=far_statistics)
    last = far_gradient, near[1]._replace(input=whole(s))
    check_results("layer_norm", kernel_backend, "backward", last, near)


@pytest.mark.deep
@variants
def test_results_of_rms_norm(kernel_backend, monkeypatch, every_row_a_program, width, wide):
    if wide:
        narrow("rms_norm", monkeypatch)
    contract = operators.contract("rms_norm")
    (x, r, dy, ds), weight = (normal(3, width) for _ in range(4)), normal(width)
    whole = functools.partial(ending_with, rows=rows_past(width))
    near = contract.Call(x, r, weight, 1e-5)
    last = near._replace(input=whole(x), residual=whole(r))
    check_results("rms_norm", kernel_backend, "forward", [last], [near])

    _, s, rstd = dispatch.load(kernel_backend, "rms_norm").forward(near)
    near = contract.Gradient(dy, ds, rstd, True, False), contract.Call(s, None, weight, 1e-5)
    far_gradient = near[0]._replace(grad_output=whole(dy), grad_summed=whole(ds), rstd=whole(rstd))
    check_results("rms_norm", kernel_backend, "backward", (far_gradient, near[1]._replace(input=whole(s))), near)


@pytest.mark.deep
@pytest.mark.parametrize("kind", ["plain", "pair", "packed", "bias"])
@pytest.mark.parametrize("width", [64, 61])
def test_results_of_nonlinearity(kernel_backend, width, kind):
    contract = operators.contract("nonlinearity")
    x, up, dy, bias = (*(normal(3, width) for _ in range(3)), normal(width))
    whole = functools.partial(ending_with, rows=rows_past(width))
    if kind == "packed":
        x = normal(3, 2 * width)
    up, bias = up if kind == "pair" else None, bias if kind == "bias" else None
    near = contract.Call(x, up, bias, "gelu", kind == "packed")
    last = near._replace(input=whole(x), up=None if up is None else whole(up))
    check_results("nonlinearity", kernel_backend, "forward", [last], [near])
    if kind != "bias":
        gradient = contract.Gradient(dy, True, kind == "pair", None)
        last = gradient._replace(grad_output=whole(dy)), last
        check_results("nonlinearity", kernel_backend, "backward", last, (gradient, near))


# (shape of what is outside of the values, shape of the values, dimension): the first one is made as long as it takes.
SOFTMAX = [((4,), (64,), 1), ((4,), (61,), 1), ((2,), (3, 40), 2), ((2,), (5, 16), 1), ((2,), (40, 7), 1)]


@pytest.mark.deep
@pytest.mark.parametrize("limit", [None, 16])
@pytest.mark.parametrize(("last", "inner", "dim"), SOFTMAX, ids=str)
def test_results_of_softmax(kernel_backend, monkeypatch, last, inner, dim, limit):
    if limit is not None:
        narrow("softmax", monkeypatch)
    contract = operators.contract("softmax")
    x, mask, dy = (normal(*last, *inner) for _ in range(3))
    whole = functools.partial(ending_with, rows=rows_past(*inner))
    near = contract.Call(x, dim, None, 1.0, mask > -1, False)
    last_mask = ending_with(near.mask.to(torch.uint8), rows_past(*inner)).view(torch.bool)
    check_results("softmax", kernel_backend, "forward", [near._replace(input=whole(x), mask=last_mask)], [near])

    y = dispatch.load(kernel_backend, "softmax").forward(near)
    call = contract.Call(None, dim, None, 1.0, None, False)
    gradient = contract.Gradient(dy, y, torch.bfloat16)
    last = gradient._replace(grad_output=whole(dy), output=whole(y)), call
    check_results("softmax", kernel_backend, "backward", last, (gradient, call))


@pytest.mark.deep
def test_results_of_softmax_over_the_first_dimension(kernel_backend):
    """Its elements lie as far apart as there are columns."""
    contract = operators.contract("softmax")
    columns = rows_past(4) // 16 * 16
    x, dy = (far(normal(5, 16), columns) for _ in range(2))
    whole = sparse_ending_with_columns
    near = contract.Call(x.contiguous(), 0, None, 1.0, None, False)
    kernels = dispatch.load(kernel_backend, "softmax")
    expected = kernels.forward(near)
    with last_programs(4):
        y = kernels.forward(near._replace(input=whole(near.input, columns)))
    same_bits("forward", y[:, -16:], expected)
    call, dy = contract.Call(None, 0, None, 1.0, None, False), dy.contiguous()
    with last_programs(4):
        gradient = contract.Gradient(whole(dy, columns), whole(expected, columns), torch.bfloat16)
        dx = kernels.backward(gradient, call)
    same_bits("gradient", dx[:, -16:], kernels.backward(contract.Gradient(dy, expected, torch.bfloat16), call))


def sparse_ending_with_columns(last: torch.Tensor, columns: int) -> torch.Tensor:
    """A contiguous tensor of so many columns, zeros but for the last ones."""
    whole = sparse(last.shape[0] * columns, last.dtype).view(last.shape[0], columns)
    whole[:, -last.shape[1] :] = last
    return whole


@pytest.mark.deep
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("outer", ["batch", "heads"])
def test_results_of_rotary(kernel_backend, outer, interleaved):
    contract = operators.contract("rotary")
    cos, sin = normal(2, 6, 3)
    x, dy = normal(2, 2, 3, 6, 16)
    if outer == "batch":
        whole = functools.partial(ending_with, rows=rows_past(3, 6, 16))
    else:
        x, dy = x[:, 0], dy[:, 0]
        whole = lambda last: ending_with(last, rows_past(6, 16))[None]  # noqa: E731
    near = contract.Call(x if outer == "batch" else x[None], cos, sin, 6, interleaved)
    kernels = dispatch.load(kernel_backend, "rotary")
    for direction, tensor in (("forward", x), ("backward", dy)):
        with last_programs(8):
            if direction == "forward":
                actual = kernels.forward(near._replace(input=whole(tensor)))
            else:
                actual = kernels.backward(contract.Gradient(whole(tensor)), near._replace(input=None))
        alone = near._replace(input=tensor.view(near.input.shape))
        expected = kernels.forward(alone) if direction == "forward" else kernels.backward(
            contract.Gradient(alone.input), near._replace(input=None)
        )  # fmt: skip
        same_bits(direction, actual.flatten(0, -3)[-2:], expected.flatten(0, -3)[-2:])


@pytest.mark.deep
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("mode", ["w8a8", "w8a16"])
def test_results_of_int8_linear(kernel_backend, mode, activation):
    contract = operators.contract("int8_linear")
    K, N = 72, 80
    x, dy, bias = normal(4, K), normal(4, N), normal(N)
    weight, weight_scale = torch.randint(-128, 128, (N, K), dtype=torch.int8), torch.rand(N) + 0.01
    whole = functools.partial(ending_with, rows=rows_past(K))
    near = contract.Call(x, weight, weight_scale, bias, activation, mode)
    check_results("int8_linear", kernel_backend, "forward", [near._replace(input=whole(x))], [near])
    if activation is None:
        near = near._replace(input=None, bias=None)
    gradient = contract.Gradient(dy, True, False)
    last = gradient._replace(grad_output=whole(dy)), near._replace(input=None if activation is None else whole(x))
    check_results("int8_linear", kernel_backend, "backward", last, (gradient, near))


@pytest.mark.deep
@pytest.mark.parametrize("width", [64, 61, 17_000])
def test_results_of_quantize_int8(kernel_backend, width):
    contract = operators.contract("quantize_int8")
    x = normal(3, width)
    last, near = (contract.Call(tensor, 1) for tensor in (ending_with(x, rows_past(width)), x))
    check_results("quantize_int8", kernel_backend, "forward", [last], [near])


@pytest.mark.deep
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 40)])
def test_results_of_quantize_int8_over_another_dimension(cuda_backend, shape):
    contract = operators.contract("quantize_int8")
    x = normal(*shape)
    kernels = dispatch.load("cuda", "quantize_int8")
    q, scale = kernels.forward(contract.Call(x, len(shape) - 2))
    with last_programs(4):
        if len(shape) == 2:
            columns = rows_past(4) // 16 * 16
            far_q, far_scale = kernels.forward(contract.Call(sparse_ending_with_columns(x, columns), 0))
            far_q = far_q[:, -16:]
        else:
            far_q, far_scale = kernels.forward(contract.Call(ending_with(x, rows_past(*shape[1:])), 1))
            far_q = far_q[-2:]
    same_bits("q", far_q, q)
    same_bits("scale", far_scale.flatten()[-16:], scale.flatten()[-16:])
