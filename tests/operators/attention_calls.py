"""How the tests call attention: shapes, tensors, and a call that is judged against the oracle."""

from __future__ import annotations

from typing import NamedTuple

import oracle_attention
import pytest
import torch
from checking import check

import gptkern
import gptkern.functional as G

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Shape(NamedTuple):
    """The sizes of one call."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    length_q: int = 17
    length_k: int = 17
    head_dim: int = 16

    def __str__(self):
        return f"b{self.batch} h{self.heads}/{self.kv_heads} q{self.length_q} k{self.length_k} d{self.head_dim}"


def taken(dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype; of a test that names none float32, or float16 on the CUDA kernels, which have no float32."""
    cuda = gptkern.backends.dispatch._forced() == "cuda"
    if dtype == torch.float32 and cuda:
        pytest.skip("attention in float32 is Triton's: the CUDA kernels have 16 bits alone")
    return dtype or (torch.float16 if cuda else torch.float32)


def random_tensors(shape: Shape, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """query, key and value of a shape."""
    b, h, h_kv, n_q, n_k, d = shape
    sizes = ((b, h, n_q, d), (b, h_kv, n_k, d), (b, h_kv, n_k, d))
    return [torch.randn(size).to(device=device, dtype=dtype) for size in sizes]


def random_call(shape: Shape, device: str, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """query, key and value that the backend takes."""
    return random_tensors(shape, device, taken(dtype))


# A log-sum-exp between 4 and 16, kept in float32, is known to 16 * 2⁻²⁴, and so is the logarithm of each probability.
OF_LOG_SUM_EXP = 1e-6

# Scores of 1e4 are only known to 1e4 * 2⁻²⁴ in float32, and so is the logarithm of each probability.
OF_HUGE_SCORES = 0.02

# PyTorch's own attention in float32 on a CPU uses an exp of about 20 roundings.
PYTORCHS_EXP = 1e-5


def check_attention(query, key, value, grad_output=None, need=None, floor=0.0, **arguments) -> torch.Tensor:
    gqa = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    if (
        query.dtype == torch.float32
        and gptkern.explain(G.scaled_dot_product_attention, query, key, value, **gqa)[0] == "torch"
    ):
        floor = max(floor, PYTORCHS_EXP)
    output = check(
        lambda q, k, v: G.scaled_dot_product_attention(q, k, v, **arguments, **gqa),
        lambda q, k, v, precision: oracle_attention.attention(q, k, v, **arguments, precision=precision),
        query,
        key,
        value,
        grad_output=grad_output,
        need=need,
        floor=floor,
    )
    assert output.dtype == query.dtype
    return output
