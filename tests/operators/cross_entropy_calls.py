"""How the tests call cross_entropy: inputs, options, backends, and a call that is judged against the oracle."""

from __future__ import annotations

import oracle_cross_entropy
import pytest
import torch
from checking import check
from sharp import sharp

import gptkern.functional as G

# float16 goes the way of bfloat16; what has no dtypes of its own is called in float32.
dtypes = pytest.mark.parametrize(
    "dtype", sharp((torch.float16, torch.bfloat16, torch.float32), torch.bfloat16), ids=str
)


def random(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (2.0 * torch.randn(*shape)).to(device=device, dtype=dtype)


def classes_for(input: torch.Tensor, ignored: int | None = -100) -> torch.Tensor:
    """Random classes, of which the second and every fifth from there is ignored."""
    shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()
    target = torch.randint(input.shape[0 if input.dim() == 1 else 1], shape)
    if ignored is not None and target.numel() > 1:
        target.view(-1)[1::5] = ignored
    return target.to(input.device)


def probabilities_for(input: torch.Tensor) -> torch.Tensor:
    target = torch.randn(input.shape).softmax(0 if input.dim() == 1 else 1)
    return target.to(device=input.device, dtype=input.dtype)


def weights_for(input: torch.Tensor) -> torch.Tensor:
    return (torch.rand(input.shape[0 if input.dim() == 1 else 1]) + 0.5).to(device=input.device, dtype=input.dtype)


def check_cross_entropy(input, target=None, weight=None, grad_output=None, **options) -> torch.Tensor:
    target = classes_for(input) if target is None else target
    return check(
        lambda x: G.cross_entropy(x, target, weight, **options),
        lambda x, precision: oracle_cross_entropy.cross_entropy(x, target, weight, **options, precision=precision),
        input,
        grad_output=grad_output,
    )


# name -> (options, whether there are weights, whether the target is probabilities)
CALLS = {
    "plain": ({}, False, False),
    "sum": ({"reduction": "sum"}, False, False),
    "each row": ({"reduction": "none"}, False, False),
    "weights": ({}, True, False),
    "smoothed": ({"label_smoothing": 0.2}, False, False),
    "smoothed, weights": ({"label_smoothing": 0.2}, True, False),
    "wholly smoothed": ({"label_smoothing": 1.0, "reduction": "none"}, True, False),
    "z-loss": ({"z_loss": 0.1}, True, False),
    "softcap": ({"softcap": 2.0}, False, False),
    "scaled": ({"logit_scale": -0.7}, False, False),
    "everything": (
        {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0, "logit_scale": 0.5, "reduction": "none"}, True, False,
    ),
    "probabilities": ({}, False, True),
    "probabilities, each row": ({"reduction": "none"}, True, True),
    "probabilities, everything": (
        {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0, "logit_scale": 0.5, "reduction": "sum"}, True, True,
    ),
}  # fmt: skip
calls = pytest.mark.parametrize("name", CALLS)
# Those of the table that differ most, where each takes its time.
SHARP = ("each row", "everything", "probabilities, everything")
slow_calls = pytest.mark.parametrize("name", sharp(CALLS, *SHARP))


def call_of(name: str, input: torch.Tensor) -> tuple:
    """(target, weight, options) of a call of the table."""
    options, has_weights, is_probabilities = CALLS[name]
    target = probabilities_for(input) if is_probabilities else classes_for(input)
    return target, weights_for(input) if has_weights else None, options
