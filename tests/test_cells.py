"""What is measured: every operator's cells, inputs and implementations, and the whole model's. Nothing is timed."""

from __future__ import annotations

import itertools

import pytest
import torch

import gptkern
from gptkern import operators
from gptkern.measuring import model, peers, runner
from gptkern.measuring.cells import Implementation

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
def test_what_users_write_is_the_same_function(operator):
    """`plain` and `written_out`, which gptkern is timed against: a wrong one would be fast for nothing.

    int8_linear has none: its peers are given the weight that was quantised.
    """
    problem = operators.problem(operator)
    small = {problem.for_float64(timed.sizes) for kind in KINDS for timed in problem.cells(kind, "full")}
    for sizes in small:
        made = problem.inputs(sizes, torch.float32, torch.Generator().manual_seed(0))
        expected = made.reference(*made.tensors.values())
        for written in (problem.plain(sizes), problem.written_out(sizes)):
            for actual, right in zip(results(written(*made.arguments)), results(expected), strict=True):
                torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-4)


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


# --- The model ------------------------------------------------------------------------------------------------------


def prepared(direction, name, monkeypatch):
    """(the implementation, its inputs, the stock model that it was made of)"""
    made, new = [], model.new_model
    monkeypatch.setattr(model, "new_model", lambda *given: made.append(new(*given)) or made[-1])
    cell = next(cell for cell in model.cells(KIND, "smoke") if cell.direction == direction)
    implementation = model.implementations(cell, KIND)[name]
    return implementation, implementation.prepare(*model.inputs(cell, KIND)), made[0]


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
