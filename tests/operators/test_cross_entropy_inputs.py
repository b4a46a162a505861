"""cross_entropy: PyTorch's calls, samples and errors, dtypes, gradients that nobody asked for, compiled code."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checking import Watched, assert_compiles, raised_by, same_bits
from cross_entropy_calls import CALLS, call_of, classes_for, dtypes, probabilities_for, random, weights_for
from sharp import deep, sharp

import gptkern
import gptkern.functional as G

# --- The twin behaves as PyTorch's ----------------------------------------------------------------------------------


def samples(device, dtype):
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (op for op in op_db if op.name == "nn.functional.cross_entropy")
    for sample in info.sample_inputs(device, dtype, requires_grad=True):
        yield sample.input, sample.args, sample.kwargs


def frozen(value):
    """PyTorch's samples ask for gradients of targets and weights, which kernels leave to PyTorch."""
    return value.detach() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *deep(torch.float16, torch.float32, torch.float64)],
    ids=str,
)
def test_pytorchs_own_samples(plain_or_triton, device, dtype):
    if plain_or_triton == "triton" and dtype == torch.float64:
        with pytest.raises(gptkern.BackendError, match="float64"):
            G.cross_entropy(random(2, 3, device=device, dtype=dtype), torch.tensor([0, 1], device=device))
        return
    count = 0
    for input, args, kwargs in samples(device, dtype):
        args, kwargs = tuple(map(frozen, args)), {key: frozen(value) for key, value in kwargs.items()}
        results = []
        for function, of in ((G.cross_entropy, dtype), (F.cross_entropy, torch.float64)):
            leaf = input.detach().to(of).requires_grad_()
            others = [[v.to(of) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in given]
                      for given in (args, kwargs.values())]  # fmt: skip
            output = function(leaf, *others[0], **dict(zip(kwargs, others[1])))
            output.sum().backward()
            results.append((output.detach(), leaf.grad))
        expected = F.cross_entropy(input, *args, **kwargs)
        (output, gradient), (right, right_gradient) = results
        assert output.dtype == expected.dtype and output.shape == expected.shape and gradient.dtype == dtype
        tolerance = 4 * torch.finfo(dtype).eps
        for actual, wanted in ((output, right), (gradient, right_gradient)):
            torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
        count += 1
    assert count >= 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_on_a_cpu_the_bits_are_pytorchs(dtype):
    with gptkern.backend("torch"):
        for input, args, kwargs in samples("cpu", dtype):
            same_bits("the loss", G.cross_entropy(input, *args, **kwargs), F.cross_entropy(input, *args, **kwargs))


SAME_CALLS = {
    "by position": lambda x, y, w: ((x, y, w, None, 3, None, "sum", 0.1), {}),
    "keywords": lambda x, y, w: ((), {"input": x, "target": y, "weight": w, "label_smoothing": 0.5}),
    "an int for a float": lambda x, y, w: ((x, y), {"label_smoothing": 1}),
    "a tensor for a float": lambda x, y, w: ((x, y), {"label_smoothing": torch.tensor(0.25)}),
    "NumPy's numbers": lambda x, y, w: ((x, y), {"label_smoothing": np.float32(0.25), "ignore_index": np.int64(2)}),
    "a tensor for an int": lambda x, y, w: ((x, y), {"ignore_index": torch.tensor(2)}),
    "smoothing below 0 is none": lambda x, y, w: ((x, y), {"label_smoothing": -1.0}),
    "one row": lambda x, y, w: ((x[0], y[0], w), {"reduction": "none"}),
    "one row, a target of one": lambda x, y, w: ((x[0], y[:1]), {"reduction": "mean"}),
    "one row of probabilities": lambda x, y, w: ((x[0], x[1].softmax(0), w), {"reduction": "none"}),
    "bytes": lambda x, y, w: ((x, y.byte()), {}),
    "weights of nothing": lambda x, y, w: ((x, y, w * 0), {}),
    "a Parameter": lambda x, y, w: ((torch.nn.Parameter(x), y), {}),
    "probabilities in float32": lambda x, y, w: ((x.bfloat16(), x.softmax(1)), {}),
    "probabilities' weights in float32": lambda x, y, w: ((x.half(), x.half().softmax(1), w.float()), {}),
}


@pytest.mark.parametrize("name", SAME_CALLS)
def test_the_same_result_as_pytorch(plain_or_triton, device, name):
    input = random(4, 9, device=device)
    args, kwargs = SAME_CALLS[name](input, classes_for(input, 3), weights_for(input))
    actual, expected = G.cross_entropy(*args, **kwargs), F.cross_entropy(*args, **kwargs)
    assert actual.requires_grad == expected.requires_grad and actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    tolerance = 4 * torch.finfo(expected.dtype if "half" not in name else torch.float16).eps
    if any(isinstance(a, torch.Tensor) and a.dtype in (torch.float16, torch.bfloat16) for a in args):
        tolerance = 4 * torch.finfo(torch.bfloat16).eps  # PyTorch's log_softmax is rounded to 16 bits
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("options", [(None, False), (False, None), (True, True), (False, True)], ids=str)
def test_the_older_names_of_the_reduction(plain_or_triton, device, options):
    input = random(4, 9, device=device)
    target, (size_average, reduce) = classes_for(input), options
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        actual = G.cross_entropy(input, target, None, size_average, -100, reduce)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = F.cross_entropy(input, target, None, size_average, -100, reduce)
    torch.testing.assert_close(actual, expected)


def test_the_oldest_name_of_the_mean_warns(plain_or_triton, device):
    input = random(4, 9, device=device)
    with pytest.warns(UserWarning, match="elementwise_mean"):
        actual = G.cross_entropy(input, classes_for(input, None), reduction="elementwise_mean")
    assert actual.shape == ()


# name -> the call, the exception that the contract promises, what its message names.
BAD_CALLS = {
    "a target of another batch": (lambda f, x, y: f(x, y[:3]), ValueError, "target"),
    "a target of two dimensions": (lambda f, x, y: f(x, y[:, None]), RuntimeError, "target"),
    "a target of other positions": (lambda f, x, y: f(x[..., None], y[:, None, None]), RuntimeError, "target"),
    "a target in int32": (lambda f, x, y: f(x, y.int()), RuntimeError, "target|Int"),
    "a target of bools": (lambda f, x, y: f(x, y > 1), RuntimeError, "target|Bool"),
    "a target of floats": (lambda f, x, y: f(x, y.float()), RuntimeError, "target|Float"),
    "probabilities in integers": (lambda f, x, y: f(x, x.long()), RuntimeError, "target"),
    "probabilities and an index": (lambda f, x, y: f(x, x.softmax(1), ignore_index=0), RuntimeError, "ignore_index"),
    "too much smoothing": (lambda f, x, y: f(x, y, label_smoothing=1.5), RuntimeError, "label_smoothing"),
    "too much smoothing of probabilities": (
        lambda f, x, y: f(x, x.softmax(1), label_smoothing=1.5), RuntimeError, "label_smoothing",
    ),
    "another weight": (lambda f, x, y: f(x, y, x[0, :4]), RuntimeError, "weight"),
    "another weight of probabilities": (lambda f, x, y: f(x, x.softmax(1), x[0, :4]), RuntimeError, "weight"),
    "a weight in rows": (lambda f, x, y: f(x, y, x[:1]), RuntimeError, "weight"),
    "a weight in float64": (lambda f, x, y: f(x, y, x[0].double()), RuntimeError, "weight|Double"),
    "a weight in float32": (lambda f, x, y: f(x.bfloat16(), y, x[0]), RuntimeError, "weight|Float"),
    "integers": (lambda f, x, y: f(x.long(), y), NotImplementedError, "input|Long"),
    "complex numbers": (lambda f, x, y: f(x.to(torch.complex64), y), NotImplementedError, "input|Complex"),
    "a scalar": (lambda f, x, y: f(x[0, 0], y[0]), RuntimeError, "input|target"),
    "no such reduction": (lambda f, x, y: f(x, y, reduction="average"), ValueError, "reduction"),
    "no reduction": (lambda f, x, y: f(x, y, reduction=None), ValueError, "reduction"),
    "a list as target": (lambda f, x, y: f(x, [1, 2, 3, 4]), TypeError, "target"),
    "a list as weight": (lambda f, x, y: f(x, y, [1.0] * 5), TypeError, "weight"),
    "a float as index": (lambda f, x, y: f(x, y, ignore_index=1.5), TypeError, "ignore_index"),
    "a bool as index": (lambda f, x, y: f(x, y, ignore_index=True), TypeError, "ignore_index"),
    "a string as smoothing": (lambda f, x, y: f(x, y, label_smoothing="a"), TypeError, "label_smoothing"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("extended", [False, *deep(True)])
def test_bad_calls_raise_as_in_pytorch(plain_or_triton, device, name, extended):
    call, expected, words = BAD_CALLS[name]
    input, target = random(4, 5, device=device), torch.tensor([0, 1, 4, 2], device=device)
    pytorchs = raised_by(call, F.cross_entropy, input, target)
    assert isinstance(pytorchs, expected), f"the table is wrong about PyTorch: {pytorchs!r}"

    def twin(*args, **kwargs):
        return G.cross_entropy(*args, **kwargs, **({"softcap": 2.0} if extended else {}))

    with pytest.raises(expected, match=words) as raised:
        call(twin, input, target)
    assert isinstance(pytorchs, type(raised.value)) or isinstance(raised.value, type(pytorchs))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"z_loss": -0.1}, ValueError, r"z_loss is -0\.1"), ({"z_loss": math.inf}, ValueError, "z_loss is inf"),
        ({"softcap": 0.0}, ValueError, r"softcap is 0\.0"), ({"softcap": math.nan}, ValueError, "softcap is nan"),
        ({"softcap": "a"}, TypeError, "softcap is a str"), ({"logit_scale": [1]}, TypeError, "logit_scale is a list"),
        ({"z_loss": None}, TypeError, "z_loss is a NoneType"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_extensions(plain_or_triton, device, options, error, words):
    input = random(4, 5, device=device)
    with pytest.raises(error, match=words):
        G.cross_entropy(input, classes_for(input), **options)


def test_the_extensions_are_keyword_only(device):
    with pytest.raises(TypeError):
        G.cross_entropy(random(3, 4), torch.tensor([0, 1, 2]), None, None, -100, None, "mean", 0.0, 0.1)


def test_tensors_on_several_devices(plain_or_triton, device):
    input = random(4, 5, device=device)
    for target, weight in ((classes_for(input).to("meta"), None), (classes_for(input), weights_for(input).to("meta"))):
        with pytest.raises(RuntimeError, match=r"meta|device"):
            G.cross_entropy(input, target, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *deep(torch.float16)], ids=str)
@pytest.mark.parametrize("name", ["probabilities", "everything", *deep("plain", "each row")])
def test_autocast_as_in_pytorch(plain_or_triton, device, dtype, name):
    input = random(4, 9, device=device, dtype=dtype)
    target, weight, options = call_of(name, input)
    with torch.autocast(device, dtype=torch.bfloat16):
        leaf = input.clone().requires_grad_()
        output = G.cross_entropy(leaf, target, weight, **options)
        plain = {key: value for key, value in options.items() if key in ("label_smoothing", "reduction")}
        assert output.dtype == F.cross_entropy(input, target, weight, **plain).dtype == torch.float32
    output.sum().backward()
    assert leaf.grad.dtype == dtype
    expected = G.cross_entropy(input.float(), target, None if weight is None else weight.float(), **options)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


# --- Gradients ------------------------------------------------------------------------------------------------------


def test_no_gradient_that_nobody_asked_for(triton_backend, device):
    input = random(4, 17, device=device)
    target = classes_for(input)
    with Watched() as watched:
        output = G.cross_entropy(input, target)
        assert not output.requires_grad
        with torch.no_grad():
            assert not G.cross_entropy(input.clone().requires_grad_(), target).requires_grad
    assert watched.names == ["cross_entropy_forward"] * 2


@pytest.mark.parametrize("which", ["target", "weight"])
def test_targets_and_weights_that_require_grad(plain_or_triton, device, which):
    input = random(4, 17, device=device).requires_grad_()
    target, weight = probabilities_for(input.detach()), weights_for(input.detach())
    (target if which == "target" else weight).requires_grad_()
    if plain_or_triton == "triton":
        with pytest.raises(gptkern.BackendError, match=f"{which} requires a gradient"):
            G.cross_entropy(input, target, weight)
        return
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (input, target, weight)]
        found = torch.autograd.grad(G.cross_entropy(*leaves, z_loss=0.1), leaves)
        right = [tensor.detach().float().requires_grad_() for tensor in leaves]
        lse = torch.logsumexp(right[0], 1)
        expected = torch.autograd.grad(F.cross_entropy(*right) + 0.1 * lse.square().mean(), right)
        for actual, wanted in zip(found, expected):
            torch.testing.assert_close(actual, wanted.to(dtype))


@dtypes
def test_second_derivatives_on_pytorch(device, dtype):
    input = random(3, 5, device=device, dtype=dtype)
    target = classes_for(input)
    for options in ({}, {"softcap": 2.0, "z_loss": 0.1, "reduction": "none"}):
        found = []
        for of in (dtype, torch.float64):
            leaf = input.detach().to(of).requires_grad_()
            with gptkern.backend("torch"):
                output = G.cross_entropy(leaf, target, **options)
            (gradient,) = torch.autograd.grad(output.sum(), leaf, create_graph=True)
            found.append(torch.autograd.grad(gradient.square().sum(), leaf)[0].double())
        torch.testing.assert_close(*found, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_second_derivatives_are_the_difference_quotients():
    input = random(3, 5, dtype=torch.float64).requires_grad_()
    for name in CALLS:
        target, weight, options = call_of(name, input.detach())

        def function(x, target=target, weight=weight, options=options):
            return G.cross_entropy(x, target, weight, **options)

        with gptkern.backend("torch"):
            assert torch.autograd.gradgradcheck(function, input)


def test_gradients_of_many_outputs_at_once(plain_or_triton, device):
    for dtype in (torch.float32, torch.bfloat16):
        input = random(5, 24, device=device, dtype=dtype).requires_grad_()
        output = G.cross_entropy(input, classes_for(input.detach()), reduction="none", z_loss=0.1)
        many = torch.randn(3, 5, device=device).to(dtype)
        (batched,) = torch.autograd.grad(output, input, many, is_grads_batched=True, retain_graph=True)
        alone = torch.stack([torch.autograd.grad(output, input, one, retain_graph=True)[0] for one in many])
        torch.testing.assert_close(batched, alone)


SAVED = {
    "every other element": lambda saved: torch.stack([saved, saved.clone().fill_(1)], -1)[..., 0],
    "one element on": lambda saved: torch.cat([saved.flatten()[:1], saved.flatten()])[1:].view(saved.shape),
    "transposed": lambda saved: saved.mT.contiguous().mT if saved.dim() > 1 else saved,
}


@pytest.mark.parametrize("layout", SAVED)
@pytest.mark.parametrize("name", ["everything", *deep("weights", "probabilities, everything")])
def test_saved_tensors_may_come_back_in_another_layout(plain_or_triton, device, layout, name):
    input = random(5, 24, device=device, dtype=torch.bfloat16)
    target, weight, options = call_of(name, input)
    gradients = []
    for hook in (lambda saved: saved, SAVED[layout]):
        leaf = input.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(hook, lambda saved: saved):
            output = G.cross_entropy(leaf, target, weight, **options)
        output.sum().backward()
        gradients.append(leaf.grad)
    same_bits("the gradient", *gradients)


def test_a_second_derivative_is_refused(triton_backend, device):
    input = random(4, 17, device=device).requires_grad_()
    (gradient,) = torch.autograd.grad(G.cross_entropy(input, classes_for(input)), input, create_graph=True)
    with pytest.raises(NotImplementedError, match="cross_entropy has no second derivative"):
        gradient.sum().backward()


def test_backward_twice_with_retain_graph(plain_or_triton, device):
    input = random(4, 17, device=device).requires_grad_()
    output = G.cross_entropy(input, classes_for(input), z_loss=0.1)
    (first,) = torch.autograd.grad(output, input, retain_graph=True)
    (second,) = torch.autograd.grad(output, input)
    same_bits("the second backward", second, first)


@dtypes
def test_under_torch_func(device, dtype):
    input, target = random(3, 4, 9, device=device, dtype=dtype), torch.tensor([0, -100, 8, 2], device=device)
    alone = torch.stack([G.cross_entropy(x, target, softcap=3.0) for x in input])
    batched = torch.vmap(lambda x: G.cross_entropy(x, target, softcap=3.0))(input)
    torch.testing.assert_close(batched, alone)
    gradient = torch.func.grad(lambda x: G.cross_entropy(x, target))(input[0])
    leaf = input[0].clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(G.cross_entropy(leaf, target), leaf)[0])


# --- The registered ops, torch.compile ------------------------------------------------------------------------------


def registered(name: str, input: torch.Tensor, stats: bool) -> tuple:
    target, weight, options = call_of(name, input)
    numbers = (
        options.get("reduction", "mean"), -100, options.get("label_smoothing", 0.0), options.get("z_loss", 0.0),
        options.get("softcap"), options.get("logit_scale", 1.0), input.dtype,
    )  # fmt: skip
    return input, target, weight, *numbers, stats, False


@pytest.mark.parametrize(
    ("name", "name_of_backend"),
    [
        ("plain", "triton"),
        *(pytest.param(name, backend, marks=pytest.mark.deep) for name, backend in (
            ("everything", "torch"), ("plain", "torch"),
            ("each row", "torch"), ("each row", "triton"), ("everything", "triton"),
            ("probabilities, everything", "torch"), ("probabilities, everything", "triton"))),
    ],
)  # fmt: skip
def test_the_registered_ops(triton_backend, device, name, name_of_backend):
    forward, backward = (getattr(torch.ops.gptkern, f"cross_entropy_{way}").default for way in ("forward", "backward"))
    for input in (random(5, 9, device=device), random(2, 7, 5, device=device).transpose(1, 2).half()):
        call = registered(name, input, name == "plain")
        loss, statistics, denominator, *_ = forward(*call, name_of_backend)
        torch.library.opcheck(forward, (*call, name_of_backend))
        divides = call[3] == "mean" and not call[1].is_floating_point()
        gradient = torch.ones_like(loss), statistics, denominator if divides else None
        torch.library.opcheck(backward, (*gradient, *call, name_of_backend))
        in_place = torch.ops.gptkern.cross_entropy_in_place_backward.default
        torch.library.opcheck(in_place, (*gradient, input.clone(), *call, name_of_backend))


@pytest.mark.parametrize("name", sharp(CALLS, "everything"))
def test_compiled_as_eager(plain_or_triton, device, name):
    input = random(7, 9, device=device)
    target, weight, options = call_of(name, input)
    assert_compiles(lambda x: G.cross_entropy(x * 1.0, target, weight, **options), input)


def ops_of(function, *inputs):
    """The ops of the graphs, forward and backward, that torch.compile makes of a step; of a tuple's parts none."""
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def collect(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=collect, bw_compiler=collect))
    compiled(*inputs).backward()
    nodes = [[node for node in graph.graph.nodes if node.op == "call_function"] for graph in graphs]
    names = [[str(node.target) for node in graph] for graph in nodes]
    return [[name for name in graph if "getitem" not in name] for graph in names]


def test_compiled_it_is_one_node_a_direction(triton_backend, device):
    input = random(7, 9, device=device).requires_grad_()
    target = classes_for(input.detach())
    forward, backward = ops_of(lambda x: G.cross_entropy(x, target, softcap=3.0, z_loss=0.1), input)
    assert forward == ["gptkern.cross_entropy_forward.default"]
    assert backward == ["gptkern.cross_entropy_backward.default"]


def test_compiled_with_stats_and_in_place(plain_or_triton, device):
    input = random(7, 9, device=device)
    target = classes_for(input)

    def step(x):
        loss, stats = G.cross_entropy(x * 2.0, target, return_stats=True, in_place_gradient=True)
        return loss + 0.0 * stats.lse.sum() + stats.correct.sum()

    assert_compiles(step, input)


@pytest.mark.parametrize("in_place", [*deep(False), True])
def test_compiled_for_sizes_that_vary(triton_backend, device, in_place):
    torch._dynamo.reset()
    options = dict(in_place_gradient=in_place)
    compiled = torch.compile(
        lambda x, y: G.cross_entropy(x, y, **options), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for rows, classes in ((5, 9), (7, 33), (12, 17)):
        input = random(rows, classes, device=device)
        target = classes_for(input)
        same_bits("compiled", compiled(input, target), G.cross_entropy(input, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_without_a_class_are_all_ignored(dtype, reduction):
    logits, target = torch.zeros(2, 0, dtype=dtype, requires_grad=True), torch.full((2,), -100)
    loss = G.cross_entropy(logits, target, reduction=reduction)
    expected = F.cross_entropy(logits.detach().float(), target, reduction=reduction)
    torch.testing.assert_close(loss.float(), expected, equal_nan=True)
    loss.sum().backward()
    assert logits.grad.shape == (2, 0)
