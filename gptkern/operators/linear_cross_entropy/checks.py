"""What linear_cross_entropy takes: its checks, and what PyTorch's `options` mean here."""

from __future__ import annotations

import warnings
from typing import Any

import torch

_OPTIONS = ("allow_retain_graph", "batch_chunk_size", "chunking_method", "acc_policy", "acc_dtype")
_POLICIES = ("auto", "accurate", "balanced", "compact")


def _error(kind: type, message: str) -> Exception:
    return kind(f"linear_cross_entropy: {message}")


def shapes(input, linear_weight, target, linear_bias, weight, ignore_index) -> tuple[int, ...]:
    """-> the logits' shape, (*rows, classes, *positions).

    Raises:
        TypeError, RuntimeError: as linear_cross_entropy's docstring says.
    """
    for name, argument in (("input", input), ("linear_weight", linear_weight), ("target", target)):
        if not isinstance(argument, torch.Tensor):
            raise _error(TypeError, f"{name} is a {type(argument).__name__}; it needs to be a Tensor")
    for name, argument in (("linear_bias", linear_bias), ("weight", weight)):
        if argument is not None and not isinstance(argument, torch.Tensor):
            raise _error(TypeError, f"{name} is a {type(argument).__name__}; it needs to be a Tensor or None")
    if not 1 <= input.dim() <= 2:
        raise _error(RuntimeError, f"expected input with dimensionality 1 or 2, got {input.dim()}; it needs the shape "
                     "(width,) or (rows, width)")  # fmt: skip
    if linear_weight.dim() < 2:
        raise _error(RuntimeError, f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}")
    if input.shape[-1] != linear_weight.shape[-1]:
        raise _error(RuntimeError, "expected equal input and linear_weight last dimensions (in_features), got "
                     f"{input.shape[-1]} and {linear_weight.shape[-1]}, respectively")  # fmt: skip
    classes, positions = linear_weight.shape[0], tuple(linear_weight.shape[1:-1])
    if linear_bias is not None and tuple(linear_bias.shape) != (classes, *positions):
        needed, got = (classes, *positions), tuple(linear_bias.shape)
        raise _error(RuntimeError, f"expected linear_bias shape {needed}, got {got}")
    if positions and input.dim() == 1:
        raise _error(RuntimeError, f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} "
                     f"requires batched input, (N, {input.shape[-1]}), got unbatched input with shape "
                     f"{tuple(input.shape)}")  # fmt: skip
    logits = (*input.shape[:-1], classes, *positions)
    if tuple(target.shape) == logits and ignore_index is not None:
        raise _error(RuntimeError, "ignore_index cannot be specified when target contains probabilities")
    return logits


def loss_dtype(dtype: Any) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise _error(TypeError, f"loss_dtype is {dtype!r}; it needs to be a floating-point torch.dtype or None")


def process_group(group: Any) -> None:
    if group is not None and not (hasattr(group, "size") and hasattr(group, "group_name")):
        raise _error(TypeError, f"group is a {type(group).__name__}; it needs to be a torch.distributed process group "
                     "or None")  # fmt: skip


def of_chunks(input, linear_weight, target, linear_bias, weight, all_classes: int) -> None:
    """What F.linear and F.cross_entropy say of these tensors, before any work; class indices, rows of one vocabulary.

    Raises:
        RuntimeError, ValueError, IndexError: of the types that PyTorch raises.
    """
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias), ("weight", weight)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise _error(RuntimeError, f"{name} is {tensor.dtype}; it needs the input's dtype, {input.dtype}")
    for name, tensor in (("linear_weight", linear_weight), ("target", target), ("linear_bias", linear_bias),
                         ("weight", weight)):  # fmt: skip
        if tensor is not None and tensor.device != input.device:
            raise _error(RuntimeError, f"{name} is on {tensor.device}; it needs the input's device, {input.device}")
    if target.shape != input.shape[:1]:
        raise _error(ValueError, f"Expected input batch_size ({input.shape[0]}) to match target batch_size; target has "
                     f"shape {tuple(target.shape)}")  # fmt: skip
    if weight is not None and tuple(weight.shape) != (all_classes,):
        raise _error(RuntimeError, f"weight has shape {tuple(weight.shape)}; it needs one number for each class, "
                     f"({all_classes},)")  # fmt: skip


def indices(target: torch.Tensor, ignore_index: int, classes: int) -> None:
    """Raises IndexError where a target is no class. Reads values: for tensors on a CPU alone."""
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        found = int(target[wrong][0])
        raise _error(IndexError, f"Target {found} is out of bounds; it needs to be from 0 to {classes - 1}, or "
                     f"ignore_index, {ignore_index}")  # fmt: skip


def chunk_elements(options: Any, rows: int, width: int, classes: int, input: torch.Tensor) -> int:
    """Elements of the logits that a chunk has at most, as `options` ask; 0: by our own formula.

    batch_chunk_size tokens of a whole vocabulary are as many elements as all tokens of a part of it. `acc_policy` and
    `acc_dtype` ask for a precision that ours is never below, and `allow_retain_graph` for what always holds.

    Raises:
        TypeError: a field is missing. ValueError: a field's value is none of PyTorch's, or batch_chunk_size and
            chunking_method disagree. RuntimeError: acc_dtype cannot be had for the input's dtype.
    """
    if options is None:
        return 0
    missing = [name for name in _OPTIONS if not hasattr(options, name)]
    if missing:
        raise _error(TypeError, f"options is a {type(options).__name__} without {', '.join(missing)}; it needs the "
                     "fields of torch.nn.LinearCrossEntropyOptions")  # fmt: skip
    _, size, method, policy, acc_dtype = (getattr(options, name) for name in _OPTIONS)
    if policy not in _POLICIES:
        raise _error(ValueError, f"options.acc_policy is {policy!r}; it needs one of {', '.join(map(repr, _POLICIES))}")
    if size is not None and (type(size) is not int or size <= 0):
        raise _error(ValueError, f"options.batch_chunk_size is {size!r}; it needs to be a positive int or None")
    narrow = input.dtype in (torch.float16, torch.bfloat16)
    if acc_dtype not in (None, input.dtype) and not (narrow and acc_dtype == torch.float32):
        raise _error(RuntimeError, f"options.acc_dtype is {acc_dtype}; it needs to be None, the input's dtype, "
                     f"{input.dtype}, or float32 for 16-bit input")  # fmt: skip
    if method == "auto":
        return 0 if size is None else size * classes
    if method is None:
        return (rows if size is None else size) * classes
    kind, colon, factor = method.partition(":")
    if kind != "aspect_ratio" or (colon and not (factor.isdigit() and int(factor) > 0)):
        raise _error(ValueError, f"options.chunking_method is {method!r}; it needs 'auto', 'aspect_ratio', "
                     "'aspect_ratio:N' with N >= 1, or None")  # fmt: skip
    # next power of two of rows / (classes / width), divided by the factor
    least = -(-rows // max(-(-classes // max(width, 1)), 1))
    found = max(min((1 << max(least - 1, 0).bit_length()) // int(factor or 1), rows), 1)
    if size is not None and size != found:
        raise _error(ValueError, f"options.batch_chunk_size is {size} and options.chunking_method {method!r} gives "
                     f"{found}; it needs one of them")  # fmt: skip
    return found * classes


def warn_whole(why: str) -> None:
    warnings.warn(f"linear_cross_entropy: options have no effect: {why}, and the logits are whole in memory",
                  stacklevel=4)  # fmt: skip
