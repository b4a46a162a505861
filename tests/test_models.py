"""swap on the models that people have: the same results, the way back, and proof that something was swapped."""

from __future__ import annotations

import pytest
import torch
from checking import Watched
from model_zoo import CASES, EACH_WAY, IGNORED, LAYERS, PADDING, PARAMETERS, VOCABULARY, Case, parameters

import gptkern
from gptkern.backends import dispatch
from gptkern.swapping.twins import SWAPPABLE

LENGTH = 12
PADDED = 4  # tokens of the first row
LEARNING_RATE = 0.1

# Of logits of size 1 and gradients below, in float32, where other operators than PyTorch's compute the same.
LOGITS = dict(rtol=1e-4, atol=1e-5)
GRADIENTS = dict(rtol=1e-3, atol=2e-6)

cases = pytest.mark.parametrize("case", PARAMETERS)


def built(case: Case, dropout: float = 0.0):
    torch.manual_seed(1)
    model = case.build(dropout)
    with torch.no_grad():
        # Biases and norms start as zeros and ones, which would hide that they were left out.
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batch(rows: int = 2, length: int = LENGTH, side: str | None = None):
    """ids and targets (rows, length), and padding: None, or False at the first or last tokens of the first row."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (rows, length + 1), generator=generator)
    ids, targets = ids[:, :-1].clone(), ids[:, 1:].clone()
    if side is None:
        return ids, targets, None
    padding = torch.ones(rows, length, dtype=torch.bool)
    padding[0, slice(None, PADDED) if side == "left" else slice(-PADDED, None)] = False
    return ids.masked_fill(~padding, PADDING), targets.masked_fill(~padding, IGNORED), padding


def results(case: Case, model, ids, targets, padding):
    """logits where there is a token, the loss, and every parameter's gradient."""
    model.zero_grad()
    logits, loss = case.run(model, ids, targets, padding)
    loss.backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    logits = logits.detach()
    return logits if padding is None else logits[padding], loss.detach(), gradients


def same_operators(case: Case) -> list[str]:
    """The operators with which a swapped model runs on the PyTorch operators that it ran on before."""
    return [operator for operator in SWAPPABLE if operator not in case.inexact]


def compare(case: Case, actual, expected, exact: bool | None = None):
    """Logits, loss and gradients: bit for bit, or within the tolerances above where an operator rounds otherwise."""
    exact = not case.inexact if exact is None else exact
    (logits, loss, gradients), (wanted_logits, wanted_loss, wanted_gradients) = actual, expected
    assert gradients.keys() == wanted_gradients.keys()
    if exact:
        assert torch.equal(logits, wanted_logits)
        assert torch.equal(loss, wanted_loss)
    torch.testing.assert_close(logits, wanted_logits, **LOGITS)
    torch.testing.assert_close(loss, wanted_loss, **LOGITS)
    for name, gradient in gradients.items():
        wanted = wanted_gradients[name]
        assert (gradient is None) == (wanted is None), name
        if wanted is None:
            continue
        if exact:
            assert torch.equal(gradient, wanted), name
        torch.testing.assert_close(gradient, wanted, **GRADIENTS, msg=lambda message, name=name: f"{name}: {message}")


def calls_in(monkeypatch, action):
    """How many calls of gptkern's operators `action` makes."""
    count = 0
    settled = dispatch.settled

    def counted(tensor):
        nonlocal count
        count += 1
        return settled(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "settled", counted)
        action()
    return count


def structure(model):
    """All that `unswap` has to bring back, object for object."""
    modules = dict(model.named_modules())
    return {
        "classes": {name: type(module) for name, module in modules.items()},
        "fields": {name: list(module.__dict__) for name, module in modules.items()},
        "configs": {name: id(getattr(module, "config", None)) for name, module in modules.items()},
        "settings": {name: dict(vars(module.config)) for name, module in modules.items() if hasattr(module, "config")},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "keys": list(model.state_dict()),
        "hooks": {name: [list(getattr(module, hooks)) for hooks in module.__dict__ if hooks.endswith("_hooks")]
                  for name, module in modules.items()},
        "training": {name: module.training for name, module in modules.items()},
    }  # fmt: skip


# --- The torch backend ------------------------------------------------------------------------------------------------


@cases
def test_what_is_swapped_and_that_it_is_called(case, monkeypatch):
    model = built(case)
    ids, targets, _ = batch()
    assert calls_in(monkeypatch, lambda: case.run(model, ids, targets)) == 0
    report = gptkern.swap(model)
    found: dict[str, int] = {}
    for entry in report.replaced:
        for operator in entry.operator.split(", "):
            found[operator] = found.get(operator, 0) + 1
    assert set(case.calls) <= set(found)
    assert len(report.skipped) == case.skipped
    assert calls_in(monkeypatch, lambda: case.run(model, ids, targets)) == sum(case.calls.values())
    # And with nothing to differentiate: PyTorch's encoder would leave Python then.
    model.eval()
    with torch.no_grad():
        assert calls_in(monkeypatch, lambda: case.run(model, ids, targets)) == sum(case.calls.values())


@cases
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_logits_loss_and_gradients(case, padded):
    if padded and case.padding is None:
        pytest.skip("the model has no argument for padding")
    model = built(case)
    keys = list(model.state_dict())
    call = batch(side=case.padding if padded else None)
    expected = results(case, model, *call)
    gptkern.swap(model, ops=same_operators(case))
    compare(case, results(case, model, *call), expected, exact=not (padded and case.grouped))
    gptkern.swap(model)
    compare(case, results(case, model, *call), expected, exact=False)
    assert list(model.state_dict()) == keys


@cases
def test_eval_mode(case):
    """PyTorch's encoder takes another way then, with other roundings."""
    model = built(case).eval()
    ids, targets, padding = batch(side=case.padding)
    visible = slice(None) if padding is None else padding
    with torch.no_grad():
        expected = case.run(model, ids, targets, padding)[0]
        gptkern.swap(model)
        actual = case.run(model, ids, targets, padding)[0]
    torch.testing.assert_close(actual[visible], expected[visible], **LOGITS)


@cases
def test_dropout_draws_what_the_stock_model_draws(case):
    """The same operators, the same seed: the same weights are dropped."""
    if "attention" in case.inexact:
        pytest.skip("its own attention draws for another layout")
    stock, swapped = built(case, dropout=0.5), built(case, dropout=0.5)
    gptkern.swap(swapped, ops=same_operators(case))
    call = batch()
    outcomes = []
    for model, seed in ((stock, 3), (swapped, 3), (swapped, 4)):
        torch.manual_seed(seed)
        outcomes.append(results(case, model, *call))
    compare(case, outcomes[1], outcomes[0], exact=True)
    assert not torch.equal(outcomes[2][0], outcomes[0][0])


def greedy(case: Case, model, ids, padding, tokens, use_cache=True):
    if case.is_transformers:
        return model.generate(
            ids, attention_mask=None if padding is None else padding.long(), max_new_tokens=tokens,
            min_new_tokens=tokens, do_sample=False, use_cache=use_cache,
        )  # fmt: skip
    for _ in range(tokens):
        logits, _ = case.run(model, ids, None, padding)
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        padding = None if padding is None else torch.cat([padding, padding.new_ones(len(ids), 1)], dim=1)
    return ids


@cases
def test_greedy_generation_gives_the_same_tokens(case):
    """With a cache and without; a whole batch, and one row padded on the left where the model knows padding."""
    model = built(case).eval()
    batches = [batch(side=side) for side in (None, "left") if side is None or case.padding == "left"]
    tokens = 6
    with torch.no_grad():
        expected = [greedy(case, model, ids, padding, tokens) for ids, _, padding in batches]
        gptkern.swap(model)
        for (ids, _, padding), wanted in zip(batches, expected):
            assert torch.equal(greedy(case, model, ids, padding, tokens), wanted)
            if case.is_transformers:
                assert torch.equal(greedy(case, model, ids, padding, tokens, use_cache=False), wanted)


@cases
def test_the_way_back_after_a_training_step(case):
    """Two models take the same steps, one of them swapped for the first of two: they end in the same place."""
    stock, model = built(case), built(case)
    call = batch(side=case.padding)
    # Not Adam: its first steps are the gradients' signs, which are chance where a gradient is all rounding.
    optimisers = [torch.optim.SGD(m.parameters(), lr=LEARNING_RATE) for m in (stock, model)]
    start = [parameter.detach().clone() for parameter in stock.parameters()]
    # transformers adds hooks at the first call; the structure is that of a model that has run.
    case.run(model, *call), case.run(stock, *call)
    before = structure(model)
    gptkern.swap(model, ops=same_operators(case))
    assert structure(model) != before
    for step in range(2):
        for m, optimiser in zip((stock, model), optimisers):
            results(case, m, *call)
            optimiser.step()
        if step == 0:
            gptkern.swap(model)
            results(case, model, *call)
            gptkern.unswap(model)
            assert structure(model) == before
    tolerance = GRADIENTS if case.grouped else dict(rtol=0, atol=0)
    for (name, parameter), other, first in zip(model.named_parameters(), stock.parameters(), start):
        torch.testing.assert_close(parameter - first, other - first, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@cases
def test_an_unswapped_model_is_the_stock_model(case):
    stock, model = built(case), built(case)
    gptkern.unswap(model)
    replaced = gptkern.swap(model).replaced
    restored = gptkern.unswap(model).restored
    assert {entry.name for entry in restored} == {entry.name for entry in replaced} and len(restored) == len(replaced)
    call = batch(side=case.padding)
    compare(case, results(case, model, *call), results(case, stock, *call), exact=True)


@cases
def test_a_second_swap_changes_nothing(case):
    model = built(case)
    first = gptkern.swap(model)
    swapped = structure(model)
    second = gptkern.swap(model)
    assert structure(model) == swapped
    assert (second.replaced, second.skipped) == (first.replaced, first.skipped)
    assert str(second) == str(first)


@cases
def test_strict_leaves_a_model_with_something_to_skip_untouched(case):
    model = built(case)
    before = structure(model)
    if case.skipped:
        with pytest.raises(RuntimeError, match="unchanged"):
            gptkern.swap(model, strict=True)
        assert structure(model) == before
    else:
        assert gptkern.swap(model, strict=True).replaced


# --- Kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EACH_WAY)
def test_kernels_agree(case, kernel_backend, device):
    """One small forward and backward: the kernels of every operator ran, as often as they should.

    In float32; in float16 where the kernels of attention take no float32, as close to the stock model in float32 as the
    stock model in float16 is.
    """
    dtype = torch.float16 if kernel_backend == "cuda" else torch.float32
    call = [None if part is None else part.to(device) for part in batch(rows=1, length=5)]
    with gptkern.backend("torch"):
        expected = results(case, built(case).to(device), *call)
        yardstick = results(case, built(case).to(device, dtype), *call)
    model = built(case).to(device, dtype)
    gptkern.swap(model)
    with Watched() as watched:
        actual = results(case, model, *call)
    if dtype == torch.float32:
        compare(case, actual, expected, exact=False)
    else:
        compare_in_16_bits(actual, yardstick, expected)
    counts = {operator: watched.names.count(f"{operator}_forward") for operator in case.calls}
    assert counts == case.calls
    assert {operator: watched.names.count(f"{operator}_backward") for operator in case.calls} == case.calls


@pytest.mark.parametrize("case", [p for p in parameters(fast=("gpt2", "llama")) if p.values[0].padding])
def test_kernels_agree_on_a_padded_batch(case, triton_backend, device):
    """The mask is read inside the kernels of attention."""
    call = [part.to(device) for part in batch(rows=2, length=6, side=case.padding)]
    model = built(case).to(device)
    with gptkern.backend("torch"):
        expected = results(case, model, *call)
    gptkern.swap(model)
    with Watched() as watched:
        compare(case, results(case, model, *call), expected, exact=False)
    assert watched.names.count("attention_forward") == watched.names.count("attention_backward") == LAYERS


def test_kernels_drop_attention_weights_in_training(triton_backend, device):
    """GPT-2 as it is trained: dropout in the attention, a padded batch. The same seed drops the same."""
    case = next(case for case in CASES if case.name == "gpt2")
    call = [part.to(device) for part in batch(rows=2, length=6, side="left")]
    model = built(case, dropout=0.5).to(device)
    gptkern.swap(model)
    outcomes = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        with Watched() as watched:
            outcomes.append(results(case, model, *call))
        assert watched.names.count("attention_forward") == watched.names.count("attention_backward") == LAYERS
    compare(case, outcomes[1], outcomes[0], exact=True)
    assert not torch.equal(outcomes[2][0], outcomes[0][0])


def compare_in_16_bits(actual, yardstick, reference):
    """By the norm of the error: how the roundings of a whole model fall at one place is chance."""
    errors = [
        [
            (part.double() - wanted.double()).norm() / wanted.double().norm()
            for part, wanted in zip(run, flat(reference))
        ]
        for run in map(flat, (actual, yardstick))
    ]
    for name, error, usual in zip(["logits", "loss", *reference[2]], *errors):
        assert error <= 2 * usual + torch.finfo(torch.float16).eps, name


def flat(outcome):
    logits, loss, gradients = outcome
    return [logits, loss, *(torch.zeros(1) + 1 if gradient is None else gradient for gradient in gradients.values())]
