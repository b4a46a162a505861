"""gelu, silu, swiglu, geglu, linear: strides, frozen inputs, PyTorch's errors, registered ops, compile, modules."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from checking import Watched, assert_compiles, raised_by, same_bits
from layouts import LAYOUTS, guarded, of_own_strides
from nonlinearity_calls import KINDS, call, check, combinations, tensors_of
from sharp import deep
from simulated_gpus import H200, simulate
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode

import gptkern
import gptkern.functional as G
from gptkern import nn
from gptkern.operators.nonlinearity import contract

all_calls = pytest.mark.parametrize(("function", "kind"), combinations())

# --- Memory layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float16, 33), pytest.param(torch.float32, 16, marks=pytest.mark.deep)]
)
def test_strides(backend, device, layout, kind, dtype, width):
    tensors = tensors_of(kind, 3, 5, width, dtype=dtype, device=device)
    grad = guarded(torch.randn(3, 5, width, device=device).to(dtype))
    check("gelu", kind, [layout(tensors[0]), *tensors[1:]], grad=grad)
    check("gelu", kind, tensors, grad=layout(grad))
    if kind == "pair":
        check("gelu", kind, [tensors[0], layout(tensors[1])], grad=grad)


@pytest.mark.parametrize("width", [33, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_every_operand_has_strides_of_its_own(kernel_backend, device, kind, width):
    tensors = tensors_of(kind, 15, width, dtype=torch.bfloat16, device=device)
    grad = torch.randn(15, width, device=device).bfloat16()
    *tensors, grad = of_own_strides(*tensors, grad, step=1 if width % 8 else 8)
    check("gelu_tanh", kind, tensors, grad=grad)


@pytest.mark.parametrize("width", [24, 25])
def test_halves_of_a_larger_tensor_are_read_in_place(backend, device, width):
    # One product gives gate, up and more: each is a view, and so is what is packed.
    whole = guarded(torch.randn(2, 7, 3 * width, device=device).bfloat16())
    gate, up, _ = whole.chunk(3, -1)
    check("silu", "pair", [gate, up])
    check("silu", "packed", [whole[..., width:]])
    same_bits("packed", G.swiglu(whole[..., : 2 * width]), G.swiglu(gate, up))


def test_a_gradient_of_halves_is_one_tensor(kernel_backend, device):
    (packed,) = tensors_of("packed", 5, 16, dtype=torch.bfloat16, device=device)
    with Watched() as watched:
        output = G.swiglu(packed.requires_grad_())
        output.sum().backward()
    (_, (dinput, dup, dbias)) = watched.calls[1]
    assert dinput.shape == packed.shape and dup.numel() == dbias.numel() == 0
    same_bits("the gradient", packed.grad, dinput)


def test_gradient_of_a_sum_is_one_number_expanded(backend, device):
    for kind in KINDS:
        tensors = tensors_of(kind, 5, 33, dtype=torch.float32, device=device)
        check("gelu", kind, tensors, grad=torch.ones((), device=device).expand(5, 33))


@pytest.mark.parametrize(
    "of_bias", [lambda b: torch.stack([b, b], 1)[:, 0], lambda b: b.flip(0), lambda b: b[:1].expand(33)]
)
def test_strides_of_the_bias(backend, device, of_bias):
    input, bias = tensors_of("bias", 5, 33, dtype=torch.float32, device=device)
    check("gelu", "bias", [input, of_bias(bias)])


@pytest.mark.parametrize("shape", [(0,), (0, 5), (2, 0, 5), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_compute(backend, device, kind, shape):
    leaves = [t.requires_grad_() for t in tensors_of(kind, *shape, dtype=torch.float32, device=device)]
    output = call("gelu", kind, *leaves)
    assert output.shape == shape
    output.sum().backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


# --- Autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need", [(True, False), (False, True)])
@pytest.mark.parametrize("kind", ["bias", "pair"])
@pytest.mark.parametrize("width", [32, 33])
def test_only_what_requires_grad_gets_one(backend, device, kind, width, need):
    check("gelu", kind, tensors_of(kind, 19, width, dtype=torch.float32, device=device), need=need)


@pytest.mark.parametrize("need", [(True, False), (False, True)])
@pytest.mark.parametrize("kind", ["bias", "pair"])
def test_nothing_is_computed_that_nobody_asked_for(kernel_backend, device, kind, need):
    tensors = tensors_of(kind, 5, 33, dtype=torch.float32, device=device)
    leaves = [tensor.requires_grad_(needed) for tensor, needed in zip(tensors, need)]
    output = call("gelu", kind, *leaves)
    with Watched() as watched:
        output.sum().backward()
    ((_, (dinput, dup, dbias)),) = watched.calls
    assert [dinput.numel() > 0, (dup if kind == "pair" else dbias).numel() > 0] == list(need)


@all_calls
def test_the_inputs_alone_are_kept(kernel_backend, device, function, kind):
    leaves = [t.requires_grad_() for t in tensors_of(kind, 5, 16, dtype=torch.float32, device=device)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        call(function, kind, *leaves)
    assert [tensor.data_ptr() for tensor in kept] == [leaf.data_ptr() for leaf in leaves]


def test_without_gradients_nothing_is_recorded(backend, device):
    (input,) = tensors_of("plain", 3, 5, dtype=torch.float32, device=device)
    assert not G.gelu(input).requires_grad
    with torch.no_grad():
        assert not G.silu(input.requires_grad_()).requires_grad


def test_writing_into_what_the_backward_needs_is_an_error(backend, device):
    gate, up = tensors_of("pair", 3, 5, dtype=torch.float32, device=device)
    output = G.swiglu(gate, up.requires_grad_())
    gate.add_(1)
    if backend == "torch":  # PyTorch has kept silu(gate)
        return output.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivative_is_refused(kernel_backend, device, kind):
    leaves = [t.requires_grad_() for t in tensors_of(kind, 5, 8, dtype=torch.float32, device=device)]
    first = torch.autograd.grad(call("gelu", kind, *leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="nonlinearity has no second derivative"):
        first[0].sum().backward()


# --- As PyTorch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nn.functional.gelu", "nn.functional.silu"])
@pytest.mark.parametrize("dtype", [*deep(torch.float16), torch.bfloat16, *deep(torch.float32), torch.float64], ids=str)
def test_pytorchs_own_samples(backend, device, name, dtype):
    ours = {"nn.functional.gelu": G.gelu, "nn.functional.silu": G.silu}[name]
    (info,) = [info for info in op_db if info.name == name and not info.variant_test_name]
    if backend == "cuda" and dtype == torch.float64:
        pytest.skip("there are no float64 kernels in CUDA C++")
    samples = 0
    for sample in info.sample_inputs(device, dtype, requires_grad=True):
        if sample.kwargs.get("inplace") and backend != "torch":
            continue
        samples += 1
        grads = []
        for function in (ours, info.op):
            leaf = sample.input.detach().clone().requires_grad_()
            output = function(leaf, *sample.args, **sample.kwargs)
            (grad,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
            grads.append((output.detach(), grad))
        (output, grad), (of_theirs, grad_of_theirs) = grads
        assert output.shape == of_theirs.shape and output.dtype == of_theirs.dtype
        torch.testing.assert_close(output, of_theirs)
        torch.testing.assert_close(grad, grad_of_theirs)
    assert samples


@pytest.mark.parametrize("autocast_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_as_pytorch(backend, device, dtype, autocast_dtype):
    input, up = tensors_of("pair", 5, 33, dtype=dtype, device=device)
    with torch.autocast(device, dtype=autocast_dtype):
        for ours, theirs in ((G.gelu, F.gelu), (G.silu, F.silu), (G.swiglu, lambda x, u: F.silu(x) * u)):
            given = (input, up) if ours is G.swiglu else (input,)
            assert ours(*given).dtype == theirs(*given).dtype == dtype


X = torch.ones(3, 6)
# what is wrong -> the call, and what the message says where it is gptkern's own
BAD_GELU = {
    "input is a list": (lambda f, x: f([1.0]), ("input", "list", "Tensor|tensor")),
    "input is None": (lambda f, x: f(None), ("input", "NoneType", "Tensor|tensor")),
    "integers": (lambda f, x: f(x.int()), ("int32", "floating-point")),
    "bool": (lambda f, x: f(x.bool()), ("bool", "floating-point")),
}
BAD_APPROXIMATION = {
    "approximate is another word": (lambda f, x: f(x, approximate="exact"), ("approximate", "exact", "tanh")),
    "approximate is None": (lambda f, x: f(x, approximate=None), ("approximate", "NoneType", "str")),
    "approximate by place": (lambda f, x: f(x, "tanh"), ()),
}


@pytest.mark.parametrize("mistake", [*BAD_GELU, *BAD_APPROXIMATION])
def test_mistakes_raise_what_pytorch_raises(backend, device, mistake):
    wrong, words = (BAD_GELU | BAD_APPROXIMATION)[mistake]
    pairs = [(G.gelu, F.gelu)] if mistake in BAD_APPROXIMATION else [(G.gelu, F.gelu), (G.silu, F.silu)]
    for ours, theirs in pairs:
        expected, found = raised_by(wrong, theirs, X.to(device)), raised_by(wrong, ours, X.to(device))
        assert type(found) is type(expected), f"{found!r}; PyTorch: {expected!r}"
        if backend != "torch":
            assert all(any(word in str(found) for word in either.split("|")) for either in words), str(found)


BAD_CALLS = {
    "up is a number": (lambda x: G.swiglu(x, 1.0), TypeError, "swiglu: up is float; it needs a tensor"),
    "up is another shape": (lambda x: G.swiglu(x, x[:, :3]), RuntimeError, r"up has shape \(3, 3\).*\(3, 6\)"),
    "up broadcasts": (lambda x: G.geglu(x, x[:1]), RuntimeError, r"geglu: up has shape \(1, 6\)"),
    "up is another dtype": (lambda x: G.swiglu(x, x.half()), RuntimeError, "up is torch.float16.*float32"),
    "up is elsewhere": (lambda x: G.swiglu(x, x.to("meta")), RuntimeError, "up is on meta"),
    "the halves are odd": (lambda x: G.swiglu(x[:, :5]), RuntimeError, r"gate has shape \(3, 5\).*even"),
    "nothing to halve": (lambda x: G.geglu(x.sum()), RuntimeError, r"gate has shape \(\)"),
    "a gate of integers": (lambda x: G.swiglu(x.int()), NotImplementedError, "gate is torch.int32"),
    "a gate of another approximation": (lambda x: G.geglu(x, None, "no"), RuntimeError, "approximate is 'no'"),
    "bias is a list": (lambda x: G.gelu(x, bias=[1.0]), TypeError, "bias is list"),
    "bias is too short": (lambda x: G.gelu(x, bias=x[0, :5]), RuntimeError, r"bias has shape \(5,\).*\(6,\)"),
    "bias of two dimensions": (lambda x: G.gelu(x, bias=x[:1]), RuntimeError, r"bias has shape \(1, 6\)"),
    "bias of one number": (lambda x: G.gelu(x.sum(), bias=x[0, :1]), RuntimeError, r"bias has shape \(1,\)"),
    "bias is another dtype": (lambda x: G.gelu(x, bias=x[0].half()), RuntimeError, "bias is torch.float16"),
    "bias is elsewhere": (lambda x: G.gelu(x, bias=x[0].to("meta")), RuntimeError, "bias is on meta"),
    "bias beside out": (lambda x: G.gelu(x, bias=x[0], out=x), ValueError, "out is given beside a bias"),
    "unknown activation": (lambda x: G.linear(x, x, activation="relu"), ValueError, "activation is 'relu'"),
    "activation is no name": (lambda x: G.linear(x, x, activation=[1]), ValueError, r"activation is \[1\]"),
}


@pytest.mark.parametrize("mistake", BAD_CALLS)
def test_mistakes(backend, device, mistake):
    wrong, kind, words = BAD_CALLS[mistake]
    with pytest.raises(kind, match=words):
        wrong(X.to(device))


def test_what_pytorchs_operator_alone_does(backend, device):
    x = torch.randn(3, 5, device=device)
    out, written = torch.empty(3, 5, device=device), x.clone()
    if backend != "torch":
        with pytest.raises(gptkern.BackendError, match="inplace=True"):
            G.silu(written, inplace=True)
        with pytest.raises(gptkern.BackendError, match="out is given"):
            G.gelu(x, out=out)
        return
    assert G.silu(written, inplace=True) is written and torch.equal(written, F.silu(x))
    assert G.gelu(x, approximate="tanh", out=out) is out and torch.equal(out, F.gelu(x, approximate="tanh"))
    with pytest.raises(RuntimeError, match="in-place"):
        G.silu(x.requires_grad_(), True)


def test_complex_numbers_are_pytorchs(device):
    x = torch.randn(3, 5, dtype=torch.complex64, device=device)
    torch.testing.assert_close(G.silu(x), F.silu(x))
    assert type(raised_by(G.gelu, x)) is type(raised_by(F.gelu, x))
    with gptkern.backend("torch:launchers"), pytest.raises(gptkern.BackendError, match="complex64"):
        G.silu(x)


def test_subnormal_and_zero_keep_their_sign(backend, device):
    x = torch.tensor([0.0, -0.0, 1e-40, -1e-40], device=device)
    for y in (G.gelu(x), G.gelu(x, approximate="tanh"), G.silu(x)):
        assert torch.equal(torch.signbit(y), torch.signbit(x))


# --- The registered ops ---------------------------------------------------------------------------------------------


def test_registered_ops(backend, device):
    forward, backward = torch.ops.gptkern.nonlinearity_forward.default, torch.ops.gptkern.nonlinearity_backward.default
    tests = {}  # all of them on the first case; the slow ones, of torch.compile, are the same for the others
    for kind in KINDS:
        input, other = [*tensors_of(kind, 5, 33, dtype=torch.bfloat16, device=device), None][:2]
        up, bias = (other, None) if kind == "pair" else (None, other)
        options = (input, up, bias, "gelu", kind == "packed", backend)
        torch.library.opcheck(forward, options, **tests)
        grad = torch.randn_like(forward(*options))
        for need in (True, False):
            dtype = torch.float32 if kind == "bias" else None
            torch.library.opcheck(backward, (grad, need, kind == "pair", dtype, *options), **tests)
            tests = {"test_utils": ("test_schema", "test_faketensor")}


# Compiling takes its time: what has most to go wrong is in `make test`.
compiled_kinds = pytest.mark.parametrize(
    "kind", [kind if kind == "packed" else pytest.param(kind, marks=pytest.mark.deep) for kind in KINDS]
)


@compiled_kinds
def test_compiles_to_one_graph(backend, device, kind):
    tensors = tensors_of(kind, 5, 16, dtype=torch.float32, device=device)
    assert_compiles(lambda *given: call("gelu_tanh", kind, *given), *tensors)


@compiled_kinds
def test_a_call_is_one_node_of_a_compiled_graph(kernel_backend, device, kind):
    graphs = []

    def look(module, _):
        graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return module

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *given: call("silu" if kind != "bias" else "gelu", kind, *given),
        fullgraph=True, backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=look),
    )  # fmt: skip
    with torch.no_grad():
        compiled(*tensors_of(kind, 5, 16, dtype=torch.float32, device=device))
    assert graphs == [["gptkern.nonlinearity_forward.default"]]


def test_explained_without_running(backend, device):
    (x,) = tensors_of("plain", 3, 6, dtype=torch.float32, device=device)
    for function in (G.gelu, G.silu, G.swiglu, G.geglu, F.gelu, F.silu):
        assert gptkern.explain(function, x).backend == backend


# --- torch.nn's modules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments"), [("GELU", {}), ("GELU", {"approximate": "tanh"}), ("SiLU", {}), ("SiLU", {"inplace": True})]
)
def test_module_as_pytorch(backend, device, name, arguments):
    ours, theirs = getattr(nn, name)(**arguments), getattr(torch.nn, name)(**arguments)
    assert isinstance(ours, getattr(torch.nn, name)) and repr(ours) == repr(theirs)
    input = torch.randn(4, 33, device=device)
    if arguments.get("inplace") and backend != "torch":
        return
    torch.testing.assert_close(ours(input.clone()), theirs(input.clone()))
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is getattr(nn, name) and torch.equal(copied(input.clone()), ours(input.clone()))


# --- linear with a GELU ---------------------------------------------------------------------------------------------


def product_of(*shape, dtype, device, has_bias=True):
    leaves = [torch.randn(*shape, 24, device=device).to(dtype), torch.randn(17, 24, device=device).to(dtype) / 4]
    return [
        leaf.requires_grad_() for leaf in (*leaves, *([torch.randn(17, device=device).to(dtype)] if has_bias else []))
    ]


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (), (2, 3), (0,)], ids=str)
def test_a_product_and_its_gelu(backend, device, activation, has_bias, shape):
    leaves = product_of(*shape, dtype=torch.float32, device=device, has_bias=has_bias)
    ours = G.linear(*leaves, activation=activation)
    theirs = F.gelu(F.linear(*leaves), approximate={"gelu": "none", "gelu_tanh": "tanh"}[activation])
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(theirs)
    for mine, others in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad)):
        torch.testing.assert_close(mine, others, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "need", [(True, False, False), (False, True, False), (False, False, True), (False, False, False)]
)
def test_a_product_of_what_is_frozen(backend, device, need):
    leaves = [
        leaf.detach().requires_grad_(needed)
        for leaf, needed in zip(product_of(5, dtype=torch.float32, device=device), need)
    ]
    output = G.linear(*leaves, activation="gelu")
    assert output.requires_grad == any(need)
    if any(need):
        output.sum().backward()
        F.gelu(
            F.linear(*(copies := [leaf.detach().requires_grad_(needed) for leaf, needed in zip(leaves, need)]))
        ).sum().backward()
        for leaf, copied in zip(leaves, copies):
            assert (leaf.grad is None) == (copied.grad is None)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, copied.grad, rtol=1e-5, atol=1e-5)


def test_the_bias_of_a_product_is_summed_with_its_gelus_gradient(kernel_backend, device):
    leaves = product_of(5, dtype=torch.float32, device=device)
    output = G.linear(*leaves, activation="gelu")
    with Watched() as watched:
        output.sum().backward()
    ((name, (_, _, dbias)),) = watched.calls
    assert name == "nonlinearity_backward"
    same_bits("the bias's gradient", leaves[2].grad, dbias)


def test_a_product_without_an_activation_is_pytorchs(backend, device):
    leaves = product_of(5, dtype=torch.float32, device=device)
    with Watched() as watched:
        assert torch.equal(G.linear(*leaves), F.linear(*leaves))
    assert watched.names == []
    for wrong in ((leaves[0], leaves[1].t()), ([1.0], leaves[1])):
        theirs = raised_by(F.linear, *wrong)
        assert type(raised_by(G.linear, *wrong, activation="gelu")) is type(theirs)


@pytest.mark.parametrize("autocast_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_product_under_autocast(backend, device, autocast_dtype):
    leaves = product_of(5, dtype=torch.float32, device=device)
    with torch.autocast(device, dtype=autocast_dtype):
        ours, theirs = G.linear(*leaves, activation="gelu"), F.gelu(F.linear(*leaves))
    assert ours.dtype == theirs.dtype == autocast_dtype
    torch.testing.assert_close(ours, theirs)
    ours.sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float32] * 3


def test_a_compiled_product(backend, device):
    assert_compiles(
        lambda *given: G.linear(*given, activation="gelu_tanh"), *product_of(5, dtype=torch.float32, device=device)
    )


def test_a_product_under_torch_func(device):
    leaves = [leaf.detach() for leaf in product_of(5, dtype=torch.float32, device=device)]
    ours, theirs = (
        torch.func.grad(lambda *given, of=of: of(*given).sum(), argnums=(0, 1, 2))(*leaves)
        for of in (lambda *g: G.linear(*g, activation="gelu"), lambda *g: F.gelu(F.linear(*g)))
    )
    for mine, others in zip(ours, theirs):
        torch.testing.assert_close(mine, others)
    assert math.isfinite(float(ours[0].sum()))


# --- linear on a GPU: tensors without memory --------------------------------------------------------------------------


class Called(TorchDispatchMode):
    """Records the names of the operators that run inside the `with` block."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op._schema.name.partition("::")[2])
        return op(*args, **(kwargs or {}))


def operands_on_a_gpu(dtypes=(torch.bfloat16,) * 3, shape=(2, 5)):
    sizes = ((*shape, 24), (17, 24), (17,))
    return [torch.empty(size, dtype=dtype, device="cuda") for size, dtype in zip(sizes, dtypes)]


def called_on_a_gpu(activation="gelu_tanh", shape=(2, 5)):
    """What a product calls on a simulated GPU, where fake tensors count as plain ones."""
    operands = operands_on_a_gpu(shape=shape)
    with Called() as called:
        output = G.linear(*operands, activation=activation)
    assert output.shape == (*shape, 17) and output.dtype == torch.bfloat16
    return called.names


@pytest.fixture
def a_gpu(monkeypatch):
    simulate(monkeypatch, (H200.name, (9, 0)))
    monkeypatch.setattr(gptkern.backends.dispatch, "_uncovered", lambda *call: None)
    monkeypatch.setattr(contract, "_PLAIN", (*contract._PLAIN, FakeTensor))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    with FakeTensorMode(), gptkern.backend(None):
        yield


def test_without_gradients_the_product_computes_its_gelu(a_gpu):
    names = called_on_a_gpu()
    assert "_addmm_activation" in names and not {"gelu", "nonlinearity_forward", "addmm"} & set(names)


@pytest.mark.parametrize("options", [dict(activation="gelu"), dict(shape=(0,))], ids=str)
def test_where_it_cannot_a_kernel_follows(a_gpu, options):
    assert "_addmm_activation" not in called_on_a_gpu(**options)


def test_what_the_epilogue_does_not_take(a_gpu):
    x, w, b = operands = operands_on_a_gpu()
    assert contract._has_epilogue(*operands, "gelu_tanh")

    def other(*shape, dtype=torch.bfloat16, requires_grad=False):
        return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=requires_grad)

    others = [
        (x, w, None), (x, w, other(17, requires_grad=True)), (x, other(17, 24, requires_grad=True), b),
        (x, w, other(17, dtype=torch.float32)), (other(2, 5), w, b), (x, w, other(5)), (other(), w, b), (x, b, b),
        tuple(other(*operand.shape, dtype=torch.int32) for operand in operands),
    ]  # fmt: skip
    assert [contract._has_epilogue(*operands, "gelu_tanh") for operands in others] == [False] * len(others)
    with torch.no_grad():
        assert contract._has_epilogue(x, w, other(17, requires_grad=True), "gelu_tanh")


def test_a_kernel_that_is_forced_runs(a_gpu):
    pytest.importorskip("triton")
    with gptkern.backend("triton"):
        names = called_on_a_gpu()
    assert "nonlinearity_forward" in names and "_addmm_activation" not in names
    with gptkern.backend("torch"):
        assert "_addmm_activation" in called_on_a_gpu()
