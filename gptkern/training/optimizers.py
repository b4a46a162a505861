"""The optimizer that a GPT is trained with."""

from __future__ import annotations

import torch

BETAS = (0.9, 0.95)  # GPT-3, appendix B
WEIGHT_DECAY = 0.1  # GPT-3, appendix B


def optimizer_of(model: torch.nn.Module, lr: float, *, capturable: bool = False) -> torch.optim.AdamW:
    """AdamW that decays matrices only: biases and the parameters of LayerNorm keep their size.

    Args:
        capturable: a step can be captured in a CUDA graph; the parameters have to be on a GPU.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True, capturable=capturable)
