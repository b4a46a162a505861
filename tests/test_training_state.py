"""A training that goes on from a state is the one that was never interrupted, bit for bit."""

from __future__ import annotations

import copy
import itertools
import json
import math
import signal

import pytest
import torch
from plain_training import CONFIG, a_store
from test_training_loop import a_trainer

import gptkern
from gptkern.training import interrupting, loop
from gptkern.training.errors import UserError

STEPS = 7
FP16 = dict(precision="fp16", dropout=0.2, steps=STEPS, accumulate=2)
KINDS = {
    "fp32": dict(steps=STEPS),
    "dropout, pieces": dict(dropout=0.2, accumulate=3, steps=STEPS, recompute="2"),
    "bf16": dict(precision="bf16", dropout=0.2, steps=STEPS, schedule="wsd", z_loss=0.01),
    "fp16": FP16,
}


def kept(state):
    """A copy, as a file would keep it."""
    tensors, about = state
    return {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(about))


def the_same(state, other) -> None:
    (tensors, about), (others, about_others) = state, other
    assert about == about_others and list(tensors) == list(others)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


def overflowing(trainer: loop.Trainer) -> None:
    """A scale that is too high by far at first, and that grows again after two updates."""
    if trainer.scaler is not None:
        tensors, about = trainer.state()
        trainer.load_state(tensors, about | {"scaler": about["scaler"] | {"scale": 2.0**22, "growth_interval": 2}})


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_goes_on_from_any_step(kind):
    trainer = a_trainer(**KINDS[kind])
    overflowing(trainer)
    states = [kept(trainer.state())]
    for _ in range(STEPS):
        trainer.run(1)
        states.append(kept(trainer.state()))
    records = trainer.records()
    if kind == "fp16":
        scales = [record.scale for record in records]
        assert records[0].skipped and any(a < b for a, b in itertools.pairwise(scales)), "it overflows, and grows again"
    for step, state in enumerate(states):
        other = a_trainer(**KINDS[kind] | {"seed": 77})  # other weights, other random numbers
        other = loop.Trainer(other.model, a_store(), trainer.recipe)
        torch.manual_seed(step)
        other.load_state(*state)
        assert other.step == step
        other.run(STEPS - step)
        assert str(other.records()) == str(records[step:])  # nan is not itself
        the_same(kept(other.state()), states[-1])


def test_a_state_is_read_in_place():
    trainer = a_trainer(dropout=0.2)
    trainer.run(3)
    tensors, about = kept(trainer.state())
    other = a_trainer(dropout=0.2, seed=9)
    mine, _ = other.state()
    for name, tensor in mine.items():
        tensor.copy_(tensors[name])
    other.load_state(mine, about)
    the_same(other.state(), (tensors, about | {"recipe": about["recipe"] | {"seed": 9}}))
    assert other.model.lm_head.weight is other.model.token_embedding.weight


def test_the_names_are_stock_ones_and_each_memory_has_one():
    trainer = a_trainer()
    tensors, about = trainer.state()
    keys = {name.removeprefix("model.") for name in tensors if name.startswith("model.")}
    assert keys == {name for name, _ in trainer.model.named_parameters()}  # tied weights once
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)
    assert about["config"]["width"] == CONFIG.width and about["versions"]["torch"] == str(torch.__version__)
    states = {name: tensor.clone() for name, tensor in tensors.items() if name.startswith("generators.")}
    trainer.run(1)
    after, _ = trainer.state()
    assert list(after) == list(tensors)
    for name, tensor in tensors.items():
        same = after[name].data_ptr() == tensor.data_ptr()
        # The generators' are others, of which nothing is written into those before.
        assert same != (name in states) and (same or torch.equal(tensor, states[name])), name


def test_each_process_draws_and_resumes_a_stream_of_its_own():
    def of(rank: int, seed: int = 5) -> loop.Trainer:
        trainer = a_trainer(dropout=0.2, seed=seed)
        return loop.Trainer(trainer.model, a_store(), trainer.recipe, rank=rank, world=2)

    trainers = [of(rank) for rank in range(2)]
    streams = [trainer.generators.states["cpu"] for trainer in [*trainers, of(0, seed=6), of(1, seed=4)]]
    assert len({bytes(stream.numpy()) for stream in streams}) == len(streams)
    assert torch.equal(streams[0], torch.Generator().manual_seed(5).get_state())
    (first, about), (second, _) = (trainer.state() for trainer in trainers)
    saved = {name: tensor.clone() for name, tensor in (first | second).items()}
    for rank, trainer in enumerate(trainers):
        with trainer.generators.drawing():
            torch.rand(9)
        assert not torch.equal(trainer.generators.states["cpu"], streams[rank])
        trainer.load_state(saved, about)
        assert torch.equal(trainer.generators.states["cpu"], streams[rank])
    with pytest.raises(UserError, match=r"no generators\.1\.cpu: it is of another process, or of fewer of them"):
        trainers[1].load_state(first, about)


def test_a_swapped_model_goes_on_from_a_stock_ones_state():
    stock = a_trainer(dropout=0.2, recompute="full")
    stock.run(2)
    state = kept(stock.state())
    stock.run(2)
    other = a_trainer(dropout=0.2, recompute="full", seed=9)
    gptkern.swap(other.model)
    # The model is swapped after the recipe said what is computed again.
    assert other.model.recompute_every == copy.deepcopy(other.model).recompute_every == 1
    other = loop.Trainer(other.model, a_store(), stock.recipe)
    other.load_state(*state)
    other.run(2)
    assert other.losses == pytest.approx(stock.losses[2:], rel=1e-5)
    gptkern.unswap(other.model)
    assert other.model.recompute_every == 1


# --- An update that is ended early ------------------------------------------------------------------------------------


class Ended(Exception):
    pass


@pytest.mark.parametrize("kind", ["dropout, pieces", "fp16"])
@pytest.mark.parametrize("place", ["first piece", "second piece", "step"])
def test_an_update_that_an_error_ends_has_not_been(kind, place):
    """In the forward of its first and of its second piece, and before AdamW's step, when all is drawn."""
    calls = []

    def end(*_):
        calls.append(1)
        if place != "second piece" or len(calls) == 2:
            raise Ended

    trainer, plain = a_trainer(**KINDS[kind]), a_trainer(**KINDS[kind])
    trainer.run(2)
    before = kept(trainer.state())
    hook = (
        trainer.model.blocks[1].register_forward_hook if "piece" in place else trainer.optimizer.register_step_pre_hook
    )
    handle = hook(end)
    with pytest.raises(Ended):
        trainer.run(1)
    handle.remove()
    the_same(kept(trainer.state()), before)
    assert trainer.step == 2 and all(parameter.grad is None for parameter in trainer.model.parameters())
    trainer.run(STEPS - 2)
    plain.run(STEPS)
    assert trainer.losses == plain.losses
    the_same(trainer.state(), plain.state())


def test_a_signal_waits_for_the_step_of_the_optimizer():
    trainer, plain = a_trainer(), a_trainer()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        handle = trainer.optimizer.register_step_pre_hook(lambda *_: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            trainer.run(3)
    finally:
        signal.signal(signal.SIGTERM, before)
    handle.remove()
    plain.run(1)
    assert trainer.step == 1 and trainer.losses == plain.losses
    the_same(trainer.state(), plain.state())


def test_each_signal_that_was_postponed_is_handled_in_order():
    """As a run has it: the first is noted, and another one raises."""
    came = []

    def note(number, frame):
        came.append(number)
        if len(came) != 1:
            raise KeyboardInterrupt

    sent = [signal.SIGTERM, signal.SIGINT, signal.SIGTERM]
    with interrupting.handled(note), pytest.raises(KeyboardInterrupt), interrupting.postponed():
        for number in sent:
            signal.raise_signal(number)
        assert not came
    assert came == sent


def test_a_damaged_text_is_raised_and_ends_no_state():
    trainer = a_trainer()
    trainer.run(1)
    before = kept(trainer.state())
    read = trainer.store.train.read
    trainer.store.train.read = lambda *_: (_ for _ in ()).throw(UserError("frame 17 is damaged"))
    with pytest.raises(UserError, match="frame 17"):
        trainer.run(9)
    trainer.store.train.read = read
    assert trainer.step >= 1 and trainer.step == len(trainer.losses)
    assert trainer.step > 1 or the_same(kept(trainer.state()), before) is None


# --- What does not fit ------------------------------------------------------------------------------------------------


def changed(tensors, about, change):
    name = "model.blocks.1.attention.qkv.weight"
    if change == "missing":
        del tensors[name], tensors["optimizer.final_norm.bias.exp_avg"]
    elif change == "left over":
        tensors["model.blocks.2.attention.qkv.weight"] = torch.zeros(1)
    elif change == "shape":
        tensors[name] = torch.zeros(3, 5)
    elif change == "dtype":
        tensors[name] = tensors[name].half()
    elif change == "generator":
        tensors["generators.0.cpu"] = torch.zeros(3, dtype=torch.uint8)
    elif change == "precision":
        about["scaler"] = None
    elif change == "scale":
        about["scaler"]["scale"] = math.nan
    elif change == "no scale":
        del about["scaler"]["scale"]
    elif change == "step":
        about["step"] = 10
    elif change == "no step":
        about["step"] = "3"


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "missing": r"the state has no model\.blocks\.1\.attention\.qkv\.weight \(nor 1 more\)",
        "left over": r"the state has model\.blocks\.2\.attention\.qkv\.weight, which this training has not",
        "shape": r"the state's model\.blocks\.1\.attention\.qkv\.weight is \(3, 5\), torch\.float32; .* \(48, 16\)",
        "dtype": r"qkv\.weight is \(48, 16\), torch\.float16; this training needs \(48, 16\), torch\.float32",
        "generator": r"the state's generators\.0\.cpu is \(3,\)",
        "precision": r"the state is of a training in no fp16; precision is fp16",
        "scale": r"the state's loss scale has scale nan; it needs a finite number above 0",
        "no scale": r"the state's loss scale has scale None; it needs a finite number above 0",
        "step": r"the state's step is 10; it needs a whole number from 0 to 7",
        "no step": r"the state's step is '3'; it needs a whole number from 0 to 7",
    }.items(),
)
def test_a_state_that_does_not_fit_is_named_and_changes_nothing(change, message):
    trainer = a_trainer(**FP16)
    trainer.run(2)
    tensors, about = kept(trainer.state())
    trainer.run(1)
    before = kept(trainer.state())
    changed(tensors, about, change)
    with pytest.raises(UserError, match=message):
        trainer.load_state(tensors, about)
    the_same(kept(trainer.state()), before)
