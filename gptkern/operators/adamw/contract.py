"""adamw: the contract of an update of AdamW over lists of tensors, the PyTorch backend and the registered ops.

    g = grad / grad_scale * clip                               (−g where the objective is maximised)
    θ = θ − lr · weight_decay · θ
    m = m + (1 − β₁) (g − m)                                   exp_avg
    v = β₂ v + (1 − β₂) g²                                     exp_avg_sq
    θ = θ − lr / (1 − β₁ᵗ) · m / (√(v / (1 − β₂ᵗ)) + eps)      amsgrad: the largest v so far in its place

All of it in float32 (float64 for float64), then θ, m and v are rounded to what they are held in: to the nearest, or,
of bfloat16 parameters with a seed, at random without bias (`stochastic`). m and v may be 8-bit codes in blocks
(gptkern/operators/adamw/blockwise.py). t is the tensor's own count of updates, which the update raises by one.
Gradients are read and never written, unlike PyTorch's fused step, which leaves them unscaled.

Bytes an element that have to cross the memory's bus, gradients in the parameter's dtype:

    parameters   states                         read            written      in all
    float32      float32                        g θ m v   16    θ m v   12   28        amsgrad: 36
    bfloat16     bfloat16                       g θ m v    8    θ m v    6   14        amsgrad: 18
    bfloat16     float32                        g θ m v   12    θ m v   10   22        amsgrad: 30
    float32      8 bits, a scale for 256        g θ m v   10    θ m v    6   16 + 1/16
    bfloat16     8 bits, a scale for 256        g θ m v    6    θ m v    4   10 + 1/16

and the norm reads g once more: 4 or 2. Beside that 8 bytes for each 4096 elements say whose they are.

Source: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2019 (arXiv:1711.05101); amsgrad: Reddi, Kale,
Kumar, "On the Convergence of Adam and Beyond", 2018.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from gptkern.backends import dispatch, tracing
from gptkern.backends.philox import philox, philox_in_a_row
from gptkern.backends.registration import Operator, Written
from gptkern.backends.unseen import is_unseen
from gptkern.operators.adamw import blockwise

# Of Call.places: what is said of each tensor.
PLACES = ("number", "start", "run", "stride")
# Bits of one word of Philox serve two elements, a counter's four words eight.
DRAWS = 8
_WORD = 0xFFFFFFFF


class Call(NamedTuple):
    """An update of several tensors with the same hyperparameters: all on one device, the parameters of one dtype, the
    gradients of one, the states of one.

    Of an element e of a tensor's own (its logical, row-major order) `places` gives, four numbers a tensor, the tensor's
    number and the element's place in the whole tensor that this one is a shard of:
        place(e) = start + (e // run) · stride + e % run
    They are needed where parameters are rounded at random; else the list is empty.
    """

    params: list[Written]
    grads: list[torch.Tensor]  # as params
    exp_avgs: list[Written]  # as params, floating; or int8 codes
    exp_avg_sqs: list[Written]  # as params, floating; or uint8 codes
    max_exp_avg_sqs: list[Written]  # of amsgrad alone: as params
    exp_avg_scales: list[Written]  # of codes alone: float32 (rows, blocks of a row), the largest |m| of each block
    exp_avg_sq_scales: list[Written]  # likewise, the largest √v
    steps: list[Written]  # 0-d float32: updates done before this one
    places: list[int]
    lr: float
    lr_on_device: torch.Tensor | None  # 0-d or of one element: takes the place of lr
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    seed: int | None  # of the rounding at random, 64 bits; None: to the nearest
    grad_scale: torch.Tensor | None  # float32, one element: gradients are divided by it
    found_inf: torch.Tensor | None  # float32, one element: where it is not 0 nothing is written, the steps included
    clip: torch.Tensor | None  # float32, 0-d: gradients are multiplied by it


class Norm(NamedTuple):
    """The norm of several gradients on one device and of one dtype, as if they were one vector."""

    grads: list[torch.Tensor]


def start(call: Call) -> None:
    """The update, on the backend that dispatch chooses. The call is trusted: gptkern.optim.AdamW checks.

    Raises:
        BackendError: a backend is forced that does not cover it.
    """
    backend = _chosen(call)
    if backend == "torch":
        # PyTorch's own operators, which whoever looks on sees. Its fused one tells autograd nothing of what it writes.
        forward(call)
        torch.autograd.graph.increment_version([*call.params, *call.exp_avgs, *call.exp_avg_sqs])
    else:
        OPERATOR.forward(call, backend, _is_unseen(call))


def norm_of(grads: list[torch.Tensor]) -> torch.Tensor:
    """0-d float32 (float64 of float64): √(Σ g²), summed in a fixed order."""
    call = Norm(grads)
    backend = _chosen(call)
    return norm(call) if backend == "torch" else NORM.forward(call, backend, _is_unseen(call))


def _chosen(call: Call | Norm) -> str:
    choice = dispatch.settled(call[0][0])
    return dispatch.chosen("adamw", call)[0].backend if choice is None else choice.backend


def _is_unseen(call: Call | Norm) -> bool:
    """Of what is in the call's lists too, into which the question of a call does not look."""
    flat: list = []
    for value in call:
        flat += value if isinstance(value, list) else (value,)
    return is_unseen(tuple(flat))


# --- The torch backend: bare launchers in plain PyTorch -------------------------------------------------------------


def unsupported(call: Call | Norm) -> str | None:
    return None


def norm(call: Norm) -> torch.Tensor:
    """-> 0-d: √(Σ g²) of all gradients."""
    dtype = statistics_dtype(call.grads[0])
    # The norms of the tensors, then the norm of these: as torch.nn.utils.get_total_norm sums, with its bits.
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(call.grads, 2, dtype=dtype)), 2)


def forward(call: Call) -> None:
    """PyTorch's own fused AdamW where it does the same; else its formula, tensor by tensor."""
    is_plain = not call.exp_avg_scales and call.seed is None and call.exp_avgs[0].dtype == call.params[0].dtype
    # Its grad_scale, into which a clip goes, is float32.
    is_plain = is_plain and (call.clip is None or call.clip.dtype == torch.float32)
    if is_plain and call.grads[0].dtype == call.params[0].dtype and all(map(is_dense, call.params)):
        return _fused(call)
    for index in range(len(call.params)):
        _plain(call, index)
    torch._foreach_add_(call.steps, counted(call))


def counted(call: Call):
    """What an update adds to the steps: 1, or 0 where infinities were found."""
    return 1 if call.found_inf is None else (call.found_inf == 0).to(torch.float32).reshape(())


def _fused(call: Call) -> None:
    scale, grads = call.grad_scale, call.grads
    clip = None if _is_one(call.clip) else call.clip
    if clip is not None:
        # g / grad_scale * clip
        scale = (1.0 if scale is None else scale) / clip
    torch._foreach_add_(call.steps, 1)
    lists = call.params, grads, call.exp_avgs, call.exp_avg_sqs, call.max_exp_avg_sqs
    if scale is None:
        # It walks through memory.
        params, _, *averages = lists
        _fused_kernel(call, None, params, [*map(laid_out_as, grads, params)], *averages, call.steps)
    else:
        # It leaves in the gradients what it divided by the scale: in copies.
        for *part, steps in _parts(call) if call.params[0].is_cpu else [(*lists, call.steps)]:
            part[1] = _copied(part[1], part[0])
            _fused_kernel(call, scale, *part, steps)
    if call.found_inf is not None:
        torch._foreach_add_(call.steps, 1 - counted(call), alpha=-1)


def _fused_kernel(call: Call, scale, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps) -> None:
    torch._fused_adamw_(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps,
        lr=call.lr if call.lr_on_device is None else call.lr_on_device, beta1=call.beta1, beta2=call.beta2,
        weight_decay=call.weight_decay, eps=call.eps, amsgrad=bool(max_exp_avg_sqs), maximize=call.maximize,
        grad_scale=scale, found_inf=None if call.found_inf is None else (call.found_inf != 0).to(torch.float32),
    )  # fmt: skip


def _is_one(clip: torch.Tensor | None) -> bool:
    """Whether a CPU's clip changes nothing."""
    return clip is not None and clip.is_cpu and tracing.has_values(clip) and clip.item() == 1.0


def _copied(grads: list[torch.Tensor], params: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of the gradients, laid out as the parameters."""
    copies = [torch.empty_like(p, dtype=g.dtype) for g, p in zip(grads, params)]
    torch._foreach_copy_(copies, grads)
    return copies


# Elements whose gradients are copied at a time on a CPU: they are still in its caches when they are used.
_COPIED = 2**17


def _parts(call: Call) -> Iterator[tuple[list[torch.Tensor], ...]]:
    """(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps) of some of the tensors, or of a part of one."""
    lists = [call.params, call.grads, call.exp_avgs, call.exp_avg_sqs]
    if call.max_exp_avg_sqs:
        lists.append(call.max_exp_avg_sqs)
    held, count = [[] for _ in range(6)], 0
    for *tensors, step in zip(*lists, call.steps):
        size = tensors[0].numel()
        if count and count + size > _COPIED:
            yield held
            held, count = [[] for _ in range(6)], 0
        if size > _COPIED and all(tensor.is_contiguous() for tensor in tensors):
            for pieces in zip(*(tensor.view(-1).split(_COPIED) for tensor in tensors)):
                yield *([piece] for piece in pieces), *[[]] * (5 - len(pieces)), [step]
            continue
        for kept, tensor in zip(held, tensors):
            kept.append(tensor)
        held[-1].append(step)
        count += size
    if count:
        yield held


# Elements of a tensor that are updated at a time on a CPU, with all of their temporaries in its caches.
_AT_A_TIME = 2**17


def _plain(call: Call, index: int) -> None:
    param = call.params[index]
    if param.numel() == 0:
        return
    on_cpu = param.is_cpu and tracing.has_values(param.detach())
    if on_cpu and call.found_inf is not None and call.found_inf.item() != 0:
        return
    dtype = statistics_dtype(param)
    t = call.steps[index].to(dtype) + 1
    # 1 − βᵗ = −expm1(t · log β): of β near 1 the difference would have lost its digits
    corrections = [
        1.0 if beta == 0 else -torch.expm1(t * math.log(beta)) for beta in (call.beta1, call.beta2)
    ]  # fmt: skip
    lr = call.lr if call.lr_on_device is None else call.lr_on_device.to(dtype)
    lists = param, call.grads[index], call.exp_avgs[index], call.exp_avg_sqs[index]
    largest = call.max_exp_avg_sqs[index] if call.max_exp_avg_sqs else None
    scales = (call.exp_avg_scales[index], call.exp_avg_sq_scales[index]) if call.exp_avg_scales else ()
    if not on_cpu or param.numel() <= _AT_A_TIME or param.dim() == 0:
        return _plain_part(call, index, 0, lr, corrections, on_cpu, *lists, largest, *scales)
    width = param.shape[1:].numel()
    each = max(_AT_A_TIME // width, 1)
    for row in range(0, param.shape[0], each):
        # Of codes each row has blocks of its own.
        part = (None if x is None else x[row : row + each] for x in (*lists, largest, *scales))
        _plain_part(call, index, row * width, lr, corrections, on_cpu, *part)


def _plain_part(call, index, first, lr, corrections, on_cpu, param, grad, m_held, v_held, largest_held, *scales):
    """The update of a tensor's elements from `first` on, whole rows of dimension 0.

    Args:
        corrections: 1 − β₁ᵗ and 1 − β₂ᵗ. scales: of codes alone, two.
        on_cpu: whether what is written need not be kept back for infinities that were found.
    """
    dtype = statistics_dtype(param)
    g = grad.to(dtype)
    # g = grad / grad_scale * clip
    if call.grad_scale is not None:
        g = g / call.grad_scale
    if call.clip is not None:
        g = g * call.clip
    if call.maximize:
        g = -g
    if scales:
        m, v = blockwise.decoded(m_held, scales[0]), blockwise.decoded_square(v_held, scales[1])
    else:
        m, v = m_held.to(dtype, copy=not on_cpu), v_held.to(dtype, copy=not on_cpu)
    # θ = θ − lr · weight_decay · θ
    p = param.to(dtype)
    p = p - lr * call.weight_decay * p
    # m = m + (1 − β₁) (g − m)
    m += (g - m).mul_(1 - call.beta1)
    # v = β₂ v + (1 − β₂) g²
    v.mul_(call.beta2).add_(((1 - call.beta2) * g).mul_(g))
    written = [(m_held, m), (v_held, v)]
    largest = v
    if largest_held is not None:
        largest = torch.maximum(largest_held.to(dtype), v)
        written.append((largest_held, largest))
    # θ = θ − lr / (1 − β₁ᵗ) · m / (√(v / (1 − β₂ᵗ)) + eps)
    p -= (lr / corrections[0] * m).div_((largest / corrections[1]).sqrt_().add_(call.eps))
    if call.seed is not None and param.dtype == torch.bfloat16:
        p = stochastic(p, call, index, first)
    written.append((param, p))
    if scales:
        (m_codes, m_scales), (v_codes, v_scales) = blockwise.encoded(m), blockwise.encoded_square(v)
        written[:2] = [(m_held, m_codes), (v_held, v_codes), (scales[0], m_scales), (scales[1], v_scales)]
    for old, new in written:
        if old is new:
            continue
        if call.found_inf is not None and not on_cpu:
            new = torch.where(call.found_inf != 0, old, new.to(old.dtype))
        old.copy_(new)


def stochastic(p: torch.Tensor, call: Call, index: int, first: int = 0) -> torch.Tensor:
    """float32 -> bfloat16, up with a probability that is the part of the way that it lies above the value below.

    Sixteen random bits are added to the sixteen that bfloat16 has not. Element e takes half e % 8 of
    Philox(key = seed, counter = (place // 8 in two words, the tensor's number, t)), low halves before high ones.

    Args:
        p: elements of the tensor `index`, the first of which is `first`.
    """
    number, start, run, stride = call.places[4 * index : 4 * index + 4]
    shape, count = p.shape, p.numel()
    if run >= call.params[index].numel():
        start += first
        counter = start // DRAWS
        counters = (start + count - 1) // DRAWS + 1 - counter
        draws = _draws_in_a_row(call, index, counter, counters, number).view(-1)[start - counter * DRAWS :][:count]
    else:
        e = torch.arange(first, first + count, device=p.device)
        place = start + e // run * stride + e % run
        counters, at = torch.unique_consecutive(place // DRAWS, return_inverse=True)
        draws = _draws(call.seed, counters, number, _next_step(call, index))[at, place % DRAWS].to(torch.int32)
    p = p.contiguous().view(-1)
    # A sum beyond the largest finite number is an infinity, as rounding to the nearest has it there.
    up = (p.view(torch.int32) + draws).bitwise_right_shift_(16).bitwise_left_shift_(16).view(torch.float32)
    if not (p.is_cpu and tracing.has_values(p) and p.sum().isfinite()):
        up = torch.where(p.isfinite(), up, p)
    return up.view(shape).to(torch.bfloat16)


def _next_step(call: Call, index: int) -> torch.Tensor:
    return (call.steps[index] + 1).to(torch.int64)


def _draws_in_a_row(call: Call, index: int, first: int, count: int, number: int) -> torch.Tensor:
    """(count, 8) of sixteen random bits in int32, of the counters from `first` on."""
    t = _next_step(call, index)
    if not (t.is_cpu and tracing.has_values(t)):
        counters = torch.arange(first, first + count, device=t.device)
        return _draws(call.seed, counters, number, t).to(torch.int32)
    words = philox_in_a_row((call.seed & _WORD, (call.seed >> 32) & _WORD), first, count, number, t.item())
    if sys.byteorder == "little":
        return words.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
    return torch.stack([words & 0xFFFF, (words >> 16) & 0xFFFF], dim=-1).flatten(-2)


def _draws(seed: int, counters: torch.Tensor, number: int, t: torch.Tensor) -> torch.Tensor:
    """(counters,) -> (counters, 8) of sixteen random bits."""
    counter = counters & _WORD, counters >> 32, torch.full_like(counters, number), t.expand_as(counters)
    words = torch.stack(philox((seed & _WORD, (seed >> 32) & _WORD), counter), dim=-1)
    return torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(-2)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill their memory without a gap, in whatever order."""
    return tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)


def laid_out_as(tensor: torch.Tensor, like: torch.Tensor, copy: bool = False) -> torch.Tensor:
    """The same numbers with the strides of `like`."""
    # Strides are what takes long.
    if not copy and ((tensor.is_contiguous() and like.is_contiguous()) or tensor.stride() == like.stride()):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


# --- Registration -----------------------------------------------------------------------------------------------------


def statistics_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _norm_fake(call: Norm) -> torch.Tensor:
    return call.grads[0].new_empty((), dtype=statistics_dtype(call.grads[0]))


OPERATOR = Operator("adamw", Call, 0, lambda call: None)
NORM = Operator("adamw_norm", Norm, 1, _norm_fake, room="adamw", launcher="norm")


def updated(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One update of one tensor: -> parameter, exp_avg, exp_avg_sq. What `gptkern check` and `bench` call.

    Args:
        in_place: whether they are the tensors that were given, step included, or copies.
    """
    with torch.no_grad():
        tensors = [param, exp_avg, exp_avg_sq, step]
        param, exp_avg, exp_avg_sq, step = tensors if in_place else [tensor.clone() for tensor in tensors]
        call = Call(
            [param], [grad], [exp_avg], [exp_avg_sq], [], [], [], [step], [], lr, None, *betas, eps, weight_decay,
            False, None, None, None, None,
        )  # fmt: skip
        start(call)
    return param, exp_avg, exp_avg_sq


TWIN = updated
