"""The optimizer that a GPT is trained with."""

from __future__ import annotations

import torch

from gptkern.optim import AdamW

BETAS = (0.9, 0.95)  # GPT-3, appendix B
WEIGHT_DECAY = 0.1  # GPT-3, appendix B


def optimizer_of(
    model: torch.nn.Module,
    lr: float,
    *,
    betas: tuple[float, float] = BETAS,
    weight_decay: float = WEIGHT_DECAY,
    capturable: bool = False,
) -> AdamW:
    """AdamW that decays matrices only: biases and the parameters of LayerNorm keep their size.

    Args:
        betas: of the averages of the gradient and of its square. weight_decay: of the matrices.
        capturable: a step can be captured in a CUDA graph; the parameters have to be on a GPU.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=lr, betas=betas, capturable=capturable)


def begin(optimizer: torch.optim.AdamW) -> None:
    """Make now what AdamW makes at its first step, averages of zeros: they can be read into, and their memory is taken.

    A parameter that no gradient reaches has them too; it stays as it is.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # float32 on the parameter's device: what the fused step reads
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
