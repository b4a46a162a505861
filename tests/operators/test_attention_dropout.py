"""attention's dropout: the generator, the frequencies of its masks, and forward and backward under a known mask."""

from __future__ import annotations

import math

import numpy as np
import oracle_attention
import pytest
import torch
import torch.nn.functional as F
from checking import Watched, check, raised_by, same_bits
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

import gptkern
import gptkern.functional as G
from gptkern.autograd import AttentionFunction
from gptkern.backends import philox

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
B, H, Q, K, D = 2, 2, 19, 45, 16
# As in test_attention_masks.py.
OF_EXPONENTS = 3e-6


def call(device, dtype=torch.float32, batch=B, heads=H, kv_heads=H, length_q=Q, length_k=K, head_dim=D):
    sizes = (batch, heads, length_q, head_dim), (batch, kv_heads, length_k, head_dim)
    return [torch.randn(sizes[i > 0]).to(device=device, dtype=dtype) for i in range(3)]


def next_seed(device) -> int:
    """The seed that the next call draws, put back: one int64 of PyTorch's generator."""
    generator = torch.cuda.default_generators[0] if device == "cuda" else torch.default_generator
    state = generator.get_state()
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device).item()
    generator.set_state(state)
    return seed


def kept_by_the_kernel(device, seed, length_q, length_k, dropout_p, batch=1, heads=1) -> torch.Tensor:
    """The mask itself: with queries of 0 all probabilities are alike, and value row j is the unit vector j."""
    query = torch.zeros(batch, heads, length_q, length_k, device=device)
    value = torch.eye(length_k, device=device).expand(batch, heads, length_k, length_k)
    seed = torch.tensor([seed], device=device)
    output = AttentionFunction.apply(query, value, value, False, 1.0, "triton", None, dropout_p, False, seed)
    expected = torch.where(output != 0, 1 / (length_k * (1 - dropout_p)), 0.0)
    torch.testing.assert_close(output, expected)
    return output != 0


# --- The generator --------------------------------------------------------------------------------------------------

# Counter, key and words of philox4x32-10 among the known answers that the paper's authors publish with their code.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_known_answers(counter, key, words):
    assert tuple(int(word) for word in oracle_attention.philox(key, counter)) == words
    assert tuple(word.item() for word in philox.philox(key, counter)) == words


SEEDS = [0, 1, -1, 2**32, 2**63 - 1, -(2**63), 0x243F6A8885A308D3]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dropout_p", [0.1, 0.75])
def test_the_mask_is_the_same_bit_for_bit(device, seed, dropout_p):
    for shape in ((2, 3, 5, 7), (1, 1, 9, 64)):
        kept = philox.kept(torch.tensor([seed], device=device), shape, dropout_p).cpu()
        assert torch.equal(kept, oracle_attention.kept_by_dropout(seed, shape, dropout_p))


@pytest.mark.parametrize("seed, dropout_p", [(-1, 0.1), (0x243F6A8885A308D3, 0.75), (2**32, 0.5)])
@pytest.mark.parametrize("tiles", [(16, 16), (16, 32), (32, 64)], ids=str)
def test_the_kernels_mask_is_the_same_in_all_tiles(triton_backend, device, tiles, seed, dropout_p):
    with gptkern.backends.dispatch.load("triton", "attention").forced_tiles(*tiles):
        kept = kept_by_the_kernel(device, seed, 21, 48, dropout_p, batch=2, heads=1).cpu()
    assert torch.equal(kept, oracle_attention.kept_by_dropout(seed, (2, 1, 21, 48), dropout_p))


# --- Statistics: more than 10⁶ draws of the mask that was compared bit for bit above ----------------------------------

SHAPE = (2, 4, 400, 400)
DRAWS = math.prod(SHAPE)
# Standard deviations: by chance one test in 1.7 million fails, and the seeds are fixed.
BOUND = 5.0


def drawn(seed, dropout_p) -> torch.Tensor:
    """The mask with mean 0 and variance 1, in float64."""
    kept = philox.kept(torch.tensor([seed]), SHAPE, dropout_p).double()
    return (kept - (1 - dropout_p)) / math.sqrt(dropout_p * (1 - dropout_p))


@pytest.mark.parametrize("dropout_p", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, -7])
def test_frequencies(seed, dropout_p):
    mask = drawn(seed, dropout_p)
    assert abs(mask.mean()) < BOUND / math.sqrt(DRAWS)
    # Of every row, column and head; the largest of some hundreds lies below 5 deviations too.
    for dims in ((0, 1, 2), (0, 1, 3), (2, 3)):
        means = mask.mean(dims)
        bound = (BOUND + (2 if dropout_p < 0.01 else 0)) / math.sqrt(DRAWS / means.numel())
        assert means.abs().max() < bound


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_neighbours_are_not_correlated(dropout_p):
    mask = drawn(12345, dropout_p)
    pairs = {f"{lag} columns apart": (mask[..., lag:], mask[..., :-lag]) for lag in (1, 2, 3, 4, 8)}
    pairs |= {f"{lag} rows apart": (mask[:, :, lag:], mask[:, :, :-lag]) for lag in (1, 2, 16)}
    pairs |= {"heads": (mask[:, 1:], mask[:, :-1]), "sequences": (mask[1:], mask[:-1])}
    pairs |= {"the diagonal": (mask[:, :, 1:, 1:], mask[:, :, :-1, :-1]), "transposed": (mask.mT, mask)}
    others = {"the next seed": 12346, "the other half of the seed": 12345 + 2**32, "the seed negated": -12345}
    pairs |= {name: (mask, drawn(seed, dropout_p)) for name, seed in others.items()}
    for name, (one, other) in pairs.items():
        # The transposed mask pairs each element with another, but for the diagonals, once in both orders.
        diagonal = (one * other).diagonal(dim1=-2, dim2=-1).sum() if name == "transposed" else 0
        correlation = ((one * other).sum() - diagonal) / math.sqrt(one.numel() * (2 if name == "transposed" else 1))
        assert abs(correlation) < BOUND, f"{name}: {correlation:.1f} standard deviations"


def test_words_of_a_counter_are_uniform():
    # 256 bins of the first bits of a million words: chi-squared of 255 degrees, 5 deviations of 22.6.
    words = torch.stack(philox.philox((5, 9), (torch.arange(250_000), 3, 2, 0)))
    counts = np.bincount((words >> 24).flatten().numpy(), minlength=256)
    expected = words.numel() / 256
    assert abs(((counts - expected) ** 2 / expected).sum() - 255) < BOUND * math.sqrt(2 * 255)


# --- Forward and backward under a known mask --------------------------------------------------------------------------


def check_dropped(name, device, tensors, dropout_p, is_causal=False, mask=None, lower_right=False, need=None):
    query, key, _ = tensors
    seed = -0x1234567890ABCDEF
    shape = (*query.shape[:3], key.shape[2])
    known = dict(attn_mask=mask, lower_right=lower_right, dropout_p=dropout_p, is_causal=is_causal, scale=0.25)
    known["kept"] = oracle_attention.kept_by_dropout(seed, shape, dropout_p).to(device)
    seed = torch.tensor([seed], device=device)
    return check(
        lambda q, k, v: AttentionFunction.apply(
            q, k, v, is_causal, 0.25, name, mask, dropout_p, lower_right, seed
        ),
        lambda q, k, v, precision: oracle_attention.attention(q, k, v, **known, precision=precision),
        *tensors, need=need, floor=OF_EXPONENTS if query.dtype == torch.float32 else 0.0,
    )  # fmt: skip


@dtypes
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_against_the_oracle(triton_backend, device, poisoned_memory, dtype, is_causal):
    with gptkern.backends.dispatch.load("triton", "attention").forced_tiles(32, 32):
        check_dropped("triton", device, call(device, dtype, kv_heads=1), 0.3, is_causal)


@pytest.mark.parametrize("tiles", [(16, 32), (32, 16)], ids=str)
def test_in_other_tiles(triton_backend, device, tiles):
    with gptkern.backends.dispatch.load("triton", "attention").forced_tiles(*tiles):
        check_dropped("triton", device, call(device, batch=1, length_q=35, length_k=37), 0.1, True)


def test_with_a_mask_and_with_the_lower_right(triton_backend, device):
    with gptkern.backends.dispatch.load("triton", "attention").forced_tiles(16, 32):
        tensors = call(device, batch=1)
        check_dropped("triton", device, tensors, 0.5, mask=torch.rand(Q, K, device=device) > 0.3)
        check_dropped("triton", device, tensors, 0.5, mask=torch.randn(1, 1, 1, K, device=device))
        check_dropped("triton", device, tensors, 0.5, True, lower_right=True)


@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_frozen_inputs(triton_backend, device, need):
    check_dropped("triton", device, call(device, batch=1), 0.4, need=need)


def test_head_dim_256_makes_the_mask_in_each_of_its_launches(triton_backend, device):
    check_dropped("triton", device, call(device, torch.float16, 1, 1, 1, 9, 21, 256), 0.4)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_the_pytorch_launchers(device, is_causal):
    check_dropped("torch", device, call(device, heads=4), 0.3, is_causal)


# --- The twin -------------------------------------------------------------------------------------------------------


def test_the_twin_draws_one_seed(triton_backend, device):
    tensors = call(device)
    torch.manual_seed(7)
    seed = torch.tensor([next_seed(device)], device=device)
    output = G.scaled_dot_product_attention(*tensors, dropout_p=0.3)
    scale = 1 / math.sqrt(D)
    expected = AttentionFunction.apply(*tensors, False, scale, "triton", None, 0.3, False, seed)
    same_bits("the seed of the twin", output, expected)
    # Another call draws again; the same seed gives the same.
    assert (G.scaled_dot_product_attention(*tensors, dropout_p=0.3) != output).any()
    torch.manual_seed(7)
    same_bits("the same seed", G.scaled_dot_product_attention(*tensors, dropout_p=0.3), output)


def test_nothing_is_drawn_where_nothing_is_dropped(triton_backend, device):
    tensors = call(device, batch=1)
    before = next_seed(device)
    plain = G.scaled_dot_product_attention(*tensors)
    same_bits("dropout_p = 0", G.scaled_dot_product_attention(*tensors, dropout_p=0.0), plain)
    gptkern.explain(G.scaled_dot_product_attention, *tensors, dropout_p=0.5)
    assert next_seed(device) == before
    # So small that no word is below it, and none is dropped.
    same_bits("a trifle", G.scaled_dot_product_attention(*tensors, dropout_p=1e-12), plain)


def test_gradients_are_those_of_the_outputs_mask(triton_backend, device):
    """For a value of the unit vectors, dvalue of a 1 at (i, j) is the dropped probability itself."""
    query, key, _ = call(device, batch=1, heads=1, kv_heads=1, length_q=20, length_k=32, head_dim=32)
    value = torch.eye(32, device=device)[None, None].requires_grad_()
    output = G.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    output[0, 0, :, 5].sum().backward()
    # dvalue[j, 5] = sum over i of the dropped probability of (i, j), which is output[i, j].
    torch.testing.assert_close(value.grad[0, 0, :, 5], output[0, 0].sum(0))


def test_all_is_dropped_as_in_pytorch(backend, device):
    if backend == "cuda":
        return
    for function in (G.scaled_dot_product_attention, F.scaled_dot_product_attention):
        leaves = [tensor.requires_grad_() for tensor in call(device, batch=1)]
        output = function(*leaves, dropout_p=1.0)
        output.sum().backward()
        for result in (output, *(leaf.grad for leaf in leaves)):
            assert (result == 0).all()


@pytest.mark.parametrize("dropout_p", [1.5, -0.1])
def test_no_probability(triton_backend, device, dropout_p):
    tensors = call(device)
    assert isinstance(raised_by(F.scaled_dot_product_attention, *tensors, dropout_p=dropout_p), RuntimeError)
    with pytest.raises(RuntimeError, match="dropout_p"):
        G.scaled_dot_product_attention(*tensors, dropout_p=dropout_p)


def test_on_the_torch_backend_it_is_pytorchs(device):
    tensors = call(device)
    for choice in ("torch", None) if device == "cpu" else ("torch",):
        runs = []
        for function in (G.scaled_dot_product_attention, F.scaled_dot_product_attention):
            torch.manual_seed(1)
            with gptkern.backend(choice):
                runs.append(function(*tensors, dropout_p=0.5))
        same_bits("dropout", *runs)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_repeats_the_mask(triton_backend, device, use_reentrant):
    tensors, runs = call(device, batch=1), []

    def block(q, k, v):
        return G.scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True)

    for checkpointed in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        torch.manual_seed(3)
        with Watched() as watched:
            output = checkpoint(block, *leaves, use_reentrant=use_reentrant) if checkpointed else block(*leaves)
            torch.rand(5, device=device)  # what comes between forward and backward
            output.sum().backward()
        assert watched.names.count("attention_forward") == 1 + checkpointed
        runs.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for name, one, other in zip(("output", "dquery", "dkey", "dvalue"), *runs):
        same_bits(name, one, other)


def test_compiled_as_eager(triton_backend, device):
    def seeded(q, k, v):
        return G.scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True)

    tensors = call(device, batch=1)
    torch._dynamo.reset()
    compiled = torch.compile(seeded, fullgraph=True, backend="aot_eager")
    runs = []
    for function in (seeded, compiled):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        torch.manual_seed(5)
        output = function(*leaves)
        output.sum().backward()
        runs.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for name, one, other in zip(("output", "dquery", "dkey", "dvalue"), *runs):
        same_bits(name, one, other)


def test_autocast(triton_backend, device):
    leaves = [tensor.requires_grad_() for tensor in call(device, batch=1)]
    with torch.autocast(device, torch.bfloat16):
        output = G.scaled_dot_product_attention(*leaves, dropout_p=0.5)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_a_second_derivative_is_refused(triton_backend, device):
    leaves = [tensor.requires_grad_() for tensor in call(device, batch=1, length_q=3, length_k=5)]
    output = G.scaled_dot_product_attention(*leaves, dropout_p=0.5)
    gradient = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="attention has no second derivative"):
        gradient.sum().backward()


def test_the_expectation_is_the_attention_without(triton_backend, device):
    # Of the same query 300 times: the mean of what is divided by 1 - p, within 5 deviations of its own spread.
    count = 300
    query, key, value = call(device, batch=1, heads=1, kv_heads=1, length_q=1, length_k=16)
    outputs = G.scaled_dot_product_attention(query.expand(1, 1, count, D), key, value, dropout_p=0.3)[0, 0]
    plain = G.scaled_dot_product_attention(query, key, value)[0, 0, 0]
    assert ((outputs.mean(0) - plain).abs() < BOUND * outputs.std(0) / math.sqrt(count)).all()


def test_dropout_in_a_cached_step(triton_backend, device):
    query, key, value = call(device, batch=1, length_q=3, length_k=20)
    output = G.scaled_dot_product_attention(query, key, value, causal_lower_right(3, 20), dropout_p=0.5)
    assert output.isfinite().all()
