"""gptkern.optim.AdamW as torch.optim.AdamW is used: groups, states that are exchanged, schedulers, scalers."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle

import pytest
import torch
from sharp import deep
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import gptkern
from gptkern.optim import AdamW

SHAPES = [(7, 80), (33,), (4, 5, 17), (0, 3), (1,), (3, 300)]


def model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def give(*lists, seed, some=lambda step, index: True):
    """The same gradients to each list of parameters."""
    generator = torch.Generator().manual_seed(seed)
    for index, params in enumerate(zip(*lists)):
        grad = torch.randn(params[0].shape, generator=generator)
        for param in params:
            param.grad = grad.to(param.dtype) if some(seed, index) else None


def groups(params):
    return [
        {"params": params[:2], "lr": 3e-3, "weight_decay": 0.0},
        {"params": params[2:4], "betas": (0.8, 0.9)},
        {"params": params[4:]},
    ]


def same(a, b):
    return all(map(torch.equal, a, b))


# --- The same as torch.optim.AdamW ------------------------------------------------------------------------------------


def test_the_signature_is_torchs_and_more():
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (AdamW, torch.optim.AdamW))
    assert [*ours][: len(theirs)] == [*theirs]
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind), name
    assert [*ours][len(theirs) :] == ["max_norm", "stochastic_rounding", "state_dtype", "seed"]
    assert isinstance(AdamW(model()), torch.optim.AdamW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *deep(torch.float16, torch.float64)])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}], ids=str)
def test_two_hundred_steps_are_torchs_bits(options, dtype):
    """Groups, a parameter without a gradient, others that have one now and then."""
    a, b = model(dtype=dtype), model(dtype=dtype)
    ours, theirs = AdamW(groups(a), lr=1e-2, **options), torch.optim.AdamW(groups(b), lr=1e-2, fused=True, **options)
    for step in range(200):
        give(a, b, seed=step, some=lambda step, index: index != 1 and (index != 2 or step % 3))
        ours.step()
        theirs.step()
    assert same(a, b) and a[1] not in ours.state
    assert int(ours.state[a[2]]["step"]) == 133
    for x, y in zip(a, b):
        assert theirs.state[y].keys() == ours.state[x].keys()
        assert all(torch.equal(ours.state[x][key], value) for key, value in theirs.state[y].items())


def test_clipping_of_float64_keeps_its_digits():
    a, b = model(dtype=torch.float64), model(dtype=torch.float64)
    ours, theirs = AdamW(a, lr=1e-2, max_norm=3.0), torch.optim.AdamW(b, lr=1e-2)
    for step in range(3):
        give(a, b, seed=step)
        ours.step()
        torch.nn.utils.clip_grad_norm_(b, 3.0)
        theirs.step()
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def test_clipping_is_torchs_within_rounding():
    a, b = model(), model()
    ours, theirs = AdamW(groups(a), lr=1e-2, max_norm=3.0), torch.optim.AdamW(groups(b), lr=1e-2, fused=True)
    for step in range(30):
        give(a, b, seed=step)
        ours.step()
        norm = torch.nn.utils.clip_grad_norm_(b, 3.0)
        theirs.step()
        # One kind of tensors: the norm itself has its bits.
        assert torch.equal(ours.grad_norm, norm)
    for x, y in zip(a, b):
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}], ids=str)
def test_states_are_exchanged_in_the_middle_of_a_run(options):
    """Either way, again and again: the bits of one optimizer that was never exchanged."""
    a, b = model(), model()
    kept = torch.optim.AdamW(groups(b), lr=1e-2, fused=True, **options)
    optimizer, classes = AdamW(groups(a), lr=1e-2, **options), [torch.optim.AdamW, AdamW] * 3
    for step, cls in enumerate(classes):
        give(a, b, seed=step, some=lambda step, index: index != 1)
        optimizer.step()
        kept.step()
        # As if read from a file.
        state = copy.deepcopy(optimizer.state_dict())
        optimizer = cls(groups(a), lr=0.7)
        optimizer.load_state_dict(state)
    assert same(a, b)
    assert optimizer.state_dict()["state"].keys() == kept.state_dict()["state"].keys()


@pytest.mark.parametrize("fused, foreach", [(None, None), (False, None), (None, True), (None, False)])
def test_the_state_of_an_optimizer_that_is_not_fused_is_loaded(fused, foreach):
    """Its steps may be float64 or numbers; what it says of its implementation is not what this one has."""
    a, b = model(), model()
    theirs = torch.optim.AdamW(b, lr=1e-2, fused=fused, foreach=foreach)
    give(a, b, seed=0)
    theirs.step()
    for state in theirs.state.values():
        state["step"] = state["step"].double()
    theirs.state[b[1]]["step"] = 1
    ours = AdamW(a)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for x, y in zip(a, b):
        x.data.copy_(y)
        state = ours.state[x]
        assert (state["step"].dtype, state["step"].shape, state["step"].item()) == (torch.float32, (), 1)
    assert ours.param_groups[0]["fused"] is True and ours.param_groups[0]["lr"] == 1e-2
    for state in theirs.state.values():
        state["step"] = torch.tensor(1.0)
    give(a, b, seed=1)
    ours.step()
    theirs.step()
    for x, y in zip(a, b):
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_copied_and_a_pickled_optimizer_go_on():
    params = model(dtype=torch.bfloat16)
    optimizer = AdamW(params, lr=1e-2, max_norm=2.0, stochastic_rounding=True, state_dtype="int8", seed=7)
    give(params, seed=0)
    optimizer.step()
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        others = [param for group in copied.param_groups for param in group["params"]]
        assert copied.max_norm == 2.0 and same(params, others) and copied.grad_norm is None
        mine = [param.detach().clone().requires_grad_() for param in params]
        again = AdamW(mine, max_norm=2.0, state_dtype="int8")
        again.load_state_dict(copy.deepcopy(copied.state_dict()))
        give(others, mine, seed=1)
        copied.step()
        again.step()
        assert same(others, mine) and not same(params, others)
        copied.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        assert copied.param_groups[1]["seed"] == 7


def test_groups_are_added_and_named():
    named = [("a", torch.nn.Parameter(torch.ones(3))), ("b", torch.nn.Parameter(torch.ones(3)))]
    optimizer = AdamW(iter(named[:1]), lr=0.1)
    optimizer.add_param_group({"params": iter(named[1:]), "lr": 0.2, "seed": 5})
    assert [group["param_names"] for group in optimizer.param_groups] == [["a"], ["b"]]
    for _, param in named:
        param.grad = torch.ones(3)
    optimizer.step()
    (_, a), (_, b) = named
    assert torch.allclose(1 - b, 2 * (1 - a)) and "seed: 5" in repr(optimizer)


def test_schedulers_hooks_and_closures():
    a, b = model(), model()
    seen = []
    runs = []
    for cls, params, options in ((AdamW, a, {}), (torch.optim.AdamW, b, {"fused": True})):
        optimizer = cls(params, lr=torch.tensor(1e-2), **options)
        schedulers = [torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)]
        schedulers.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
        optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_: seen.append("after"))
        runs.append((optimizer, schedulers))
    for step in range(6):
        for (optimizer, schedulers), params in zip(runs, (a, b)):

            def closure(params=params, step=step):
                assert torch.is_grad_enabled()
                give(params, seed=step)
                return 1.5

            assert optimizer.step(closure) == 1.5
            for scheduler in schedulers:
                scheduler.step()
    assert same(a, b) and seen == ["before", "after"] * 12
    # A tensor stays the one it is: a captured graph reads it.
    assert isinstance(runs[0][0].param_groups[0]["lr"], torch.Tensor)


def test_the_profiler_sees_the_step():
    params = model()
    optimizer = AdamW(params)
    give(params, seed=0)
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}


def test_hooks_of_state_dicts_are_called_once():
    params = model()
    optimizer = AdamW(params, lr=0.5)
    give(params, seed=0)
    optimizer.step()
    calls = []

    def doubled(_, state_dict):
        calls.append("load")
        state = {key: {**value, "exp_avg": 2 * value["exp_avg"]} for key, value in state_dict["state"].items()}
        return {**state_dict, "state": state}

    optimizer.register_load_state_dict_pre_hook(doubled)
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    before = optimizer.state[params[0]]["exp_avg"].clone()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["load", "loaded"] and torch.equal(optimizer.state[params[0]]["exp_avg"], 2 * before)


def test_distributed_checkpoints_know_it():
    """torch.distributed.checkpoint makes the states of an optimizer by a step of zeros, then loads into them."""
    nets = [torch.nn.Linear(80, 4) for _ in range(2)]
    optimizers = [AdamW(net.parameters(), lr=0.1, state_dtype="int8") for net in nets]
    nets[0](torch.randn(3, 80)).square().sum().backward()
    optimizers[0].step()
    state = get_optimizer_state_dict(nets[0], optimizers[0])
    set_optimizer_state_dict(nets[1], optimizers[1], state)
    for mine, other in zip(nets[0].parameters(), nets[1].parameters()):
        found, expected = optimizers[1].state[other], optimizers[0].state[mine]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_step_that_is_compiled_is_the_step():
    nets = [torch.nn.Linear(8, 4) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [AdamW(net.parameters(), lr=1e-2, max_norm=1.0) for net in nets]

    @torch.compile(backend="aot_eager")
    def step():
        optimizers[0].step()

    x = torch.randn(3, 8)
    for _ in range(2):
        for net, optimizer, act in zip(nets, optimizers, (step, optimizers[1].step)):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            act()
    assert same(nets[0].parameters(), nets[1].parameters())
    assert torch.equal(optimizers[0].grad_norm, optimizers[1].grad_norm)


# --- GradScaler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_a_grad_scaler_from_end_to_end(max_norm, unscales):
    """Gradients under a scale, an overflow in between: as torch's fused one does it, clipped after unscaling."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.GELU(), torch.nn.Linear(9, 3))
    other = copy.deepcopy(net)
    ours = AdamW(net.parameters(), lr=1e-2, max_norm=max_norm)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-2, fused=True)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3) for _ in range(2)]
    for step in range(8):
        x = torch.randn(5, 6)
        if step == 4:
            x[0, 0] = math.inf
        before = copy.deepcopy(net.state_dict())
        for network, optimizer, scaler in ((net, ours, scalers[0]), (other, theirs, scalers[1])):
            optimizer.zero_grad()
            scaler.scale(network(x).square().mean()).backward()
            if unscales or (optimizer is theirs and max_norm):
                scaler.unscale_(optimizer)
            if optimizer is theirs and max_norm:
                norm = torch.nn.utils.clip_grad_norm_(other.parameters(), max_norm)
            scaler.step(optimizer)
            scaler.update()
        if max_norm and step != 4:
            assert torch.allclose(ours.grad_norm, norm, rtol=1e-5)
        left = all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        assert left == (step == 4)
    assert not hasattr(ours, "grad_scale") and scalers[0].get_scale() == scalers[1].get_scale()
    assert {int(state["step"]) for state in ours.state.values()} == {7}
    for mine, expected in zip(net.parameters(), other.parameters()):
        assert torch.allclose(mine, expected, rtol=1e-5, atol=1e-7)


# --- States in another dtype ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [None, torch.float32, "int8"])
@pytest.mark.parametrize("of", [None, torch.float32, "int8"])
def test_states_become_what_the_optimizer_holds(of, to):
    a, b = model(dtype=torch.bfloat16), model(dtype=torch.bfloat16)
    first, second = AdamW(a, state_dtype=of, lr=1e-2), AdamW(b, state_dtype=to)
    for step in range(3):
        give(a, b, seed=step)
        first.step()
        for x, y in zip(a, b):
            y.data.copy_(x)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["state_dtype"] == to and second.param_groups[0]["lr"] == 1e-2
    for x, y in zip(a, b):
        coded = to == "int8" and len(x.shape) > 1 and math.prod(x.shape[1:]) >= 64
        assert ("exp_avg_codes" in second.state[y]) == coded
        expected = {None: torch.bfloat16}.get(to, torch.float32)
        assert coded or second.state[y]["exp_avg"].dtype == expected
    # The averages themselves, in float32: apart by no more than 8 bits or bfloat16 round.
    floats = [optimizer.to_float_state_dict()["state"] for optimizer in (first, second)]
    for key, state in floats[0].items():
        for name in ("exp_avg", "exp_avg_sq"):
            x, y = state[name].float(), floats[1][key][name].float()
            assert x.numel() == 0 or x.abs().mean() > 1e-4
            assert torch.allclose(x, y, rtol=0.05, atol=0.02 * x.abs().max().item() if x.numel() else 0), (key, name)
    give(a, b, seed=9)
    first.step()
    second.step()
    if of == to:
        assert same(a, b)
    for x, y in zip(a, b):
        assert torch.allclose(x.float(), y.float(), rtol=0.02, atol=0.01)
    # What torch.optim.AdamW loads, and nothing else in it.
    state = second.to_float_state_dict()
    assert {key for value in state["state"].values() for key in value} == {"step", "exp_avg", "exp_avg_sq"}
    assert state["param_groups"][0].keys() == torch.optim.AdamW(b).state_dict()["param_groups"][0].keys()
    theirs = torch.optim.AdamW(b)
    theirs.load_state_dict(state)
    give(b, seed=10)
    theirs.step()


def test_eight_bits_train_as_float32_does():
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    target = torch.tanh(x @ torch.randn(32, 8))
    ends = []
    for state_dtype in (None, "int8"):
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.GELU(), torch.nn.Linear(128, 8))
        optimizer = AdamW(net.parameters(), lr=3e-3, state_dtype=state_dtype)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (net(x) - target).square().mean()
            loss.backward()
            optimizer.step()
        ends.append(loss.item())
    assert ends[0] < 0.02 and abs(ends[1] - ends[0]) < 0.3 * ends[0]


@pytest.mark.parametrize("state_dtype", [None, torch.float32, "int8"])
def test_a_resumed_run_rounds_as_if_it_had_not_stopped(state_dtype):
    options = dict(lr=1e-2, state_dtype=state_dtype, stochastic_rounding=True)
    a, b = model(dtype=torch.bfloat16), model(dtype=torch.bfloat16)
    first, second = AdamW(a, seed=11, **options), AdamW(b, seed=11, **options)
    for step in range(6):
        give(a, b, seed=step)
        first.step()
        second.step()
        if step == 2:
            # Its seed comes with the state.
            resumed = AdamW(b, **options)
            resumed.load_state_dict(copy.deepcopy(second.state_dict()))
            second = resumed
    assert same(a, b)


# --- What is refused --------------------------------------------------------------------------------------------------


def a_parameter(dtype=torch.float32, *shape):
    return torch.nn.Parameter(torch.ones(shape or (3,), dtype=dtype), requires_grad=dtype.is_floating_point)


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(differentiable=True), RuntimeError, "differentiable is True; the step is fused"),
        (dict(fused=True, foreach=True), RuntimeError, "foreach and fused are both True"),
        (dict(fused=False), ValueError, "fused is False; the step is always fused"),
        (dict(lr=-1.0), ValueError, "Invalid learning rate: -1.0"),
        (dict(lr=torch.ones(2)), ValueError, "Tensor lr must be 1-element"),
        (dict(betas=(0.9, 1.0)), ValueError, "Invalid beta parameter at index 1: 1.0"),
        (dict(eps=-1e-8), ValueError, "Invalid epsilon value"),
        (dict(weight_decay=-1.0), ValueError, "Invalid weight_decay value"),
        (dict(max_norm=-1.0), ValueError, "max_norm is -1.0; it needs to be a number from 0 on, or None"),
        (dict(max_norm=math.nan), ValueError, "max_norm is nan"),
        (dict(max_norm="1"), ValueError, "max_norm is '1'"),
        (dict(state_dtype=torch.bfloat16), ValueError, 'state_dtype is torch.bfloat16; it needs to be None'),
        (dict(state_dtype=torch.int8), ValueError, "state_dtype is torch.int8"),
        (dict(state_dtype="int8", amsgrad=True), ValueError, "the largest average is not held in 8 bits"),
        (dict(stochastic_rounding=1), ValueError, "stochastic_rounding is 1"),
        (dict(seed=-1), ValueError, "seed is -1; it needs to be a whole number from 0"),
        (dict(seed=2**63), ValueError, "seed is"),
        (dict(seed=1.0), ValueError, "seed is 1.0"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_are_none(options, error, words):
    with pytest.raises(error, match=words):
        AdamW([a_parameter()], **options)


@pytest.mark.parametrize(
    "options", [dict(foreach=True), dict(foreach=False), dict(fused=True), dict(capturable=True)], ids=str
)
def test_options_of_torchs_implementations_change_nothing(options):
    a, b = model(), model()
    give(a, b, seed=0)
    AdamW(a, **options).step()
    torch.optim.AdamW(b, fused=True).step()
    assert same(a, b)


@pytest.mark.parametrize(
    "param, words",
    [
        (a_parameter(torch.complex64), "parameter 0 of a group is torch.complex64; it needs float16, bfloat16"),
        (a_parameter(torch.int32), "parameter 0 of a group is torch.int32"),
    ],
)
def test_parameters_that_are_none(param, words):
    with pytest.raises(ValueError, match=words):
        AdamW([param])
    optimizer = AdamW([a_parameter()])
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": param})
    with pytest.raises(ValueError, match="float16; stochastic_rounding is for bfloat16"):
        optimizer.add_param_group({"params": a_parameter(torch.float16), "stochastic_rounding": True})
    with pytest.raises(ValueError, match="a group has max_norm; it is of all groups"):
        optimizer.add_param_group({"params": a_parameter(), "max_norm": 1.0})
    with pytest.raises(ValueError, match="fused is False"):
        optimizer.add_param_group({"params": a_parameter(), "fused": False})
    with pytest.raises(TypeError, match="optimizer can only optimize Tensors"):
        optimizer.add_param_group({"params": [1.0]})
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamW([])
    assert len(optimizer.param_groups) == 1


def test_a_sparse_gradient_is_refused_before_anything_changes():
    first, table = a_parameter(), torch.nn.Embedding(5, 3, sparse=True)
    optimizer = AdamW([first, table.weight], max_norm=1.0)
    first.grad = torch.ones(3)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="the gradient of parameter 1 is sparse; it needs to be dense"):
        optimizer.step()
    assert torch.equal(first, torch.ones(3)) and not optimizer.state and optimizer.grad_norm is None


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s["state"][1].pop("exp_avg_sq"), "the state of parameter 1 has no exp_avg_sq"),
        (lambda s: s["state"][1].update(exp_avg=torch.ones(4)), r"parameter 1 has exp_avg \(4,\); it needs \(33,\)"),
        (lambda s: s["state"][0].update(step=torch.ones(2)), r"parameter 0 has step \(2,\); it needs one number"),
        (lambda s: s["state"].update({2: [1]}), "the state of parameter 2 is a list"),
        (lambda s: s["param_groups"][0].update(amsgrad=True), "the largest average is not held in 8 bits"),
        (lambda s: s["param_groups"][0].update(differentiable=True), "differentiable is True"),
        (lambda s: s["param_groups"][0].update(seed=-4), "seed is -4"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), "lr is -1.0"),
        (lambda s: s["param_groups"].pop(), "different number of parameter groups"),
        (lambda s: s["param_groups"][0]["params"].pop(), "doesn't match the size of optimizer's group"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(change, words):
    params = model()
    optimizer = AdamW(params, state_dtype="int8")
    give(params, seed=0)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, value in before["state"].items():
        of_codes = {name: one for name, one in value.items() if not isinstance(one, torch.Tensor)}
        assert of_codes.items() <= after["state"][key].items()
        assert all(torch.equal(after["state"][key][n], one) for n, one in value.items() if n not in of_codes)


def test_amsgrad_is_loaded_with_its_averages_or_not_at_all():
    a, b = model(), model()
    first, second = AdamW(a, amsgrad=True), AdamW(b)
    give(a, b, seed=0)
    first.step()
    second.step()
    plain = second.state_dict()
    plain["param_groups"][0]["amsgrad"] = True
    with pytest.raises(ValueError, match="the state of parameter 0 has no max_exp_avg_sq"):
        AdamW(model()).load_state_dict(plain)


def test_the_backend_is_forced_as_of_every_operator(monkeypatch):
    params = model()
    give(params, seed=0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with gptkern.backend("triton"), pytest.raises(gptkern.BackendError, match="cannot run adamw"):
        AdamW(params).step()


def test_torchs_adamw_refuses_averages_in_8_bits_when_it_loads_them():
    params = [torch.nn.Parameter(torch.randn(4, 300)), torch.nn.Parameter(torch.randn(3))]
    ours = AdamW(params, state_dtype="int8")
    for param in params:
        param.grad = torch.randn_like(param)
    ours.step()
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    with pytest.raises(ValueError, match="to_float_state_dict"):
        torch.optim.AdamW(params).load_state_dict(saved)
    torch.optim.AdamW(params).load_state_dict(copy.deepcopy(ours.to_float_state_dict()))
    again = AdamW(params, state_dtype="int8")
    again.load_state_dict(saved)
    for param in params:
        assert ours.state[param].keys() == again.state[param].keys()
        assert all(torch.equal(value, again.state[param][key]) for key, value in ours.state[param].items())


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer, p: optimizer([]),
        lambda optimizer, p: optimizer([{"params": [p]}, {"params": []}]),
        lambda optimizer, p: optimizer([{"params": [p]}, {"params": [p]}]),
        lambda optimizer, p: optimizer([{"lr": 0.1}]),
        lambda optimizer, p: optimizer([{"params": {p}}]),
        lambda optimizer, p: optimizer([p]).add_param_group([p]),
        lambda optimizer, p: optimizer([p]).add_param_group({"params": [p]}),
        lambda optimizer, p: optimizer([p], lr=torch.tensor(-0.1)),
        lambda optimizer, p: optimizer([p], lr=torch.tensor([0.1, 0.2])),
        lambda optimizer, p: optimizer([p], lr=torch.tensor(0.1), foreach=True),
        lambda optimizer, p: optimizer([p], betas=(torch.tensor(0.9), 0.9)),
        lambda optimizer, p: optimizer([("a", p), torch.nn.Parameter(torch.zeros(1))]),
    ],
)
def test_mistakes_in_groups_raise_what_torchs_do(make):
    raised = []
    for optimizer in (torch.optim.AdamW, AdamW):
        try:
            make(optimizer, torch.nn.Parameter(torch.zeros(2)))
            raised.append(None)
        except Exception as error:
            raised.append(type(error))
    assert raised[0] == raised[1]
