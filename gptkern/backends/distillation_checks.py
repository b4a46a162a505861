"""What the distillation losses check of their arguments, and what they do before and after their rows are computed."""

from __future__ import annotations

import math

import torch

from gptkern.backends import tracing
from gptkern.backends.distillation import DIVERGENCES, JSD
from gptkern.backends.numbers import as_float, as_int

REDUCTIONS = ("none", "mean", "sum")
# What no rounding makes of logarithms of probabilities: logits - lse in bfloat16, both below 16, is off by 2^-4, and
# bfloat16 moves a logarithm by 2^-8 of itself, which makes Σ p^(1 - 2^-8) <= n^(2^-8) of 1, 1.05 of 2^18 classes.
_MOST_LOG_PROBABILITY = 2**-4
_MOST_SUM = 1.125


def check_tensor(name: str, what: str, tensor, device: torch.device | None = None, floating: bool = True) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: {what} is a {type(tensor).__name__}; it needs to be a Tensor")
    if floating and not tensor.is_floating_point():
        raise RuntimeError(f"{name}: {what} is {tensor.dtype}; it needs a floating-point dtype")
    if device is not None and tensor.device != device:
        raise RuntimeError(f"{name}: {what} is on {tensor.device}; it needs the student's device, {device}")


def check_options(name: str, divergence, beta, temperature, mix, ignore_index, reduction, has_target: bool, has_top):
    """-> (divergence, beta, temperature, mix, ignore_index), of Python's own types."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"{name}: divergence is {divergence!r}; it needs one of {', '.join(map(repr, DIVERGENCES))}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction is {reduction!r}; it needs one of {', '.join(map(repr, REDUCTIONS))}")
    beta, temperature, mix = (
        _number(name, what, value) for what, value in (("beta", beta), ("temperature", temperature), ("mix", mix))
    )
    index = as_int(ignore_index)
    if index is None:
        raise TypeError(f"{name}: ignore_index is a {type(ignore_index).__name__}; it needs an int")
    if divergence == JSD and not 0.0 < beta < 1.0:
        limit = " (at 0 and 1 jsd is 0 whatever the models; for its limits take forward_kl and reverse_kl)"
        raise ValueError(f"{name}: beta is {beta}; it needs to be above 0 and below 1{limit if beta in (0, 1) else ''}")
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ValueError(f"{name}: temperature is {temperature}; it needs to be finite and above 0")
    if not 0.0 <= mix <= 1.0:
        raise ValueError(f"{name}: mix is {mix}; it needs to be from 0 (the teacher alone) to 1 (the target alone)")
    if mix > 0.0 and not has_target:
        raise ValueError(f"{name}: target is None and mix is {mix}; it needs a target for the cross-entropy")
    if has_top and temperature != 1.0:
        raise ValueError(
            f"{name}: temperature is {temperature} and teacher_top is given; it needs to be 1: what the classes that "
            "were not stored have at another temperature does not follow from what was"
        )
    return divergence, beta, temperature, mix, index


def _number(name, what, value):
    number = value if type(value) is float else as_float(value)
    if number is None:
        raise TypeError(f"{name}: {what} is a {type(value).__name__}; it needs a number")
    return number


def check_classes(name: str, what: str, classes, whose: str, wanted) -> None:
    """Raises where the teacher's vocabulary is another one than the student's."""
    if classes != wanted:
        more = f"{abs(classes - wanted)} {'more' if classes > wanted else 'fewer'}"
        raise ValueError(
            f"{name}: {what} has {classes} classes and {whose} {wanted}, {more}; a divergence needs both models "
            "to have the same vocabulary"
        )


def check_rows(name: str, what: str, tensor: torch.Tensor, shape) -> None:
    """Raises where a tensor of the teacher's has other dimensions before the last than the student."""
    if tensor.dim() != len(shape) or tensor.shape[:-1] != shape[:-1]:
        needs = ", ".join([*map(str, shape[:-1]), "*"])
        raise RuntimeError(f"{name}: {what} has shape {tuple(tensor.shape)}; it needs the student's, ({needs})")


def check_target(name: str, target, student: torch.Tensor, classes, ignore_index: int) -> None:
    check_tensor(name, "target", target, student.device, floating=False)
    if target.dtype != torch.int64:
        raise RuntimeError(f"{name}: target is {target.dtype}; it needs int64, the indices of classes")
    if target.shape != student.shape[:-1]:
        raise RuntimeError(
            f"{name}: target has shape {tuple(target.shape)}; it needs the student's without its last dimension, "
            f"{tuple(student.shape[:-1])}"
        )
    # A GPU's values are not looked at: there the loss of such a row is NaN.
    if target.is_cpu and tracing.has_values(target):
        wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
        if wrong.any():
            found = target[wrong].flatten()[0].item()
            raise IndexError(
                f"{name}: target holds {found}; it needs classes from 0 to {classes - 1}, or ignore_index, "
                f"{ignore_index}"
            )


def check_top(name: str, teacher_top, student: torch.Tensor, classes) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (log_probabilities, indices), each (rows, n)."""
    if not isinstance(teacher_top, (tuple, list)) or len(teacher_top) != 2:
        got = type(teacher_top).__name__
        raise TypeError(f"{name}: teacher_top is a {got}; it needs the pair (log_probabilities, indices)")
    log_probabilities, indices = teacher_top
    check_tensor(name, "teacher_top[0]", log_probabilities, student.device)
    check_tensor(name, "teacher_top[1]", indices, student.device, floating=False)
    if indices.dtype != torch.int64:
        raise TypeError(f"{name}: teacher_top[1] is {indices.dtype}; it needs int64, the indices of classes")
    check_rows(name, "teacher_top[0]", log_probabilities, student.shape)
    if indices.shape != log_probabilities.shape:
        raise RuntimeError(
            f"{name}: teacher_top has shapes {tuple(log_probabilities.shape)} and {tuple(indices.shape)}; "
            "it needs equal ones"
        )
    n = indices.shape[-1]
    if not 0 < n <= classes:
        raise ValueError(f"{name}: teacher_top has {n} classes a row; it needs from 1 to the student's {classes}")
    return log_probabilities.detach().reshape(-1, n), indices.reshape(-1, n)


def counting_top(
    name: str, log_probabilities: torch.Tensor, indices: torch.Tensor, target, ignore_index: int, classes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both (rows, n), in rows that do not count n classes of equal probability in place of whatever they hold, and what
    is left of them checked. Reads values on a CPU alone.

    Args:
        target: (rows,), or None.
    """
    if target is not None:
        counts, n = (target != ignore_index).unsqueeze(1), indices.shape[1]
        indices = torch.where(counts, indices, torch.arange(n, device=indices.device))
        log_probabilities = torch.where(counts, log_probabilities, -math.log(max(n, 2)))
    if indices.is_cpu and tracing.has_values(indices) and indices.numel():
        least, most = indices.aminmax()
        if least < 0 or most >= classes:
            wrong = least if least < 0 else most
            raise IndexError(f"{name}: teacher_top[1] holds {wrong.item()}; it needs classes from 0 to {classes - 1}")
        if indices.shape[1] > 1 and (indices.sort(1).values.diff(dim=1) == 0).any():
            raise ValueError(f"{name}: teacher_top[1] holds a class twice in a row; it needs each once")
    _check_log_probabilities(name, log_probabilities)
    return log_probabilities, indices


def _check_log_probabilities(name: str, log_probabilities: torch.Tensor) -> None:
    """Raises where no rounding makes (rows, n) logarithms of probabilities: logits, probabilities."""
    if not (log_probabilities.is_cpu and tracing.has_values(log_probabilities)):
        return
    found = log_probabilities.float()
    sums = found.exp().sum(1)
    above = found > _MOST_LOG_PROBABILITY
    # NaN, which is not above anything, stays in its row.
    if above.any():
        got = f"teacher_top[0] holds {found[above].max().item():.6g}"
    elif (sums > _MOST_SUM).any():
        got = f"the exponentials of a row of teacher_top[0] sum to {sums[sums > _MOST_SUM].max().item():.6g}"
    else:
        return
    raise ValueError(
        f"{name}: {got}; teacher_top needs logarithms of probabilities, at most 0, whose exponentials sum to at most 1 "
        "in each row, not logits or probabilities: pass torch.log_softmax(teacher_logits, -1).topk(n)"
    )


def reduced(losses: torch.Tensor, target, ignore_index: int, reduction: str, shape, dtype: torch.dtype) -> torch.Tensor:
    """(rows,) -> the result, of the shape of the student's without its last dimension, or a number."""
    if reduction == "none":
        return losses.reshape(shape[:-1]).to(dtype)
    total = losses.sum()
    if reduction == "mean":
        # Of no row that counts 0 / 0, NaN, as in PyTorch.
        total = total / (losses.numel() if target is None else (target != ignore_index).sum())
    return total.to(dtype)
