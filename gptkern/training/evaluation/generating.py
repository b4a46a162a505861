"""What a model says, greedily: the likeliest token each time.

    token = argmax_v z_v,    of equal ones the first

Prompts of several lengths go on together, filled up at their right ends, which a causal model does not see: each says
what it says alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gptkern.models.gpt import GPT
from gptkern.training.evaluation.likelihood import Computing, check_finite, read
from gptkern.training.precision import autocast


@torch.no_grad()
def greedy(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    most: int,
    end: int | None,
    how: Computing,
    is_over: Callable[[Sequence[int]], bool] = lambda said: False,
) -> list[tuple[list[int], bool]]:
    """Of each prompt (the tokens that follow it, whether it came to its end). The model is in eval mode.

    Args:
        prompts: of at least one token each. most: tokens that follow at most. end: the token that is an end, and not
            among those that follow; None where there is none. is_over: whether the tokens that follow are all. What
            lies further back than the context is not seen.
    """
    said: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), how.batch):
        picked = order[start : start + how.batch]
        going = picked if most else []
        while going:
            ids = [[*prompts[index], *said[index]][-model.config.context :] for index in going]
            features = read(model, ids, how)  # (rows, length, width)
            last = torch.tensor([len(row) - 1 for row in ids], device=how.device)
            with autocast(how.device, how.precision):
                logits = model.lm_head(features[torch.arange(len(ids), device=how.device), last])  # (rows, vocab_size)
            check_finite(bool(logits.isfinite().all()), how)
            left = []
            for index, token in zip(going, logits.float().argmax(-1).tolist()):
                if token == end:
                    ended[index] = True
                    continue
                said[index].append(token)
                ended[index] = is_over(said[index])
                if not ended[index] and len(said[index]) < most:
                    left.append(index)
            going = left
        how.called(len(picked))
    return list(zip(said, ended))
