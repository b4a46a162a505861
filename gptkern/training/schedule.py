"""The learning rate of an update.

    warmup steps W = warmup · steps, rounded; at least 1 where warmup is above 0
    lr(step) = peak · (step + 1) / W                                       while step < W
             = floor + (peak - floor) · f                                  afterwards, floor = final_lr · peak

    cosine     f = (1 + cos(π · progress)) / 2      progress = (step - W) / (steps - W)
    linear     f = 1 - progress
    wsd        f = 1 until the last D = decay · steps steps (rounded), then 1 - (step - (steps - D)) / D
    constant   f = 1

Sources: cosine as in GPT-3, appendix B (arXiv:2005.14165); warm-up, stable, decay: Hu et al., MiniCPM, 2024
(arXiv:2404.06395), with the linear decay of Hägele et al., 2024 (arXiv:2405.18392).
"""

from __future__ import annotations

import math

from gptkern.training.recipe import Recipe


def warmup_steps(recipe: Recipe) -> int:
    return max(1, round(recipe.warmup * recipe.steps)) if recipe.warmup > 0 else 0


def lr_at(recipe: Recipe, step: int) -> float:
    """The learning rate of update `step`, the first of which is 0; beyond the last one it stays what it ends at."""
    warmup = warmup_steps(recipe)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    floor = recipe.final_lr * recipe.lr
    return floor + (recipe.lr - floor) * _height(recipe, step, warmup)


def _height(recipe: Recipe, step: int, warmup: int) -> float:
    """Where between the floor, 0, and the peak, 1."""
    step = min(step, recipe.steps)
    progress = (step - warmup) / max(1, recipe.steps - warmup)
    if recipe.schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if recipe.schedule == "linear":
        return 1 - progress
    if recipe.schedule == "wsd":
        decay = round(recipe.decay * recipe.steps)
        start = recipe.steps - decay
        return 1.0 if step < start or decay == 0 else 1 - (step - start) / decay
    return 1.0
