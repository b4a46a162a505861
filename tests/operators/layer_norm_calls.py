"""How the tests call layer_norm: tensors, and a call that is judged against the oracle."""

from __future__ import annotations

import functools

import oracle_layer_norm
import oracles
import pytest
import torch
import torch.nn.functional
from layouts import guarded

import gptkern
from gptkern import functional as F
from gptkern.autograd import LayerNormFunction
from gptkern.measuring.rounding import noise
from gptkern.measuring.tolerance import FORWARD_FACTOR, GRADIENT_FACTOR, assert_close

ALL_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIXTEEN_BITS = [torch.float16, torch.bfloat16]


def tensors_of(rows, width, dtype, device, *, residual=False, weight=True, bias=True, parameters=None):
    """(input, residual, weight, bias), each None where it is not wanted, with memory around them that is NaN."""

    def normal(*shape, dtype, offset=0.0):
        return guarded(torch.randn(shape, device=device).add(offset).to(dtype))

    parameters = parameters or dtype
    return (
        normal(rows, width, dtype=dtype, offset=0.5),
        normal(rows, width, dtype=dtype) if residual else None,
        normal(width, dtype=parameters, offset=1.0) if weight else None,
        normal(width, dtype=parameters) if bias else None,
    )


def leaves_of(tensors, requires_grad=(True, True, True, True)):
    """The same memory and strides as new leaves."""
    return [None if t is None else t.detach().requires_grad_(r) for t, r in zip(tensors, requires_grad)]


def twin(input, residual, weight, bias, normalized_shape, eps):
    result = F.layer_norm(input, normalized_shape, weight, bias, eps, residual=residual)
    return (result,) if residual is None else result


def function_on(backend):
    """The autograd.Function itself, with the signature of `twin`."""

    def call(input, residual, weight, bias, normalized_shape, eps):
        output, summed = LayerNormFunction.apply(input, residual, weight, bias, eps, backend)
        return (output,) if residual is None else (output, summed)

    return call


def refuses_float64(backend, *tensors) -> bool:
    """Whether a tensor is float64 and the backend is cuda, which leaves that to Triton and says so."""
    if backend != "cuda" or not any(t is not None and t.dtype == torch.float64 for t in tensors):
        return False
    with pytest.raises(gptkern.BackendError, match="float64"):
        twin(*tensors, (tensors[0].shape[-1],), 1e-5)
    return True


def on_cpu(tensor):
    return None if tensor is None else tensor.detach().cpu()


def references(tensors, grads, normalized_shape, eps, precision):
    """((y, s), gradients) with the gradients in the order of the tensors that are there.

    The yardstick is PyTorch's own layer_norm in float32, of the rounded sum; the oracle does not round it.
    """
    given_residual = tensors[1] is not None
    rounded = on_cpu(tensors[0]) + on_cpu(tensors[1]) if given_residual else None

    def formula(*present):
        present = iter(present)
        input, residual, weight, bias = (None if t is None else next(present) for t in tensors)
        if precision == oracles.ORACLE:
            return oracle_layer_norm.layer_norm(input, normalized_shape, weight, bias, eps, residual=residual)
        s = input
        if given_residual:
            s = input + residual
            # the rounded sum, through which gradients pass straight
            s = rounded.to(precision) + (s - s.detach())
        return torch.nn.functional.layer_norm(s, normalized_shape, weight, bias, eps), s

    present = [on_cpu(t) for t in tensors if t is not None]
    outputs = [output.detach() for output in formula(*(t.to(precision) for t in present))]
    grads = [torch.zeros_like(y) if g is None else on_cpu(g) for g, y in zip(grads, outputs)]
    gradients = oracles.gradients(lambda *t: formula(*t)[: len(grads)], present, tuple(grads), precision)
    return outputs, gradients


def check(tensors, *, call=twin, normalized_shape=None, eps=1e-5, grads=None, needs_grad=(True, True, True, True)):
    """Runs the call forward and backward and judges the results and every gradient.

    Args:
        tensors: input, residual, weight, bias. grads: of y and of s; random ones where they are not given.
    """
    normalized_shape = normalized_shape or (tensors[0].shape[-1],)
    leaves = leaves_of(tensors, needs_grad)
    outputs = call(*leaves, normalized_shape, eps)
    dtype = tensors[0].dtype if tensors[1] is None else torch.result_type(tensors[0], tensors[1])
    for output in outputs:
        assert output.shape == tensors[0].shape
        assert output.dtype == dtype
        assert output.device == tensors[0].device
    if tensors[1] is not None:
        assert torch.equal(outputs[1], tensors[0] + tensors[1])
    if grads is None:
        grads = [guarded(torch.randn_like(output)) for output in outputs]
    asked = [(output, grad) for output, grad in zip(outputs, grads) if grad is not None and output.requires_grad]
    torch.autograd.backward([output for output, _ in asked], [grad for _, grad in asked])

    expected, expected_gradients = references(tensors, grads, normalized_shape, eps, oracles.ORACLE)
    yardstick, yardstick_gradients = references(
        tensors, grads, normalized_shape, eps, oracles.ORACLE if dtype == torch.float64 else oracles.YARDSTICK
    )

    @functools.cache
    def noises():
        return noise(
            lambda: [t for part in references(tensors, grads, normalized_shape, eps, oracles.ORACLE) for t in part]
        )

    assert_close("output", outputs[0], expected[0], yardstick[0], FORWARD_FACTOR, lambda: noises()[0])
    names = [name for name, t in zip(("input", "residual", "weight", "bias"), leaves) if t is not None]
    present = [leaf for leaf in leaves if leaf is not None]
    judged = zip(names, present, expected_gradients, yardstick_gradients)
    for place, (name, leaf, oracle, soft) in enumerate(judged, len(expected)):
        if not leaf.requires_grad:
            assert leaf.grad is None, f"{name} is frozen and has a gradient"
            continue
        if grads[0] is None and name in ("weight", "bias"):
            assert leaf.grad is None or not leaf.grad.any()
            continue
        assert leaf.grad.dtype == leaf.dtype
        assert_close(
            f"gradient of {name}", leaf.grad, oracle, soft, GRADIENT_FACTOR, lambda place=place: noises()[place]
        )
    return leaves, outputs
