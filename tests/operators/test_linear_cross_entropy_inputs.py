"""linear_cross_entropy: what it takes: strides, PyTorch's errors, `options`, autocast, transforms, registered ops."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional
from checking import raised_by
from layouts import of_own_strides
from linear_cross_entropy_calls import IGNORED, _loss_backend, check, cut, gradients, tensors_of  # noqa: F401
from sharp import deep

import gptkern
from gptkern import functional as F
from gptkern.backends import few_logits
from gptkern.operators.linear_cross_entropy import checks, contract

THEIRS = getattr(torch.nn.functional, "linear_cross_entropy", None)
needs_theirs = pytest.mark.skipif(THEIRS is None, reason="F.linear_cross_entropy is new in PyTorch 2.13")


def whole(input, linear_weight, target, *, linear_bias=None, ignore_index=None, **options):
    """F.linear_cross_entropy in PyTorch's words, for versions without it."""
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    index = -100 if ignore_index is None else ignore_index
    return torch.nn.functional.cross_entropy(logits, target, ignore_index=index, **options)


# --- Memory layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", [*deep("sum"), "none"])
def test_every_operand_has_strides_of_its_own(loss_backend, reduction):
    (input, weight, bias), target = tensors_of(9, 8, 33, torch.float32)
    of_class, grad = torch.rand(33) + 0.5, torch.randn(9)
    input, weight, bias, of_class, grad = of_own_strides(input, weight, bias, of_class, grad)
    target = torch.stack((target, torch.full_like(target, 99)), 1)[:, 0]
    options = dict(weight=of_class, label_smoothing=0.2)
    check((input, weight, bias), target, tokens=2, reduction="none", grad=grad, **options)
    check((input.t().contiguous().t(), weight.t().contiguous().t(), bias), target, tokens=2, reduction=reduction)


def test_a_weight_of_rows_far_apart(loss_backend):
    (input, weight, _), target = tensors_of(5, 8, 33, torch.float32, bias=False)
    wide = torch.full((33, 24), torch.nan)
    wide[:, 8:16] = weight
    check((input, wide[:, 8:16], None), target, tokens=2, reduction="sum")


# --- Errors ---------------------------------------------------------------------------------------------------------

# what is wrong -> the call, and words of the message
BAD_CALLS = {
    "input is a list": (lambda f, x, w, y: f([1.0], w, y), ("input", "list")),
    "weight is None": (lambda f, x, w, y: f(x, None, y), ("linear_weight", "NoneType")),
    "target is a list": (lambda f, x, w, y: f(x, w, [1, 2]), ("target", "list")),
    "input has three dimensions": (lambda f, x, w, y: f(x[None], w, y), ("input", "1 or 2", "got 3")),
    "weight has one dimension": (lambda f, x, w, y: f(x, w[0], y), ("linear_weight", "at least 2", "got 1")),
    "other widths": (lambda f, x, w, y: f(x[:, :3], w, y), ("in_features", "3", "5")),
    "bias is too long": (lambda f, x, w, y: f(x, w, y, linear_bias=torch.ones(8)), ("linear_bias", "(7,)", "(8,)")),
    "bias is a list": (lambda f, x, w, y: f(x, w, y, linear_bias=[1.0]), ("linear_bias", "list")),
    "too few targets": (lambda f, x, w, y: f(x, w, y[:3]), ("batch_size", "4", "3")),
    "targets are int32": (lambda f, x, w, y: f(x, w, y.int()), ()),
    "targets are floats": (lambda f, x, w, y: f(x, w, y.float()), ()),
    "ignore_index beside probabilities": (
        lambda f, x, w, y: f(x, w, torch.rand(4, 7), ignore_index=1),
        ("ignore_index",),
    ),
    "weight of too many classes": (lambda f, x, w, y: f(x, w, y, weight=torch.ones(8)), ("weight", "7", "8")),
    "weight is float64": (lambda f, x, w, y: f(x, w, y, weight=torch.ones(7).double()), ()),
    "linear_weight is float64": (lambda f, x, w, y: f(x, w.double(), y), ()),
    "bias is float64": (lambda f, x, w, y: f(x, w, y, linear_bias=torch.ones(7).double()), ()),
    "reduction is none of the three": (lambda f, x, w, y: f(x, w, y, reduction="max"), ("reduction", "max")),
    "smoothing above 1": (lambda f, x, w, y: f(x, w, y, label_smoothing=1.5), ("label_smoothing", "1.5")),
    "a class too far": (lambda f, x, w, y: f(x, w, y + 7), ("out of bounds",)),
    "a class below 0": (lambda f, x, w, y: f(x, w, y - 9), ("out of bounds",)),
    "options by place": (lambda f, x, w, y: f(x, w, y, None), ()),
    "an unknown name": (lambda f, x, w, y: f(x, w, y, bias=None), ()),
}


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("mistake", BAD_CALLS)
def test_mistakes_raise_what_pytorch_raises(mistake, chunks, monkeypatch):
    if chunks:
        monkeypatch.setattr(contract, "SMALL", 0)
    call, words = BAD_CALLS[mistake]
    x, w, y = torch.randn(4, 5), torch.randn(7, 5), torch.tensor([1, 6, 0, 3])
    ours = raised_by(call, F.linear_cross_entropy, x, w, y)
    for word in words:
        assert word in str(ours), str(ours)
    if THEIRS is not None and "list" not in mistake and "None" not in mistake:
        theirs = raised_by(call, THEIRS, x, w, y)
        assert type(ours) is type(theirs), f"{ours!r}; PyTorch: {theirs!r}"


@pytest.mark.parametrize(
    ("options", "kind", "word"),
    [
        (dict(softcap=0.0), ValueError, "softcap"),
        (dict(softcap="1"), TypeError, "softcap"),
        (dict(z_loss=-1.0), ValueError, "z_loss"),
        (dict(logit_scale=None), TypeError, "logit_scale"),
        (dict(ignore_index=1.5), TypeError, "ignore_index"),
        (dict(loss_dtype=torch.int64), TypeError, "loss_dtype"),
        (dict(loss_dtype="float32"), TypeError, "loss_dtype"),
        (dict(group="x"), TypeError, "group is a str; it needs to be a torch.distributed process group"),
        (dict(options=3), TypeError, "options is a int without allow_retain_graph"),
    ],
    ids=str,
)
def test_what_extensions_need(options, kind, word):
    error = raised_by(F.linear_cross_entropy, torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]), **options)
    assert type(error) is kind and word in str(error), repr(error)


@needs_theirs
def test_the_signature_is_pytorchs():
    import inspect

    theirs = inspect.signature(THEIRS).parameters
    ours = inspect.signature(F.linear_cross_entropy).parameters
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ours.keys() - theirs.keys())


# --- What is not one class of a vocabulary a row --------------------------------------------------------------------


@needs_theirs
@pytest.mark.parametrize("options", [{}, dict(reduction="sum"), dict(label_smoothing=0.1)], ids=str)
def test_probabilities_and_dimensions_are_pytorchs(options):
    x, w = torch.randn(4, 5), torch.randn(7, 5)
    for arguments in (
        (x, w, torch.rand(4, 7)),
        (x[0], w, torch.rand(7)),
        (x, torch.randn(7, 2, 3, 5), torch.randint(7, (4, 2, 3))),
        (x, torch.randn(7, 2, 5), torch.rand(4, 7, 2)),
    ):
        bias = torch.randn(arguments[1].shape[:-1])
        ours = F.linear_cross_entropy(*arguments, linear_bias=bias, **options)
        assert torch.equal(ours, THEIRS(*arguments, linear_bias=bias, **options))
        zero = F.linear_cross_entropy(*arguments, linear_bias=bias, softcap=1e9, **options)
        torch.testing.assert_close(zero, ours, rtol=1e-4, atol=1e-4)


def test_options_without_effect_warn():
    x, w = torch.randn(4, 5), torch.randn(7, 2, 5)
    with pytest.warns(UserWarning, match="options have no effect: linear_weight has shape .7, 2, 5., for a loss of 1"):
        F.linear_cross_entropy(x, w, torch.randint(7, (4, 2)), options=cut(2))
    with pytest.warns(UserWarning, match="options have no effect: target contains probabilities"):
        F.linear_cross_entropy(x, w[:, 0], torch.rand(4, 7), options=cut(2))


def test_z_loss_and_stats_of_probabilities():
    x, w, target = torch.randn(4, 5).double(), torch.randn(7, 5).double(), torch.rand(4, 7).double()
    loss, stats = F.linear_cross_entropy(x, w, target, z_loss=0.1, softcap=2.0, return_stats=True)
    s = 2.0 * torch.tanh(x @ w.T / 2.0)
    lse = torch.logsumexp(s, 1)
    torch.testing.assert_close(loss, (target * (lse[:, None] - s)).sum() / 4 + 0.1 * lse.square().mean())
    torch.testing.assert_close(stats.lse, lse)


# --- options --------------------------------------------------------------------------------------------------------


@needs_theirs
@pytest.mark.parametrize("method", ["aspect_ratio", "aspect_ratio:2", "aspect_ratio:64", None])
@pytest.mark.parametrize("sizes", [(8192, 4096, 128256), (100, 32, 1000), (7, 64, 50), (1, 1, 1)])
def test_a_chunking_method_gives_pytorchs_chunks(method, sizes):
    rows, width, classes = sizes
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=method)
    theirs = options._adjust(rows, width, classes, torch.float32).batch_chunk_size
    found = checks.chunk_elements(options, rows, width, classes, torch.empty(0))
    assert found == theirs * classes


def test_what_options_ask_of_chunks(monkeypatch):
    """So many tokens of the whole vocabulary: of whole rows as many, of all rows as many classes as are no more."""
    seen = []
    real = contract.chunks.vocabulary.logits
    monkeypatch.setattr(
        contract.chunks.vocabulary, "logits", lambda *given: seen.append(given[2].shape[0]) or real(*given)
    )
    (input, weight, _), target = tensors_of(12, 5, 40, torch.float32, ignored=False)
    with torch.no_grad():
        F.linear_cross_entropy(input, weight, target, options=cut(3))
        assert seen == [10, 10, 10, 10]
        seen.clear()
        F.linear_cross_entropy(input, weight, target, options=cut(None))
        assert seen == [40]
        seen.clear()
        F.linear_cross_entropy(input, weight, target, options=cut(None, chunking_method=None))
        assert seen == [40]


@pytest.mark.parametrize(
    ("fields", "kind", "word"),
    [
        (dict(acc_policy="fast"), ValueError, "acc_policy is 'fast'"),
        (dict(tokens=0), ValueError, "batch_chunk_size is 0"),
        (dict(tokens=2.0), ValueError, "batch_chunk_size is 2.0"),
        (dict(chunking_method="halves"), ValueError, "chunking_method is 'halves'"),
        (dict(chunking_method="aspect_ratio:0"), ValueError, "chunking_method"),
        (dict(tokens=3, chunking_method="aspect_ratio"), ValueError, "gives 4"),
        (dict(acc_dtype=torch.bfloat16), RuntimeError, "acc_dtype is torch.bfloat16"),
    ],
    ids=str,
)
def test_options_that_are_none(fields, kind, word):
    error = raised_by(
        F.linear_cross_entropy, torch.ones(12, 5), torch.ones(15, 5), torch.zeros(12).long(), options=cut(**fields)
    )
    assert type(error) is kind and word in str(error), repr(error)


@pytest.mark.parametrize("policy", ["accurate", "balanced", "compact", "auto"])
@pytest.mark.parametrize("retain", [True, False])
def test_policies_change_nothing(policy, retain):
    tensors, target = tensors_of(9, 5, 20, torch.bfloat16)
    runs = []
    for options in (cut(2), cut(2, acc_policy=policy, acc_dtype=torch.float32, allow_retain_graph=retain)):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        loss = F.linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2], options=options)
        runs.append([loss, *gradients(loss, leaves)])
    assert all(torch.equal(first, second) for first, second in zip(*runs))


# --- Dtypes, autocast -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_loss_has_pytorchs_dtype(dtype, reduction):
    (input, weight, _), target = tensors_of(6, 5, 9, dtype)
    for options in ({}, dict(softcap=3.0), dict(z_loss=0.1)):
        for cuts in (None, cut(2)):
            loss = F.linear_cross_entropy(input, weight, target, reduction=reduction, options=cuts, **options)
            assert loss.dtype == dtype
            loss = F.linear_cross_entropy(
                input, weight, target, reduction=reduction, options=cuts, loss_dtype=torch.float32, **options
            )
            assert loss.dtype == torch.float32


@pytest.mark.parametrize("cuts", [None, cut(2)], ids=["whole", "chunks"])
@pytest.mark.parametrize("weighted", [False, True])
def test_autocast_as_linear(cuts, weighted):
    tensors, target = tensors_of(9, 8, 40, torch.float32)
    weight = torch.rand(40) + 0.5 if weighted else None
    runs = []
    for call in (
        lambda x, w, b: F.linear_cross_entropy(x, w, target, linear_bias=b, weight=weight, options=cuts),
        lambda x, w, b: whole(x, w, target, linear_bias=b, weight=weight),
    ):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = call(*leaves)
        runs.append([loss, *gradients(loss, leaves)])
    for ours, theirs in zip(*runs):
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3)


# --- Transforms, subclasses, compilers ------------------------------------------------------------------------------


def test_transforms_and_forward_mode_take_pytorchs_way(monkeypatch):
    monkeypatch.setattr(contract, "SMALL", 0)
    (input, weight, _), target = tensors_of(6, 5, 9, torch.float64)
    loss = lambda x: F.linear_cross_entropy(x, weight, target)  # noqa: E731
    leaf = input.detach().requires_grad_()
    (dx,) = gradients(loss(leaf), [leaf])
    torch.testing.assert_close(torch.func.grad(loss)(input), dx)
    tangent = torch.randn_like(input)
    _, derivative = torch.func.jvp(loss, (input,), (tangent,))
    torch.testing.assert_close(derivative, (dx * tangent).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input, tangent)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent, derivative)
    each = torch.func.vmap(lambda x, y: F.linear_cross_entropy(x, weight, y))(input, target.clamp(0))
    torch.testing.assert_close(each, F.linear_cross_entropy(input, weight, target.clamp(0), reduction="none"))


class Named(torch.Tensor):
    pass


def test_a_subclass_takes_pytorchs_way(monkeypatch):
    monkeypatch.setattr(contract, "SMALL", 0)
    (input, weight, _), target = tensors_of(6, 5, 9, torch.float32)
    loss = F.linear_cross_entropy(input.as_subclass(Named), weight, target)
    assert type(loss) is Named and torch.equal(loss.as_subclass(torch.Tensor), whole(input, weight, target))


@pytest.mark.parametrize("reduction", ["mean", *deep("none")])
def test_compiles_to_one_graph(loss_backend, reduction):
    tensors, target = tensors_of(9, 8, 40, torch.float32)
    options = dict(reduction=reduction, z_loss=0.1, options=cut(2), return_stats=True)

    def call(x, w, b):
        loss, stats = F.linear_cross_entropy(x, w, target, linear_bias=b, **options)
        return loss, *stats

    torch._dynamo.reset()
    runs = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        loss, *stats = function(*leaves)
        # Not 1, so that what the forward has computed is multiplied.
        grads = gradients(loss, leaves, torch.full_like(loss, 0.5))
        runs.append([loss, *stats, *grads])
    for eager, compiled in zip(*runs):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", *deep("none")])
def test_registered_ops(loss_backend, reduction):
    forward = torch.ops.gptkern.linear_cross_entropy_forward.default
    backward = torch.ops.gptkern.linear_cross_entropy_backward.default
    (input, weight, bias), target = tensors_of(5, 4, 9, torch.float32)
    tests = {}
    for ahead in (False, True) if (loss_backend, reduction) == ("torch", "mean") else (False,):
        call = (
            input, weight, target, bias, None, reduction, IGNORED, 0.1, 0.01, 2.0, 1.0, torch.float32, True, 18, None,
            ahead, ahead, ahead, loss_backend,
        )  # fmt: skip
        torch.library.opcheck(forward, call, **tests)
        loss, maximum, total, miss, *_ = forward(*call)
        torch.library.opcheck(
            backward, (torch.ones_like(loss), maximum, total, miss, True, ahead, True, *call), **tests
        )
        tests = {"test_utils": ("test_schema", "test_faketensor")}


def test_explained_without_running(loss_backend):
    (input, weight, _), target = tensors_of(5, 4, 9, torch.float32)
    assert gptkern.explain(F.linear_cross_entropy, input, weight, target, options=cut()).backend == loss_backend
    if THEIRS is not None:
        assert gptkern.explain(THEIRS, input, weight, target, options=cut()).backend == loss_backend


# --- PyTorch's own samples ------------------------------------------------------------------------------------------


def _wide(value, dtype):
    """A leaf of this dtype with the tensor's values; what is no floating-point tensor is itself."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype, copy=True).requires_grad_(value.requires_grad)


@needs_theirs
@pytest.mark.deep
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["", "chunked", "chunked_none"])
def test_pytorchs_samples(loss_backend, monkeypatch, variant, dtype):
    from torch.testing._internal.common_methods_invocations import op_db

    if (loss_backend, dtype) == ("triton", torch.float64):
        return
    monkeypatch.setattr(contract, "SMALL", 0)
    monkeypatch.setattr(few_logits, "MOST", 0)
    (info,) = (op for op in op_db if (op.name, op.variant_test_name) == ("nn.functional.linear_cross_entropy", variant))
    seen = cuts = 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        arguments = sample.input, *sample.args
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            ours = F.linear_cross_entropy(*arguments, **sample.kwargs)
        is_cut = "LinearCrossEntropyFunction" in type(ours.grad_fn.next_functions[0][0] or ours.grad_fn).__name__
        is_cut |= "LinearCrossEntropyFunction" in type(ours.grad_fn).__name__
        # Where logits are cut, float32 of the same tensors; where they are whole, PyTorch's own bits.
        dtype_of_theirs = torch.promote_types(dtype, torch.float32) if is_cut else dtype
        wide = [_wide(tensor, dtype_of_theirs) for tensor in arguments]
        kwargs = {name: _wide(one, dtype_of_theirs) for name, one in sample.kwargs.items() if name != "options"}
        theirs = THEIRS(*wide, **kwargs)
        tolerances = dict(rtol=1.6e-2, atol=1e-3) if dtype.itemsize == 2 else {}
        tolerances = tolerances if is_cut else dict(rtol=0, atol=0)
        torch.testing.assert_close(ours, theirs.to(dtype), **tolerances)
        grad = torch.ones_like(ours)
        leaves, right = (
            [one for one in (*given, options.get("linear_bias")) if one is not None and one.requires_grad]
            for given, options in ((arguments, sample.kwargs), (wide, kwargs))
        )
        for one, other in zip(gradients(ours, leaves, grad), gradients(theirs, right, grad.to(theirs.dtype))):
            torch.testing.assert_close(one, other.to(dtype), **tolerances)
        cuts += is_cut
        seen += 1
    assert seen > 10 and cuts > 3
    for error in info.error_inputs_func(info, "cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            F.linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)


def test_a_loss_of_all_rows_ignored_is_nan_and_its_gradient_zero(loss_backend):
    (input, weight, _), target = tensors_of(4, 5, 9, torch.float32)
    leaf = input.requires_grad_()
    loss = F.linear_cross_entropy(leaf, weight, torch.full_like(target, IGNORED), options=cut(2))
    assert math.isnan(loss.item()) and not gradients(loss, [leaf])[0].any()


def test_gradients_of_a_graph_that_is_kept_are_the_callers_own(monkeypatch):
    monkeypatch.setattr(contract, "SMALL", 0)
    x, w = torch.randn(6, 4), torch.randn(9, 4, requires_grad=True)
    loss = F.linear_cross_entropy(x, w, torch.arange(6), reduction="sum")
    (first,) = torch.autograd.grad(loss, w, retain_graph=True)
    expected = first.clone()
    first.data.mul_(3.0)
    (second,) = torch.autograd.grad(loss, w)
    assert torch.equal(second, expected)
