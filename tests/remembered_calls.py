"""Calls of every operator in turn, on tensors that say that they are on a GPU: what is remembered of one must change
nothing of the next. Run by test_remembered_calls.py, in a process of its own.

    python remembered_calls.py compiled    CUDA C++'s launchers, and a compiled module that says what a call hangs on
    python remembered_calls.py python      the launchers in plain PyTorch, which cover every call, and Python says it

A call's outcome is what the launcher was given, tensors by their shapes and by which argument they are, or the error.
After an operator's usual call each other one, and after each other one the usual call, has the outcome that it has
alone; and so has each in two rounds of all of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import gptkern.functional as G
from gptkern.backends import dispatch
from gptkern.backends.registration import Operator
from gptkern.operators.nonlinearity.contract import activation

SHAPES = [(64,), [64], torch.Size((64,)), (64.0,), (True,), (4, 64), (), 64, (32,)]
NUMBERS = [1e-5, 1e-6, 1, 1.0, True, "1", None, float("nan"), float("inf"), -1.0, 0.0, torch.zeros(())]
FLAGS = [False, True, 0, 1, None]

started: list[tuple] = []


class Own(torch.Tensor):
    pass


def tensors(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Of this shape, and beside it: of another dtype, size, rank and layout; what needs a gradient; no plain tensor."""
    x, (*lead, last) = torch.zeros(shape, dtype=dtype), shape
    found = [x, x.clone(), x.to(torch.bfloat16), x.double(), x.int(), torch.nn.Parameter(x, False)]
    found += [torch.zeros(*lead, last + 8, dtype=dtype), torch.zeros(2, *shape, dtype=dtype)]
    found += [torch.zeros(last, *lead, dtype=dtype).movedim(0, -1), x.as_subclass(Own), x.to_sparse()]
    found += [torch.nested.nested_tensor([x, x])]
    return found + ([x.clone().requires_grad_()] if dtype.is_floating_point else [])


def operators() -> dict[str, tuple]:
    """operator -> (twin, the usual arguments, {argument: others for it})."""
    x, width, angles = torch.zeros(4, 64), torch.zeros(64), torch.zeros(16, 32)
    heads, codes = torch.zeros(1, 2, 16, 64, dtype=torch.bfloat16), torch.zeros(64, 64, dtype=torch.int8)
    rows, few, of_heads = tensors(4, 64), [None, *tensors(64)], tensors(1, 2, 16, 64, dtype=torch.bfloat16)
    # Without a weight an input of more dimensions may be normalised over two of them.
    norm = dict(input=x, normalized_shape=(64,), weight=None)
    others = dict(input=rows, normalized_shape=SHAPES, weight=few, eps=NUMBERS)
    attention = dict(query=heads, key=heads, value=heads, attn_mask=None, dropout_p=0.0, is_causal=False)
    masks = [None, torch.zeros(16, 16).bool(), torch.zeros(16, 16).bool(), torch.zeros(16, 16)]
    masked = dict(attn_mask=masks, dropout_p=[0.0, 0, 0.5, None], is_causal=FLAGS)
    masked |= dict(scale=NUMBERS, enable_gqa=FLAGS)
    int8 = dict(input=x, weight=codes, weight_scale=width, bias=width, activation=None, mode="auto")
    modes = dict(activation=[None, "gelu", "relu", "no", 1], mode=["auto", "w8a8", "w8a16", "no", None])
    softmax = dict(input=x, dim=-1, dtype=None, scale=1.0, mask=None, is_causal=False)
    dtypes = dict(dtype=[None, torch.float32, torch.bfloat16, torch.int32, "float32"], dim=[None, 1, 0, 5, 1.0, True])
    scaled = dict(scale=NUMBERS, mask=[None, torch.ones(4, 64).bool(), torch.ones(4, 64).bool()], is_causal=FLAGS)
    loss = dict(input=x, target=torch.zeros(4, dtype=torch.long), weight=None, size_average=None, ignore_index=-100)
    loss |= dict(reduce=None, reduction="mean", label_smoothing=0.0, z_loss=0.0, softcap=None, logit_scale=1.0)
    targets = [*tensors(4, dtype=torch.long), torch.zeros(4, dtype=torch.uint8), *tensors(4, 64), [0, 1, 2, 3]]
    reductions = dict(reduction=["mean", "sum", "none", "no", None], ignore_index=[-100, 0, 0.0, True, None, "0"])
    scores = dict(label_smoothing=NUMBERS, z_loss=NUMBERS, softcap=NUMBERS, logit_scale=NUMBERS)
    kept = dict(return_stats=FLAGS, in_place_gradient=FLAGS, size_average=[None, False], reduce=[None, False])
    turned = dict(interleaved=FLAGS, rotary_dim=[None, 64, 32, 64.0, True])
    return {
        "attention": (
            G.scaled_dot_product_attention,
            attention | dict(scale=None, enable_gqa=False),
            dict(query=of_heads, key=of_heads, value=of_heads) | masked,
        ),
        "layer_norm": (
            G.layer_norm,
            norm | dict(bias=None, eps=1e-5, residual=None),
            others | dict(bias=few, residual=[None, x]),
        ),
        "rms_norm": (G.rms_norm, norm | dict(eps=None), others),
        "softmax": (G.softmax, softmax, dict(input=rows) | dtypes | scaled),
        "cross_entropy": (
            G.cross_entropy,
            loss | dict(return_stats=False, in_place_gradient=False),
            dict(input=rows, target=targets, weight=few) | reductions | scores | kept,
        ),
        "nonlinearity": (
            activation,
            dict(input=x, up=None, function="gelu", bias=None, packed=False),
            dict(input=rows, up=rows, function=["gelu_tanh", "silu", "relu", None], bias=few, packed=FLAGS),
        ),
        "rotary": (
            G.rotary_embedding,
            dict(input=heads, cos=angles, sin=angles, interleaved=False, rotary_dim=None),
            dict(input=of_heads, cos=tensors(16, 32), sin=tensors(16, 32)) | turned,
        ),
        "int8_linear": (
            G.int8_linear,
            int8,
            dict(input=rows, weight=tensors(64, 64, dtype=torch.int8), weight_scale=tensors(64), bias=few) | modes,
        ),
        "quantize_int8": (
            G.quantize_int8,
            dict(input=x, dim=-1),
            dict(input=rows, dim=[-1, 0, 1, 5, True, 1.0]),
        ),
    }


def described(argument: Any, arguments: dict) -> tuple:
    if not isinstance(argument, torch.Tensor):
        return type(argument).__name__, argument
    if argument.is_nested or argument.layout is not torch.strided:
        return str(argument.layout), argument.is_nested
    names = [name for name, given in arguments.items() if given is argument]
    return names, str(argument.dtype), tuple(argument.shape), argument.stride(), argument.requires_grad


def outcome(twin, arguments: dict) -> str:
    started.clear()
    try:
        result = twin(**arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    first = result[0] if isinstance(result, tuple) else result
    launches = [(name, backend, *(described(field, arguments) for field in call)) for name, backend, call in started]
    return repr((launches, described(first, arguments), type(first.grad_fn).__name__))


def examined(name: str, twin, usual: dict, others: dict) -> dict:
    calls = [usual, *(usual | {argument: value} for argument, values in others.items() for value in values)]
    alone, wrong = [], []

    def compare(call: dict, expected: str) -> None:
        found = outcome(twin, call)
        if found != expected:
            wrong.append((expected, found))

    for call in calls:
        dispatch.forget_choices()
        alone.append(outcome(twin, call))
    for call, expected in zip(calls, alone):
        for first, then, of_then in ((usual, call, expected), (call, usual, alone[0])):
            dispatch.forget_choices()
            outcome(twin, first)
            compare(then, of_then)
    dispatch.forget_choices()
    for call, expected in zip(calls * 2, alone * 2):
        compare(call, expected)
    return dict(calls=len(calls), kept=len(dispatch._remembered.get(name, ())), wrong=wrong[:3])


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
    import host_path

    if sys.argv[1] == "compiled":
        import host_path_cuda

        if (reason := host_path_cuda.prepare()) is not None:
            sys.exit(reason)
    else:
        host_path.as_on_a_gpu(torch)
    forward = Operator.forward

    def starting(operator, call, backend, is_unseen=None):
        started.append((operator.name, backend, call))
        return forward(operator, call, backend, is_unseen)

    Operator.forward = starting
    forget = dispatch.forget_choices
    backend = "cuda" if sys.argv[1] == "compiled" else dispatch.LAUNCHERS
    dispatch.forget_choices = lambda: (forget(), host_path.prefer(backend))
    print(json.dumps({name: examined(name, *calls) for name, calls in operators().items()}))


if __name__ == "__main__":
    main()
