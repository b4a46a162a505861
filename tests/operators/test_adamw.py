"""AdamW's update on every backend, against the oracle: sizes around a chunk, layouts, dtypes, averages in 8 bits."""

from __future__ import annotations

import functools
import math
import sys

import pytest
import torch
from oracle_adamw import adamw, levels
from oracles import YARDSTICK
from sharp import deep

import gptkern
from gptkern.backends import philox
from gptkern.measuring.rounding import noise
from gptkern.measuring.tolerance import assert_close
from gptkern.operators.adamw import blockwise, contract
from gptkern.optim import AdamW

FACTOR = 2  # of results (docs/design.md, section 5)
HYPER = dict(lr=0.03, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.2)
THREE = [torch.float32, torch.bfloat16, *deep(torch.float16)]
CHUNK = 4096


def parameters(shapes, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def give_gradients(params, seed=2, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        grad = torch.randn(param.shape, generator=generator) * spread
        param.grad = grad.to(param.device, param.dtype)


def judged(before, optimizer, group, factor=1.0):
    """What the optimizer has made of each tensor of `before`, [(parameter, its copy, gradient, copy of the state)]."""
    for param, copy, grad, state in before:
        kept = optimizer.state[param]
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        averages = [state.get(name, torch.zeros_like(copy, dtype=kept[name].dtype)) for name in names]
        step = int(kept["step"])
        known = dict(
            step=step, maximize=group["maximize"], factor=factor,
            **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")},
        )  # fmt: skip
        reference = adamw(copy, grad, *averages, **known)
        yardstick = adamw(copy, grad, *averages, **known, precision=YARDSTICK)
        noises = functools.cache(lambda args=(copy, grad, *averages), known=known: noise(lambda: adamw(*args, **known)))
        for index, actual in enumerate([param, *(kept[name] for name in names)]):
            assert_close(
                names[index - 1] if index else "parameter", actual.detach(), reference[index], yardstick[index], FACTOR,
                noise=lambda index=index, noises=noises: noises()[index],
            )  # fmt: skip


def stepped(optimizer, factor=1.0, steps=2):
    """Steps of new gradients, each of them judged by what was there before it."""
    params = optimizer.param_groups[0]["params"]
    for seed in range(steps):
        give_gradients(params, seed)
        before = [
            (p, p.detach().clone(), p.grad.clone(), {k: v.clone() for k, v in optimizer.state[p].items()})
            for p in params
            if p.numel()
        ]
        optimizer.step()
        for param, _, grad, _ in before:
            assert torch.equal(param.grad, grad)
        judged(before, optimizer, optimizer.param_groups[0], factor)


SHAPES = [(CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (1,), (3, 5, 7), (0, 4), (2, CHUNK + 3)]


@pytest.mark.parametrize("dtype", THREE)
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, *deep({"maximize": True})], ids=str)
def test_an_update(backend, dtype, options, device):
    stepped(AdamW(parameters(SHAPES, dtype, device), **HYPER, **options))


@pytest.mark.parametrize(
    "hyper", [dict(betas=(0.0, 0.0)), dict(weight_decay=0.0, eps=1e-3), dict(betas=(0.999, 0.9999))]
)
def test_hyperparameters_at_their_ends(backend, hyper, device):
    """With β near 1 the first corrections are differences of numbers near 1."""
    stepped(AdamW(parameters([(33,), (5, 9)], device=device), **{**HYPER, **hyper}))


def test_averages_in_float32(backend, device):
    optimizer = AdamW(parameters(SHAPES, torch.bfloat16, device), state_dtype=torch.float32, **HYPER)
    stepped(optimizer)
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}


@pytest.mark.parametrize("gaps", [False, True])
def test_every_layout(backend, gaps, device):
    """Transposed, with gaps, off by one element; gradients and averages in an order of their own."""

    def made(seed):
        g = torch.Generator().manual_seed(seed)
        dense = [
            torch.randn(70, 66, generator=g).to(device).t(), torch.randn(CHUNK + 3, generator=g).to(device)[1:],
            torch.randn(2, 6, 4, generator=g).to(device).permute(2, 0, 1),
        ]  # fmt: skip
        with_gaps = [
            torch.randn(300, generator=g).to(device)[::3], torch.randn(2, 3, 4, 5, generator=g).to(device)[:, :, 1:],
        ]  # fmt: skip
        return dense + with_gaps if gaps else dense

    params = [torch.nn.Parameter(tensor) for tensor in made(0)]
    optimizer = AdamW(params, **HYPER)
    for step in range(2):
        for param, grad in zip(params, made(step + 1)):
            # In row-major order at the first step, then as the parameter.
            param.grad = grad.contiguous() if step == 0 else grad
        before = [
            (p, p.detach().clone(), p.grad.clone(), {k: v.clone() for k, v in optimizer.state[p].items()})
            for p in params
        ]
        optimizer.step()
        judged(before, optimizer, optimizer.param_groups[0])


@pytest.mark.parametrize("count", [103, *deep(1003)])
def test_many_small_tensors_of_two_dtypes(backend, device, count):
    params = parameters([(index % 7 + 1,) for index in range(count)], device=device)
    for param in params[::3]:
        param.data = param.data.to(torch.bfloat16)
    stepped(AdamW(params, **HYPER), steps=1)


def test_clipping_and_unscaling(backend, device):
    """The norm is of unscaled gradients; both factors reach the update."""
    params = parameters(SHAPES, device=device)
    optimizer = AdamW(params, max_norm=2.0, **HYPER)
    assert optimizer.grad_norm is None
    optimizer.grad_scale = torch.full((1,), 64.0, device=device)
    give_gradients(params, 0)
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in params)) / 64
    assert norm > 2
    stepped(optimizer, factor=2.0 / (norm + 1e-6) / 64, steps=1)
    assert optimizer.grad_norm.shape == () and optimizer.grad_norm.dtype == torch.float32
    assert abs(optimizer.grad_norm.item() / norm - 1) < 1e-6


def test_a_norm_below_the_limit_changes_nothing(backend, device):
    a, b = (parameters(SHAPES, device=device) for _ in range(2))
    for params, limit in ((a, None), (b, math.inf)):
        give_gradients(params)
        optimizer = AdamW(params, max_norm=limit, **HYPER)
        optimizer.step()
    assert all(map(torch.equal, a, b)) and optimizer.grad_norm > 0
    # What is multiplied by 1.
    c = parameters(SHAPES, device=device)
    give_gradients(c)
    AdamW(c, max_norm=1e6, **HYPER).step()
    assert all(map(torch.equal, a, c))


@pytest.mark.parametrize("dtype", THREE)
def test_the_norm(backend, dtype, device):
    """Of tensors with gaps, of one that does not begin at 16 bytes, and in the same bits again."""
    grads = [p.detach() for p in parameters([(9 * CHUNK + 5,), (7,), (3, 4), (0,)], dtype, device)]
    grads += [grads[0][1:], grads[0][::2], grads[0][: 4 * 16].view(16, 4).t()]
    found = contract.norm_of(grads)
    expected = math.sqrt(sum(grad.double().square().sum().item() for grad in grads))
    assert found.dtype == torch.float32 and abs(found.item() / expected - 1) < 1e-5
    assert torch.equal(found, contract.norm_of(grads))
    grads[-1] = torch.full((3,), math.nan, dtype=dtype, device=device)
    assert contract.norm_of(grads).isnan()


@pytest.mark.parametrize("state_dtype", [None, *deep(torch.float32), "int8"])
@pytest.mark.parametrize("rounding", [*deep(False), True])
def test_an_overflow_leaves_everything(backend, state_dtype, rounding, device):
    params = parameters([(CHUNK + 1,), (3, 300)], torch.bfloat16, device)
    optimizer = AdamW(params, state_dtype=state_dtype, stochastic_rounding=rounding, max_norm=1.0, **HYPER)
    give_gradients(params)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    params[0].grad[5] = math.inf
    for found in (1.0, 2.0):
        optimizer.found_inf = torch.full((1,), found, device=device)
        optimizer.step()
        assert all(map(torch.equal, params, before))
        for param, state in zip(params, states):
            assert all(torch.equal(optimizer.state[param][key], value) for key, value in state.items())
    optimizer.found_inf = torch.zeros(1, device=device)
    give_gradients(params, 3)
    optimizer.step()
    assert not torch.equal(params[0], before[0]) and optimizer.state[params[0]]["step"] == 2


def test_numbers_that_are_none_stay_where_they_are(backend, device):
    """NaN and infinities of a gradient reach its own element alone; in 8 bits, its block."""
    for state_dtype in (None, "int8"):
        params = parameters([(2, 512)], torch.bfloat16, device)
        optimizer = AdamW(params, state_dtype=state_dtype, stochastic_rounding=True, **HYPER)
        give_gradients(params)
        params[0].grad[0, 300] = math.nan
        optimizer.step()
        assert params[0].isnan().nonzero().tolist() == [[0, 300]]
        give_gradients(params)
        optimizer.step()
        touched = params[0].isnan()
        assert touched[0, 300] and not touched[1].any() and not touched[0, :256].any()
        assert touched.sum() == (1 if state_dtype is None else 256)


# --- Rounding at random -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8 * 515 + 3,), (3, 300), *deep((1,), (3, 5, 7), (2, 512))])
@pytest.mark.parametrize("state_dtype", [torch.float32, "int8"])
def test_the_bits_of_the_rounding_are_pytorchs(backend, shape, state_dtype, device):
    """Where both compute the same number before it is rounded: with β = 0 of both that is ± lr, and the decay."""
    found = []
    for name in (backend, "torch"):
        params = parameters([(4,), shape], torch.bfloat16, device)
        optimizer = AdamW(
            params, lr=2.0**-9, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, state_dtype=state_dtype,
            stochastic_rounding=True, seed=2**62 + 12345,
        )  # fmt: skip
        with gptkern.backend(name):
            for step in range(3):
                give_gradients(params, step)
                optimizer.step()
        found.append(params[1].detach())
    assert torch.equal(*found)


def test_rounding_at_random_is_without_bias(backend, device):
    """A million draws of one number between two neighbours: the part that went up, within five standard deviations."""
    # Of kernels, whose bits are PyTorch's, fewer.
    n, lr = 2**20 if backend == "torch" else 2**17, 2.0**-10
    # 1 − lr lies a quarter of the way from 1 down to the neighbour below, 1 − 2⁻⁸.
    param = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device=device))
    param.grad = torch.ones_like(param)
    optimizer = AdamW(
        [param], lr=lr, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, stochastic_rounding=True, state_dtype=torch.float32
    )
    optimizer.step()
    down = (param == 1 - 2.0**-8).sum().item()
    assert down + (param == 1).sum().item() == n
    p = lr / 2.0**-8
    assert abs(down - n * p) < 5 * math.sqrt(n * p * (1 - p))
    # Neighbours are independent: as many pairs went down together as chance has it.
    pairs = (param.view(-1, 2) != 1).all(1).sum().item()
    assert abs(pairs - n / 2 * p**2) < 5 * math.sqrt(n / 2 * p**2)
    # So are steps, and tensors.
    first = param.detach() != 1
    param.data.fill_(1)
    optimizer.step()
    both = (first & (param != 1)).sum().item()
    assert abs(both - n * p**2) < 5 * math.sqrt(n * p**2)


def test_tensors_and_seeds_draw_their_own(backend, device):
    def rounded(seed, number):
        params = [torch.nn.Parameter(torch.ones(4000, dtype=torch.bfloat16, device=device)) for _ in range(number + 1)]
        params[number].grad = torch.ones_like(params[number])
        AdamW(
            params, lr=2.0**-9, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, stochastic_rounding=True, seed=seed
        ).step()
        return params[number].detach()

    one = rounded(1, 0)
    assert torch.equal(one, rounded(1, 0))
    for other in (rounded(1, 1), rounded(2, 0), rounded(1 + 2**32, 0)):
        assert 0.4 < (one != other).float().mean() < 0.6


def test_every_nan_stays_one_when_it_is_rounded(triton_backend):
    """A GPU's own NaN has all bits but the sign, to which nothing can be added."""
    triton = pytest.importorskip("triton")
    import triton.language as tl

    elements = sys.modules["gptkern.operators.adamw.triton_elements"]

    @triton.jit
    def kernel(x_ptr, draws_ptr, y_ptr, ROUNDED: tl.constexpr):
        e = tl.arange(0, 8)
        tl.store(y_ptr + e, ROUNDED(tl.load(x_ptr + e), tl.load(draws_ptr + e)))

    bits = torch.tensor(
        [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800000, -0x800000, 0x7F7FFFFF, 0x3F808000, 0], dtype=torch.int32
    )
    y = torch.zeros(8)
    kernel[(1,)](bits.view(torch.float32), torch.full((8,), 0xFFFF, dtype=torch.int32), y, elements.rounded_at_random)
    assert y[:3].isnan().all()
    assert y[3:].tolist() == [math.inf, -math.inf, math.inf, 1 + 2.0**-7, 0.0]


@pytest.mark.deep
def test_an_update_too_small_for_bfloat16_is_not_lost(backend, device):
    """Steps of a tenth of half a unit in the last place: to the nearest nothing ever moves."""
    ends = []
    for rounding in (False, True):
        param = torch.nn.Parameter(torch.ones(2000, dtype=torch.bfloat16, device=device))
        optimizer = AdamW(
            [param], lr=2.0**-9 / 10, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, stochastic_rounding=rounding,
            state_dtype=torch.float32,
        )  # fmt: skip
        for _ in range(40):
            param.grad = torch.ones_like(param)
            optimizer.step()
        ends.append(param.float().mean().item())
    assert ends[0] == 1.0 and abs(ends[1] - (1 - 40 * 2.0**-9 / 10)) < 3e-4


# --- 8 bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_the_dynamic_one(signed):
    """Every level comes back as it is; between two levels the code is one of both, and codes follow magnitudes."""
    decades = 7 if signed else 8
    expected = torch.tensor(levels(decades))
    count = len(expected)
    assert count == (127 if signed else 255)
    x = torch.zeros(1, 256)
    x[0, :count] = expected * 3.0
    if signed:
        codes, scale = blockwise.encoded(x)
        assert codes.dtype == torch.int8 and torch.equal(blockwise.encoded(-x)[0], -codes)
        back = blockwise.decoded(codes, scale)
    else:
        codes, scale = blockwise.encoded_square(x.square())
        assert codes.dtype == torch.uint8
        back = blockwise.decoded_square(codes, scale).sqrt()
    assert scale.tolist() == [[pytest.approx(3.0)]]
    assert codes[0, :count].tolist() == list(range(1, count + 1))
    assert torch.allclose(back[0, :count], x[0, :count], rtol=1e-5)
    # Whatever lies between levels is off by no more than the wider of the two steps around it.
    between = torch.rand(1, 256) * 3
    between[0, 0] = 3.0
    pair = blockwise.encoded(between) if signed else blockwise.encoded_square(between.square())
    back = blockwise.decoded(*pair) if signed else blockwise.decoded_square(*pair).sqrt()
    assert ((back - between).abs() <= 3.0 / 2 ** (decades - 1)).all()
    order = between[0].argsort()
    assert (pair[0][0, order].to(torch.int32).diff() >= 0).all()


def test_no_root_is_coded_as_zero_beside_others():
    """m / eps would be the update."""
    v = torch.zeros(2, 256)
    v[0, 0] = 1.0
    codes, scale = blockwise.encoded_square(v)
    assert (codes[0] >= 1).all() and (codes[1] == 0).all() and scale.tolist() == [[1.0], [0.0]]
    assert blockwise.decoded_square(codes, scale)[1].eq(0).all()


@pytest.mark.parametrize("dtype", [*deep(torch.float32), torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 255), (5, 256), (2, 257), *deep((3, 64), (33, 512), (2, 3, 100))])
def test_an_update_in_8_bits(backend, shape, dtype, device):
    """The parameter moves by what the decoded averages say; the codes are those of the new ones."""
    (param,) = parameters([shape], dtype, device)
    optimizer = AdamW([param], state_dtype="int8", **HYPER)
    for step in range(1, 4):
        give_gradients([param], step)
        state = {key: value.clone() for key, value in optimizer.state[param].items()}
        zeros = torch.zeros(shape, device=device)
        m = blockwise.decoded(state["exp_avg_codes"], state["exp_avg_absmax"]) if state else zeros
        v = blockwise.decoded_square(state["exp_avg_sq_codes"], state["exp_avg_sq_absmax"]) if state else zeros
        reference = adamw(param.detach(), param.grad, m, v, step=step, **HYPER)
        yardstick = adamw(param.detach(), param.grad, m, v, step=step, **HYPER, precision=YARDSTICK)
        optimizer.step()
        assert_close("parameter", param.detach(), reference[0], yardstick[0], FACTOR, noise=lambda: 1e-6)
        state = optimizer.state[param]
        for key, new, encode in (
            ("exp_avg", reference[1], blockwise.encoded), ("exp_avg_sq", reference[2], blockwise.encoded_square),
        ):  # fmt: skip
            codes, scale = encode(new.float())
            off = (state[f"{key}_codes"].to(torch.int32) - codes.to(torch.int32)).abs()
            # A magnitude at the border of two levels may fall on either side of it.
            assert off.max() <= 1 and off.float().mean() < 0.01, key
            assert torch.allclose(state[f"{key}_absmax"], scale, rtol=1e-5), key
        assert state["exp_avg_codes"].dtype == torch.int8 and state["exp_avg_sq_codes"].dtype == torch.uint8
        assert state["exp_avg_absmax"].shape == (shape[0], -(-math.prod(shape[1:]) // 256))


def test_what_is_held_in_8_bits():
    """By the shape of the whole parameter: narrow rows and vectors keep float32."""
    params = parameters([(300,), (4, 63), (4, 64), (2, 8, 8)], torch.bfloat16)
    optimizer = AdamW(params, state_dtype="int8")
    give_gradients(params)
    optimizer.step()
    for param, coded in zip(params, (False, False, True, True)):
        assert ("exp_avg_codes" in optimizer.state[param]) == coded
        assert coded or optimizer.state[param]["exp_avg"].dtype == torch.float32


# --- The registered ops -----------------------------------------------------------------------------------------------


def a_call(**fields):
    tensors = [torch.randn(5), torch.randn(5), torch.zeros(5), torch.zeros(5)]
    p, g, m, v = ([tensor] for tensor in tensors)
    call = contract.Call(
        p, g, m, v, [], [], [], [torch.zeros(())], [], 0.1, None, 0.9, 0.99, 1e-8, 0.1, False, None, None, None, None
    )
    return call._replace(**fields)


def test_the_ops_are_registered_rightly():
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.gptkern.adamw_forward.default, (*a_call(), "torch"), test_utils=utils)
    torch.library.opcheck(torch.ops.gptkern.adamw_norm_forward.default, ([torch.randn(3)], "torch"), test_utils=utils)


def test_float64_is_left_to_pytorch_and_named(triton_backend):
    params = parameters([(3,)], torch.float64)
    give_gradients(params)
    with pytest.raises(gptkern.BackendError, match="float64; the kernels are for float16, bfloat16 and float32"):
        AdamW(params).step()


def test_what_was_written_is_known_to_autograd(backend, device):
    param = torch.nn.Parameter(torch.ones(3, device=device))
    loss = (param * param).sum()
    param.grad = torch.ones_like(param)
    AdamW([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- A CPU's way: parts of tensors, tables, draws in a row ------------------------------------------------------------


@pytest.mark.parametrize("n", [blockwise.SIGNED, blockwise.UNSIGNED])
def test_the_table_of_codes_has_the_formulas(n):
    edges = blockwise._cells(n).next
    edges = edges[edges.isfinite()].view(torch.int32)
    # Each code but 0 begins somewhere: at the edges, in 16 upper bits, or at 1.
    near = torch.cat([edges + step for step in (-1, 0, 1)]).view(torch.float32)
    x = torch.cat([near, torch.rand(5000), 10.0 ** (-9 * torch.rand(5000)), torch.tensor([0.0, 1.0, 1e-40, math.nan])])
    found, wanted = blockwise._codes_on_a_cpu(x, n), blockwise._codes(x, n)
    assert torch.equal(found.int(), wanted) and set(found.int().tolist()) == set(range(2 ** (n + 1)))


def test_draws_in_a_row_are_philoxs():
    for first in (0, 5, 2**32 - 3, 2**45 + 1):
        found = philox.philox_in_a_row((0x12345678, 0xFEDCBA98), first, 7, 0xFFFFFFFF, 2**31)
        counters = torch.arange(first, first + 7)
        words = philox.philox((0x12345678, 0xFEDCBA98), (counters & (2**32 - 1), counters >> 32, 0xFFFFFFFF, 2**31))
        assert torch.equal(found.long() & (2**32 - 1), torch.stack(words, 1))


@pytest.mark.parametrize("kind", ["int8", "stochastic", "clip", "amsgrad"])
def test_parts_of_a_tensor_are_updated_as_the_whole(monkeypatch, kind):
    options = {
        "int8": dict(state_dtype="int8"),
        "stochastic": dict(stochastic_rounding=True, state_dtype=torch.float32),
        "clip": dict(max_norm=0.5),
        "amsgrad": dict(max_norm=0.5, amsgrad=True),
    }[kind]
    dtype = torch.bfloat16 if kind == "stochastic" else torch.float32
    given = [torch.randn(shape).to(dtype) for shape in ((37, 70), (5, 3, 100), (400,), (), (9, 1))]
    given.append(torch.randn(20, 90).t().to(dtype))
    grads = [[torch.randn_like(one) for one in given] for _ in range(3)]
    results = []
    for elements in (2**30, 128):
        monkeypatch.setattr(contract, "_AT_A_TIME", elements)
        monkeypatch.setattr(contract, "_COPIED", elements)
        params = [torch.nn.Parameter(one.clone(memory_format=torch.preserve_format)) for one in given]
        optimizer = AdamW(params, **options)
        for of_step in grads:
            for param, grad in zip(params, of_step):
                param.grad = grad.clone(memory_format=torch.preserve_format)
            optimizer.step()
            assert all(torch.equal(param.grad, grad) for param, grad in zip(params, of_step))
        results.append([*params, *(value for param in params for value in optimizer.state[param].values())])
    assert all(map(torch.equal, *results))
