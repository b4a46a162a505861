"""adamw in CUDA C++: the bytes that an update moves, every combination of dtypes, schedules."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from test_adamw import CHUNK, HYPER, THREE, give_gradients, parameters, stepped

from gptkern.backends.cuda import emulated
from gptkern.operators.adamw import contract
from gptkern.optim import AdamW

emulator = pytest.mark.skipif(DEVICE != "cpu", reason="the emulator counts, and there is a GPU")
# Bytes an element, of contract.py's table: what is read and written.
BYTES = [
    (torch.float32, None, {}, 28), (torch.float32, None, {"amsgrad": True}, 36), (torch.bfloat16, None, {}, 14),
    (torch.bfloat16, torch.float32, {}, 22), (torch.bfloat16, torch.float32, {"amsgrad": True}, 30),
    (torch.bfloat16, torch.float32, {"stochastic_rounding": True}, 22),
    (torch.float32, "int8", {}, 16 + 1 / 16), (torch.bfloat16, "int8", {}, 10 + 1 / 16),
]  # fmt: skip


def moved(step) -> int:
    """Bytes of global memory that the kernels of a step load and store."""
    import count_cuda

    calls: list = []
    with count_cuda._counting(calls):
        step()
    return sum(
        counts[kind]["bytes"] for _, kernels, _ in calls for counts in kernels.values() for kind in count_cuda.ACCESSES
    )


@emulator
@pytest.mark.parametrize(("dtype", "state_dtype", "options", "least"), BYTES)
def test_no_more_bytes_than_needed(cuda_backend, device, dtype, state_dtype, options, least):
    params = parameters([(32, 1024), (16, 256)], dtype, device)
    optimizer = AdamW(params, state_dtype=state_dtype, **options, **HYPER)
    give_gradients(params)
    optimizer.step()
    elements = sum(param.numel() for param in params)
    assert 1 <= moved(optimizer.step) / elements / least < 1.03


@emulator
def test_the_norm_reads_gradients_once(cuda_backend, device):
    grads = [torch.randn(40, 1024, device=device).bfloat16()]
    assert 1 <= moved(lambda: contract.norm_of(grads)) / grads[0].nbytes < 1.04


@pytest.mark.parametrize("dtype", THREE)
@pytest.mark.parametrize("grad_dtype", THREE)
@pytest.mark.parametrize("state_dtype", [None, torch.float32])
def test_gradients_of_another_dtype(cuda_backend, device, dtype, grad_dtype, state_dtype):
    """torch.optim takes them of a parameter's own dtype alone: the launchers take any."""
    import gptkern

    generator = torch.Generator().manual_seed(3)
    shape = (CHUNK + 5,)
    p = torch.randn(shape, generator=generator).to(device, dtype)
    g = torch.randn(shape, generator=generator).to(device, grad_dtype)
    m, v = torch.zeros(2, *shape, device=device).to(state_dtype or dtype)
    ends = []
    for backend in ("cuda", "torch:launchers"):
        tensors = [tensor.clone() for tensor in (p, m, v)]
        call = contract.Call(
            [tensors[0]], [g], [tensors[1]], [tensors[2]], [], [], [], [torch.zeros((), device=device)], [], 0.1, None,
            0.9, 0.99, 1e-8, 0.1, False, None, None, None, None,
        )  # fmt: skip
        with gptkern.backend(backend):
            contract.start(call)
        ends.append(tensors)
    for actual, expected in zip(*ends):
        eps = torch.finfo(actual.dtype).eps
        torch.testing.assert_close(actual, expected, rtol=max(2 * eps, 1e-6), atol=1e-7)


@emulator
def test_the_same_bits_whatever_the_schedule(cuda_backend, device):
    found = []
    for seed in (1, 2, 3, 1_000_003):
        emulated.load().set_seed(seed)
        params = parameters([(CHUNK + 1,), (3, 300)], torch.bfloat16, device)
        optimizer = AdamW(params, state_dtype="int8", stochastic_rounding=True, seed=7, max_norm=1.0, **HYPER)
        for step in range(2):
            give_gradients(params, step)
            optimizer.step()
        found.append([*(p.detach() for p in params), optimizer.grad_norm])
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


def test_a_learning_rate_on_the_device(cuda_backend, device):
    stepped(AdamW(parameters([(33,), (5, 9)], device=device), **{**HYPER, "lr": torch.tensor(0.03, device=device)}))
