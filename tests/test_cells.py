"""What is measured: every operator's cells, inputs and implementations, and the whole model's. Nothing is timed."""

from __future__ import annotations

import dataclasses
import itertools
import types
import weakref

import pytest
import torch
from sharp import deep
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gptkern
from gptkern import operators
from gptkern.backends.problem import Tuned
from gptkern.measuring import model, peers, runner, timing, tuning
from gptkern.measuring.cells import Implementation
from gptkern.measuring.tuning_tasks import ClassTask
from gptkern.models.gpt import GPT

KINDS, EXTENTS = ("cpu", "cuda"), ("smoke", "quick", "full")
KIND = "cuda" if torch.cuda.is_available() else "cpu"
# What float64 has room for: elements of the largest input, of attention's scores or of the model's logits.
MOST_ELEMENTS = 2**28

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_every_cell_is_complete(kind):
    panels = {}
    for operator in runner.OPERATORS:
        smoke, quick, full = (runner.module(operator).cells(kind, extent) for extent in EXTENTS)
        assert smoke and quick and set(quick) < set(full)
    for extent in EXTENTS:
        listed = runner.cells(kind, extent)
        assert len({cell.key for cell in listed}) == len(listed) >= len(runner.OPERATORS)
        for cell in listed:
            assert isinstance(cell.bytes, int) and cell.bytes > 0 and cell.flops > 0, cell.key
            assert cell.ceiling in ("copy", "float32", "bfloat16", "int8"), cell.key
            assert (cell.tokens is not None) == (cell.operator == "model"), cell.key
            if extent == "full":
                panels.setdefault((cell.operator, cell.panel, cell.direction, cell.dtype), []).append(cell)
    # Cells of one panel differ in the size that the panel is plotted over.
    for key, of_panel in panels.items():
        (x,) = {cell.x for cell in of_panel}
        assert len({cell.size(x) for cell in of_panel}) == len(of_panel), key


@kinds
@pytest.mark.parametrize("operator", runner.OPERATORS)
def test_every_cell_has_gptkern_and_a_peer(operator, kind):
    for extent in EXTENTS:
        for cell in runner.module(operator).cells(kind, extent):
            found = runner.module(operator).implementations(cell, kind)
            assert next(iter(found)) == "gptkern" and set(found) <= {"gptkern", *peers.NAMES}
            first, second = list(found.values())[:2]
            assert isinstance(first, Implementation) and isinstance(second, Implementation), cell.key
            # A smoke run shows that the bench runs; compiling would be all of its time.
            assert (extent == "smoke") == (len(found) == 2), cell.key


@pytest.mark.parametrize("operator", [name for name in runner.OPERATORS if name not in ("model", "int8_linear")])
@pytest.mark.parametrize("extent", ["smoke", *deep("full")])
def test_what_users_write_is_the_same_function(operator, extent):
    """`plain` and `written_out`, which gptkern is timed against: a wrong one would be fast for nothing.

    int8_linear has none: its peers are given the weight that was quantised.
    """
    problem = operators.problem(operator)
    small = {problem.for_float64(timed.sizes) for kind in KINDS for timed in problem.cells(kind, extent)}
    for sizes in small:
        made = problem.inputs(sizes, torch.float32, torch.Generator().manual_seed(0))
        expected = made.reference(*made.tensors.values())
        for written in (problem.plain(sizes), problem.written_out(sizes)):
            for actual, right in zip(results(written(*made.arguments)), results(expected), strict=True):
                torch.testing.assert_close(actual.to(right.dtype), right, rtol=1e-4, atol=1e-4)


def results(returned):
    return returned if isinstance(returned, tuple) else (returned,)


@kinds
def test_what_is_checked_is_as_hard_and_fits(kind):
    for cell in itertools.chain(*(runner.cells(kind, extent) for extent in EXTENTS)):
        module = runner.module(cell.operator)
        small = module.check_cell(cell)
        assert (small.operator, small.direction) == (cell.operator, cell.direction), cell.key
        assert module.check_cell(small) == small, cell.key
        sizes, of_cell = dict(small.sizes), dict(cell.sizes)
        for name in ("head_dim", "causal", "residual", "in_features", "mode", "interleaved", "rotary_dim"):
            assert sizes.get(name) == of_cell.get(name), cell.key
        if cell.operator == "model":
            config = model._config(small.size("model"))
            assert config.head_dim == model._config(cell.size("model")).head_dim, cell.key
            elements = config.vocab_size * sizes["batch"] * sizes["length"]
        else:
            assert small.dtype == cell.dtype, cell.key
            elements = max(small.bytes // 8, sizes.get("heads", 0) * sizes.get("length", 0) ** 2)
        assert elements <= MOST_ELEMENTS, cell.key


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_twin_is_checked_and_its_gradient_where_that_is_timed(monkeypatch, direction):
    cell = next(cell for cell in runner.cells("cpu", "full", ("softmax",)) if cell.direction == direction)
    room, softmax = runner.module("softmax"), operators.contract("softmax")
    right = softmax.TWIN

    def is_right():
        return all(error <= bound for *_, error, bound in room.checked(room.check_cell(cell)))

    assert is_right()
    # The right result, whose gradient is not.
    monkeypatch.setattr(
        softmax, "TWIN", lambda input, **options: right(input, **options) + 1e-3 * (input - input.detach())
    )
    assert is_right() is (direction == "forward")


@pytest.mark.parametrize("operator", [name for name in runner.OPERATORS if name != "model"])
def test_sets_of_every_operator_exceed_the_cache_by_what_a_call_is_handed(monkeypatch, operator):
    """What is timed and what is tuned, on a GPU with a cache of 30,000 bytes; an int8 weight counts, and once."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(L2_cache_size=30_000))
    room, problem, (cell, *_) = (
        runner.module(operator),
        operators.problem(operator),
        runner.cells("cpu", "smoke", (operator,)),
    )
    variant = tuning.Variant(ClassTask(operator, (), Tuned("forward", torch.float32, cell.of, cell.of)), "torch")
    generator = torch.Generator().manual_seed(0)
    for make in (lambda: room.inputs(cell, "cpu"), lambda: variant.inputs(generator)):
        sets = timing.sets_of_inputs(make, "cuda")
        one = timing.memory(sets[:1])
        made = problem.inputs(cell.of, torch.float32, generator)
        assert one == sum(tensor.numel() * tensor.element_size() for tensor in made.arguments)
        assert len(sets) == min(timing.MOST_SETS, max(2, -(-90_000 // one)))
    if operator == "int8_linear":
        assert one < 2 * made.constants["weight"].numel(), "most of it is the weight"


# --- The model ------------------------------------------------------------------------------------------------------


def prepared(direction, name, monkeypatch):
    """(the implementation, its inputs, the model that it was made of)"""
    made, new, beside = [], model.new_model, model._beside
    monkeypatch.setattr(model, "new_model", lambda *given: made.append(new(*given)) or made[-1])
    monkeypatch.setattr(model, "_beside", lambda stock: made.append(beside(stock)) or made[-1])
    cell = next(cell for cell in model.cells(KIND, "smoke") if cell.direction == direction)
    implementation = model.implementations(cell, KIND)[name]
    return implementation, implementation.prepare(*model.inputs(cell, KIND)), made[-1]


def test_a_training_step_can_be_repeated(monkeypatch):
    optimizers, new = [], model.optimizer_of
    monkeypatch.setattr(model, "optimizer_of", lambda *of, **at: optimizers.append(new(*of, **at)) or optimizers[-1])
    implementation, inputs, stock = prepared("training step", "gptkern", monkeypatch)
    before = {name: value.clone() for name, value in stock.state_dict().items()}
    gradients = [implementation.call(*inputs)[0].clone() for _ in range(2)]
    assert torch.equal(*gradients) and gradients[0].count_nonzero() > 0
    assert len(optimizers[0].state) == len(list(stock.parameters())), "AdamW stepped"
    # Every implementation has the same weights, which a step leaves alone.
    others = prepared("training step", "eager", monkeypatch)[2].state_dict()
    for name, value in stock.state_dict().items():
        assert torch.equal(value, before[name]) and torch.equal(value, others[name])


def test_generation_appends_the_likeliest_token(monkeypatch):
    implementation, (ids,), _ = prepared("generation", "gptkern", monkeypatch)
    logits, longer = implementation.call(ids)
    assert not logits.requires_grad
    assert torch.equal(longer[:, :-1], ids) and torch.equal(longer[:, -1], logits.argmax(-1))


def test_implementations_train_the_same_parameters_with_modules_of_their_own(monkeypatch):
    made, optimizers, new, beside = [], [], model.optimizer_of, model._beside
    monkeypatch.setattr(model, "optimizer_of", lambda *of, **at: optimizers.append(new(*of, **at)) or optimizers[-1])
    monkeypatch.setattr(model, "_beside", lambda stock: made.append((stock, beside(stock))) or made[-1][1])
    cell = next(cell for cell in model.cells(KIND, "smoke") if cell.direction == "training step")
    found = model.implementations(cell, KIND)
    tokens = model.inputs(cell, KIND)
    gradients = [found[name].call(*found[name].prepare(*tokens))[0].clone() for name in ("gptkern", "eager")]
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=1e-4)
    (stock, ours), (same, eager) = made
    assert stock is same and len(optimizers) == 1 and ours is not eager
    for one, other in ((stock, ours), (stock, eager)):
        assert all(map(lambda a, b: a is b, one.parameters(), other.parameters()))
        assert not set(one.modules()) & set(other.modules()) and other.lm_head.weight is other.token_embedding.weight
    swapped = [any(isinstance(part, gptkern.nn.LayerNorm) for part in each.modules()) for each in (stock, ours, eager)]
    assert swapped == [False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_a_gpu_can_be_captured(monkeypatch, kind):
    monkeypatch.setattr(model, "new_model", lambda config, device, dtype: GPT(config))
    cell = model.cells("cuda", "smoke")[0]
    _, optimizer = model._trained(cell, torch.device(kind))
    assert {group["capturable"] for group in optimizer.param_groups} == {kind == "cuda"}
    found = model.implementations(cell, kind).values()
    assert all(implementation.graph and implementation.or_events for implementation in found)


# --- Its memory -----------------------------------------------------------------------------------------------------


class Held(TorchDispatchMode):
    """Bytes of the tensors that are alive, and the most that were at a time; of fake ones nothing is allocated."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.sizes = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self._hold(result.untyped_storage())
        return results

    def _hold(self, storage):
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._release, storage._cdata)

    def _release(self, place):
        self.now -= self.sizes.pop(place)


def most_held(cell, swapped):
    """The bytes that training steps of a cell hold at most: the real ones, on fake tensors."""

    def change(own):
        if swapped:
            gptkern.swap(own)
        return own

    with FakeTensorMode(), Held() as held:
        stock = GPT(model._config(cell.size("model"))).train()
        optimizer = model.optimizer_of(stock, lr=0.0)
        call, prepare = model._training(cell, change, lambda device: (stock, optimizer))
        inputs = prepare(*model.inputs(cell, torch.device("cpu")))
        # In the second the moments are there from the start.
        for _ in range(2):
            call(*inputs)
    return held.peak


@pytest.mark.parametrize("swapped", [False, True], ids=["stock", "swapped"])
@pytest.mark.parametrize("name", model.GPU_BATCHES)
def test_the_memory_of_a_training_step_is_the_formula_s(monkeypatch, name, swapped):
    """Of few blocks with the largest batch: all of it, and what each more block takes."""
    batch, found = max(model.GPU_BATCHES[name]), []
    for layers in (1, 3):
        cut = f"{name}, cut to {layers}"
        monkeypatch.setitem(model.SMALL, cut, dataclasses.replace(model._config(name), layers=layers))
        held = most_held(model._training_cell("bfloat16", cut, batch), swapped)
        found.append((held, model.training_memory(cut, batch, graph=False)))
    # Swapped, attention widens to float32 on a CPU, block by block.
    more = [] if swapped else [[third - first for first, third in zip(*found)]]
    for held, formula in (*found, *more):
        assert held <= formula <= 1.3 * held


@pytest.mark.deep
@pytest.mark.parametrize("swapped", [False, True], ids=["stock", "swapped"])
@pytest.mark.parametrize("name, batch", [(name, batch) for name, found in model.GPU_BATCHES.items() for batch in found])
def test_the_memory_of_whole_models_is_the_formula_s(name, batch, swapped):
    held = most_held(model._training_cell("bfloat16", name, batch), swapped)
    assert held <= model.training_memory(name, batch, graph=False) <= 1.3 * held


def test_every_training_cell_fits_a_gpu_of_80_gb():
    cells = [cell for extent in EXTENTS for cell in model.cells("cuda", extent) if cell.direction == "training step"]
    assert {cell.size("model") for cell in cells} >= {"gpt2", "gpt3-1.3B"}
    for cell in cells:
        needed = model.training_memory(cell.size("model"), cell.size("batch"), model.graphed(cell))
        assert needed <= (1 - model.HEAD_ROOM) * 80e9, f"{cell.key}: {needed / 1e9:.0f} GB"
    # Both kinds are there: what has room for a graph beside a plain step, and what has not.
    assert {model.graphed(cell) for cell in cells} == {True, False}


@pytest.mark.parametrize("direction", ["training step", "generation"])
def test_the_swapped_model_is_checked(monkeypatch, direction):
    cell = next(cell for cell in model.cells(KIND, "smoke") if cell.direction == direction)
    ((_, error, bound),) = model.checked(model.check_cell(cell))
    assert error <= bound
    swap = gptkern.swap
    monkeypatch.setattr(gptkern, "swap", lambda model: swap(model) and model.final_norm.weight.data.mul_(1.001))
    ((_, error, bound),) = model.checked(model.check_cell(cell))
    assert error > bound


@pytest.mark.parametrize("direction", ["training step", "generation"])
def test_gptkern_s_model_is_swapped_and_eager_s_is_not(monkeypatch, direction):
    for name, swapped in (("gptkern", True), ("eager", False)):
        modules = list(prepared(direction, name, monkeypatch)[2].modules())
        assert any(isinstance(module, gptkern.nn.LayerNorm) for module in modules) == swapped
        int8 = any(isinstance(module, gptkern.nn.Int8Linear) for module in modules)
        assert int8 == (swapped and direction == "generation")
