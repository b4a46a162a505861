"""A training written again in plain PyTorch, which shares no code with the library's loop: what that is held against.

Taken from the library are the model and the rows of the text, by number; tests/test_data_loader.py holds the rows.
"""

from __future__ import annotations

import contextlib
import math
import types

import torch
import torch.nn.functional as F

from gptkern.models.gpt import GPT, GPTConfig
from gptkern.training.data.rows import Rows
from gptkern.training.data.store import ArrayTokens, Store
from gptkern.training.recipe import Recipe

VOCABULARY, LENGTH = 61, 8
CONFIG = GPTConfig(vocab_size=VOCABULARY, context=LENGTH, layers=2, width=16, heads=2)
STEPS, BATCH, LR, SEED = 12, 6, 0.03, 5


def recipe(**changes) -> Recipe:
    return Recipe(**{"steps": STEPS, "batch": BATCH, "length": LENGTH, "lr": LR, "seed": SEED, **changes})


def a_store(train: torch.Tensor | None = None, validation: torch.Tensor | None = None) -> Store:
    """Of random text; the tokens of the held-out part are others than those that are trained on."""
    generator = torch.Generator().manual_seed(1)
    if train is None:
        train = torch.randint(0, 40, (700,), generator=generator)
    if validation is None:
        validation = torch.randint(40, VOCABULARY, (150,), generator=generator)
    tokenizer = types.SimpleNamespace(vocab_size=VOCABULARY)
    return Store(ArrayTokens(train), ArrayTokens(validation), tokenizer, None, "a text", "0" * 64)


# Of 12 steps, 3 of warm-up, and 3 of decay under wsd; the floor is a tenth of the peak.
WARMUP, DECAY, FINAL = 3, 3, 0.1
HEIGHTS = {
    "cosine": lambda step: (1 + math.cos(math.pi * ((step - 3) / 9))) / 2,
    "linear": lambda step: 1 - (step - 3) / 9,
    "wsd": lambda step: 1 if step < 9 else 1 - (step - 9) / 3,
    "constant": lambda step: 1,
}


def plain_training(
    schedule="cosine", accumulate=1, clip=1.0, betas=(0.9, 0.95), weight_decay=0.1, smoothing=0.0, z_loss=0.0,
    dtype=None, scale=None, dropout=0.0,
):  # fmt: skip
    """-> the model, and of each step the loss, the norm of the gradients before they were clipped, and the scale."""
    torch.manual_seed(SEED)
    model = GPT(GPTConfig(VOCABULARY, LENGTH, layers=2, width=16, heads=2, dropout=dropout))
    torch.manual_seed(SEED)
    rows = Rows(a_store().train, LENGTH, SEED)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=betas, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 2.0**16, enabled=dtype is torch.float16)
    history = []
    for step in range(STEPS):
        batch = torch.stack([torch.tensor(rows.row(BATCH * step + index).tolist()) for index in range(BATCH)])
        scale_before = scaler.get_scale() if dtype is torch.float16 else None
        optimizer.zero_grad()
        total = []
        for piece in batch.split(BATCH // accumulate):
            with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
                logits = model(piece[:, :-1])[0].reshape(-1, VOCABULARY).float()
                reduction = "none" if z_loss else "sum"  # which round in another order
                loss = F.cross_entropy(
                    logits, piece[:, 1:].reshape(-1), reduction=reduction, label_smoothing=smoothing
                )  # fmt: skip
                if z_loss:
                    loss = (loss + logits.logsumexp(-1) ** 2 * z_loss).sum()
            loss = loss / (BATCH * LENGTH)
            scaler.scale(loss).backward()
            total.append(loss.detach())
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
        for group in optimizer.param_groups:
            height = HEIGHTS[schedule](step)
            group["lr"] = LR * (step + 1) / 3 if step < 3 else 0.1 * LR + (LR - 0.1 * LR) * height
        scaler.step(optimizer)
        scaler.update()
        loss = total[0] if accumulate == 1 else torch.stack(total).sum()
        history.append((loss.item(), norm.item(), scale_before))
    return model, history
