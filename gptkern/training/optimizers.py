"""The optimizer that a GPT is trained with."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gptkern.optim import AdamW
from gptkern.training.mup import Scale

BETAS = (0.9, 0.95)  # GPT-3, appendix B
WEIGHT_DECAY = 0.1  # GPT-3, appendix B


def optimizer_of(
    model: torch.nn.Module,
    lr: float,
    *,
    betas: tuple[float, float] = BETAS,
    weight_decay: float = WEIGHT_DECAY,
    capturable: bool = False,
    scales: Mapping[str, Scale] | None = None,
) -> AdamW:
    """AdamW that decays matrices only: biases and the parameters of LayerNorm keep their size.

    A group's "lr_scale" is what its learning rate is multiplied by: `set_lr` does.

    Args:
        betas: of the averages of the gradient and of its square. weight_decay: of the matrices.
        capturable: a step can be captured in a CUDA graph; the parameters have to be on a GPU.
        scales: of parameters, by name: mup.scales. What it does not name has a scale of 1.
    """
    found: dict[tuple[Scale, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = (scales or {}).get(name, Scale()), parameter.dim() >= 2
            found.setdefault(kind, []).append(parameter)
    groups = [
        {
            "params": parameters,
            "lr_scale": scale.lr,
            "weight_decay": weight_decay * scale.weight_decay if is_matrix else 0.0,
        }
        for (scale, is_matrix), parameters in found.items()
    ]
    optimizer = AdamW(groups, lr=lr, betas=betas, capturable=capturable)
    set_lr(optimizer, lr)
    return optimizer


def set_lr(optimizer: torch.optim.AdamW, lr: float) -> None:
    """Every group's learning rate, times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


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
