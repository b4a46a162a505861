"""How the tests call rms_norm: tensors, and a call that is judged against the oracle."""

from __future__ import annotations

import functools

import oracle_rms_norm
import oracles
import torch
from checking import check as check_against
from checking import same_bits
from layouts import guarded

from gptkern import functional as F
from gptkern.measuring.rounding import noise
from gptkern.measuring.tolerance import FORWARD_FACTOR, GRADIENT_FACTOR, assert_close

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SIXTEEN_BITS = [torch.float16, torch.bfloat16]


def tensors_of(rows, width, dtype, device, *, weight=True, parameter=None):
    """(input, weight), None where it is not wanted, with memory around them that is NaN."""
    input = guarded(torch.randn(rows, width, device=device).add(0.5).to(dtype))
    if not weight:
        return input, None
    return input, guarded(torch.randn(width, device=device).add(1.0).to(parameter or dtype))


def default_eps(dtype):
    """What None stands for: of 16-bit input too, PyTorch computes in float32."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def check(tensors, *, normalized_shape=None, eps=1e-5, grad=None, need=(True, True), call=None):
    """Runs the call forward and backward and judges the result and every gradient."""
    input = tensors[0]
    shape = normalized_shape or (input.shape[-1],)

    def ours(input, weight=None):
        if call is not None:
            return call(input, weight, eps)
        return F.rms_norm(input, shape, weight, eps)

    def oracle(input, weight=None, *, precision):
        added = default_eps(tensors[0].dtype) if eps is None else eps
        return oracle_rms_norm.rms_norm(input, shape, weight, added, precision=precision)

    present = [tensor for tensor in tensors if tensor is not None]
    output = check_against(ours, oracle, *present, grad_output=grad, need=need[: len(present)])
    assert (output.shape, output.dtype, output.device) == (input.shape, input.dtype, input.device)
    return output


# --- With a residual ------------------------------------------------------------------------------------------------


def tensors_with_residual(rows, width, dtype, device, *, weight=True, of_residual=None):
    """(input, residual, weight), None where it is not wanted, with memory around them that is NaN."""
    input, scale = tensors_of(rows, width, dtype, device, weight=weight)
    return input, guarded(torch.randn(rows, width, device=device).to(of_residual or dtype)), scale


def twin(input, residual, weight, normalized_shape, eps):
    return F.rms_norm(input, normalized_shape, weight, eps, residual=residual)


def _references(tensors, grads, normalized_shape, eps, precision):
    """((y, s), gradients) in the order of the tensors that are there.

    The yardstick normalises the rounded sum, through which gradients pass straight; the oracle does not round it.
    """
    input, residual, weight = (None if tensor is None else tensor.detach().cpu() for tensor in tensors)
    rounded = (input + residual).to(precision)

    def formula(x, r, w=None):
        s = x + r
        if precision != oracles.ORACLE:
            s = rounded + (s - s.detach())
        return oracle_rms_norm.rms_norm(s, normalized_shape, w, eps, precision=precision), s

    present = [tensor for tensor in (input, residual, weight) if tensor is not None]
    outputs = formula(*(tensor.to(precision) for tensor in present))
    grads = tuple(torch.zeros_like(y) if g is None else g.detach().cpu() for g, y in zip(grads, outputs))
    return outputs, oracles.gradients(formula, present, grads, precision)


def check_residual(tensors, *, call=twin, normalized_shape=None, eps=1e-5, grads=None, need=(True, True, True)):
    """Runs the call forward and backward and judges both results and every gradient; returns the results.

    Args:
        tensors: input, residual, weight. grads: of y and of the sum; random ones by default, None where one is missing.
    """
    shape = normalized_shape or (tensors[0].shape[-1],)
    before = [None if tensor is None else tensor.clone() for tensor in tensors]
    leaves = [None if t is None else t.detach().requires_grad_(needed) for t, needed in zip(tensors, need)]
    outputs = call(*leaves, shape, eps)
    dtype = torch.result_type(*tensors[:2])
    for output in outputs:
        assert (output.shape, output.dtype, output.device) == (tensors[0].shape, dtype, tensors[0].device)
    same_bits("the sum", outputs[1].detach(), tensors[0] + tensors[1])
    grads = [guarded(torch.randn_like(output)) for output in outputs] if grads is None else grads
    kept = [None if grad is None else grad.clone() for grad in grads]
    asked = [(y, grad) for y, grad in zip(outputs, grads) if grad is not None and y.requires_grad]
    torch.autograd.backward([y for y, _ in asked], [grad for _, grad in asked])

    expected, expected_gradients = _references(tensors, grads, shape, eps, oracles.ORACLE)
    soft, soft_gradients = _references(tensors, grads, shape, eps, oracles.YARDSTICK)

    @functools.cache
    def noises():
        drawn = noise(lambda: [t for part in _references(tensors, grads, shape, eps, oracles.ORACLE) for t in part])
        return drawn[:1] + drawn[2:]

    assert_close("output", outputs[0], expected[0], soft[0], FORWARD_FACTOR, lambda: noises()[0])
    present = [leaf for leaf in leaves if leaf is not None]
    for place, (leaf, oracle, yardstick) in enumerate(zip(present, expected_gradients, soft_gradients)):
        name = f"gradient of {('input', 'residual', 'weight')[place]}"
        if not leaf.requires_grad:
            assert leaf.grad is None, f"{name}: it is frozen and has one"
            continue
        if leaf is leaves[2] and grads[0] is None:
            assert leaf.grad is None or not leaf.grad.any()
            continue
        assert leaf.grad.dtype == leaf.dtype
        assert_close(name, leaf.grad, oracle, yardstick, GRADIENT_FACTOR, lambda place=place: noises()[1 + place])
    for tensor, copy in zip((*tensors, *grads), (*before, *kept)):
        if tensor is not None:
            same_bits("what was given", tensor, copy)
    return outputs
