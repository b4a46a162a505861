"""A block's sum and the norm that comes next in another module: one call where nobody can see it, else apart."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from residual_models import WIDTH, Block, noted_calls
from sharp import deep
from torch.utils.checkpoint import checkpoint

import gptkern
from gptkern.backends import handing
from gptkern.functional import layer_norm
from gptkern.swapping import SWAPPABLE

APART = [operator for operator in SWAPPABLE if operator != "residual_norm"]
LAYERS = 3


@pytest.fixture(autouse=True)
def launchers():
    """Where PyTorch's own operators run, nothing is computed together."""
    with gptkern.backend("torch:launchers"):
        yield


class Model(torch.nn.Module):
    """Blocks in a loop and a norm after them; `between` is what the model's own code does with each block's result."""

    def __init__(self, norm=torch.nn.LayerNorm, block=Block):
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.ModuleList(block(norm) for _ in range(LAYERS))
        self.last_norm = norm(WIDTH)
        self.head = torch.nn.Linear(WIDTH, WIDTH)
        self.between = None

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if self.between is not None:
                x = self.between(self, index, x)
        return self.head(self.last_norm(x))


def pair(model=None):
    """Two copies: swapped, and swapped without "residual_norm"."""
    model = Model() if model is None else model
    together, apart = copy.deepcopy(model), copy.deepcopy(model)
    report = gptkern.swap(together)
    gptkern.swap(apart, ops=APART)
    return together, apart, report


def hidden(seed=5):
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


def results(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = model(x)
    (output * torch.linspace(-1, 1, WIDTH)).sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected):
        assert torch.equal(ours, theirs)


def fused(model, x, monkeypatch, mode=torch.no_grad) -> int:
    """How many of the norms are computed together with a sum."""
    with gptkern.backend("triton"), noted_calls(monkeypatch) as found, mode():
        model.eval()(x)
    return [has_residual for _, has_residual in found].count(True)


@pytest.mark.parametrize("norm, name", [(torch.nn.LayerNorm, "layer_norm"), (torch.nn.RMSNorm, "rms_norm")])
@pytest.mark.parametrize("training", [False, True])
def test_all_norms_but_the_first(monkeypatch, norm, name, training):
    together, apart, report = pair(Model(norm).train(training))
    assert {entry.name: entry.replacement for entry in report.replaced if entry.operator == "residual_norm"} == {
        "(model)": "Model, routed, sums with the norms after its blocks",
        "layers.0": "Block, routed, sums with second_norm, the next first_norm",
        "layers.1": "Block, routed, sums with second_norm, the next first_norm",
        "layers.2": "Block, routed, sums with second_norm, the model's last_norm",
    }
    x = hidden()
    with gptkern.backend("triton"), noted_calls(monkeypatch) as found:
        actual = results(together, x)
    found = found[: 1 + 2 * LAYERS]
    assert found == [(name, False)] + [(name, True)] * (2 * LAYERS)
    for ours, theirs in zip(actual, results(apart, x)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert_same(results(together, x), results(apart, x))


class Parallel(Block):
    def forward(self, x):
        return x + self.mix(self.first_norm(x)) + self.feed(self.second_norm(x))


class Difference(Block):
    def forward(self, x):
        x = x - self.mix(self.first_norm(x))
        return x - self.feed(self.second_norm(x))


class ChangedFirst(Block):
    def forward(self, x):
        x = x * 2
        x = x + self.mix(self.first_norm(x))
        return x + self.feed(self.second_norm(x))


@pytest.mark.parametrize("block, count", [(Parallel, LAYERS), (Difference, 0), (ChangedFirst, LAYERS + 1)])
def test_other_blocks(monkeypatch, block, count):
    together, apart, _ = pair(Model(block=block))
    assert fused(together, hidden(), monkeypatch) == count
    assert_same(results(together, hidden()), results(apart, hidden()))


# --- Who looks between two blocks -------------------------------------------------------------------------------------


def scaled(model, index, x):
    return x * 2


def in_place(model, index, x):
    with torch.no_grad():
        return x.mul_(2) if not x.requires_grad else x.clone().mul_(2)


def of_another_tensor(model, index, x):
    return x.clone()


def after_a_norm_of_another(model, index, x):
    model.last_norm(torch.zeros_like(x))
    return x


def through_another_norm(model, index, x):
    return model.last_norm(x)


def with_other_weights(model, index, x):
    following = model.layers[index + 1].first_norm if index + 1 < LAYERS else model.last_norm
    if not x.requires_grad:
        with torch.no_grad():
            following.weight.mul_(2)
    return x


def with_another_parameter(model, index, x):
    following = model.layers[index + 1].first_norm if index + 1 < LAYERS else model.last_norm
    following.weight = torch.nn.Parameter(torch.full((WIDTH,), 3.0))
    return x


def without_gradients_from_here(model, index, x):
    torch.set_grad_enabled(False)
    return x


BETWEEN = [
    scaled, in_place, of_another_tensor, after_a_norm_of_another, through_another_norm, with_other_weights,
    with_another_parameter,
]  # fmt: skip


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_a_models_own_code_does_in_between_counts(between, mode):
    together, apart, _ = pair()
    outputs = []
    for model in (together, apart):
        model.between = between
        with mode():
            outputs.append(model.eval()(hidden().requires_grad_(mode is torch.enable_grad)).clone())
    assert torch.equal(*outputs)
    assert handing.thread.handed is None


def test_another_norm_without_parameters_has_another_eps():
    model = Model(lambda width: torch.nn.LayerNorm(width, elementwise_affine=False))
    model.last_norm.eps = 1.0
    together, apart, _ = pair(model.eval())
    together.between = apart.between = through_another_norm
    with torch.no_grad():
        assert torch.equal(together(hidden()), apart(hidden()))


def test_gradients_that_end_in_between():
    together, apart, _ = pair()
    found = []
    for model in (together, apart):
        model.between = without_gradients_from_here
        with torch.enable_grad():
            output = model(hidden().requires_grad_())
        found.append(output.requires_grad)
    assert found == [False, False]


def test_gradients_that_begin_in_between():
    together, apart, _ = pair()
    found = []
    for model in (together, apart):
        model.between = lambda model, index, x: (torch.set_grad_enabled(True), x)[1]
        with torch.no_grad():
            output = model(hidden())
            output.sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert_same(*found)


def test_hooks_of_blocks_and_norms_see_and_change_what_they_did(monkeypatch):
    x = hidden()
    for place in ("layers.0", "layers.1", "layers.1.first_norm", "last_norm"):
        for kind in ("register_forward_hook", "register_forward_pre_hook"):
            together, apart, _ = pair()
            outputs = []
            for model in (together, apart):
                seen = []

                def hook(module, args, output=None, seen=seen):
                    value = args[0] if output is None else output
                    seen.append(value.clone())
                    with torch.no_grad():
                        return value.mul_(2)

                getattr(model.get_submodule(place), kind)(hook)
                with torch.inference_mode():
                    outputs.append([model.eval()(x.clone()), *seen])
            assert_same(*outputs)


def test_without_versions_nothing_waits(monkeypatch):
    """Of an inference tensor nobody could say whether it was changed."""
    together, _, _ = pair()
    assert fused(together, hidden(), monkeypatch, torch.inference_mode) == LAYERS
    assert fused(together, hidden(), monkeypatch) == 2 * LAYERS


def test_parameters_that_were_made_in_inference_mode():
    with torch.inference_mode():
        together, apart, _ = pair(Model().eval())
    with torch.no_grad():
        assert torch.equal(together(hidden()), apart(hidden()))


class Dropped(Model):
    def forward(self, x):
        for index, layer in enumerate(self.layers):
            if index != 1:
                x = layer(x)
        return self.head(self.last_norm(x))


class Sliced(Model):
    def forward(self, x):
        for layer in self.layers[:2]:
            x = layer(x)
        return self.head(self.last_norm(x))


class Backwards(Model):
    def forward(self, x):
        for index in range(LAYERS):
            x = self.layers[LAYERS - 1 - index](x)
        return self.head(self.last_norm(x))


@pytest.mark.parametrize("cls", [Dropped, Sliced, Backwards])
def test_layers_that_come_in_another_order(cls):
    together, apart, _ = pair(cls())
    assert_same(results(together, hidden()), results(apart, hidden()))
    assert handing.thread.handed is None


def test_layers_that_were_changed_after_the_swap(monkeypatch):
    together, apart, _ = pair()
    for model in (together, apart):
        del model.layers[1]
        model.layers.insert(1, model.layers[0])
    assert_same(results(together, hidden()), results(apart, hidden()))
    together, apart, _ = pair()
    for model in (together, apart):
        model.layers[1] = torch.nn.Softplus()
    assert_same(results(together, hidden()), results(apart, hidden()))


def test_a_block_that_is_called_alone_hands_nothing_on(monkeypatch):
    together, _, _ = pair()
    x = hidden()
    assert fused(together.layers[0], x, monkeypatch) == 1
    with torch.no_grad():
        summed = together.layers[0](x)
        together.layers[1].first_norm.weight.data.mul_(2)
        norm = together.layers[1].first_norm
        assert torch.equal(norm(summed), layer_norm(summed, (WIDTH,), norm.weight, norm.bias))
    assert handing.thread.handed is None


def test_nothing_waits_after_an_error():
    together, _, _ = pair()

    def fails(model, index, x):
        assert handing.thread.handed is not None
        raise KeyError

    together.between = fails
    with pytest.raises(KeyError):
        together(hidden())
    assert handing.thread.handed is None


# --- Activations that are computed again ------------------------------------------------------------------------------


class Checkpointed(Model):
    every, reentrant = 1, False

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            again = index % self.every == 0
            x = checkpoint(layer, x, use_reentrant=self.reentrant) if again else layer(x)
        return self.head(self.last_norm(x))


@pytest.mark.parametrize("every", [*deep(1), 2, *deep(3)])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", [*deep("torch"), "torch:launchers", "triton"])
@pytest.mark.parametrize("training", [False, True])
def test_activation_checkpoints(every, reentrant, backend, training):
    together, apart, _ = pair(Checkpointed().train(training))
    with gptkern.backend(backend):
        for model in (together, apart):
            model.every, model.reentrant = every, reentrant
        actual, expected = results(together, hidden()), results(apart, hidden())
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert backend == "triton" or torch.equal(ours, theirs)


def test_what_pytorch_runs_is_not_prepared():
    together, _, _ = pair()
    waiting = []
    together.between = lambda model, index, x: (waiting.append(handing.thread.handed), x)[1]
    for backend, count in ((None, 0), ("torch", 0), ("torch:launchers", LAYERS)):
        waiting.clear()
        with gptkern.backend(backend):
            together(hidden())
        assert len([found for found in waiting if found is not None]) == count


def test_tensors_that_are_saved_elsewhere():
    together, apart, _ = pair()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        assert_same(results(together, hidden()), results(apart, hidden()))


# --- In and out -------------------------------------------------------------------------------------------------------


def test_copies_pickles_and_threads(monkeypatch):
    together, apart, _ = pair()
    for again in (copy.deepcopy(together), pickle.loads(pickle.dumps(together))):
        assert fused(again, hidden(), monkeypatch) == 2 * LAYERS
        assert_same(results(again, hidden()), results(apart, hidden()))
    inputs = [hidden(seed) for seed in range(4)]
    with torch.no_grad():
        expected = [apart(x) for x in inputs]
    wrong = []

    def run(x, wanted):
        with torch.no_grad(), gptkern.backend("torch:launchers"):
            wrong.extend(index for index in range(20) if not torch.equal(together(x), wanted))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_unswap_brings_the_classes_back():
    model = Model()
    classes = [type(module) for module in model.modules()]
    gptkern.swap(model)
    assert type(model) is not Model
    gptkern.unswap(model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.deep
def test_compiled_in_one_graph():
    together, apart, _ = pair()
    graphs = []
    with torch.no_grad():
        compiled = torch.compile(together, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)
        torch.testing.assert_close(compiled(hidden()), apart(hidden()))
    assert len(graphs) == 1
    torch.compiler.reset()


def test_a_model_whose_blocks_have_another_norm_keeps_its_class():
    class Own(torch.nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Model(Own)
    report = gptkern.swap(model)
    assert type(model) is Model and type(model.layers[0]) is Block
    assert not any("residual_norm" in entry.operator for entry in report.replaced)


def test_whoever_keeps_a_sum_gets_its_whole_gradient(kernel_backend, device):
    """Every block's result: of the last, and of those whose norm is another block's."""
    model, kept = Model().to(device), []
    model.between = lambda model, index, x: kept.append(x) or x
    x, gradients = hidden().to(device), []
    for swapped in (False, True):
        if swapped:
            gptkern.swap(model)
        kept.clear()
        with gptkern.backend(kernel_backend if swapped else "torch"):
            output = model(x.clone().requires_grad_())
            for tensor in kept:
                tensor.retain_grad()
            output.square().sum().backward()
        gradients.append([tensor.grad for tensor in kept])
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
