"""attention's variant torch:cudnn: what it refuses, and what it leaves of PyTorch's own switches and order."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

import gptkern.functional as G
from gptkern.backends import dispatch
from gptkern.operators.attention import torch_cudnn
from gptkern.operators.attention.contract import Call


def of_shape(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def call(query=(2, 4, 5, 64), key=(2, 4, 9, 64), dtype=torch.float16, **options) -> Call:
    keys = of_shape(*key, dtype=dtype)
    return Call(of_shape(*query, dtype=dtype), keys, keys, False, 0.125, **options)


def test_a_plain_call_is_covered():
    assert torch_cudnn.unsupported(call()) is None


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (call(dtype=torch.float32), "the dtype is torch.float32"),
        (call((4, 5, 64), (4, 9, 64)), "query has 3 dimensions"),
        (call((1, 4, 5, 64)), "batch sizes are 1, 2 and 2"),
        (call((2, 4, 5, 72), (2, 4, 9, 136)), "head_dim is 72"),
        (call((2, 4, 5, 60), (2, 4, 9, 60)), "head_dim is 60"),
        (call(key=(2, 4, 1, 64)), "the lengths are 5 and 1"),
        (call((2, 4, 0, 64)), "the lengths are 0 and 9"),
        (call(attn_mask=of_shape(5, 9)), "attn_mask is given"),
        (call(lower_right=True), "attn_mask is given"),
        (call(dropout_p=0.1), "dropout_p is 0.1"),
        (call()._replace(scale=-0.5), "scale is -0.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_refuses(refused, reason):
    assert torch_cudnn.unsupported(refused).startswith(reason)


def test_deterministic_algorithms_are_not_cudnns():
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic" in torch_cudnn.unsupported(call())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def chosen(monkeypatch):
    """The twin's calls go to the variant, on a CPU: PyTorch takes what of its order the CPU has."""
    monkeypatch.setattr(dispatch, "settled", lambda tensor: None)
    choice = dispatch.Choice("torch:cudnn", "for the test")
    monkeypatch.setattr(dispatch, "chosen", lambda operator, call: (choice, False))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.5}, {"enable_gqa": True}], ids=str)
def test_it_is_pytorchs_function(chosen, options):
    query, keys = torch.randn(2, 4, 5, 16), torch.randn(2, 2 if "enable_gqa" in options else 4, 9, 16)
    actual = G.scaled_dot_product_attention(query, keys, keys, **options)
    torch.testing.assert_close(actual, F.scaled_dot_product_attention(query, keys, keys, **options))


def test_it_compiles_to_one_graph(chosen):
    tensors = [torch.randn(2, 3, 5, 16, requires_grad=True) for _ in range(3)]

    def call(*tensors):
        return G.scaled_dot_product_attention(*tensors, is_causal=True)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), F.scaled_dot_product_attention(*tensors, is_causal=True))


def test_what_is_switched_off_stays_off_and_the_order_is_put_back(chosen, monkeypatch):
    seen = []

    def watched(*args, **kwargs):
        seen.append((torch.backends.cuda.flash_sdp_enabled(), torch._C._get_sdp_priority_order()[0]))
        return args[0]

    monkeypatch.setattr(torch_cudnn.F, "scaled_dot_product_attention", watched)
    before = torch._C._get_sdp_priority_order()
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        query = torch.randn(1, 1, 2, 8)
        threads = [
            threading.Thread(target=lambda: [G.scaled_dot_product_attention(query, query, query) for _ in range(50)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    # The first call lets PyTorch make up its mind; of the others each has cuDNN first.
    assert len(seen) >= 200 and seen[-1] == (False, int(torch._C._SDPBackend.CUDNN_ATTENTION))
    assert not any(flash for flash, _ in seen)
    assert torch._C._get_sdp_priority_order() == before


def test_an_older_cudnn_is_no_choice(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    assert "91500" in torch_cudnn.unavailable(torch.device("cuda", 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    assert torch_cudnn.unavailable(torch.device("cuda", 0)) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert "8.9" in torch_cudnn.unavailable(torch.device("cuda", 0))
