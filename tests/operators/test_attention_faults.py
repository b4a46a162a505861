"""attention: what faults of kernels hide behind: equal strides, round lengths, ordinary scores, small tensors.

tests/test_broken_attention.py plants such faults, one at a time, and sees these tests fail.
"""

from __future__ import annotations

import contextlib
import importlib
import math

import oracle_attention
import pytest
import torch
from attention_calls import Shape, random_tensors, taken
from checking import check, same_bits
from layouts import in_order

import gptkern.functional as G
from gptkern.autograd import AttentionFunction
from gptkern.backends.dispatch import load

# The exponents of the log-sum-exp, of up to 300 here, are known to 300 * 2⁻²⁴ in float32, and so are the logarithms of
# the probabilities; a gradient sums a hundred of them.
OF_LOW_SCORES = 300 * 2**-21
# As in test_attention_masks.py.
OF_EXPONENTS = 3e-6
SEED = 7


def tiles(backend: str, block_m: int, block_n: int):
    """Triton's tiles. Those of the CUDA kernels are fixed: 128 queries and 64 keys forward, 64 and 32 backward."""
    return (
        load("triton", "attention").forced_tiles(block_m, block_n) if backend == "triton" else contextlib.nullcontext()
    )


def check_call(
    backend, query, key, value, grad_output, *, is_causal=False, lower_right=False, mask=None, dropout_p=0.0, floor=0.0
):  # fmt: skip
    """The call and its gradients, of the strides given, against plain mathematics."""
    shape = (*query.shape[:3], key.shape[2])
    scale, seed, kept = 1 / math.sqrt(query.shape[3]), None, None
    if dropout_p:
        seed = torch.tensor([SEED], device=query.device)
        kept = oracle_attention.kept_by_dropout(SEED, shape, dropout_p).to(query.device)
    check(
        lambda *tensors: AttentionFunction.apply(
            *tensors, is_causal, scale, backend, mask, dropout_p, lower_right, seed
        ),
        lambda *tensors, precision: oracle_attention.attention(
            *tensors, is_causal=is_causal, lower_right=lower_right, attn_mask=mask, kept=kept, dropout_p=dropout_p,
            precision=precision,
        ),
        query, key, value, grad_output=grad_output, floor=floor,
    )  # fmt: skip


# --- Every operand has a layout of its own --------------------------------------------------------------------------

# How (batch, heads, length, head_dim) lie in memory, and how much room is behind: rows as a projection leaves them; the
# sequence outermost; plain; heads outermost. The results are dense, and their rows lie as those of query, key or value.
OWN_LAYOUTS = [((0, 2, 1, 3), 8), ((2, 0, 1, 3), 16), ((0, 1, 2, 3), 24), ((1, 0, 2, 3), 32)]


def of_own_layouts(device, dtype, shape: Shape) -> list[torch.Tensor]:
    """query, key, value and the output's gradient, no two of which have a stride in common."""
    query, key, value = random_tensors(shape, device, dtype)
    call = [in_order(t, *own) for t, own in zip((query, key, value, torch.randn_like(query)), OWN_LAYOUTS)]
    assert all(len({tensor.stride(dim) for tensor in call}) == 4 for dim in range(3))
    return call


def own_mask(device, kind: str, shape: Shape) -> torch.Tensor | None:
    """Of any strides: keys outside of the heads and the heads outside of the batch; or one row for every query."""
    size = (shape.batch, shape.heads, 1 if "by key" in kind else shape.length_q, shape.length_k)
    if "mask" not in kind:
        return None
    mask = torch.randn(size, device=device) * 2
    return in_order(mask < 1 if "bool" in kind else mask, (3, 1, 0, 2), 3).expand(
        *size[:2], shape.length_q, shape.length_k
    )


CUDA_OPTIONS = ("full", "causal")
OPTIONS = (
    *CUDA_OPTIONS, "lower right", "bool mask", "additive mask", "bool mask by key", "additive mask by key", "dropout",
    "causal dropout", "lower right dropout", "bool mask dropout", "additive mask dropout",
)  # fmt: skip
# A change of one of them seldom leaves the others right: these have every argument between them.
SHARP_OPTIONS = ("causal", "bool mask", "additive mask dropout")


def check_own_layouts(backend, device, options):
    # Triton: two tiles each way. CUDA: two of keys forward, and several backward.
    shape = Shape(2, 4, 2, 17, 19, 16) if backend == "triton" else Shape(2, 4, 2, 70, 70, 16)
    call = of_own_layouts(device, taken(), shape)
    with tiles(backend, 16, 16):
        check_call(
            backend, *call, is_causal="causal" in options or "lower right" in options,
            lower_right="lower right" in options, mask=own_mask(device, options, shape),
            dropout_p=0.3 if "dropout" in options else 0.0, floor=OF_EXPONENTS if backend == "triton" else 0.0,
        )  # fmt: skip


@pytest.mark.parametrize(
    "options", [pytest.param(name, marks=[] if name in SHARP_OPTIONS else [pytest.mark.deep]) for name in OPTIONS]
)
def test_own_layouts(triton_backend, device, poisoned_memory, options):
    check_own_layouts(triton_backend, device, options)


@pytest.mark.parametrize("options", CUDA_OPTIONS)
def test_own_layouts_on_cuda(cuda_backend, device, poisoned_memory, options):
    check_own_layouts(cuda_backend, device, options)


def test_one_sequence_or_head_for_all_of_them(kernel_backend, device, poisoned_memory):
    """Strides of 0: of the batch, of the heads, and of both, each in another operand."""
    query, key, value, grad_output = of_own_layouts(device, taken(), Shape(2, 4, 2, 17, 19, 16))
    key, value = key[:1].expand(key.shape), value[:, 1:].expand(value.shape)
    grad_output = grad_output[:1, :1].expand(grad_output.shape)
    check_call(kernel_backend, query, key, value, grad_output, is_causal=True, floor=OF_EXPONENTS)


# --- Lengths beside the edges of tiles, low scores, poison behind the last row --------------------------------------


def check_low_scores(backend, device, dtype, lengths, is_causal, head_dim=16):
    """All scores are about -200, in base 2: a key past the end that is not hidden, of score 0, outweighs the whole row.

    So is the log-sum-exp: an exponent of a hidden key is beyond float32, and times 0 gives NaN. Behind the last row and
    the last column is NaN.
    """
    query, key, value = random_tensors(Shape(1, 1, 1, *lengths, head_dim), device, dtype)
    # scale * head_dim * level² = 140, and 140 * log2(e) = 202
    level = math.sqrt(140 / math.sqrt(head_dim))
    call = [
        in_order(tensor, (0, 1, 2, 3), 8) for tensor in (query + level, key - level, value, torch.randn_like(query))
    ]
    # dS is rounded to the dtype, multiplied by keys or queries of the level, and summed over up to 129 of them.
    floor = max(OF_LOW_SCORES, 8 * level * torch.finfo(dtype).eps)
    check_call(backend, *call, is_causal=is_causal, floor=floor)


# One below, at and above whole tiles, of 16, 32, 64 and 128 queries or keys. A causal limit hides the key past the last
# one from all but later queries: there are more queries than keys, too.
BESIDE_TILES = [
    (15, 63), (16, 31), (17, 127), (31, 65), (32, 129), (33, 15), (33, 31), (63, 128), (64, 33), (65, 63), (65, 95),
    (127, 64), (128, 17), (129, 32), (129, 127),
]  # fmt: skip
SHARP_LENGTHS = [(31, 65), (33, 31), (65, 63), (129, 127)]
full_and_causal = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


beside_tiles = pytest.mark.parametrize(
    "lengths",
    [pytest.param(pair, marks=[] if pair in SHARP_LENGTHS else [pytest.mark.deep]) for pair in BESIDE_TILES],
    ids=str,
)


@full_and_causal
@beside_tiles
def test_low_scores_beside_tiles(triton_backend, device, poisoned_memory, lengths, is_causal):
    # The tiles that ship for 16 bits on sm_80: 128 x 64, 32 x 128 for dK/dV.
    check_low_scores(triton_backend, device, torch.float16, lengths, is_causal)


@full_and_causal
@beside_tiles
def test_low_scores_beside_tiles_on_cuda(cuda_backend, device, poisoned_memory, lengths, is_causal):
    check_low_scores(cuda_backend, device, torch.float16, lengths, is_causal)


@pytest.mark.parametrize("head_dim", [80, 96, 128, 256])
def test_low_scores_beside_tiles_of_every_width(cuda_backend, device, poisoned_memory, head_dim):
    # Above 128 tiles are of 32 keys forward, and above 80 the backward takes a tile of 32 in two halves.
    for lengths, is_causal in (((17, 63), False), ((33, 47), False), ((47, 31), True), ((15, 15), False)):
        check_low_scores(cuda_backend, device, torch.float16, lengths, is_causal, head_dim)


def shipped_tiles() -> list[tuple[int, int]]:
    """(BLOCK_M, BLOCK_N) of every row of Triton's table, for any kernel and architecture."""
    entries = load("triton", "attention").TABLE.entries
    return sorted({row.configuration[:2] for entry in entries for row in entry.rows.values()})


@pytest.mark.deep
@full_and_causal
def test_low_scores_beside_every_tile_that_ships(triton_backend, device, poisoned_memory, is_causal):
    for block_m, block_n in shipped_tiles():
        with tiles(triton_backend, block_m, block_n):
            for lengths in ((block_m - 1, block_n + 1), (block_m, 2 * block_n - 1), (block_m + 1, block_n - 1)):
                check_low_scores(triton_backend, device, torch.float16, lengths, is_causal)


@pytest.mark.deep
@full_and_causal
def test_low_scores_of_every_length(kernel_backend, device, poisoned_memory, is_causal):
    # 37 and 131 have no common divisor: queries are of every length too.
    for length_k in range(1, 131):
        check_low_scores(kernel_backend, device, torch.float16, (length_k * 37 % 131, length_k), is_causal)


# --- Rare values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height", [-1e30, -1e12, -1e6, -1e4, 1e4, 1e6, 1e30])
def test_rows_of_one_score(kernel_backend, device, height):
    """Whatever the score, the probabilities of 64 keys are 1/64."""
    query, key, value = random_tensors(Shape(1, 2, 2, 20, 64, 16), device, taken())
    query[:], key[:] = 0.0, 0.0
    query[..., 0], key[..., 0] = math.copysign(1.0, height), 1.0
    if device != "cpu" and abs(height) > 1e6:
        pytest.skip("on a GPU S - m is one fused multiply-add, in which S is not rounded as m is")
    value.requires_grad_()
    output, lse = AttentionFunction.apply(
        query, key, value, False, abs(height), kernel_backend, None, 0.0, False, None, True
    )
    rounding = 4 * torch.finfo(value.dtype).eps
    torch.testing.assert_close(output, value.mean(2, keepdim=True).expand_as(output), rtol=rounding, atol=rounding)
    torch.testing.assert_close(lse, torch.full_like(lse, height + math.log(64)))
    if abs(height) > 1e6:  # beside such a maximum float32 has no room for the logarithm of the sum, which is 6
        return
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    # The backward computes S anew: on a GPU it may differ by half a unit of the last place.
    rounding += 0 if device == "cpu" else abs(height) * 2**-22
    expected = (grad_output.sum(2, keepdim=True) / 64).expand_as(value)
    torch.testing.assert_close(value.grad, expected, rtol=rounding, atol=rounding)


HIDING = {
    "bool": None,
    "-inf": -math.inf,
    "the lowest number": torch.finfo(torch.float32).min,
    "-1e9": -1e9,
    "-1e4": -1e4,
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.deep] if kind.startswith("-1e") else []) for kind in HIDING]
)
def test_low_scores_under_a_window(triton_backend, device, poisoned_memory, kind):
    """Of late queries whole tiles of keys are hidden before the first that is seen.

    Where no number hides, two queries see nothing at all. (Beside -3e38 the rule of tolerance allows a row anything.)
    """
    shape, level = Shape(1, 2, 1, 41, 47, 16), 6.0
    query, key, value = random_tensors(shape, device, torch.float32)
    place = torch.arange(47, device=device) - torch.arange(41, device=device)[:, None]
    mask = (place <= 0) & (place > -9)
    if kind in ("bool", "-inf"):
        mask[3], mask[29] = False, False
    if kind != "bool":
        mask = torch.zeros(mask.shape, device=device).masked_fill(~mask, HIDING[kind])
    with tiles(triton_backend, 16, 16):
        check_call(
            triton_backend, query + level, key - level, value, torch.randn_like(query), mask=mask,
            floor=OF_LOW_SCORES,
        )  # fmt: skip


def test_low_scores_where_the_first_queries_see_nothing(triton_backend, device, poisoned_memory):
    query, key, value = random_tensors(Shape(1, 2, 1, 50, 31, 16), device, torch.float32)
    with tiles(triton_backend, 16, 16):
        check_call(
            triton_backend, query + 6, key - 6, value, torch.randn_like(query), is_causal=True, lower_right=True,
            floor=OF_LOW_SCORES,
        )  # fmt: skip


# --- Offsets beyond 2³¹ elements ------------------------------------------------------------------------------------

# Of these nothing but a few rows is touched, and so takes memory.
FAR_ELEMENTS = 289 * 2**23
# Between the tensors that share them: more than the rows of one drift away from those of another.
APART = 2**17


def far_apart(device, dtype, call: list[torch.Tensor], dim: int, step: int) -> list[torch.Tensor]:
    """Copies whose neighbours in `dim` are about `step` elements apart, no two of them by the same."""
    storage = torch.empty(FAR_ELEMENTS, dtype=dtype, device=device)
    far = []
    for index, tensor in enumerate(call, 1):
        strides = list(torch.empty(tensor.shape, device="meta").stride())
        strides[dim] = step - 16 * index
        far.append(storage.as_strided(tensor.shape, strides, index * APART).copy_(tensor))
    return far


def same_far_apart(backend, device, monkeypatch, shape: Shape, dim: int, step: int):
    """Tensors far apart, results included, give the bits of tensors that are not."""
    call = random_tensors(shape, device, torch.float16)
    call.append(torch.randn_like(call[0]))
    # output and dquery, dkey, dvalue, in the order in which they are asked for
    results = far_apart(device, torch.float16, [call[0], *call[:3]], dim, step - 128)
    same_bits_of(
        backend, call, far_apart(device, torch.float16, call, dim, step), None, None,
        lambda: write_into(backend, monkeypatch, results),
    )  # fmt: skip


def same_bits_of(backend, near, far, near_mask, far_mask, before_far=lambda: None):
    """Outputs and gradients of two calls (query, key, value, gradient of the output), which hold the same values."""
    runs = []
    for (*inputs, grad_output), mask in ((near, near_mask), (far, far_mask)):
        if runs:
            before_far()
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        output = AttentionFunction.apply(*leaves, False, 0.25, backend, mask)
        runs.append([output.detach(), *torch.autograd.grad(output, leaves, grad_output)])
    for name, expected, found in zip(("output", "dquery", "dkey", "dvalue"), *runs):
        same_bits(name, found, expected)
        assert expected.any()


def write_into(backend, monkeypatch, results: list[torch.Tensor]):
    """The launchers write output, dquery, dkey and dvalue there. They are dense: so far apart only in gigabytes."""
    given = iter(results)
    rooms = {"triton": ("triton", "triton_backward"), "cuda": ("cuda",)}[backend]
    for room in rooms:
        module = importlib.import_module(f"gptkern.operators.attention.{room}")
        monkeypatch.setattr(module, "empty_in_layout_of", lambda tensor: next(given))


@pytest.mark.parametrize("dim", [0, 1], ids=["batch", "heads"])
def test_sequences_or_heads_far_apart(kernel_backend, device, monkeypatch, dim):
    # An offset of 2 * 2³⁰, though the stride fits 32 bits. The results' too.
    sizes = [1, 1]
    sizes[dim] = 3
    same_far_apart(kernel_backend, device, monkeypatch, Shape(*sizes, sizes[1], 5, 7, 16), dim, 2**30 + 256)


@pytest.mark.parametrize("lengths", [(289, 5), (5, 289)], ids=["queries", "keys"])
def test_rows_far_apart(kernel_backend, device, monkeypatch, lengths):
    # As far as rows may be for a tile's own offsets to have 32 bits on Triton, the last tile is beyond.
    step = 2**23 if kernel_backend == "triton" else 2**23 + 256
    with tiles(kernel_backend, 16, 16):
        same_far_apart(kernel_backend, device, monkeypatch, Shape(1, 1, 1, *lengths, 16), 2, step)


@pytest.mark.deep
@pytest.mark.parametrize("name", ["rows", "columns"])
def test_rows_or_columns_of_a_mask_far_apart(triton_backend, device, name):
    lengths, strides = ((289, 5), (0, 0, 2**23 - 8, 1)) if name == "rows" else ((5, 289), (0, 0, 1, 2**23 - 8))
    near = torch.rand(1, 1, *lengths, device=device) < 0.7
    far = torch.empty(FAR_ELEMENTS, dtype=torch.bool, device=device).as_strided(near.shape, strides).copy_(near)
    call = random_tensors(Shape(1, 1, 1, *lengths, 16), device, torch.float16)
    call.append(torch.randn_like(call[0]))
    with tiles(triton_backend, 16, 16):
        same_bits_of(triton_backend, call, call, near, far)


def test_rows_that_a_tile_cannot_span_are_copied(kernel_backend, device):
    """16 rows of a tile are 2³¹ elements apart."""
    call = random_tensors(Shape(1, 1, 1, 18, 18, 16), device, torch.float16)
    call.append(torch.randn_like(call[0]))
    same_bits_of(kernel_backend, call, far_apart(device, torch.float16, call, 2, 2**27), None, None)


def test_rows_of_a_mask_that_a_tile_cannot_span_are_copied(triton_backend, device):
    call = random_tensors(Shape(1, 1, 1, 18, 18, 16), device, torch.float16)
    call.append(torch.randn_like(call[0]))
    near = torch.rand(1, 1, 18, 18, device=device) < 0.7
    far = torch.empty(FAR_ELEMENTS, dtype=torch.bool, device=device).as_strided(near.shape, (0, 0, 2**27, 1))
    same_bits_of(triton_backend, call, call, near, far.copy_(near))


# --- Second derivatives ---------------------------------------------------------------------------------------------


def check_second_derivatives(backend, device, need, mask=None, dropout_p=0.0, is_causal=False, lower_right=False):
    """They are refused, by whatever the first one depends on: the input that needs it, and the output's gradient."""
    call = random_tensors(Shape(1, 2, 1, 5, 7, 16), device, taken())
    call[need].requires_grad_()
    grad_output = torch.randn_like(call[0], requires_grad=True)
    seed = torch.tensor([SEED], device=device) if dropout_p else None
    output = AttentionFunction.apply(*call, is_causal, 0.25, backend, mask, dropout_p, lower_right, seed)
    (gradient,) = torch.autograd.grad(output, call[need], grad_output, create_graph=True)
    for source in (call[need], grad_output):
        # allow_unused: a gradient that is not tied to it would be None, and no error.
        with pytest.raises(NotImplementedError, match="attention has no second derivative"):
            torch.autograd.grad(gradient.sum(), source, retain_graph=True, allow_unused=True)


of_each_input = pytest.mark.parametrize("need", range(3), ids=["query", "key", "value"])


@of_each_input
@full_and_causal
def test_second_derivatives_are_refused(kernel_backend, device, need, is_causal):
    check_second_derivatives(kernel_backend, device, need, is_causal=is_causal)


@of_each_input
@pytest.mark.parametrize(
    "options", [{"dropout_p": 0.3}, {"is_causal": True, "lower_right": True}, {"mask": 1}], ids=str
)
def test_second_derivatives_of_other_options_are_refused(triton_backend, device, need, options):
    if "mask" in options:
        options = {"mask": torch.randn(5, 7, device=device)}
    check_second_derivatives(triton_backend, device, need, **options)


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_second_derivatives_are_refused_by_every_other_input(kernel_backend, device, which):
    """Of a gradient that is one input's, by the others."""
    call = dict(zip(("query", "key", "value"), random_tensors(Shape(1, 1, 1, 5, 7, 16), device, taken())))
    call = {name: tensor.requires_grad_() for name, tensor in call.items()}
    output = G.scaled_dot_product_attention(**call)
    (gradient,) = torch.autograd.grad(output.square().sum(), call[which], create_graph=True)
    for tensor in call.values():
        with pytest.raises(NotImplementedError, match="attention has no second derivative"):
            torch.autograd.grad(gradient.square().sum(), tensor, retain_graph=True, allow_unused=True)
    with pytest.raises(NotImplementedError, match="attention has no second derivative"):
        (output.sum() + gradient.square().sum()).backward()
