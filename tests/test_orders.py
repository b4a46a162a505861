"""Which backend is tried first: the orders in backends.json, by architecture and as measured, variants among them."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from simulated_gpus import H200, simulate, users_file
from torch._subclasses.fake_tensor import FakeTensorMode

import gptkern
import gptkern.functional as G
from gptkern import operators
from gptkern.backends import dispatch
from gptkern.backends.tables import files, orders, user


@pytest.fixture(autouse=True)
def nothing_known(tmp_path, monkeypatch):
    """Nobody's own cache is read, no choice is forced, and no test sees what another one left in memory."""
    monkeypatch.setenv("GPTKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dispatch, "_warned", set())
    dispatch.forget()
    with gptkern.backend(None):
        yield
    dispatch.forget()


# --- The files ------------------------------------------------------------------------------------------------------

NARROW = dict(bits=16, width=1024, last=True, fused=False)


def a_preference(*order, **changes):
    return NARROW | dict(order=list(order), ratio=1.3, on="4x512") | changes


def on_h200(*rows, **changes):
    entry = dict(device="NVIDIA H200", architecture=90, date="2026-11-22", versions={}, rows=list(rows))
    return entry | changes


def a_default(*order, architecture=80, **changes):
    return dict(architecture=architecture, order=list(order), source="reasoned") | changes


@pytest.fixture
def backends_file(tmp_path, monkeypatch):
    """backends_file(entry, …, defaults=[…]): as if these had shipped for softmax."""
    shipped = files.shipped

    def ship(*entries, **changes):
        path = tmp_path / "backends.json"
        default = [a_default(*orders.FAMILIES)]
        files.write(path, dict(defaults=default, entries=list(entries)) | changes)
        monkeypatch.setattr(files, "shipped", lambda *of: path if of == ("softmax", "backends") else shipped(*of))
        dispatch.forget()

    yield ship
    monkeypatch.undo()
    dispatch.forget()


@pytest.mark.parametrize(
    "content, words",
    [
        (dict(defaults=[a_default("cuda", "torch")]), "order is .* it needs each of cuda, triton"),
        (dict(entries=[on_h200(a_preference("triton", "torch", width=1000))]), "NVIDIA H200: width is 1000"),
        (dict(entries=[on_h200(*[a_preference("triton", "torch")] * 2)]), "to be the only one"),
    ],
)
def test_a_wrong_backends_file_names_the_place(backends_file, content, words):
    backends_file(**content)
    with pytest.raises(files.TableError, match=rf"backends\.json.*{words}"):
        orders.shipped("softmax")


def test_orders_with_variants_and_what_was_not_measured_comes_last(backends_file):
    variant = a_default("triton:tma", *orders.FAMILIES, architecture=90)
    backends_file(on_h200(a_preference("torch", "triton:tma")), defaults=[a_default(*orders.FAMILIES), variant])
    assert orders.names("softmax") == ("cuda", "triton", "torch", "triton:tma")
    assert "triton:tma" in orders.variants()
    row = orders.preferences("softmax", H200)[tuple(NARROW.values())]
    assert row.order == ("torch", "triton:tma", "cuda", "triton")
    assert row.reason == "measured 1.30 x faster than triton:tma on NVIDIA H200, 2026-11-22"


# --- What was measured ----------------------------------------------------------------------------------------------


def a_call(width, index=0):
    """A softmax's record, on a simulated GPU."""
    with FakeTensorMode():
        input = torch.empty(4, width, device=f"cuda:{index}", dtype=torch.bfloat16)
    return operators.contract("softmax").Call(input, -1, None, 1.0, None, False)


@pytest.fixture
def kernels(monkeypatch):
    """kernels("triton", …): these backends cover every softmax. cuda:0 is an H200, nobody measured cuda:1."""
    simulate(monkeypatch, ("NVIDIA H200", (9, 0)), ("NVIDIA H900", (10, 3)))
    monkeypatch.setattr(dispatch, "unavailable", lambda name, device: None)
    monkeypatch.setattr(
        dispatch,
        "_modules",
        {(name, "softmax"): SimpleNamespace(unsupported=lambda call: None) for name in ("cuda", "triton")},
    )

    def covering(*names):
        monkeypatch.setattr(dispatch, "_uncovered", lambda name, *_: None if name in names else f"{name} can not")

    covering("cuda", "triton")
    return covering


MEASURED = "measured 1.30 x faster than cuda on NVIDIA H200, 2026-11-22"


def test_nothing_measured_is_the_default(kernels, backends_file):
    backends_file()
    assert dispatch.choose("softmax", a_call(512)) == ("cuda", "reasoned")
    # Measured on the H200 and called on another GPU: nothing is measured there.
    backends_file(on_h200(a_preference("triton", "cuda")))
    assert dispatch.choose("softmax", a_call(512, index=1)) == ("cuda", "reasoned")


def test_the_measured_order_decides_its_own_class(kernels, backends_file):
    backends_file(on_h200(a_preference("triton", "cuda", "torch")))
    assert dispatch.choose("softmax", a_call(1024)) == ("triton", MEASURED)
    assert dispatch.choose("softmax", a_call(1025)) == ("cuda", "reasoned")
    # The fastest that cannot run is passed over with the reason.
    kernels("cuda")
    reason = "the input is on cuda; not triton: triton can not"
    assert dispatch.choose("softmax", a_call(512)) == ("cuda", reason)


def test_pytorch_that_is_faster_runs_without_a_warning_and_what_is_left_over_with_one(kernels, backends_file):
    backends_file(on_h200(a_preference("torch", "triton")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("softmax", a_call(512)) == ("torch", MEASURED.replace("cuda", "triton"))
    # No kernel in front of PyTorch can run, nor does one take its place that nobody measured against it.
    backends_file(on_h200(a_preference("triton", "torch")))
    kernels("cuda")
    with pytest.warns(UserWarning, match="triton can not"):
        assert dispatch.choose("softmax", a_call(512)).backend == "torch"


def test_the_users_measurement_comes_first(kernels, backends_file):
    backends_file(on_h200(a_preference("triton", "cuda"), a_preference("triton", "cuda", width=4096)))
    users_file(backends={"softmax": [a_preference("torch", "cuda", ratio=2)]})
    choice = dispatch.choose("softmax", a_call(512))
    assert choice == ("torch", "measured 2.00 x faster than cuda on NVIDIA H200, 2026-11-23")
    assert dispatch.choose("softmax", a_call(4096)).backend == "triton"


def test_choices_are_traced(kernels, backends_file, monkeypatch):
    """torch.compile sees one graph, follows the table, and does not read files while it traces."""
    # A meta tensor stands in for the GPU's: it is the one that compiles here.
    monkeypatch.setattr(user, "identify", lambda device: H200)
    Call, Norm = operators.contract("softmax").Call, operators.contract("rms_norm").Call

    def chosen(x):
        dispatch.choose("rms_norm", Norm(x, None, None, 1e-6))
        choice = dispatch.choose("softmax", Call(x, -1, None, 1.0, None, False))
        return x.new_empty({"cuda": 1, "triton": 2, "torch": 3}[choice.backend])

    def found(*widths):
        torch._dynamo.reset()
        compiled = torch.compile(chosen, fullgraph=True, backend="eager")
        return [compiled(torch.empty(4, width, device="meta", dtype=torch.bfloat16)).shape[0] for width in widths]

    backends_file()
    assert found(512, 2000) == [1, 1]
    backends_file(on_h200(a_preference("triton", "cuda"), a_preference("torch", "cuda", width=4096)))
    users_file(backends={"rms_norm": [dict(bits=16, width=None, residual=False, order=["triton", "cuda"], ratio=2)]})
    assert found(512, 800, 2000, 3000, 5000) == [2, 2, 3, 3, 1]


# --- Architectures and variants -------------------------------------------------------------------------------------

KERNELS_FIRST, WGMMA_FIRST = ("cuda", "triton", "torch"), ("triton", "cuda", "torch")
CUDNN_FIRST = ("torch:cudnn", *WGMMA_FIRST)


@pytest.fixture
def a_gpu_of(monkeypatch):
    """a_gpu_of(9, 0): every GPU is one of compute capability 9.0, with kernels and cuDNN, that nobody measured."""
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "unavailable", lambda name, device: None)
    # The simulated tensors are of a subclass, which kernels cannot read: what is left is what a module covers.
    monkeypatch.setattr(dispatch, "_uncovered", lambda name, op, call: dispatch.load(name, op).unsupported(call))
    with FakeTensorMode():
        yield lambda *capability: simulate(monkeypatch, ("NVIDIA GPU that nobody measured", capability))


@pytest.mark.parametrize(
    "operator, capability, order",
    [
        ("attention", (8, 0), KERNELS_FIRST), ("attention", (9, 0), CUDNN_FIRST), ("attention", (10, 0), CUDNN_FIRST),
        ("attention", (12, 0), KERNELS_FIRST), ("int8_linear", (8, 6), KERNELS_FIRST),
        ("int8_linear", (9, 0), WGMMA_FIRST), ("int8_linear", (12, 0), KERNELS_FIRST),
        # Where memory is the limit no part has an order of its own.
        ("layer_norm", (9, 0), KERNELS_FIRST),
    ],
)  # fmt: skip
def test_the_default_order_is_the_architectures(a_gpu_of, operator, capability, order):
    gpu = a_gpu_of(*capability)
    preference = orders.default(operator, user.identify(gpu))
    assert preference.order == order
    # What `explain` says of a call is the first of that order, with its reason.
    assert gptkern.explain(*a_16_bit_call(operator)) == (order[0], preference.reason)


def a_16_bit_call(operator):
    """(twin, arguments…) of a call on the simulated GPU that every backend and variant covers."""
    x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    if operator == "int8_linear":
        return G.int8_linear, x, torch.ones(32, 64, device="cuda", dtype=torch.int8), torch.ones(32, device="cuda")
    if operator == "layer_norm":
        return G.layer_norm, x, (64,)
    return G.scaled_dot_product_attention, *(x.expand(1, 2, 4, 64) for _ in range(3))


def test_a_variant_that_cannot_run_is_passed_over_with_the_reason(a_gpu_of, monkeypatch):
    a_gpu_of(9, 0)
    attention, *tensors = a_16_bit_call("attention")
    choice = gptkern.explain(attention, *(tensor.float() for tensor in tensors))
    assert choice.backend == "triton" and "not torch:cudnn: the dtype is torch.float32; cuDNN's" in choice.reason
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    a_gpu_of(9, 0)
    assert gptkern.explain(attention, *tensors).backend == "triton"


def test_a_forced_variant(a_gpu_of):
    a_gpu_of(8, 0)
    with gptkern.backend("torch:cudnn"):
        with pytest.raises(gptkern.BackendError, match=r"layer_norm has no such variant; it has cuda, triton, torch$"):
            gptkern.explain(*a_16_bit_call("layer_norm"))
        with pytest.raises(gptkern.BackendError, match=r"from compute capability 9\.0 on, and this GPU has 8\.0"):
            gptkern.explain(*a_16_bit_call("attention"))
