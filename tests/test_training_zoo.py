"""Models train with everything swapped as they do without: attention, norms and their sums, rotary embedding,
activations, loss, and the optimizer.

A run whose roundings differ is another run after some steps: AdamW's first updates are signs, and where a gradient is
zero but for its roundings (of an attention's key bias, say) the roundings have them. So the bound is measured: twice
what a stock run does, in NOISY draws, whose parameters move by their last place at each step, and whose gradients by
that of a sum of terms of their largest's size.
"""

from __future__ import annotations

import copy
import functools
import importlib.util

import pytest
import torch

from gptkern.models import GPT, GPTConfig

try:
    import causal_models
except ImportError:
    causal_models = None

import gptkern
from gptkern.optim import AdamW

STEPS, NOISY, LEARNING_RATE = 20, 3, 2e-3
VOCABULARY, ROWS, LENGTH = 97, 2, 12
FACTOR = 2
# A unit in the last place of a loss of size 4, and of parameters of size 1, for where the draws happen to agree.
LOSS_FLOOR, PARAMETER_FLOOR = 2.0**-21, 2.0**-22


def gpt():
    torch.manual_seed(1)
    return GPT(GPTConfig(VOCABULARY, context=16, layers=2, width=32, heads=2, dropout=0.1))


def of_transformers(kind, **changes):
    return functools.partial(causal_models.build, kind, **changes)


LLAMA = {"attention", "rms_norm", "rotary", "nonlinearity", "linear_cross_entropy"}
GPT2 = {"attention", "layer_norm", "nonlinearity", "linear_cross_entropy"}
# Model -> what makes it, and the operators that it is to call.
ZOO = {
    "gpt": (gpt, GPT2),
    "llama": ("llama", LLAMA),
    "gpt2": ("gpt2", GPT2),
    "mistral": ("mistral", LLAMA),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", LLAMA),
    # Its RMSNorm is of another form: 1 + weight.
    "gemma": ("gemma", LLAMA - {"rms_norm"}),
    # Its scores are capped, too.
    "gemma2": ("gemma2", LLAMA - {"rms_norm", "attention"}),
    "phi3": ("phi3", LLAMA - {"rotary"}),
    "gpt_neox": ("gpt_neox", GPT2 | {"rotary"}),
    "gptj": ("gptj", GPT2 | {"rotary"}),
    # Its activation is ReLU.
    "opt": ("opt", GPT2 - {"nonlinearity"}),
}
IN_MAKE_TEST = ("gpt", "llama")


def built(name):
    make = ZOO[name][0]
    return (make() if callable(make) else causal_models.build(make)).train()


@functools.cache
def batches(steps):
    """ids and targets (ROWS, LENGTH) of each step, arithmetic progressions, with some targets that do not count."""
    generator = torch.Generator().manual_seed(3)
    draw = functools.partial(torch.randint, generator=generator)
    found = []
    for _ in range(steps):
        whole = (draw(0, VOCABULARY, (ROWS, 1)) + draw(1, 4, (ROWS, 1)) * torch.arange(LENGTH + 1)) % VOCABULARY
        found.append((whole[:, :-1].contiguous(), whole[:, 1:].masked_fill(torch.arange(LENGTH) % 5 == 4, -100)))
    return found


def loss_of(model, ids, targets):
    if isinstance(model, GPT):
        return model(ids, targets)
    # transformers moves the labels itself.
    labels = torch.cat([ids[:, :1], targets[:, :-1]], 1)
    result = model(input_ids=ids, labels=labels, use_cache=False)
    return result.logits, result.loss


def train(model, optimizer_class=torch.optim.AdamW, noise=None, steps=STEPS, device="cpu"):
    """The losses (steps,) of a training; noise: a generator by which gradients and parameters move."""
    optimizer = optimizer_class(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    losses = []
    for step, (ids, targets) in enumerate(batches(steps)):
        torch.manual_seed(step)  # of the dropout
        loss = loss_of(model, ids.to(device), targets.to(device))[1]
        optimizer.zero_grad()
        loss.backward()
        if noise is not None:
            move(model, noise)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).double().cpu()


@torch.no_grad()
def move(model, generator):
    for parameter in model.parameters():
        sign, other = torch.randint(-1, 2, (2, *parameter.shape), generator=generator)
        parameter.mul_(1 + sign * 2.0**-23)
        # What no token has a part in is exactly zero, and stays so.
        gradient = parameter.grad
        gradient.add_(other * (gradient != 0) * gradient.abs().max() * 2.0**-23)


def state(model):
    return {name: tensor.detach().double().cpu() for name, tensor in model.state_dict().items()}


def deviations(losses, parameters, stock_losses, stock_parameters):
    """The largest of the losses up to each step, and of each tensor of the state, from those of the stock run."""
    of_losses = (losses - stock_losses).abs().cummax(0).values
    return of_losses, {name: (parameters[name] - stock_parameters[name]).abs().max() for name in parameters}


def noisy_runs(start, expected, steps):
    """What `deviations` are at most in some runs whose parameters move by their last place."""
    found = []
    for draw in range(NOISY):
        model = copy.deepcopy(start)
        losses = train(model, noise=torch.Generator().manual_seed(draw), steps=steps)
        found.append(deviations(losses, state(model), *expected))
    of_losses = torch.stack([losses for losses, _ in found]).amax(0)
    return of_losses, {name: max(parameters[name] for _, parameters in found) for name in found[0][1]}


def compare(losses, parameters, expected, noise):
    of_losses, of_parameters = deviations(losses, parameters, *expected)
    allowed = FACTOR * noise[0] + LOSS_FLOOR
    assert (of_losses <= allowed).all(), f"losses differ by {of_losses.tolist()}, allowed are {allowed.tolist()}"
    for name, deviation in of_parameters.items():
        allowed = FACTOR * noise[1][name] + PARAMETER_FLOOR
        assert deviation <= allowed, f"{name} differs by {deviation:.1e}, allowed are {allowed:.1e}"


def missing(name):
    if name == "gpt" or causal_models is not None:
        return []
    return [pytest.mark.skip(reason="transformers is not installed")]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=missing(name) + [pytest.mark.deep] * (name not in IN_MAKE_TEST)) for name in ZOO],
)
def test_a_training_with_everything_swapped(name):
    start = built(name)
    stock, swapped = copy.deepcopy(start), copy.deepcopy(start)
    expected = train(stock), state(stock)
    report = gptkern.swap(swapped, fused_loss=True)
    assert not any("its loss" in entry.reason for entry in report.skipped)
    ids, targets = batches(STEPS)[0]
    called = {call.operator for call in gptkern.explain(*explained(swapped, ids, targets)).calls}
    assert called == ZOO[name][1], report
    losses = train(swapped, AdamW)
    assert loss_of(swapped, ids, targets)[0] is None
    # The curve falls, and is that of the stock model.
    assert losses[-5:].mean() < losses[:5].mean() - 0.02
    compare(losses, state(swapped), expected, noisy_runs(start, expected, STEPS))

    trained, classes = copy.deepcopy(swapped.state_dict()), [type(module) for module in stock.modules()]
    gptkern.unswap(swapped)
    assert [type(module) for module in swapped.modules()] == classes
    assert swapped.state_dict().keys() == stock.state_dict().keys()
    assert all(torch.equal(tensor, trained[key]) for key, tensor in swapped.state_dict().items())
    stock.load_state_dict(trained)
    for model in (swapped, stock):
        model.eval()
    for ours, theirs in zip(loss_of(swapped, ids, targets), loss_of(stock, ids, targets)):
        assert torch.equal(ours, theirs)


def explained(model, ids, targets):
    if isinstance(model, GPT):
        return model, ids, targets
    # Keyword arguments alone reach a model of transformers by these names.
    return torch.nn.Sequential(_Called(model)), ids


class _Called(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.deep
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(causal_models is None, reason="transformers is not installed")
def test_a_few_steps_on_triton(triton_backend, device):
    """Kernels forward and backward, and the optimizer's; the noise is that of PyTorch's runs."""
    steps = 4
    start = causal_models.build("llama").train()
    stock, swapped = copy.deepcopy(start), copy.deepcopy(start).to(device)
    with gptkern.backend("torch"):
        expected = train(stock, steps=steps), state(stock)
        noise = noisy_runs(start, expected, steps)
    gptkern.swap(swapped, fused_loss=True)
    losses = train(swapped, AdamW, steps=steps, device=device)
    compare(losses, state(swapped), expected, noise)
