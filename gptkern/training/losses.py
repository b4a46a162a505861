"""What a training lowers, and what it is measured by."""

from __future__ import annotations

import torch

import gptkern.functional as F

IGNORED = -100  # a target that does not count


def objective(
    features: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """The sum over the targets that count, with the logits features @ weight^T, of

        (1 - s) · (lse - logit of the target) + s · (lse - mean of the logits) + z · lse²

    with lse the log of the sum of the logits' exponentials, s the label smoothing and z the weight of the z-loss.
    A sum, so that the pieces of an update add up whatever their share of targets: who trains divides by the targets
    of the whole update. Where the logits are many they are computed in chunks, and never whole in memory
    (`gptkern.functional.linear_cross_entropy`).

    Args:
        features: (batch, length, width), what GPT's `lm_head` is given. weight: (vocab_size, width), of the output.
        targets: (batch, length), int64; -100 does not count.

    Returns:
        A float32 scalar.

    Sources: label smoothing: Szegedy et al., 2016 (arXiv:1512.00567); z-loss: Chowdhery et al., PaLM, 2022
    (arXiv:2204.02311), section 5.
    """
    return F.linear_cross_entropy(
        features.flatten(0, 1), weight, targets.flatten(), reduction="sum", ignore_index=IGNORED,
        label_smoothing=label_smoothing, z_loss=z_loss, loss_dtype=torch.float32,
    )  # fmt: skip
