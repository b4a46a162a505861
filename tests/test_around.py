"""What people put around a model, around a swapped one: compilers, checkpointing, autocast, copies, casts, threads."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading

import pytest
import torch
from model_zoo import CASES, EACH_WAY, PARAMETERS, parameters
from test_models import batch, built, calls_in, compare, results, structure
from torch.utils.checkpoint import checkpoint

import gptkern
from gptkern.backends import dispatch

PREVALENT = ("gpt", "gpt2", "llama")
prevalent = pytest.mark.parametrize("case", [p for p in PARAMETERS if p.id in PREVALENT])
gpt = next(case for case in CASES if case.name == "gpt")


def pair(case):
    """(stock, swapped) with the same weights, in training mode."""
    stock = built(case)
    swapped = copy.deepcopy(stock)
    gptkern.swap(swapped)
    return stock, swapped


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def graphs(case, model):
    """(breaks, graphs) of a forward with the loss."""
    ids, targets, _ = batch()
    torch.compiler.reset()
    explained = torch._dynamo.explain(case.run)(model, ids, targets)
    return explained.graph_break_count, explained.graph_count


@pytest.mark.parametrize("case", EACH_WAY)
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_swapped_model_is_one_graph(case):
    _, model = pair(case)
    assert graphs(case, model) == (0, 1)


@pytest.mark.parametrize("case", [p for p in parameters(fast=("gpt", "llama")) if p.id in PREVALENT])
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_computes_the_same(case):
    _, model = pair(case)
    ids, targets, _ = batch()
    expected = results(case, model, ids, targets, None)
    compiled = case._replace(run=torch.compile(case.run, fullgraph=True, backend="aot_eager"))
    compare(compiled, results(compiled, model, ids, targets, None), expected, exact=False)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_swapped_and_quantised_model_is_one_graph():
    _, model = pair(gpt)
    gptkern.quantize(model)
    ids, targets, _ = batch()
    expected = results(gpt, model, ids, targets, None)
    assert graphs(gpt, model) == (0, 1)
    torch.compiler.reset()
    compiled = gpt._replace(run=torch.compile(gpt.run, fullgraph=True, backend="aot_eager"))
    compare(compiled, results(compiled, model, ids, targets, None), expected, exact=False)


def breaking(ids):
    torch._dynamo.graph_break()
    return ids


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_graph_break_would_be_counted():
    _, model = pair(gpt)
    model.embedding_dropout.register_forward_pre_hook(lambda module, args: breaking(*args))
    assert graphs(gpt, model)[0] > 0


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_that_is_swapped_later_is_compiled_again(monkeypatch):
    """And one that is swapped back: the graph that was kept is that of another class."""
    ids, targets, _ = batch()
    model = built(gpt)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected = compiled(ids, targets)[1]
    gptkern.swap(compiled)
    assert calls_in(monkeypatch, lambda: torch.testing.assert_close(compiled(ids, targets)[1], expected)) > 0
    gptkern.unswap(compiled)
    assert calls_in(monkeypatch, lambda: torch.testing.assert_close(compiled(ids, targets)[1], expected)) == 0
    assert len(graphs) >= 2


# --- Activation checkpointing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensor hooks", "reentrant"])
@pytest.mark.parametrize("swap_first", [True, False], ids=["swap first", "checkpoint first"])
def test_checkpointed_blocks(reentrant, swap_first, monkeypatch):
    stock = built(gpt)
    ids, targets, _ = batch()
    expected = results(gpt, stock, ids, targets, None)
    model = copy.deepcopy(stock)
    if swap_first:
        gptkern.swap(model)
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=reentrant)
    if not swap_first:
        gptkern.swap(model)
    once = calls_in(monkeypatch, lambda: model(ids, targets))
    twice = calls_in(monkeypatch, lambda: compare(gpt, results(gpt, model, ids, targets, None), expected))
    # two blocks of two norms, an attention and a GELU each; a sum and its norm are one call, or the norm's alone
    blocks = 2 * (2 + 1 + 1)
    # the final norm and the loss lie outside of them, and are not computed again
    assert once == blocks + 2 == sum(gpt.calls.values())
    assert twice == once + blocks


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensor hooks", "reentrant"])
@pytest.mark.parametrize("swap_first", [True, False], ids=["swap first", "checkpoint first"])
@pytest.mark.parametrize("case", [p for p in PARAMETERS if p.id in ("gpt2", "llama")])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_of_transformers(case, reentrant, swap_first, monkeypatch):
    stock = built(case)
    ids, targets, _ = batch()
    expected = results(case, stock, ids, targets, None)
    model = copy.deepcopy(stock)
    if swap_first:
        gptkern.swap(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if not swap_first:
        gptkern.swap(model)
    once = calls_in(monkeypatch, lambda: case.run(model, ids, targets))
    twice = calls_in(monkeypatch, lambda: compare(case, results(case, model, ids, targets, None), expected))
    assert once == sum(case.calls.values())
    assert twice == once + once - 1, "all but the last norm are computed again"
    gptkern.unswap(model)
    compare(case, results(case, model, ids, targets, None), expected)


# --- Autocast and casts -----------------------------------------------------------------------------------------------

# Of bfloat16, half of its last place at 1; of float16 as well, which has three more digits.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Roundings that may add up on the way through two layers.
ROUNDINGS = 8


def assert_close_in(dtype, actual, expected):
    """Relative to the largest value: a few roundings apart."""
    assert actual.dtype == expected.dtype
    distance = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert distance <= ROUNDINGS * ROUNDING[dtype], f"{distance:.3g}"


@prevalent
def test_autocast(case):
    stock, swapped = pair(case)
    ids, targets, _ = batch()

    def run(model):
        with torch.autocast("cpu", torch.bfloat16):
            logits, loss = case.run(model, ids, targets)
        loss.backward()
        return logits, loss, gradients_of(model)

    (logits, loss, gradients), (stock_logits, stock_loss, stock_gradients) = run(swapped), run(stock)
    assert logits.dtype == torch.bfloat16
    assert_close_in(torch.bfloat16, logits, stock_logits)
    assert_close_in(torch.bfloat16, loss, stock_loss)
    assert gradients.keys() == stock_gradients.keys()
    for name, gradient in gradients.items():
        assert_close_in(torch.bfloat16, gradient, stock_gradients[name])


CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "to a device and a dtype": lambda model: model.to("cpu", torch.float16, non_blocking=True),
}


@pytest.mark.parametrize("cast", CASTS)
@prevalent
def test_a_cast_after_the_swap(case, cast):
    stock, swapped = pair(case)
    ids, _, _ = batch()
    before = {name: type(module) for name, module in swapped.named_modules()}
    stock, swapped = (CASTS[cast](model).eval() for model in (stock, swapped))
    assert {name: type(module) for name, module in swapped.named_modules()} == before
    with torch.no_grad():
        logits, expected = (case.run(model, ids)[0] for model in (swapped, stock))
    assert logits.dtype in ROUNDING
    assert_close_in(logits.dtype, logits, expected)
    gptkern.unswap(swapped)
    with torch.no_grad():
        assert torch.equal(case.run(swapped, ids)[0], expected)


@prevalent
def test_float64_after_the_swap(case):
    stock, swapped = (model.double() for model in pair(case))
    ids, targets, _ = batch()
    # Llama's own norm is computed in float32 whatever the model is in.
    exact = not case.inexact and "rms_norm" not in case.calls
    compare(case, results(case, swapped, ids, targets, None), results(case, stock, ids, targets, None), exact)


def test_through_the_meta_device_and_back():
    stock, swapped = pair(gpt)
    state = copy.deepcopy(stock.state_dict())
    swapped = swapped.to("meta").to_empty(device="cpu")
    swapped.lm_head.weight = swapped.token_embedding.weight
    swapped.load_state_dict(state)
    ids, targets, _ = batch()
    compare(gpt, results(gpt, swapped, ids, targets, None), results(gpt, stock, ids, targets, None))


# --- Copies -----------------------------------------------------------------------------------------------------------


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("how", COPIES)
@prevalent
def test_copies_are_swapped_and_of_their_own(case, how, monkeypatch):
    stock, model = pair(case)
    ids, targets, _ = batch()
    expected = results(case, stock, ids, targets, None)
    copied = COPIES[how](model)
    calls = sum(case.calls.values())
    assert calls_in(monkeypatch, lambda: compare(case, results(case, copied, ids, targets, None), expected)) == calls
    assert {p.data_ptr() for p in copied.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    # Neither's way back takes the other along.
    gptkern.unswap(copied)
    assert calls_in(monkeypatch, lambda: compare(case, results(case, copied, ids, targets, None), expected)) == 0
    assert calls_in(monkeypatch, lambda: compare(case, results(case, model, ids, targets, None), expected)) == calls
    assert {name: type(m) for name, m in copied.named_modules()} == {n: type(m) for n, m in stock.named_modules()}


# --- Threads ----------------------------------------------------------------------------------------------------------

STEPS = 8


def in_threads(*actions):
    """Runs the actions at once, and raises what any of them raised."""
    start, errors = threading.Barrier(len(actions)), []

    def run(action):
        try:
            start.wait()
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def calls_in_this_thread(action):
    with dispatch.choices_made() as choices:
        action()
    return len(choices)


def swapping_and_back(case):
    model = built(case)
    before, calls = structure(model), sum(case.calls.values())
    ids, targets, _ = batch()
    for _ in range(STEPS):
        gptkern.swap(model)
        # with the targets: a GPT's own loss is one of the calls
        assert calls_in_this_thread(lambda: case.run(model, ids, targets)) == calls
        gptkern.unswap(model)
        others = calls_in_this_thread(lambda: case.run(model, ids, targets))
        assert others == 0, "what others swapped is swapped here, too"
    assert structure(model) == before


@prevalent
@pytest.mark.parametrize("shared", [False, True], ids=["two models", "one model"])
def test_threads(case, shared):
    """Two of them compute forward and backward, while a third swaps another model of the same classes to and fro."""
    _, model = pair(case)
    models = (model, model if shared else copy.deepcopy(model))
    batches = [tuple(tensor.roll(shift, 1) for tensor in batch()[:2]) for shift in (0, 1)]

    def step(model, ids, targets):
        logits, loss = case.run(model, ids, targets)
        # torch.autograd.grad: .grad of a model that is shared would be everybody's
        return [logits, *torch.autograd.grad(loss, list(model.parameters()))]

    expected = [step(model, *tensors) for model, tensors in zip(models, batches)]

    def work(number):
        for _ in range(STEPS):
            for actual, wanted in zip(step(models[number], *batches[number]), expected[number]):
                assert torch.equal(actual, wanted)

    in_threads(lambda: work(0), lambda: work(1), lambda: swapping_and_back(case))


def test_a_forced_backend_and_a_route_are_their_thread_s_alone(monkeypatch):
    _, model = pair(gpt)
    stock = built(gpt)
    ids, _, _ = batch()
    inside, checked = threading.Event(), threading.Event()
    explain = functools.partial(gptkern.explain, torch.nn.functional.layer_norm, torch.zeros(2, 4), (4,))

    def forces():
        with gptkern.backend("torch"), gptkern.kernels():
            assert explain().reason == "asked for by name"
            inside.set()
            assert checked.wait(60)

    def does_not():
        try:
            assert inside.wait(60)
            assert explain().reason == "the input is on the CPU"
            assert calls_in(monkeypatch, lambda: stock(ids)) == 0
            model(ids)
        finally:
            checked.set()

    in_threads(forces, does_not)
