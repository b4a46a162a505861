"""What only a GPU can show of the launchers: that a CUDA graph captures them, that they synchronise nothing, and that
they run on the input's device and on PyTorch's current stream."""

import pytest
import torch

import gptkern
import gptkern.functional as G
from gptkern import operators

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: PyTorch sees none"),
]


# The first two small checks of each operator, which reach what differs most.
CALLS = {
    f"{operator}, {name}": (operator, check)
    for operator in operators.NAMES
    for name, check in list(operators.problem(operator).checks()["small"].items())[:2]
}


def made(name: str, device: str):
    """(a call that takes nothing, the tensors that it reads and gradients are taken of)"""
    operator, check = CALLS[name]
    dtype = torch.bfloat16 if torch.bfloat16 in check.dtypes else check.dtypes[0]
    inputs = operators.problem(operator).inputs(check.sizes, dtype, torch.Generator(device).manual_seed(0))
    tensors = {key: tensor.requires_grad_(not inputs.exact) for key, tensor in inputs.tensors.items()}
    twin = operators.contract(operator).TWIN
    return lambda: twin(**tensors, **inputs.constants, **inputs.options), list(tensors.values())


def step(call, tensors) -> list[torch.Tensor]:
    """The results, and the gradients of their sum of squares."""
    results = call()
    results = results if isinstance(results, tuple) else (results,)
    if not results[0].requires_grad:
        return list(results)
    return [*results, *torch.autograd.grad(sum((result.float() ** 2).sum() for result in results), tensors)]


@pytest.fixture(params=("cuda", "triton"))
def backend(request):
    reason = gptkern.backends.dispatch.unavailable(request.param, torch.device("cuda", 0))
    if reason:
        pytest.skip(reason)
    with gptkern.backend(request.param):
        yield request.param


@pytest.mark.parametrize("name", CALLS)
def test_a_graph_captures_forward_and_backward(name, backend):
    call, tensors = made(name, "cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and fills the allocator
            step(call, tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(call, tensors)
    with torch.no_grad():
        for t in tensors:
            t.copy_(torch.randn_like(t))
    graph.replay()
    torch.cuda.synchronize()
    for of_graph, plain in zip(captured, step(call, tensors), strict=True):
        torch.testing.assert_close(of_graph, plain)


@pytest.mark.parametrize("name", CALLS)
def test_nothing_synchronises(name, backend):
    call, tensors = made(name, "cuda")
    step(call, tensors)
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(call, tensors)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_a_graph_draws_another_dropout_at_each_replay(backend):
    if backend == "cuda":
        pytest.skip("the CUDA C++ kernels have no dropout: gptkern.explain says so")
    query, key, value = (torch.randn(2, 4, 128, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def call():
        return G.scaled_dot_product_attention(query, key, value, dropout_p=0.5)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    graph.replay()
    first = result.clone()
    graph.replay()
    assert not torch.equal(first, result)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_the_inputs_device_is_used_not_the_current_one(name, backend):
    call, tensors = made(name, "cuda:1")
    with torch.cuda.device(0):
        results = step(call, tensors)
    with torch.cuda.device(1):
        for one, other in zip(results, step(call, tensors), strict=True):
            assert one.device == torch.device("cuda", 1)
            torch.testing.assert_close(one, other)
