"""What attention asks of its arguments: each error names the argument, what it got and what it needs. And what kernels
take of a call that is right.
"""

from __future__ import annotations

import itertools

import torch

from gptkern.backends import tracing
from gptkern.backends.numbers import as_float
from gptkern.backends.registration import autocast


def check(query, key, value, attn_mask, is_causal, scale, enable_gqa):
    """-> query, key and value as autocast has them. Raises an error that names what is wrong.

    What PyTorch would broadcast passes.
    """
    if not _is_usual(query, key, value, attn_mask, is_causal, scale, enable_gqa):
        _check_each(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    return autocast("lower", query, key, value)


def _is_usual(query, key, value, attn_mask, is_causal, scale, enable_gqa) -> bool:
    """Whether nothing is wrong with a call of four dimensions, as many heads everywhere and no mask: most calls are
    such, and this is half of what `_check_each` takes.
    """
    if attn_mask is not None:
        return False
    if not (isinstance(query, torch.Tensor) and isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor)):
        return False
    shape, of_key, device, dtype = query.shape, key.shape, query.device, query.dtype
    return (
        len(shape) == 4
        and of_key == value.shape
        and shape[0] == of_key[0]
        and shape[1] == of_key[1]
        and shape[3] == of_key[3]
        and key.device == device
        and value.device == device
        and key.dtype == dtype
        and value.dtype == dtype
        and query.is_floating_point()
        and isinstance(is_causal, bool)
        and isinstance(enable_gqa, bool)
        and (scale is None or type(scale) is float)
    )


def _check_each(query, key, value, attn_mask, is_causal, scale, enable_gqa):
    device = query.device if isinstance(query, torch.Tensor) else None
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"attention: {name} is {type(tensor).__name__}; it needs a Tensor")
        if tensor.dim() < 2:
            raise RuntimeError(
                f"attention: {name} has shape {tuple(tensor.shape)}; it needs at least two dimensions, "
                "(length, head_dim)"
            )
        if not tensor.is_floating_point():
            raise RuntimeError(f"attention: {name} is {tensor.dtype}; it needs a floating-point dtype")
        if tensor.device != device:
            raise RuntimeError(f"attention: {name} is on {tensor.device}; it needs the query's device, {query.device}")
    # Autocast makes one dtype of several, and leaves float64 alone.
    cast = autocast("lower", query, key, value)
    if not cast[0].dtype == cast[1].dtype == cast[2].dtype:
        raise RuntimeError(
            f"attention: query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; they need one dtype"
        )
    if not isinstance(is_causal, bool):
        raise TypeError(f"attention: is_causal is {type(is_causal).__name__}; it needs a bool")
    if attn_mask is not None and not isinstance(attn_mask, torch.Tensor):
        raise TypeError(f"attention: attn_mask is {type(attn_mask).__name__}; it needs a Tensor or None")
    if not isinstance(enable_gqa, bool):
        raise TypeError(f"attention: enable_gqa is {type(enable_gqa).__name__}; it needs a bool")
    if scale is not None and type(scale) is not float and as_float(scale) is None:
        raise TypeError(f"attention: scale is {type(scale).__name__}; it needs a number or None")
    if attn_mask is not None and is_causal:
        raise RuntimeError("attention: attn_mask and is_causal are both given; it needs one of them at most")
    of_query, of_key, of_value = query.shape, key.shape, value.shape
    if of_query[-1] != of_key[-1]:
        raise RuntimeError(
            f"attention: key has head_dim {of_key[-1]}; it needs the query's, {of_query[-1]} "
            f"(shapes {tuple(of_query)} and {tuple(of_key)})"
        )
    if of_key[-2] != of_value[-2]:
        raise RuntimeError(
            f"attention: value has length {of_value[-2]}; it needs the key's, {of_key[-2]} "
            f"(shapes {tuple(of_value)} and {tuple(of_key)})"
        )
    if len(of_query) == len(of_key) == len(of_value) == 4:
        _check_sizes("batch size", of_query[0], of_key[0], of_value[0])
        heads, kv_heads, value_heads = of_query[1], of_key[1], of_value[1]
        if not enable_gqa:
            _check_sizes("number of heads", heads, kv_heads, value_heads)
        elif any(count > 0 and heads % count for count in (kv_heads, value_heads)):
            raise RuntimeError(
                f"attention: key and value have {kv_heads} and {value_heads} heads; with enable_gqa they need to "
                f"divide the query's {heads}"
            )


def checked_dropout(dropout_p) -> float:
    probability = dropout_p if type(dropout_p) is float else as_float(dropout_p)
    if probability is None:
        raise TypeError(f"attention: dropout_p is {type(dropout_p).__name__}; it needs a number")
    if not 0 <= probability <= 1:
        raise RuntimeError(f"attention: dropout_p is {probability}; it needs to be between 0 and 1")
    return probability


def check_mask(mask, query, key):
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(
            f"attention: attn_mask is {mask.dtype}; it needs bool, float32 or the query's dtype, {query.dtype}"
        )
    if mask.device != query.device:
        raise RuntimeError(f"attention: attn_mask is on {mask.device}; it needs the query's device, {query.device}")
    queries, keys, of_mask = map(tracing.sizes, (query, key, mask))
    wanted = *queries[:-1], keys[-2]
    if len(of_mask) <= len(wanted) and _broadcasts(of_mask, wanted):
        return
    # Of what PyTorch broadcasts, the 1s, the scores have the other size.
    lead = itertools.zip_longest(reversed(queries[:-2]), reversed(keys[:-2]), fillvalue=1)
    wanted = *reversed([one if one != 1 else other for one, other in lead]), *wanted[-2:]
    if len(of_mask) > len(wanted) or not _broadcasts(of_mask, wanted):
        raise RuntimeError(f"attention: attn_mask has shape {tuple(of_mask)}; it needs one that broadcasts to {wanted}")


def _broadcasts(sizes, wanted) -> bool:
    return all(size in (1, whole) for size, whole in zip(reversed(sizes), reversed(wanted)))


def _check_sizes(what, query, key, value):
    """Sizes of one dimension agree where those that PyTorch broadcasts, the 1s, are left out."""
    if query == key == value:
        return
    if len({size for size in (query, key, value) if size != 1}) > 1:
        raise RuntimeError(f"attention: query, key and value differ in {what}: {query}, {key} and {value}")


# --- What kernels take ---------------------------------------------------------------------------------------------

LARGEST_HEAD_DIM = 256
# Rows are read by 16 bytes: 8 values of 16 bits.
HEAD_DIM_STEP = 8


def outside_of_kernels(call: tuple, dtypes) -> str | None:
    """Why no kernel takes a call of these shapes and dtypes, or None: what the backends' `unsupported` share."""
    query, key, value = call[:3]
    of_query, of_key, of_value = query.shape, key.shape, value.shape
    if not len(of_query) == len(of_key) == len(of_value) == 4:
        return (
            f"query, key and value have {len(of_query)}, {len(of_key)} and {len(of_value)} dimensions; kernels need 4, "
            "(batch, heads, length, head_dim)"
        )
    if query.dtype not in dtypes:
        *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"the dtype is {query.dtype}; kernels need {', '.join(others)} or {last}"
    batch, heads, _, head_dim = of_query
    if of_value[3] != head_dim:
        return f"value has head_dim {of_value[3]} and query {head_dim}; kernels need them equal"
    if head_dim % HEAD_DIM_STEP != 0 or not 0 < head_dim <= LARGEST_HEAD_DIM:
        return f"head_dim is {head_dim}; kernels need a multiple of {HEAD_DIM_STEP} up to {LARGEST_HEAD_DIM}"
    if of_key[0] != batch or of_value[0] != batch:
        return f"batch sizes are {batch}, {of_key[0]} and {of_value[0]}; kernels need them equal"
    kv_heads = of_key[1]
    if of_value[1] != kv_heads or (heads % kv_heads if kv_heads else heads):
        return (
            f"query, key and value have {heads}, {kv_heads} and {of_value[1]} heads; kernels need as many in "
            "value as in key, and that they divide the query's"
        )
    return None
