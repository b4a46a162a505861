"""What a training lowers, and what it is measured by."""

from __future__ import annotations

import torch
import torch.nn.functional as F

IGNORED = -100  # a target that does not count


def objective(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> torch.Tensor:
    """The sum over the targets that count of

        (1 - s) · (lse - logit of the target) + s · (lse - mean of the logits) + z · lse²

    with lse the log of the sum of the logits' exponentials, s the label smoothing and z the weight of the z-loss.
    A sum, so that the pieces of an update add up whatever their share of targets: who trains divides by the targets
    of the whole update.

    Args:
        logits: (batch, length, vocab_size), any floating dtype; computed in float32.
        targets: (batch, length), int64; -100 does not count.

    Returns:
        A float32 scalar.

    Sources: label smoothing: Szegedy et al., 2016 (arXiv:1512.00567); z-loss: Chowdhery et al., PaLM, 2022
    (arXiv:2204.02311), section 5.
    """
    logits, targets = logits.flatten(0, 1).float(), targets.flatten()  # (batch * length, vocab_size), (batch * length,)
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    if z_loss:
        lse = torch.logsumexp(logits, -1)  # (batch * length,)
        loss = loss + z_loss * lse.square().masked_fill(targets == IGNORED, 0.0).sum()
    return loss
