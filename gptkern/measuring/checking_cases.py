"""What checking.py runs: every operator as plain mathematics, and the shapes that reach each variant of a kernel.

Variants: tails, rows too wide for registers, causal limits, grouped heads, both modes of int8_linear. The small
shapes are for interpreted kernels, the realistic ones for GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from gptkern import autograd, functional
from gptkern.backends import dispatch

SIZES = ("small", "realistic")
FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
THREE = (FLOAT32, FLOAT16, BFLOAT16)
FOUR = (*THREE, FLOAT64)


class Problem(NamedTuple):
    """A case with its tensors. All callables take the tensors in the dictionary's order."""

    tensors: dict[str, torch.Tensor]  # those that gradients are taken of; every floating-point argument
    twin: Callable
    reference: Callable  # on float64 or float32 copies of the tensors
    launch: Callable  # as the twin, on the launchers in plain PyTorch
    exact: bool = False  # the first result is integers that have to be equal


class Case(NamedTuple):
    operator: str
    shape_class: str
    shape: str
    dtype: torch.dtype
    build: Callable[[torch.dtype, torch.Generator], Problem]


def _normal(generator: torch.Generator, *shape: int, dtype: torch.dtype, spread: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=generator, device=generator.device) * spread).to(dtype)


# --- attention --------------------------------------------------------------------------------------------------------


def _attention(batch, heads, kv_heads, length_q, length_k, head_dim, kind, dtype, generator) -> Problem:
    """kind: True (causal), False (full), "lower right", "key padding" (a bool mask) or "additive"."""
    # (batch, length, heads, head_dim) in memory, as a GPT's projection leaves it: the kernels read it in place.
    query = _normal(generator, batch, length_q, heads, head_dim, dtype=dtype).transpose(1, 2)
    key = _normal(generator, batch, length_k, kv_heads, head_dim, dtype=dtype).transpose(1, 2)
    value = _normal(generator, batch, length_k, kv_heads, head_dim, dtype=dtype).transpose(1, 2)
    scale = 1 / math.sqrt(head_dim)
    is_causal, lower_right = kind in (True, "lower right"), kind == "lower right"
    mask, arguments = None, {"is_causal": is_causal}
    if lower_right:
        from torch.nn.attention.bias import causal_lower_right

        arguments = {"attn_mask": causal_lower_right(length_q, length_k)}
    elif kind == "key padding":
        # Every sequence has another length, at least half of the longest.
        lengths = length_k - torch.arange(batch, device=generator.device) % (length_k // 2 + 1)
        mask = (torch.arange(length_k, device=generator.device) < lengths[:, None])[:, None, None]
    elif kind == "additive":
        mask = _normal(generator, batch, 1, length_q, length_k, dtype=FLOAT32, spread=2.0)
    if mask is not None:
        arguments = {"attn_mask": mask}
    # Only where it is needed: with it PyTorch, which this is timed against, has fewer kernels to choose from.
    arguments["enable_gqa"] = heads != kv_heads

    def twin(query, key, value):
        return functional.scaled_dot_product_attention(query, key, value, **arguments)

    def launch(query, key, value):
        return autograd.AttentionFunction.apply(
            query, key, value, is_causal, scale, "torch", mask, 0.0, lower_right
        )  # fmt: skip

    def reference(query, key, value):
        # (batch, kv_heads, length, head_dim) -> (batch, heads, length, head_dim): head h reads h // (heads // kv_heads)
        key, value = (tensor.repeat_interleave(heads // kv_heads, dim=1) for tensor in (key, value))
        scores = (query @ key.transpose(2, 3)) * scale
        if is_causal:
            seen = torch.ones(length_q, length_k, dtype=torch.bool, device=query.device)
            scores = scores.masked_fill(~seen.tril(length_k - length_q if lower_right else 0), -math.inf)
        if kind == "key padding":
            scores = scores.masked_fill(~mask, -math.inf)
        if kind == "additive":
            scores = scores + mask.to(scores.dtype)
        # P = exp(scores) / sum exp(scores); the largest score of a row is a constant that only keeps exp in range
        exponentials = torch.exp(scores - scores.detach().amax(-1, keepdim=True))
        return (exponentials / exponentials.sum(-1, keepdim=True)) @ value

    return Problem(dict(query=query, key=key, value=value), twin, reference, launch)


def _attention_cases(size: str) -> Iterator[Case]:
    shapes = {
        # (batch, heads, kv_heads, length_q, length_k, head_dim, is_causal or the kind of mask)
        "small": {
            "causal": (1, 2, 2, 150, 150, 64, True),
            "full, tails": (2, 1, 1, 37, 141, 16, False),
            "grouped heads": (1, 4, 2, 70, 70, 32, True),
            "head_dim 80": (1, 1, 1, 100, 100, 80, True),
            "more queries than keys": (1, 1, 1, 150, 40, 24, True),
            "more keys than queries": (1, 1, 1, 40, 150, 24, True),
            "head_dim 256": (1, 1, 1, 40, 40, 256, True),
            "key padding": (2, 1, 1, 37, 70, 16, "key padding"),
            "additive mask": (2, 2, 1, 37, 70, 16, "additive"),
            "more keys than queries, additive mask": (1, 1, 1, 37, 150, 16, "additive"),
            "lower right": (1, 2, 1, 37, 70, 16, "lower right"),
        },
        "realistic": {
            "GPT-2": (4, 12, 12, 1024, 1024, 64, True),
            "head_dim 128": (1, 8, 8, 2048, 2048, 128, True),
            "grouped heads": (1, 32, 8, 1000, 1000, 128, True),
            "GPT-3 2.7B": (1, 16, 16, 1023, 1023, 80, True),
            "full": (2, 8, 8, 1024, 1024, 64, False),
            "full, tails": (1, 4, 4, 500, 3001, 128, False),
            "long": (1, 2, 2, 4096, 4096, 64, True),
            "head_dim 256": (1, 4, 4, 1024, 1024, 256, True),
            "key padding": (8, 12, 12, 1000, 1000, 64, "key padding"),
            "additive mask": (2, 8, 8, 1000, 1003, 128, "additive"),
            "additive mask, head_dim 256": (1, 4, 4, 500, 500, 256, "additive"),
            "lower right": (1, 16, 4, 300, 2001, 128, "lower right"),
        },
    }[size]
    for shape_class, (batch, heads, kv_heads, length_q, length_k, head_dim, kind) in shapes.items():
        grouped = f"/{kv_heads}" if heads != kv_heads else ""
        shape = f"{batch}x{heads}{grouped}x{length_q}" + (f":{length_k}" if length_q != length_k else "")
        for dtype in THREE:
            yield Case(
                "attention", shape_class, f"{shape}x{head_dim}", dtype,
                _bound(_attention, batch, heads, kv_heads, length_q, length_k, head_dim, kind),
            )  # fmt: skip


# --- layer_norm -------------------------------------------------------------------------------------------------------


def _layer_norm(rows, width, has_residual, has_parameters, dtype, generator) -> Problem:
    # A mean of twice the spread: a variance computed as E[x²] - E[x]² would show.
    tensors = {"input": _normal(generator, rows, width, dtype=dtype) + 2}
    if has_residual:
        tensors["residual"] = _normal(generator, rows, width, dtype=dtype)
    if has_parameters:
        tensors["weight"] = _normal(generator, width, dtype=dtype) + 1
        tensors["bias"] = _normal(generator, width, dtype=dtype)
    names, eps = tuple(tensors), 1e-5

    def twin(*given):
        arguments = dict(zip(names, given))
        return functional.layer_norm(normalized_shape=(width,), eps=eps, **arguments)

    def launch(*given):
        arguments = dict(zip(names, given))
        output, summed = autograd.LayerNormFunction.apply(
            arguments["input"], arguments.get("residual"), arguments.get("weight"), arguments.get("bias"), eps, "torch"
        )
        return (output, summed) if has_residual else output

    def reference(*given):
        arguments = dict(zip(names, given))
        s = arguments["input"] + arguments["residual"] if has_residual else arguments["input"]
        centred = s - s.mean(1, keepdim=True)
        # y = (s - mean) / sqrt(var + eps) * weight + bias
        y = centred / torch.sqrt(centred.square().mean(1, keepdim=True) + eps)
        if has_parameters:
            y = y * arguments["weight"] + arguments["bias"]
        return (y, s) if has_residual else y

    return Problem(tensors, twin, reference, launch)


def _layer_norm_cases(size: str) -> Iterator[Case]:
    shapes = {
        # (rows, width, residual, weight and bias, dtypes)
        "small": {
            "tail": (7, 33, False, True, FOUR),
            "residual": (5, 100, True, True, THREE),
            "GPT-2": (9, 768, False, True, THREE),
            "wide": (2, 16411, False, True, (FLOAT32,)),
            "wide, residual": (1, 16390, True, True, (BFLOAT16,)),
            "no weight": (6, 65, False, False, THREE),
            "narrow": (40, 3, False, True, THREE),
        },
        "realistic": {
            "GPT-2": (8192, 768, False, True, THREE),
            "residual": (4096, 1600, True, True, THREE),
            "tail": (3001, 1023, False, True, FOUR),
            "GPT-3": (1024, 12288, False, True, THREE),
            "wide": (256, 50257, False, True, FOUR),
            "widest": (64, 262144, False, True, THREE),
            "narrow": (100_003, 8, False, True, THREE),
        },
    }[size]
    for shape_class, (rows, width, has_residual, has_parameters, dtypes) in shapes.items():
        for dtype in dtypes:
            build = _bound(_layer_norm, rows, width, has_residual, has_parameters)
            yield Case("layer_norm", shape_class, f"{rows}x{width}", dtype, build)


# --- rms_norm ---------------------------------------------------------------------------------------------------------


def _rms_norm(rows, width, has_weight, dtype, generator) -> Problem:
    tensors = {"input": _normal(generator, rows, width, dtype=dtype) + 1}
    if has_weight:
        tensors["weight"] = _normal(generator, width, dtype=dtype) + 1
    eps = 1e-6

    def twin(input, weight=None):
        return functional.rms_norm(input, (width,), weight, eps)

    def launch(input, weight=None):
        return autograd.RMSNormFunction.apply(input, weight, eps, "torch")

    def reference(input, weight=None):
        # y = x / sqrt(avg(x²) + eps) * weight
        y = input / torch.sqrt(input.square().mean(1, keepdim=True) + eps)
        return y if weight is None else y * weight

    return Problem(tensors, twin, reference, launch)


def _rms_norm_cases(size: str) -> Iterator[Case]:
    shapes = {
        # (rows, width, weight, dtypes)
        "small": {
            "tail": (7, 33, True, THREE),
            "Llama": (9, 1024, True, THREE),
            "wide": (2, 33001, True, (FLOAT32, BFLOAT16)),
            "no weight": (6, 65, False, THREE),
            "narrow": (40, 3, True, THREE),
        },
        "realistic": {
            "Llama 8B": (8192, 4096, True, THREE),
            "heads of 128": (65536, 128, True, THREE),
            "tail": (3001, 1023, True, THREE),
            "Llama 405B": (1024, 16384, True, THREE),
            "wide": (256, 50257, True, THREE),
            "widest": (64, 262144, True, THREE),
            "narrow": (100_003, 8, True, THREE),
        },
    }[size]
    for shape_class, (rows, width, has_weight, dtypes) in shapes.items():
        for dtype in dtypes:
            build = _bound(_rms_norm, rows, width, has_weight)
            yield Case("rms_norm", shape_class, f"{rows}x{width}", dtype, build)


# --- rotary -----------------------------------------------------------------------------------------------------------

ROTARY_BASE = 10_000.0


def _rotary(batch, heads, length, head_dim, rotary_dim, interleaved, has_batch, dtype, generator) -> Problem:
    # The first third of a packed (batch, length, 3, heads, head_dim): read in place.
    packed = _normal(generator, batch, length, 3, heads, head_dim, dtype=dtype)
    input = packed[:, :, 0].transpose(1, 2)
    half, device = rotary_dim // 2, generator.device
    pair = torch.arange(half, device=device)
    # Each sequence of a batch at a position of its own.
    first = 100 * torch.arange(batch if has_batch else 1, device=device)
    position = first[:, None] + torch.arange(length, device=device)
    # angle = position * base^(-2 i / rotary_dim), (batch or 1, length, half)
    angles = position[:, :, None] * ROTARY_BASE ** (-2.0 * pair / max(rotary_dim, 1))
    cos, sin = angles.cos().float(), angles.sin().float()
    if not has_batch:
        cos, sin = cos[0], sin[0]

    def twin(input):
        return functional.rotary_embedding(input, cos, sin, interleaved=interleaved, rotary_dim=rotary_dim)

    def launch(input):
        return autograd.RotaryFunction.apply(input, cos, sin, rotary_dim, interleaved, "torch")

    def reference(input):
        a = 2 * pair if interleaved else pair
        b = a + 1 if interleaved else a + half
        # (batch or 1, 1, length, half)
        c, s = (tensor.to(input.dtype).view(-1, 1, length, half) for tensor in (cos, sin))
        x_a, x_b = input[..., a], input[..., b]
        # (y_a, y_b) = the rotation by the angle of (x_a, x_b); the others stay
        return input.index_copy(-1, a, x_a * c - x_b * s).index_copy(-1, b, x_a * s + x_b * c)

    return Problem(dict(input=input), twin, reference, launch)


def _rotary_cases(size: str) -> Iterator[Case]:
    shapes = {
        # (batch, heads, length, head_dim, rotary_dim, interleaved, whether the batch has angles of its own, dtypes)
        "small": {
            "half-split, tails": (2, 5, 37, 64, 64, False, False, FOUR),
            "interleaved, tails": (2, 3, 37, 64, 64, True, True, THREE),
            "partial": (1, 3, 9, 80, 32, False, True, THREE),
            "partial, interleaved": (1, 3, 9, 48, 16, True, False, THREE),
            "any head_dim": (2, 2, 5, 25, 14, False, False, THREE),
        },
        "realistic": {
            "Llama 3 8B": (2, 32, 2048, 128, 128, False, False, THREE),
            "GPT-J": (2, 16, 1023, 256, 64, True, True, THREE),
            "GPT-NeoX 20B": (1, 64, 1001, 96, 24, False, True, FOUR),
            "Phi-2": (1, 32, 1001, 80, 32, False, False, THREE),
            "generation": (8, 32, 1, 128, 128, False, True, THREE),
        },
    }[size]
    for shape_class, (*sizes, has_batch, dtypes) in shapes.items():
        batch, heads, length, head_dim, rotary_dim, _ = sizes
        shape = f"{batch}x{heads}x{length}x{head_dim}" + (f"/{rotary_dim}" if rotary_dim != head_dim else "")
        for dtype in dtypes:
            yield Case("rotary", shape_class, shape, dtype, _bound(_rotary, *sizes, has_batch))


# --- softmax ----------------------------------------------------------------------------------------------------------


def _softmax(shape, dim, scale, mask_kind, is_causal, dtype, generator) -> Problem:
    input = _normal(generator, *shape, dtype=dtype, spread=3.0)
    mask = None
    if mask_kind == "bool":
        mask = torch.rand(shape[-2:], generator=generator, device=generator.device) < 0.7
        mask[0] = False  # a row of which nothing takes part
    elif mask_kind == "additive":
        mask = _normal(generator, *shape[-2:], dtype=dtype)

    def twin(input):
        return functional.softmax(input, dim, scale=scale, mask=mask, is_causal=is_causal)

    def launch(input):
        return autograd.SoftmaxFunction.apply(input, dim, None, scale, mask, is_causal, "torch")

    def reference(input):
        z = input * scale
        if mask_kind == "additive":
            z = z + mask.to(z.dtype)
        if mask_kind == "bool":
            z = z.masked_fill(~mask, -math.inf)
        if is_causal:
            z = z.masked_fill(~torch.ones(shape[-2:], dtype=torch.bool, device=z.device).tril(), -math.inf)
        largest = z.detach().amax(dim, keepdim=True)
        exponentials = torch.exp(z - largest.masked_fill(largest == -math.inf, 0.0))
        total = exponentials.sum(dim, keepdim=True)
        return exponentials / total.masked_fill(total == 0, 1.0)

    return Problem(dict(input=input), twin, reference, launch)


def _softmax_cases(size: str) -> Iterator[Case]:
    shapes = {
        # (shape, dim, scale, mask, is_causal, dtypes)
        "small": {
            "tail": ((7, 33), -1, 1.0, None, False, FOUR),
            "causal": ((2, 37, 37), -1, 0.125, None, True, THREE),
            "wide": ((2, 33001), -1, 1.0, None, False, (FLOAT32, BFLOAT16)),
            "first dimension": ((33, 70), 0, 1.0, None, False, THREE),
            "bool mask": ((2, 9, 40), -1, 0.5, "bool", False, THREE),
            "additive mask": ((2, 9, 40), -1, 0.5, "additive", False, THREE),
            "wide first dimension": ((1100, 3), 0, 1.0, None, False, (FLOAT32,)),
        },
        "realistic": {
            "attention's": ((4096, 1024), -1, 0.125, None, False, THREE),
            "causal": ((12, 1024, 1024), -1, 0.125, None, True, THREE),
            "vocabulary": ((256, 50257), -1, 1.0, None, False, FOUR),
            "widest": ((64, 262144), -1, 1.0, None, False, THREE),
            "first dimension": ((2048, 1003), 0, 1.0, None, False, THREE),
            "bool mask": ((12, 512, 513), -1, 0.125, "bool", False, THREE),
            "additive mask": ((12, 512, 513), -1, 0.125, "additive", False, THREE),
        },
    }[size]
    for shape_class, (shape, dim, scale, mask_kind, is_causal, dtypes) in shapes.items():
        for dtype in dtypes:
            build = _bound(_softmax, shape, dim, scale, mask_kind, is_causal)
            yield Case("softmax", shape_class, "x".join(map(str, shape)), dtype, build)


# --- int8_linear ------------------------------------------------------------------------------------------------------


def _quantized(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale) as the contract has them: quotients in float32, halves to even. scale keeps its dimension, as 1."""
    x = x.detach().float()
    largest = x.abs().amax(dim, keepdim=True)
    # By a tensor: on a GPU PyTorch multiplies by a number's reciprocal, which is an ulp off.
    scale = torch.where(largest == 0, 1.0, largest / torch.full_like(largest, 127))
    return torch.round(x / scale).clamp(-127, 127), scale


def _quantize_int8(rows, width, dim, dtype, generator) -> Problem:
    input = _normal(generator, rows, width, dtype=dtype)
    input[0, :] = 0

    def twin(input):
        return functional.quantize_int8(input, dim)

    def reference(input):
        q, scale = _quantized(input, dim)
        return q.to(input.dtype), scale.squeeze(dim).to(input.dtype)

    def launch(input):
        with dispatch.backend("torch"):
            return twin(input)

    return Problem(dict(input=input), twin, reference, launch, exact=True)


def _int8_linear(rows, in_features, out_features, activation, mode, dtype, generator) -> Problem:
    device = generator.device
    # Every int8 value, -128 included; the scale brings the result back to the input's range.
    weight = torch.randint(-128, 128, (out_features, in_features), generator=generator, device=device).to(torch.int8)
    weight_scale = torch.rand(out_features, generator=generator, device=device) / (64 * math.sqrt(in_features))
    tensors = dict(
        input=_normal(generator, rows, in_features, dtype=dtype), bias=_normal(generator, out_features, dtype=dtype)
    )

    def twin(input, bias):
        return functional.int8_linear(input, weight, weight_scale, bias, activation=activation, mode=mode)

    def launch(input, bias):
        return autograd.Int8LinearFunction.apply(input, weight, weight_scale, bias, activation, mode, "torch")

    def reference(input, bias):
        x = input
        if mode == "w8a8":
            q, scale = _quantized(input, -1)
            # What is left of the input after the rounding; `input - input.detach()` is 0, and passes gradients through.
            x = (q * scale.to(input.dtype)).to(input.dtype) + (input - input.detach())
        z = (x @ weight.to(x.dtype).T) * weight_scale.to(x.dtype) + bias
        if activation == "gelu":
            return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
        if activation == "gelu_tanh":
            return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        return z

    return Problem(tensors, twin, reference, launch)


def _quantize_int8_cases(size: str) -> Iterator[Case]:
    shapes = {
        # (rows, width, dim)
        "small": {"tail": (7, 33, -1), "wide": (2, 16411, -1), "columns": (33, 7, 0)},
        "realistic": {"GPT-2": (4096, 768, -1), "wide": (256, 50257, -1), "columns": (3001, 1023, 0)},
    }[size]
    for shape_class, (rows, width, dim) in shapes.items():
        for dtype in THREE:
            build = _bound(_quantize_int8, rows, width, dim)
            yield Case("quantize_int8", shape_class, f"{rows}x{width}", dtype, build)


def _int8_linear_cases(size: str) -> Iterator[Case]:
    shapes = {
        # (rows, in_features, out_features, activation, mode)
        "small": {
            "w8a8, tails": (19, 70, 37, "gelu_tanh", "w8a8"),
            "w8a16, tails": (5, 70, 37, "gelu_tanh", "w8a16"),
            "w8a16, one row": (1, 200, 80, None, "w8a16"),
            "w8a8": (33, 256, 144, "gelu", "w8a8"),
            "w8a16, many rows": (70, 80, 48, "gelu", "w8a16"),
        },
        "realistic": {
            "w8a8, GPT-2": (4096, 768, 3072, "gelu_tanh", "w8a8"),
            "w8a16, one row": (1, 4096, 4096, None, "w8a16"),
            "w8a16, batch 16": (16, 1600, 6400, "gelu_tanh", "w8a16"),
            "w8a8, square": (2048, 4096, 4096, None, "w8a8"),
            "w8a8, tails": (1001, 1023, 999, "gelu", "w8a8"),
            "w8a16, tails": (9, 1023, 999, "gelu", "w8a16"),
            "w8a16, many rows": (1000, 768, 3072, None, "w8a16"),
        },
    }[size]
    for shape_class, (rows, in_features, out_features, activation, mode) in shapes.items():
        for dtype in THREE:
            build = _bound(_int8_linear, rows, in_features, out_features, activation, mode)
            yield Case("int8_linear", shape_class, f"{rows}x{in_features}->{out_features}", dtype, build)


def _bound(builder: Callable, *arguments) -> Callable[[torch.dtype, torch.Generator], Problem]:
    return lambda dtype, generator: builder(*arguments, dtype, generator)


_BY_OPERATOR = {
    "attention": _attention_cases,
    "layer_norm": _layer_norm_cases,
    "rms_norm": _rms_norm_cases,
    "rotary": _rotary_cases,
    "softmax": _softmax_cases,
    "int8_linear": _int8_linear_cases,
    "quantize_int8": _quantize_int8_cases,
}
OPERATORS = tuple(_BY_OPERATOR)
# operator -> builder(*sizes, dtype, generator), for problems of other sizes
BUILDERS: dict[str, Callable[..., Problem]] = {
    "attention": _attention,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "rotary": _rotary,
    "softmax": _softmax,
    "int8_linear": _int8_linear,
    "quantize_int8": _quantize_int8,
}


def cases_of(operator: str, sizes: Iterable[str]) -> list[Case]:
    return [case for size in sizes for case in _BY_OPERATOR[operator](size)]
