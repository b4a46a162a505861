"""Operators where tensors have no values or sizes are tensors: torch.jit.trace, make_fx, vmap, fake tensors and export;
and what kernels are kept from: torch.func, with a compiler too, and tangents."""

from __future__ import annotations

import io
import warnings

import model_zoo
import pytest
import torch
from sharp import deep
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import gptkern
import gptkern.functional as F
from gptkern.backends import tracing

WEIGHT, BIAS = torch.linspace(0.5, 2, 8), torch.linspace(-1, 1, 8)
CODES, SCALE = F.quantize_int8(torch.linspace(-3, 5, 48).sin().view(6, 8))
LONG_CODES, LONG_SCALE = F.quantize_int8(torch.linspace(-30, 50, 3 * 1100).sin().view(3, 1100))


def angles(x, width):
    """cos and sin (length, width) for x (…, length, head_dim)."""
    positions = torch.arange(x.shape[-2])[:, None] * torch.linspace(0.1, 1, width)
    return positions.cos(), positions.sin()


def int8(**options):
    return lambda x: F.int8_linear(x, CODES, SCALE, BIAS[:6], **options)


# name: the call of one tensor, the shape that is traced, another one.
CALLS = {
    "softmax": (lambda x: F.softmax(x, -1), (3, 5), (4, 7)),
    "softmax causal": (lambda x: F.softmax(x, -1, is_causal=True), (3, 5, 5), (2, 7, 7)),
    "softmax empty rows": (lambda x: F.softmax(x, -1, mask=x > 0.8, scale=0.5), (3, 5, 5), (4, 7, 7)),
    "softmax additive": (lambda x: F.softmax(x, -1, mask=x.masked_fill(x < 0.8, -torch.inf)), (3, 5, 5), (4, 6, 7)),
    "softmax of -inf": (lambda x: F.softmax(x.masked_fill(x < 0.8, -torch.inf), 1, mask=x[:1] > 0), (3, 5), (4, 7)),
    "softmax scale of a size": (lambda x: F.softmax(x, -1, scale=x.shape[-1] ** -0.5, is_causal=True), (5, 5), (7, 7)),
    "cross_entropy": (lambda x: F.cross_entropy(x, x.argmax(1), label_smoothing=0.1), (3, 5), (4, 7)),
    "cross_entropy extended": (
        lambda x: F.cross_entropy(x, x.argmin(1), ignore_index=1, softcap=3.0, z_loss=0.1), (3, 5, 2), (4, 7, 3),
    ),
    "cross_entropy probabilities": (lambda x: F.cross_entropy(x, x.softmax(1), z_loss=0.1), (3, 5), (4, 7)),
    "cross_entropy stats": (
        lambda x: sum(F.cross_entropy(x, x.argmax(1), logit_scale=0.5, return_stats=True)[1]), (3, 5), (4, 7),
    ),
    "layer_norm": (lambda x: F.layer_norm(x, (8,), WEIGHT, BIAS), (3, 8), (2, 5, 8)),
    "layer_norm shape": (lambda x: F.layer_norm(x, x.shape[-2:]), (3, 4, 8), (5, 2, 9)),
    "layer_norm residual": (lambda x: F.layer_norm(x, x.shape[-1:], residual=x * 2)[0], (3, 8), (5, 9)),
    "rms_norm": (lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6), (3, 8), (5, 9)),
    "nonlinearity gelu": (lambda x: F.gelu(x, approximate="tanh", bias=BIAS), (3, 8), (2, 5, 8)),
    "silu": (lambda x: F.silu(x), (3, 8), (5, 9)),
    "nonlinearity swiglu": (lambda x: F.swiglu(x, x + 1), (3, 8), (2, 5, 9)),
    "geglu packed": (lambda x: F.geglu(x, None, "tanh"), (3, 8), (2, 5, 12)),
    "linear": (lambda x: F.linear(x, torch.ones(4, 8), BIAS[:4], activation="gelu"), (3, 8), (2, 5, 8)),
    "rotary": (lambda x: F.rotary_embedding(x, *angles(x, 4)), (2, 3, 4, 8), (1, 2, 7, 8)),
    "rotary of any width": (lambda x: F.rotary_embedding(x, *angles(x, x.shape[-1] // 2)), (2, 3, 4, 8), (1, 2, 7, 12)),
    "rotary_dim of a size": (
        lambda x: F.rotary_embedding(x, *angles(x, 6), rotary_dim=x.shape[-1] - 4, interleaved=True),
        (2, 3, 4, 10), (1, 2, 7, 10),
    ),
    "rotary heads inside": (
        lambda x: F.rotary_embedding(x.transpose(1, 2), *angles(x.transpose(1, 2), 4)), (2, 3, 4, 8), (1, 5, 2, 8),
    ),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x + 1, is_causal=True), (2, 3, 4, 8), (1, 2, 7, 8)),
    "attention grouped": (
        lambda x: F.scaled_dot_product_attention(x, x[:, :2], x[:, 2:], enable_gqa=True), (2, 4, 4, 8), (1, 4, 7, 8),
    ),
    "quantize_int8": (lambda x: F.quantize_int8(x, 0)[1] * F.quantize_int8(x)[0], (3, 8), (5, 9)),
    "int8 w8a16": (int8(mode="w8a16"), (3, 2, 8), (2, 5, 8)),
    "int8 w8a8": (int8(mode="w8a8", activation="gelu"), (3, 8), (25, 8)),
    "int8 auto": (int8(activation="gelu_tanh"), (3, 8), (25, 8)),
    "int8 many terms": (lambda x: F.int8_linear(x, LONG_CODES, LONG_SCALE, mode="w8a8"), (2, 1100), (5, 1100)),
}  # fmt: skip
every_call = pytest.mark.parametrize("name", CALLS)
# Of a head_dim that varies a program would keep the condition that it is even.
BY_SYMBOLS = [name for name in CALLS if name != "rotary of any width"]


@pytest.fixture(autouse=True)
def _automatic_choice(automatic_choice):
    pass


def traced(function, *inputs):
    """The traced function, after a look that gptkern kept no size or value that the trace would not know again."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        graph = torch.jit.trace(function, inputs, check_trace=False)
    tracers = [w for w in caught if issubclass(w.category, torch.jit.TracerWarning) and "gptkern/" in w.filename]
    # The reference GPT compares lengths with its context.
    tracers = [w for w in tracers if "gptkern/models/" not in w.filename]
    assert [str(w.message) for w in tracers] == []
    torch.jit.save(graph, io.BytesIO())
    return graph


@every_call
def test_a_trace_is_for_other_sizes(name):
    function, shape, other = CALLS[name]
    inputs = [torch.randn(size, requires_grad=True) for size in (shape, other)]
    graph = traced(function, inputs[0])
    # PyTorch's own check: the same graph, traced again under no_grad.
    torch.jit.trace(function, inputs[0])
    with torch.no_grad():
        plain = traced(function, inputs[0])
    for input in inputs:
        expected = function(input)
        torch.testing.assert_close(plain(input), expected)
        actual = graph(input)
        torch.testing.assert_close(actual, expected)
        if expected.requires_grad:
            gradient = torch.randn_like(expected)
            (actual,), (expected,) = (torch.autograd.grad(y, input, gradient) for y in (actual, expected))
            torch.testing.assert_close(actual, expected)


@every_call
def test_nothing_is_looked_at_under_vmap(name):
    function, shape, _ = CALLS[name]
    batch = torch.randn(shape[-1] + 1, *shape, requires_grad=True)
    expected = torch.stack([function(x) for x in batch])
    # The batch first, and last.
    for actual in (torch.vmap(function)(batch), torch.vmap(function, in_dims=-1)(batch.movedim(0, -1))):
        torch.testing.assert_close(actual, expected)
        if expected.requires_grad:
            gradient = torch.randn_like(expected)
            ours, wanted = (torch.autograd.grad(y, batch, gradient, retain_graph=True) for y in (actual, expected))
            torch.testing.assert_close(ours, wanted)


@every_call
def test_nothing_is_looked_at_of_what_has_no_values(name):
    function, shape, _ = CALLS[name]
    expected = function(torch.randn(shape))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = mode.from_tensor(torch.randn(shape))
    # Outside of its mode a fake tensor has no values either.
    results = [function(fake)]
    with mode:
        results.append(function(fake))
    assert {(tuple(y.shape), y.dtype) for y in results} == {(tuple(expected.shape), expected.dtype)}


@pytest.mark.parametrize(
    ("name", "pre_dispatch"),
    [*((name, False) for name in CALLS), *((name, True) for name in CALLS if name.startswith("softmax"))],
)
def test_nothing_is_looked_at_by_make_fx(name, pre_dispatch):
    function, shape, _ = CALLS[name]
    graph = make_fx(function, pre_dispatch=pre_dispatch)(torch.randn(shape))
    input = torch.randn(shape)
    torch.testing.assert_close(graph(input), function(input))


@pytest.mark.deep
@pytest.mark.parametrize("name", BY_SYMBOLS)
def test_a_graph_by_symbols_is_for_other_sizes(name):
    function, shape, other = CALLS[name]
    graph = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.randn(shape))
    inputs = [torch.randn(shape)]
    if len(shape) == len(other):
        inputs.append(torch.randn(other))
    for input in inputs:
        torch.testing.assert_close(graph(input), function(input))


@pytest.mark.deep
@pytest.mark.parametrize("name", BY_SYMBOLS)
def test_an_exported_program_is_for_other_sizes(name):
    class Module(torch.nn.Module):
        def forward(self, x):
            return CALLS[name][0](x)

    function, shape, other = CALLS[name]
    sizes = {}
    # A size of 1 is not one of those that a program takes.
    if len(shape) == len(other):
        sizes = {i: torch.export.Dim.DYNAMIC for i, (a, b) in enumerate(zip(shape, other)) if a != b != 1}
    program = torch.export.export(Module(), (torch.randn(shape),), dynamic_shapes=(sizes,)).module()
    inputs = [torch.randn(shape)]
    if len(shape) == len(other) and 1 not in other:
        inputs.append(torch.randn(other))
    for input in inputs:
        torch.testing.assert_close(program(input), function(input))


def test_what_has_values():
    plain = torch.randn(3)
    assert tracing.has_values(plain)
    assert not tracing.has_values(plain.as_subclass(type("Tagged", (torch.Tensor,), {})))
    seen = []
    torch.vmap(lambda x: seen.append(tracing.has_values(x)) or x)(plain)
    torch.jit.trace(lambda x: seen.append(tracing.has_values(x)) or x, plain, check_trace=False)
    for pre_dispatch in (False, True):
        make_fx(lambda x: seen.append(tracing.has_values(x)) or x, pre_dispatch=pre_dispatch)(plain)
    assert seen == [False] * 4


# --- Kernels --------------------------------------------------------------------------------------------------------

KERNEL_CALLS = (
    "softmax causal",
    "layer_norm",
    "rms_norm",
    "nonlinearity gelu",
    "nonlinearity swiglu",
    "rotary",
    "attention",
    "int8 w8a8",
    "int8 w8a16",
)


@pytest.mark.parametrize("name", KERNEL_CALLS)
def test_kernels_refuse_what_they_do_not_see(kernel_backend, name):
    of_one, shape, _ = CALLS[name]
    # What the CUDA kernels of every operator take.
    x = torch.randn(shape, dtype=torch.float16)

    def function(x):
        if "norm" in name:
            return getattr(F, name)(x, (8,))
        return of_one(x)

    operator = name.split()[0]
    asked = f"backend '{kernel_backend}' was asked for and cannot run"
    for call in (torch.func.grad(lambda x: function(x).sum()), torch.func.jacfwd(function)):
        with pytest.raises(gptkern.BackendError, match=f"{asked} {operator}.*torch.func"):
            call(x)
    with pytest.raises(gptkern.BackendError, match=f"{asked} {operator}.*torch.func"):
        torch.vmap(function)(x[None])
    with forward_ad.dual_level(), pytest.raises(gptkern.BackendError, match=f"{asked} {operator}.*carries a tangent"):
        function(forward_ad.make_dual(x, x))
    with pytest.raises(gptkern.BackendError, match=f"{asked}.*torch.jit.trace"):
        torch.jit.trace(function, x)
    # A level in which a call has no tangent is none of its affair.
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.ones(1), torch.ones(1))
        with_level = function(x)
    torch.testing.assert_close(with_level, function(x))


def test_kernels_refuse_torch_func_that_is_compiled(triton_backend):
    """Their gradient there was 0, without a word."""
    function, shape, _ = CALLS["layer_norm"]
    torch._dynamo.reset()
    compiled = torch.compile(torch.func.grad(lambda x: function(x).sum()), backend="eager")
    with pytest.raises(Exception, match=r"torch.func|BackendError|Observed exception"):
        compiled(torch.randn(shape))


@pytest.mark.parametrize("name", ["softmax causal", "int8 w8a8", "int8 w8a16"])
def test_torch_func_that_is_compiled(name):
    function, shape, _ = CALLS[name]
    x, gradient = torch.randn(shape), torch.randn(function(torch.randn(shape)).shape)
    torch._dynamo.reset()

    def of(x):
        return torch.func.grad(lambda x: (function(x) * gradient).sum())(x)

    expected = x.clone().requires_grad_()
    function(expected).backward(gradient)
    torch.testing.assert_close(torch.compile(of, backend="eager", fullgraph=True)(x), expected.grad)


def test_a_trace_of_another_device_is_pytorchs():
    """Where kernels would be chosen, as on a GPU: a meta tensor stands in for the GPU's."""
    x = torch.randn(3, 8, device="meta")
    choices = []

    def call(x):
        with gptkern.backends.dispatch.telling(choices.append):
            return F.layer_norm(x, x.shape[-1:])

    with pytest.warns(UserWarning, match="torch.jit.trace records it"):
        graph = torch.jit.trace(call, x, check_trace=False)
    assert {choice.backend for choice in choices} == {"torch"}
    assert "aten::layer_norm" in str(graph.graph)


# --- Models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", model_zoo.parameters(fast=("gpt2", "llama", "encoder")))
@pytest.mark.parametrize("is_quantized", [*deep(False), True])
def test_a_traced_model_is_for_other_sizes(case, is_quantized):
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return case.run(self.model, ids)[0]

    torch.manual_seed(1)
    batches = [torch.randint(3, model_zoo.VOCABULARY, size) for size in ((2, 8), (1, 5), (3, 11))]
    model = Logits(case.build(0.0).eval())
    with torch.no_grad():
        stock = torch.jit.trace(model, batches[0], check_trace=False)
        # Some models' own code keeps a size.
        batches = [ids for ids in batches if ids is batches[0] or _agree(stock, model, ids)]
        gptkern.swap(model)
        if is_quantized:
            gptkern.quantize(model)
        graph = traced(model, batches[0])
        for ids in batches:
            torch.testing.assert_close(graph(ids), model(ids), rtol=1e-4, atol=1e-5)


def _agree(graph, model, ids) -> bool:
    try:
        return torch.allclose(graph(ids), model(ids), atol=1e-5)
    except RuntimeError:
        return False
