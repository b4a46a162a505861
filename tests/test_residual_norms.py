"""swap where a sum is normalised next: one call for both, and nobody who looks on sees a difference."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from residual_models import WIDTH, Block, noted_calls, sums_in
from sharp import deep
from swapped_models import SMALL, batch, class_names, gpt
from torch.utils.checkpoint import checkpoint

import gptkern
from gptkern.backends import dispatch
from gptkern.swapping import SWAPPABLE

APART = [operator for operator in SWAPPABLE if operator != "residual_norm"]


@pytest.fixture(autouse=True)
def launchers():
    """Where PyTorch's own operators run, nothing is computed together."""
    with gptkern.backend("torch:launchers"):
        yield


class Chain(torch.nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = torch.nn.Sequential(*blocks)

    def forward(self, x):
        return self.blocks(x)


def pair(model):
    """Two copies of a model: swapped, and swapped without "residual_norm"."""
    together, apart = copy.deepcopy(model), copy.deepcopy(model)
    report = gptkern.swap(together)
    gptkern.swap(apart, ops=APART)
    return together, apart, report


def hidden(dtype=torch.float32, **options):
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(5), **options).to(dtype)


def results(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = model(x)
    (output * torch.linspace(-1, 1, WIDTH, dtype=x.dtype)).sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected):
        assert torch.equal(ours, theirs)


def fused(model, x, monkeypatch, backend="triton") -> list[str]:
    with gptkern.backend(backend), noted_calls(monkeypatch) as found, torch.no_grad():
        model(x)
    return [name for name, has_residual in found if has_residual]


# --- What is computed together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm, name", [(torch.nn.LayerNorm, "layer_norm"), (torch.nn.RMSNorm, "rms_norm")])
def test_a_block_of_ones_own(monkeypatch, norm, name):
    torch.manual_seed(1)
    model, x = Chain(Block(norm), Block(norm)), hidden()
    together, apart, report = pair(model)
    assert [entry.replacement for entry in report.replaced if entry.operator == "residual_norm"] == [
        "Block, routed, sums with second_norm"
    ] * 2
    assert report.skipped == []
    assert fused(together, x, monkeypatch) == [name] * 2
    assert fused(apart, x, monkeypatch) == []
    assert_same(results(together, x), results(apart, x))
    with gptkern.backend("torch"):
        assert_same(results(together, x), results(model, x))
    with gptkern.backend("triton"):
        assert sums_in(lambda: together(x)) == 2 and sums_in(lambda: apart(x)) == 4


def test_gradients_of_kernels(kernel_backend, device):
    torch.manual_seed(1)
    model = Chain(Block(), Block(torch.nn.RMSNorm)).to(device)
    together, _, _ = pair(model)
    x = hidden().to(device)
    expected = results(model.cpu(), x.cpu())
    with gptkern.backend(kernel_backend):
        actual = results(together, x)
    for ours, theirs in zip(actual, expected):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)


class Seen(torch.nn.Module):
    """The sum is hooked after its norm was computed."""

    def __init__(self, norm, hook):
        super().__init__()
        self.norm, self.mix, self.hook = norm(WIDTH), torch.nn.Linear(WIDTH, WIDTH), hook

    def forward(self, x):
        x = x + self.mix(x)
        y = self.norm(x)
        x.register_hook(self.hook)
        return x + y


@pytest.mark.parametrize("norm", [torch.nn.LayerNorm, torch.nn.RMSNorm])
def test_a_hook_on_a_sum_gets_its_whole_gradient_and_changes_it(kernel_backend, device, norm):
    torch.manual_seed(1)
    seen = []
    model = Seen(norm, lambda g: seen.append(g) or g * torch.linspace(0, 2, WIDTH, device=device)).to(device)
    expected = results(model, hidden().to(device))
    gptkern.swap(model)
    with gptkern.backend(kernel_backend):
        actual = results(model, hidden().to(device))
    for ours, theirs in zip([*actual, seen[1]], [*expected, seen[0]], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Residual(Block):
    def forward(self, x):
        residual = x
        x = self.mix(self.first_norm(x))
        x = residual + x
        residual = x
        return residual + self.feed(self.second_norm(x))


class Scaled(Block):
    def forward(self, x):
        x = x + 0.5 * self.mix(self.first_norm(x))
        return x + self.feed(self.second_norm(x))


class Delegates(Block):
    def forward(self, x):
        return self.whole(x)

    def whole(self, x):
        x = x + self.mix(self.first_norm(x))
        return x + self.feed(self.second_norm(x))


class Difference(Block):
    def forward(self, x):
        x = x - self.mix(self.first_norm(x))
        return x - self.feed(self.second_norm(x))


class PostNorm(Block):
    def forward(self, x):
        x = self.first_norm(x + self.mix(x))
        return self.second_norm(x + self.feed(x))


class Parallel(Block):
    def forward(self, x):
        return x + self.mix(self.first_norm(x)) + self.feed(self.second_norm(x))


class ScaledSum(Block):
    def forward(self, x):
        x = (x + self.mix(self.first_norm(x))) * 0.5
        return x + self.feed(self.second_norm(x))


class InPlace(Block):
    def forward(self, x):
        y = x.clone()
        y += self.mix(self.first_norm(x))
        return y + self.feed(self.second_norm(y))


class Clamped(Block):
    def forward(self, x):
        x = x + self.mix(self.first_norm(x))
        x.clamp_(-0.5, 0.5)
        return x + self.feed(self.second_norm(x))


class Broadcast(Block):
    def forward(self, x):
        x = x + self.mix(self.first_norm(x[:1]))
        return x + self.feed(self.second_norm(x))


@pytest.mark.parametrize("cls", [Residual, Scaled, Delegates])
def test_other_blocks_that_are_known(monkeypatch, cls):
    torch.manual_seed(1)
    model, x = cls(), hidden()
    together, apart, _ = pair(model)
    assert fused(together, x, monkeypatch) == ["layer_norm"]
    assert_same(results(together, x), results(apart, x))


@pytest.mark.parametrize("cls", [Difference, PostNorm, Parallel, ScaledSum, InPlace, Clamped])
def test_blocks_that_differ_by_an_operation_are_left_alone(monkeypatch, cls):
    torch.manual_seed(1)
    model, x = cls(), hidden()
    together, apart, report = pair(model)
    assert not any("residual_norm" in entry.operator for entry in report.replaced)
    assert fused(together, x, monkeypatch) == []
    assert_same(results(together, x), results(apart, x))


@pytest.mark.parametrize("case", ["shapes", "dtypes", "no tensor", "a sparse one"])
def test_sums_of_unlike_operands_are_computed_apart(monkeypatch, case):
    torch.manual_seed(1)
    model, x = Broadcast() if case == "shapes" else Block(), hidden()
    together, apart, _ = pair(model)
    if case == "no tensor":
        for block in (together, apart):
            block.mix = Constant()
    if case == "dtypes":
        for block in (together, apart):
            block.mix.register_forward_hook(lambda module, args, output: output.half())
    if case == "a sparse one":
        for block in (together, apart):
            block.mix.register_forward_hook(lambda module, args, output: (output * 0).to_sparse())
    if case != "a sparse one":
        assert fused(together, x, monkeypatch) == []
    with torch.no_grad():
        assert torch.equal(together(x), apart(x))


class Constant(torch.nn.Module):
    def forward(self, x):
        return 0.5


# --- Who looks on -----------------------------------------------------------------------------------------------------


def seen_by_hooks(model, x):
    """What every module takes and gives, forward and backward, in order."""
    found = []

    def note(name):
        def pre(module, args):
            found.append((name, "in", *(a.detach().clone() for a in args)))

        def post(module, args, output):
            found.append((name, "out", output.detach().clone()))

        def back(module, into, out):
            found.append((name, "back", *(g.clone() for g in (*into, *out) if g is not None)))

        return pre, post, back

    handles = []
    for name, module in model.named_modules():
        pre, post, back = note(name)
        handles += [module.register_forward_pre_hook(pre), module.register_forward_hook(post)]
        handles.append(module.register_full_backward_hook(back))
    results(model, x)
    for handle in handles:
        handle.remove()
    return found


def test_hooks_of_every_module_see_the_same(monkeypatch):
    torch.manual_seed(1)
    together, apart, _ = pair(Chain(Block(), Block()))
    x = hidden()
    ours, theirs = seen_by_hooks(together, x), seen_by_hooks(apart, x)
    assert [entry[:2] for entry in ours] == [entry[:2] for entry in theirs]
    for mine, other in zip(ours, theirs):
        assert_same(mine[2:], other[2:])
    assert fused(together, x, monkeypatch) == ["layer_norm"] * 2


WATCHED = {
    "a forward hook": lambda norm: norm.register_forward_hook(lambda module, args, output: output * 2),
    "a hook before": lambda norm: norm.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "a backward hook": lambda norm: norm.register_full_backward_hook(lambda module, into, out: (into[0] * 2,)),
    "a backward hook before": lambda norm: norm.register_full_backward_pre_hook(lambda module, out: (out[0] * 2,)),
    "a forward of its own": lambda norm: setattr(norm, "forward", lambda x: x * 2),
    "a parametrisation": lambda norm: torch.nn.utils.parametrize.register_parametrization(
        norm, "weight", torch.nn.Softplus()
    ),
}


@pytest.mark.parametrize("watch", WATCHED.values(), ids=WATCHED)
def test_a_norm_that_is_more_than_its_forward_is_called(monkeypatch, watch):
    torch.manual_seed(1)
    together, apart, _ = pair(Block())
    x = hidden()
    before = results(together, x)
    for block in (together, apart):
        watch(block.second_norm)
    after = results(together, x)
    assert not torch.equal(before[1], after[1])
    assert_same(after, results(apart, x))
    assert fused(together, x, monkeypatch) == []


def test_global_hooks_see_every_norm():
    model, _, _ = pair(Block())
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        model(hidden())
    finally:
        handle.remove()
    assert model.second_norm in seen


class DoubledNorm(gptkern.nn.LayerNorm):
    def forward(self, input):
        return 2 * super().forward(input)


def test_a_subclass_of_a_twin_is_called(monkeypatch):
    together, apart, _ = pair(Block())
    for block in (together, apart):
        block.second_norm = DoubledNorm(WIDTH)
    assert fused(together, hidden(), monkeypatch) == []
    assert torch.equal(together(hidden()), apart(hidden()))


def test_a_norm_that_is_compiled_by_itself_is_called():
    together, apart, _ = pair(Block())
    calls = []
    together.second_norm.compile(backend=lambda graph, inputs: calls.append(graph) or graph)
    assert torch.equal(together(hidden()), apart(hidden())) and len(calls) == 1
    torch.compiler.reset()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", ["torch:launchers", "triton"])
def test_activation_checkpoints(monkeypatch, reentrant, backend):
    torch.manual_seed(1)
    block, _, _ = pair(Block())
    with gptkern.backend(backend):
        expected = results(block, hidden())
        block.zero_grad()
        assert_same(
            results(lambda_module(lambda x: checkpoint(block, x, use_reentrant=reentrant), block), hidden()), expected
        )


def lambda_module(forward, held):
    class Calls(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.held = held

        def forward(self, x):
            return forward(x)

    return Calls()


@pytest.mark.parametrize("every", [None, 1, 2])
def test_the_reference_gpt_trains_as_before(every):
    """With dropout, which is drawn between the projection and the sum; its activations kept or recomputed."""
    together, apart, _ = pair(gpt(dropout=0.2).train())
    found = []
    for model in (together, apart):
        model.recompute(every)
        torch.manual_seed(7)
        loss = model(*batch())[1]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert_same(*found)


def test_launches_of_the_reference_gpt(monkeypatch):
    together, apart, _ = pair(gpt().eval())
    ids, _ = batch()
    for model, norms in ((together, [True] * 4 + [False]), (apart, [False] * 5)):
        with gptkern.backend("triton"), noted_calls(monkeypatch) as found:
            model(ids)
        assert sorted((of for _, of in found), reverse=True) == norms
    with gptkern.backend("triton"):
        counts = [sums_in(lambda model=model: model(ids), SMALL["width"]) for model in (apart, together)]
    assert counts[0] - counts[1] == 4


def test_in_sixteen_bits_the_rounded_sum_is_normalised(kernel_backend, device):
    """As x + f(x) is, and what is returned beside it is the rounded sum."""
    torch.manual_seed(1)
    together, apart, _ = pair(Block().to(torch.bfloat16).to(device))
    x = (64 * hidden()).to(torch.bfloat16).to(device)
    seen = []
    for block in (together, apart):
        block.feed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        block.feed.register_forward_hook(lambda module, args, output: output * 0)
        with gptkern.backend(kernel_backend), torch.no_grad():
            seen.append(block(x))
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])


@pytest.mark.parametrize("backend", [None, "torch:launchers"])
def test_under_autocast(backend):
    torch.manual_seed(1)
    together, apart, _ = pair(Block())
    with torch.autocast("cpu", dtype=torch.bfloat16), gptkern.backend(backend):
        assert torch.equal(together(hidden()), apart(hidden()))


def test_torch_func_and_jit_trace(monkeypatch):
    torch.manual_seed(1)
    # Nothing is settled by where the tensors are, as on a GPU.
    monkeypatch.setattr(dispatch, "is_pytorchs", lambda tensor: False)
    together, apart, _ = pair(Block())
    x = hidden()
    with gptkern.backend(None):
        traced = torch.jit.trace(together, x)
        assert torch.equal(traced(x), apart(x))
        parameters = {name: parameter * 2 for name, parameter in together.named_parameters()}
        ours, theirs = (torch.func.functional_call(block, parameters, x) for block in (together, apart))
        assert torch.equal(ours, theirs)
        ours, theirs = (torch.func.jvp(block, (x,), (x,))[1] for block in (together, apart))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", [*deep(None, "torch:launchers"), "triton"])
def test_compiled_in_one_graph(backend):
    torch.manual_seed(1)
    together, apart, _ = pair(Chain(Block(), Block(torch.nn.RMSNorm)))
    x = hidden()
    graphs = []
    with gptkern.backend(backend), torch.no_grad():
        compiled = torch.compile(together, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)
        expected = apart(x)
        torch.testing.assert_close(compiled(x), expected)
        compiled(x)
    assert len(graphs) == 1
    torch.compiler.reset()


# --- In and out -------------------------------------------------------------------------------------------------------


def test_copies_and_pickles(monkeypatch):
    together, _, _ = pair(gpt())
    ids, _ = batch()
    for again in (copy.deepcopy(together), pickle.loads(pickle.dumps(together))):
        assert class_names(again) == class_names(together)
        assert torch.equal(again(ids)[0], together(ids)[0])
        with gptkern.backend("triton"), noted_calls(monkeypatch) as found:
            again(ids)
        assert [of for _, of in found].count(True) == 4


def test_unswap_brings_the_classes_back():
    model = gpt()
    classes, fields = class_names(model), {name: list(vars(m)) for name, m in model.named_modules()}
    gptkern.swap(model)
    assert class_names(model)["blocks.0"] is not classes["blocks.0"]
    gptkern.unswap(model)
    assert class_names(model) == classes and {name: list(vars(m)) for name, m in model.named_modules()} == fields


def test_without_its_norm_among_ops_a_sum_is_left_and_named():
    model = gpt()
    report = gptkern.swap(model, ops=["residual_norm"])
    assert report.replaced == []
    assert [(entry.name, entry.reason) for entry in report.skipped] == [
        (f"blocks.{i}", "perceptron_norm of its sum stays as it is: 'layer_norm' is not among ops") for i in range(2)
    ]
    gptkern.swap(model, ops=["layer_norm"])
    assert len(gptkern.swap(model, ops=["residual_norm"]).replaced) == 3


def test_a_norm_that_was_taken_back_alone_is_called(monkeypatch):
    together, apart, _ = pair(Block())
    gptkern.unswap(together.second_norm)
    assert fused(together, hidden(), monkeypatch) == []
    torch.testing.assert_close(together(hidden()), apart(hidden()))
    gptkern.swap(together, ops=["attention"])
    gptkern.swap(together)
    assert fused(together, hidden(), monkeypatch) == ["layer_norm"]
