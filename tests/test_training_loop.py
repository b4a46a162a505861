"""The training loop against one written again here in a dozen lines, bit for bit; and what generation sees."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gptkern.commands import text, training
from gptkern.models.gpt import GPT, GPTConfig
from gptkern.training.optimizers import optimizer_of

LENGTH = 8
CONFIG = GPTConfig(vocab_size=256, context=LENGTH, layers=1, width=16, heads=2)
STEPS, BATCH, LR, SEED = 12, 3, 0.05, 5
# Bytes of each block are its own: a block that is in the wrong split shows.
DATA = bytes(block * 16 + offset % 16 for block in range(16) for offset in range(text.BLOCK_BYTES // 64)) * 3


def recipe() -> training.Recipe:
    return training.Recipe(steps=STEPS, batch=BATCH, length=LENGTH, lr=LR, seed=SEED)


def a_trainer() -> training.Trainer:
    return training.Trainer(training.new_model(CONFIG, recipe()), text.Text("", *text.split(DATA)), recipe())


def halves(data: bytes) -> tuple[bytes, bytes]:
    """Every tenth block apart; of a short text a block is a tenth."""
    size = min(text.BLOCK_BYTES, len(data) // 10)
    blocks = [data[start : start + size] for start in range(0, len(data), size)]
    held_out = [block for index, block in enumerate(blocks) if index % 10 == 9]
    return b"".join(block for index, block in enumerate(blocks) if index % 10 != 9), b"".join(held_out)


def the_same_training() -> tuple[GPT, list[float], list[float]]:
    """-> the model, each step's loss, and each step's norm of the gradients before it was clipped."""
    torch.manual_seed(SEED)
    model, generator = GPT(CONFIG), torch.Generator().manual_seed(SEED)
    data = torch.tensor(list(halves(DATA)[0]))
    optimizer, losses, norms = optimizer_of(model, LR), [], []
    for step in range(STEPS):
        # The last byte may be a target, and is the last one that may.
        first = torch.randint(0, len(data) - 1 - LENGTH + 1, (BATCH, 1), generator=generator).flatten()
        rows = torch.stack([data[start : start + LENGTH + 1] for start in first.tolist()])
        optimizer.zero_grad()
        loss = F.cross_entropy(model(rows[:, :-1])[0].reshape(-1, 256), rows[:, 1:].reshape(-1))
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        # One step of warm-up, a tenth of them all; the cosine ends at a tenth of the peak.
        factor = 1 if step < 1 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 1) / (STEPS - 1))) / 2
        for group in optimizer.param_groups:
            group["lr"] = LR * factor
        optimizer.step()
        losses.append(loss.item())
    return model, losses, norms


def test_the_loop_is_the_one_of_a_dozen_lines():
    expected, losses, norms = the_same_training()
    # Else it would not show whether, or when, gradients are clipped.
    assert min(norms) < 1 < max(norms)
    trainer = a_trainer()
    for steps in (1, 4, STEPS - 5):
        trainer.run(steps)
    assert trainer.losses == losses
    for (name, parameter), other in zip(trainer.model.named_parameters(), expected.parameters()):
        assert torch.equal(parameter, other), name


def test_no_byte_of_a_held_out_block_is_trained_on():
    data = b"".join(bytes([index]) * text.BLOCK_BYTES for index in range(30))
    train, validation = text.split(data)
    assert (bytes(train.tolist()), bytes(validation.tolist())) == halves(data)
    trainer = training.Trainer(GPT(CONFIG), text.Text("", train, validation), recipe())
    seen = {token for _ in range(200) for ids in trainer.batches.next() for token in ids.flatten().tolist()}
    assert not seen & set(validation.tolist()) and seen == set(train.tolist())


def test_the_first_byte_is_an_input_and_the_last_a_target():
    batches = text.Batches(torch.arange(LENGTH + 2, dtype=torch.uint8), 64, LENGTH, 0, torch.device("cpu"))
    ids, targets = batches.next()
    assert {row[0] for row in ids.tolist()} == {0, 1} and {row[-1] for row in targets.tolist()} == {LENGTH, LENGTH + 1}
    only = text.Batches(torch.arange(LENGTH + 1, dtype=torch.uint8), 2, LENGTH, 0, torch.device("cpu"))
    assert only.next()[1].tolist() == [list(range(1, LENGTH + 1))] * 2


@pytest.mark.parametrize("windows", [1, 2, 3, 4, 7])
def test_validation_on_the_way_takes_windows_of_the_whole_held_out_text(windows):
    trainer = a_trainer()
    held_out = torch.tensor(list(halves(DATA)[1]))
    rows = [held_out[start : start + LENGTH + 1] for start in range(0, len(held_out) - LENGTH, LENGTH)]
    every = math.ceil(len(rows) / windows)
    assert len(rows) >= 4 * windows
    spread = torch.stack(rows[::every])
    with torch.no_grad():
        logits = trainer.model(spread[:, :-1])[0]
        expected = F.cross_entropy(logits.flatten(0, 1), spread[:, 1:].flatten()).item()
    assert trainer.validate(windows) == pytest.approx(expected, rel=1e-6)
    assert trainer.validate() != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("prompt", [1, LENGTH - 1, LENGTH, LENGTH + 1, LENGTH + 4])
def test_generation_sees_the_whole_context_and_no_more(prompt):
    model, seen = GPT(CONFIG), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    ids = torch.randint(256, (1, prompt))
    generated = model.generate(ids, LENGTH)
    assert len(seen) == LENGTH
    for step, given in enumerate(seen):
        assert torch.equal(given, generated[:, : prompt + step][:, max(0, prompt + step - LENGTH) :])
