"""The training loop against the one of tests/plain_training.py, step by step and bit for bit."""

from __future__ import annotations

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_training import BATCH, CONFIG, DECAY, FINAL, LENGTH, SEED, STEPS, WARMUP, a_store, plain_training, recipe

from gptkern.models.gpt import GPT
from gptkern.training import loop, process_state, schedule
from gptkern.training.data import text
from gptkern.training.data.loader import Batch
from gptkern.training.errors import UserError

SCHEDULED = dict(warmup=WARMUP / STEPS, decay=DECAY / STEPS, final_lr=FINAL)


def a_trainer(dropout: float = 0.0, **changes) -> loop.Trainer:
    config = dataclasses.replace(CONFIG, dropout=dropout)
    return loop.Trainer(loop.new_model(config, SEED), a_store(), recipe(**SCHEDULED | changes))


def the_same(trainer: loop.Trainer, plain) -> list:
    """The trainer's steps, a few at a time, are the plain loop's; -> what that did."""
    model, history = plain
    for steps in (1, 4, STEPS - 5):
        trainer.run(steps)
    records = trainer.records()
    assert [record.step for record in records] == list(range(1, STEPS + 1))
    for record, (loss, norm, scale) in zip(records, history, strict=True):
        assert (record.scale, record.tokens) == (scale, BATCH * LENGTH), record
        if not record.skipped:
            assert (record.loss, record.grad_norm) == (loss, norm), record
    for (name, parameter), other in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    return history


def test_the_loop_is_the_plain_one():
    history = the_same(a_trainer(), plain_training())
    # Else it would not show whether, or when, gradients are clipped.
    norms = [norm for _, norm, _ in history]
    assert min(norms) < 1 < max(norms)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_schedules(name):
    the_same(a_trainer(schedule=name), plain_training(name))


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.1, 0.2), (1.0, 0.0), (0.5, 0.5), (0.001, 0.001), (0.0, 1.0)])
def test_a_schedule_rises_to_its_peak_and_falls_to_its_floor(name, shares):
    for steps in (1, 2, 7, 100):
        check_schedule(name, *shares, steps)


def check_schedule(name, warmup, decay, steps):
    of = recipe(steps=steps, schedule=name, warmup=warmup, decay=decay, lr=1.0, final_lr=0.1)
    rates = [schedule.lr_at(of, step) for step in range(steps + 5)]
    rising = schedule.warmup_steps(of)
    assert (rising > 0) == (warmup > 0) and all(0 < rate <= 1 for rate in rates)
    assert rates[:rising] == [pytest.approx((step + 1) / rising) for step in range(rising)]
    # A run of warm-up alone, or one without decay, ends at its peak.
    peak = rates[max(rising - 1, 0) :]
    assert peak == sorted(peak, reverse=True) and peak[0] == 1
    ends = (name in ("cosine", "linear") and rising < steps) or (name == "wsd" and round(decay * steps) > 0)
    assert rates[steps:] == [pytest.approx(0.1 if ends else 1.0)] * 5


OPTIONS = {
    "accumulate": (dict(accumulate=3), dict(accumulate=3)),
    "clip": (dict(clip=0.25), dict(clip=0.25)),
    "no clip": (dict(clip=0.0), dict(clip=0.0)),
    "averages": (dict(beta1=0.7, beta2=0.8), dict(betas=(0.7, 0.8))),
    "decay": (dict(weight_decay=0.5), dict(weight_decay=0.5)),
    "smoothing": (dict(label_smoothing=0.2), dict(smoothing=0.2)),
    "z-loss": (dict(z_loss=0.05), dict(z_loss=0.05)),
    "both": (dict(z_loss=0.05, label_smoothing=0.2, accumulate=2), dict(z_loss=0.05, smoothing=0.2, accumulate=2)),
    "dropout": (dict(dropout=0.2), dict(dropout=0.2)),
    "bf16": (dict(precision="bf16"), dict(dtype=torch.bfloat16)),
    "fp16": (dict(precision="fp16"), dict(dtype=torch.float16)),
    "fp16, pieces": (
        dict(precision="fp16", accumulate=2, dropout=0.1, clip=0.25),
        dict(dtype=torch.float16, accumulate=2, dropout=0.1, clip=0.25),
    ),
    "deterministic": (dict(deterministic=True, dropout=0.1), dict(dropout=0.1)),
    # What is computed again is the same.
    "recompute": (dict(recompute="full", dropout=0.1), dict(dropout=0.1)),
    "recompute some": (dict(recompute="2", dropout=0.1, precision="bf16"), dict(dropout=0.1, dtype=torch.bfloat16)),
}


@pytest.mark.deep
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_a_compiled_training_is_the_same_but_for_roundings(monkeypatch):
    compiled, calls = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda *of, **how: compiled.append(how) or calls(*of, **how))
    trainer = a_trainer(compile=True, accumulate=2, label_smoothing=0.1, z_loss=0.01)
    plain = a_trainer(accumulate=2, label_smoothing=0.1, z_loss=0.01)
    trainer.run(4)
    plain.run(4)
    assert compiled == [{"dynamic": False}] and trainer.losses == pytest.approx(plain.losses, rel=1e-5)
    state = {name: tensor.clone() for name, tensor in trainer.state()[0].items()}, trainer.state()[1]
    trainer.run(4)
    other = a_trainer(compile=True, accumulate=2, label_smoothing=0.1, z_loss=0.01)
    other.load_state(*state)
    other.run(4)
    assert other.losses == trainer.losses[4:]


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    ours, plain = OPTIONS[name]
    the_same(a_trainer(**ours), plain_training(**plain))


def test_a_float16_overflow_is_left_out_and_the_scale_halved():
    scale = 2.0**24
    trainer = a_trainer(precision="fp16")
    tensors, about = trainer.state()
    trainer.load_state(tensors, about | {"scaler": about["scaler"] | {"scale": scale}})
    first = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.run(1)
    assert all(torch.equal(*pair) for pair in zip(trainer.model.parameters(), first)) and trainer.step == 1
    (record,) = trainer.records()
    assert record.skipped and not math.isfinite(record.grad_norm) and record.scale == scale
    model, history = plain_training(dtype=torch.float16, scale=scale)
    trainer.run(STEPS - 1)
    records = trainer.records()
    overflowed = [not math.isfinite(norm) for _, norm, _ in history[1:]]
    assert [record.skipped for record in records] == overflowed and True in overflowed and False in overflowed
    assert [record.scale for record in records] == [scale for *_, scale in history[1:]]
    assert all(torch.equal(*pair) for pair in zip(trainer.model.parameters(), model.parameters()))


def test_overflows_end_the_training_when_the_scale_is_down_to_1():
    trainer = a_trainer(precision="fp16", steps=40)
    trainer.model.final_norm.weight.data.fill_(1e8)
    trainer.run(16)  # 65536 is halved to 1
    assert all(record.skipped for record in trainer.records())
    with pytest.raises(loop.Diverged, match=r"at a scale of 1 the gradients' norm is (nan|inf) at step 17"):
        trainer.run(1)


# --- Pieces -----------------------------------------------------------------------------------------------------------


class Uneven:
    """Batches of 32 rows of which targets are ignored: the more, the later the row stands; of the last one all."""

    update = 0

    def next(self) -> Batch:
        generator = torch.Generator().manual_seed(self.update)
        ids = torch.randint(0, 40, (32, LENGTH + 1), generator=generator)
        ids, targets = ids[:, :-1], ids[:, 1:].clone()
        ignored = torch.rand(32, LENGTH, generator=generator) < torch.linspace(0, 1, 32)[:, None] ** 0.5
        ignored[-1] = True
        targets[ignored] = -100
        return Batch(ids, targets, int((targets != -100).sum()), ids.numel())


@pytest.mark.parametrize("changes", [{}, {"z_loss": 0.01, "label_smoothing": 0.1}], ids=["plain", "z and smoothing"])
def test_4_pieces_of_8_are_32_where_targets_are_ignored_unevenly(changes):
    states = []
    for accumulate in (1, 4, 32):
        trainer = a_trainer(batch=32, accumulate=accumulate, clip=0.0, **changes)
        trainer.model.double()
        trainer = loop.Trainer(trainer.model, a_store(), trainer.recipe)
        trainer.batches = Uneven()
        trainer.run(1)
        states.append((trainer.records()[0], trainer.state()[0]))
    (record, whole), *others = states
    batch = Uneven().next()
    counts = [int((piece != -100).sum()) for piece in batch.targets.chunk(4)]
    assert max(counts) > 1.5 * min(counts) and record.tokens == sum(counts)  # else a mean of means would do
    for other, pieces in others:
        assert other.loss == pytest.approx(record.loss, rel=1e-6)
        assert other.grad_norm == pytest.approx(record.grad_norm, rel=1e-6)
        for name in (name for name in whole if name.endswith("exp_avg")):
            # A tenth of the gradient.
            torch.testing.assert_close(pieces[name], whole[name], rtol=1e-5, atol=1e-8 * record.grad_norm)


def test_an_update_without_a_target_changes_nothing_but_the_decay():
    trainer = a_trainer(weight_decay=0.0)
    trainer.batches = Uneven()
    ids = trainer.batches.next().ids[:BATCH]
    trainer.batches.next = lambda: Batch(ids, torch.full_like(ids, -100), 0, ids.numel())
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.run(2)
    assert trainer.losses == [0.0, 0.0]
    assert all(torch.equal(*pair) for pair in zip(trainer.model.parameters(), before))


# --- What is trained on, and what is not ------------------------------------------------------------------------------


def test_held_out_text_is_never_trained_on_and_all_other_is():
    trainer, seen = a_trainer(steps=200), {True: [], False: []}
    trainer.model.register_forward_pre_hook(
        lambda model, inputs: seen[torch.is_grad_enabled()].append(inputs[0].clone())
    )
    per_epoch = trainer.batches._make.rows.per_epoch
    for _ in range(math.ceil(2 * per_epoch / BATCH)):
        trainer.run(1)
        trainer.validate(3)
    trained, evaluated = (set(torch.cat(seen[mode]).flatten().tolist()) for mode in (True, False))
    store = trainer.store
    assert trained == set(store.train.array.tolist()) and not trained & set(store.validation.array.tolist())
    assert evaluated <= set(store.validation.array.tolist())


def test_no_byte_of_a_held_out_block_of_a_text_is_trained_on():
    data = b"".join(bytes([index]) * text.BLOCK_BYTES for index in range(30))
    blocks = [data[start : start + text.BLOCK_BYTES] for start in range(0, len(data), text.BLOCK_BYTES)]
    train, validation = text.split(data)
    assert bytes(validation.tolist()) == b"".join(blocks[9::10])
    assert bytes(train.tolist()) == b"".join(block for index, block in enumerate(blocks) if index % 10 != 9)


def test_the_rows_of_an_epoch_are_each_trained_on_once_in_an_order_of_the_seed():
    first = {}
    for seed in (1, 2):
        trainer = a_trainer(seed=seed, lr=1e-9)
        seen = []
        trainer.model.register_forward_pre_hook(lambda model, inputs, seen=seen: seen.append(inputs[0].clone()))
        per_epoch = trainer.batches._make.rows.per_epoch
        trainer.run(per_epoch // BATCH)
        text = trainer.store.train.array
        rows = torch.cat(seen).numpy()
        starts = [next(at for at in range(len(text)) if np.array_equal(text[at : at + LENGTH], row)) for row in rows]
        assert len(set(starts)) == len(starts) and len({start % LENGTH for start in starts}) == 1
        assert starts != sorted(starts)
        first[seed] = starts
    assert first[1] != first[2]


def test_validation_is_the_plain_mean_over_all_rows_in_eval_mode():
    trainer = a_trainer(dropout=0.5, label_smoothing=0.3, z_loss=1.0)
    held_out = torch.tensor(trainer.store.validation.array)
    rows = torch.stack([held_out[at : at + LENGTH + 1] for at in range(0, len(held_out) - LENGTH, LENGTH)])
    assert len(rows) > loop.EVALUATION_BATCH and len(rows) % loop.EVALUATION_BATCH
    model = GPT(CONFIG)  # without dropout
    model.load_state_dict(trainer.model.state_dict())
    with torch.no_grad():
        expected = F.cross_entropy(model(rows[:, :-1])[0].flatten(0, 1), rows[:, 1:].flatten()).item()
    assert trainer.validate() == pytest.approx(expected, rel=1e-6)
    assert trainer.validations == [(0, trainer.validations[0][1])] and trainer.model.training


@pytest.mark.parametrize("windows", [1, 2, 3, 4, 7])
def test_validation_on_the_way_takes_rows_of_the_whole_held_out_text(windows):
    trainer, seen = a_trainer(), []
    trainer.model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0].clone()))
    loss = trainer.validate(windows)
    held_out = trainer.store.validation.array
    rows = torch.cat(seen).numpy()
    starts = [next(at for at in range(len(held_out)) if np.array_equal(held_out[at:][:LENGTH], row)) for row in rows]
    assert len(starts) == windows and starts == sorted(starts) and starts[0] == 0
    # No two are much closer together than others.
    assert windows == 1 or max(np.diff([*starts, len(held_out)])) <= 2 * min(np.diff(starts))
    assert windows == 7 or loss != pytest.approx(trainer.validate(), rel=1e-4)


# --- Between the updates ----------------------------------------------------------------------------------------------


def test_what_is_drawn_elsewhere_changes_nothing_and_the_other_way_round():
    trainer = a_trainer(dropout=0.2)
    torch.manual_seed(99)
    expected = torch.rand(4)
    torch.manual_seed(99)
    drawn = []
    for _ in range(4):
        trainer.run(3)
        drawn.append(torch.rand(1))
        trainer.validate(2)
    assert torch.equal(torch.cat(drawn), expected)
    assert trainer.losses == [loss for loss, *_ in plain_training(dropout=0.2)[1]]


def test_gradients_of_others_do_not_count():
    trainer = a_trainer()
    for _ in range(STEPS):
        trainer.model(torch.zeros(1, 4, dtype=torch.long))[0].sum().backward()
        trainer.run(1)
    assert trainer.losses == [loss for loss, *_ in plain_training()[1]]


def test_threads_and_deterministic_algorithms_are_the_trainings_alone():
    seen = set()
    trainer = a_trainer(threads=torch.get_num_threads() + 1, deterministic=True)
    trainer.model.register_forward_pre_hook(
        lambda *_: seen.add((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))
    )
    outside = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    trainer.run(1)
    trainer.validate(1)
    assert seen == {(outside[0] + 1, True)}
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == outside


def test_deterministic_algorithms_of_a_gpu_need_a_fixed_workspace(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match=r"CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8, .*; it is :0:0"):
        process_state.check_deterministic(torch.device("cuda"))
    process_state.check_deterministic(torch.device("cpu"))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    process_state.check_deterministic(torch.device("cuda"))


def test_the_first_number_that_is_none_is_named():
    trainer = a_trainer()
    trainer.run(2)
    trainer.model.final_norm.weight.data[0] = math.nan
    with pytest.raises(loop.Diverged, match="the loss is nan at step 3") as raised:
        trainer.run(3)
    assert raised.value.step == 3 and trainer.step == 5 and not trainer.finite()
    with pytest.raises(loop.Diverged, match="the loss is nan at step 5"):
        trainer.validate(2)


@pytest.mark.parametrize(
    ("values", "finite"),
    [([math.inf, -math.inf], False), ([-math.inf, 0], False), ([math.nan, 1], False), ([3e38, 3e38], True)],
)
def test_every_parameter_is_a_number(values, finite):
    trainer = a_trainer()
    assert trainer.finite()
    trainer.model.blocks[1].perceptron.project.bias.data[3:5] = torch.tensor(values)
    assert trainer.finite() == finite


def test_gradients_that_are_no_numbers_are_named_though_the_loss_is_one():
    trainer = a_trainer()
    trainer.model.final_norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(loop.Diverged, match=r"the norm of the gradients is (inf|nan) at step 1"):
        trainer.run(1)


# --- What does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(length=9), "length is 9; the model's context is 8"),
        (dict(device="meta"), "device is meta; the model's parameters are on cpu"),
    ],
)
def test_a_recipe_that_does_not_fit_the_model(changes, message):
    with pytest.raises(UserError, match=message):
        loop.Trainer(GPT(CONFIG), a_store(), recipe(**changes))


def test_what_does_not_fit_the_model_or_the_processes():
    with pytest.raises(UserError, match="the text has 61 tokens; the model's vocabulary has 60"):
        loop.Trainer(GPT(dataclasses.replace(CONFIG, vocab_size=60)), a_store(), recipe())
    with pytest.raises(UserError, match="batch is 6; it needs to be a multiple of 4, 2 pieces in each of 2 processes"):
        loop.Trainer(GPT(CONFIG), a_store(), recipe(accumulate=2), world=2)
    with pytest.raises(UserError, match="the held-out text has 5 tokens; rows of 8 need at least 9"):
        loop.Trainer(GPT(CONFIG), a_store(validation=torch.arange(5)), recipe()).validate()


@pytest.mark.parametrize("prompt", [1, LENGTH - 1, LENGTH, LENGTH + 1, LENGTH + 4])
def test_generation_sees_the_whole_context_and_no_more(prompt):
    model, seen = GPT(CONFIG), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    ids = torch.randint(CONFIG.vocab_size, (1, prompt))
    generated = model.generate(ids, LENGTH)
    assert len(seen) == LENGTH
    for step, given in enumerate(seen):
        assert torch.equal(given, generated[:, : prompt + step][:, max(0, prompt + step - LENGTH) :])
