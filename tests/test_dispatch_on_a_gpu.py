"""Which backend runs a call on a GPU, simulated: the automatic choice, several GPUs, and what is kept of a choice."""

from __future__ import annotations

import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from simulated_gpus import H200, simulate, users_file
from small_calls import PAIRS, a_call, operators
from torch._subclasses.fake_tensor import FakeTensorMode

import gptkern
import gptkern.functional as G
from gptkern import operators as rooms
from gptkern.backends import dispatch
from gptkern.backends.tables import orders
from gptkern.backends.triton import launching

# The tests start from the automatic choice, and from no warning given.
pytestmark = pytest.mark.usefixtures("automatic_choice")


@pytest.fixture
def a_gpu(monkeypatch):
    """A GPU of compute capability 9.0, of tensors that have shapes and a device and no memory."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launching, "missing", lambda: None)
    with FakeTensorMode():
        yield


# --- The automatic choice -------------------------------------------------------------------------------------------


@operators
def test_unable_on_a_gpu_warns_once_and_uses_pytorch(a_gpu, operator):
    # The simulated GPU's tensors are a tensor subclass, which kernels cannot read.
    call, twin = a_call(operator, "cuda"), PAIRS[operator][1]
    with pytest.warns(UserWarning, match=f"gptkern: {operator} runs on PyTorch's own operator") as caught:
        output = twin(*call)
        twin(*call)
    ours = [str(w.message) for w in caught if "gptkern" in str(w.message)]
    assert len(ours) == 1, "a warning is given once for a reason"
    assert "not triton: FakeTensor is a tensor subclass" in ours[0]
    assert output.shape == (() if operator == "cross_entropy" else call[0].shape)
    assert output.device.type == "cuda"


@operators
def test_an_old_gpu_gets_pytorch_with_the_reason(a_gpu, monkeypatch, operator):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.warns(UserWarning, match="compute capability 8.0 or newer and this GPU has 7.5"):
        PAIRS[operator][1](*a_call(operator, "cuda"))


def test_another_vendors_gpu_gets_pytorch_with_the_reason(a_gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.0")
    with pytest.warns(UserWarning, match="kernels are for NVIDIA GPUs"):
        G.softmax(*a_call("softmax", "cuda"))


def test_each_operator_and_each_reason_warns_for_itself(a_gpu, monkeypatch):
    with pytest.warns(UserWarning) as caught:
        G.softmax(*a_call("softmax", "cuda"))
        G.layer_norm(*a_call("layer_norm", "cuda"))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
        dispatch.forget_choices()
        G.softmax(*a_call("softmax", "cuda"))
    assert len([w for w in caught if "gptkern" in str(w.message)]) == 3


def test_the_warning_points_at_the_callers_line(a_gpu):
    with pytest.warns(UserWarning, match="gptkern") as caught:
        G.softmax(*a_call("softmax", "cuda"))
    assert caught[0].filename == __file__


def test_forced_pytorch_on_a_gpu_does_not_warn(a_gpu):
    with warnings.catch_warnings(), gptkern.backend("torch"):
        warnings.simplefilter("error")
        G.softmax(*a_call("softmax", "cuda"))


@pytest.fixture
def covered_by(a_gpu, monkeypatch):
    """covered_by("triton", …): these of the two kernel backends cover every softmax, the others none."""
    monkeypatch.setattr(dispatch, "unavailable", lambda name, device: None)
    # The simulated tensors are of a subclass, which kernels cannot read: what is left is what a module covers.
    monkeypatch.setattr(dispatch, "_uncovered", unsupported)

    def cover(*names):
        def module(name):
            return SimpleNamespace(unsupported=lambda call: None if name in names else f"{name} leaves this out")

        monkeypatch.setattr(dispatch, "_modules", {(name, "softmax"): module(name) for name in ("cuda", "triton")})

    return cover


def unsupported(name, operator, call):
    return dispatch.load(name, operator).unsupported(call)


def a_softmax(device="cuda"):
    """The record of a softmax."""
    return rooms.contract("softmax").Call(torch.randn(3, 8, device=device), -1, None, 1.0, None, False)


@pytest.mark.parametrize(
    "covering, expected",
    [
        (("cuda", "triton"), ("cuda", orders.default("softmax", None).reason)),
        (("triton",), ("triton", "the input is on cuda; not cuda: cuda leaves this out")),
        ((), ("torch", "not cuda: cuda leaves this out; not triton: triton leaves this out")),
    ],
    ids=["cuda first", "triton second", "neither"],
)
@pytest.mark.filterwarnings("ignore:gptkern")
def test_the_order_of_the_backends_on_a_gpu(covered_by, covering, expected):
    covered_by(*covering)
    assert dispatch.choose("softmax", a_softmax()) == expected


def test_a_forced_backend_that_does_not_cover_the_call_is_an_error_even_if_another_does(covered_by):
    covered_by("triton")
    with gptkern.backend("cuda"), pytest.raises(gptkern.BackendError, match="cuda leaves this out"):
        dispatch.choose("softmax", a_softmax())
    with gptkern.backend("triton"):
        assert dispatch.choose("softmax", a_softmax()).backend == "triton"


def test_attention_says_why_a_mask_runs_on_pytorch(a_gpu, monkeypatch):
    monkeypatch.setattr(dispatch, "_uncovered", unsupported)
    query, key, value = a_call("attention", "cuda")
    explain, attention = gptkern.explain, F.scaled_dot_product_attention
    assert explain(attention, query, key, value, is_causal=True).backend in ("triton", "cuda")
    dispatch._warned.clear()
    with pytest.warns(UserWarning, match="attn_mask"):
        choice = explain(attention, query, key, value, torch.ones(5, 5, device="cuda", requires_grad=True))
    assert choice.backend == "torch"
    assert "attn_mask" in choice.reason
    # What Triton's kernels have and the CUDA ones have not.
    for arguments in ({"attn_mask": torch.ones(5, 5, device="cuda")}, {"dropout_p": 0.1}):
        choice = explain(attention, query, key, value, **arguments)
        assert choice.backend == "triton"
        assert "not cuda: " in choice.reason


def test_a_masks_gradient_sends_softmax_to_pytorch(a_gpu, monkeypatch):
    monkeypatch.setattr(dispatch, "_uncovered", unsupported)
    input, mask = torch.randn(3, 8, device="cuda"), torch.randn(8, device="cuda", requires_grad=True)
    with pytest.warns(UserWarning, match="mask"):
        choice = gptkern.explain(G.softmax, input, -1, mask=mask)
    assert choice.backend == "torch"
    assert "mask" in choice.reason
    assert gptkern.explain(G.softmax, input, -1, mask=mask.detach()).backend in ("triton", "cuda")


# --- Two GPUs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch):
    """cuda:0 is an H200 and cuda:1 an older GPU, of tensors that have shapes and a device and no memory."""
    simulate(monkeypatch, ("NVIDIA H200", (9, 0)), ("Tesla T4", (7, 5)))
    with FakeTensorMode():
        yield
    dispatch.forget()


@operators
def test_each_gpu_is_asked_for_itself(two_gpus, operator):
    for _ in range(2):  # what is kept of one is not the other's
        for gpu, words in (("cuda:0", "FakeTensor is a tensor subclass"), ("cuda:1", "this GPU has 7.5")):
            dispatch._warned.clear()
            with pytest.warns(UserWarning, match="gptkern"):
                choice = gptkern.explain(PAIRS[operator][1], *a_call(operator, gpu))
            assert choice.backend == "torch"
            assert words in choice.reason


def of(gpu: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=f"cuda:{gpu}")


HEADS = (1, 2, 8, 8)
OF_TWO_GPUS = {
    "attention, key": lambda: G.scaled_dot_product_attention(of(0, *HEADS), of(1, *HEADS), of(0, *HEADS)),
    "attention, value": lambda: G.scaled_dot_product_attention(of(0, *HEADS), of(0, *HEADS), of(1, *HEADS)),
    "attention, attn_mask": lambda: G.scaled_dot_product_attention(*[of(0, *HEADS)] * 3, attn_mask=of(1, 8, 8)),
    "layer_norm, weight": lambda: G.layer_norm(of(0, 3, 8), (8,), of(1, 8)),
    "layer_norm, bias": lambda: G.layer_norm(of(0, 3, 8), (8,), of(0, 8), of(1, 8)),
    "rms_norm, weight": lambda: G.rms_norm(of(0, 3, 8), (8,), of(1, 8)),
    "softmax, mask": lambda: G.softmax(of(0, 3, 8), -1, mask=of(1, 8)),
    "rotary_embedding, cos": lambda: G.rotary_embedding(of(0, *HEADS), of(1, 8, 4), of(0, 8, 4)),
    "int8_linear, weight": lambda: G.int8_linear(of(0, 3, 8), of(1, 8, 8, dtype=torch.int8), of(0, 8)),
}


@pytest.mark.parametrize("name", OF_TWO_GPUS)
def test_tensors_of_two_gpus_are_refused(two_gpus, name):
    operator, argument = name.split(", ")
    with pytest.raises(RuntimeError, match=rf"{operator}.*{argument}.*cuda:1"):
        OF_TWO_GPUS[name]()


# --- What is kept of a choice -----------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What was asked of which GPU. All backends cover each softmax of up to 4096 columns; cuda:1 is an old GPU."""
    monkeypatch.setenv("GPTKERN_CACHE", str(tmp_path))
    simulate(monkeypatch, (H200.name, (9, 0)), ("Tesla T4", (7, 5)))
    questions = []

    def unavailable(name, device):
        questions.append((name, device.index))
        return "this GPU has 7.5" if device.index else None

    def covers(call):
        return "the row is long" if call.input.shape[-1] > 4096 else None

    monkeypatch.setattr(dispatch, "unavailable", unavailable)
    monkeypatch.setattr(dispatch, "_uncovered", unsupported)
    module = SimpleNamespace(unsupported=covers)
    monkeypatch.setattr(dispatch, "_modules", {(name, "softmax"): module for name in ("cuda", "triton")})
    with FakeTensorMode():
        yield questions
    dispatch.forget()


def chosen(width=8, gpu=0):
    return dispatch.choose("softmax", rooms.contract("softmax").Call(of(gpu, 3, width), -1, None, 1.0, None, False))


def test_a_gpu_is_asked_once(asked):
    reason = orders.default("softmax", H200).reason
    with dispatch.choices_made() as told:
        assert [chosen() for _ in range(3)] == [("cuda", reason)] * 3
    assert asked == [("cuda", 0)] and told == [("cuda", reason)] * 3
    dispatch.forget()
    assert chosen() == ("cuda", reason) and asked == [("cuda", 0)] * 2


@pytest.mark.filterwarnings("ignore:gptkern")
def test_each_call_is_looked_at_for_what_kernels_cover(asked):
    short, long = (
        ("cuda", orders.default("softmax", H200).reason),
        "not cuda: the row is long; not triton: the row is long",
    )
    for _ in range(2):
        assert chosen() == short
        assert chosen(5000) == ("torch", long)
    # And a first call that is not covered says nothing of the next.
    dispatch.forget()
    assert chosen(5000) == ("torch", long) and chosen() == short
    with gptkern.backend("triton"):
        assert chosen().backend == "triton"
        with pytest.raises(gptkern.BackendError, match="the row is long"):
            chosen(5000)


@pytest.mark.filterwarnings("ignore:gptkern")
def test_what_is_kept_of_one_gpu_is_not_the_others(asked):
    for _ in range(2):
        assert chosen(gpu=0).backend == "cuda"
        assert chosen(gpu=1) == ("torch", "not cuda: this GPU has 7.5; not triton: this GPU has 7.5")
    with gptkern.backend("cuda"):
        assert chosen(gpu=0).backend == "cuda"
        with pytest.raises(gptkern.BackendError, match=r"this GPU has 7\.5"):
            chosen(gpu=1)


def test_what_is_kept_outside_a_block_does_not_hold_inside_nor_the_other_way(asked):
    automatic, forced = chosen(), {}
    for _ in range(2):
        for name in ("triton", "cuda", "torch"):
            with gptkern.backend(name):
                forced[name] = chosen()
                with gptkern.backend(None):
                    assert chosen() == automatic
                assert chosen() == forced[name] == (name, "asked for by name")
            assert chosen() == automatic


def test_what_is_kept_in_one_threads_block_is_not_another_threads_choice(asked):
    inside, checked, found = threading.Event(), threading.Event(), []

    def force():
        with gptkern.backend("triton"):
            found.extend(chosen() for _ in range(2))
            inside.set()
            checked.wait(10)
            found.append(chosen())

    def plain():
        with FakeTensorMode():
            force()

    thread = threading.Thread(target=plain)
    thread.start()
    assert inside.wait(10)
    try:
        assert [chosen().backend for _ in range(2)] == ["cuda", "cuda"]
    finally:
        checked.set()
        thread.join()
    assert [choice.backend for choice in found] == ["triton"] * 3


def test_a_process_that_forces_a_backend_keeps_that(asked, monkeypatch):
    """As GPTKERN_BACKEND does, read at the import."""
    assert chosen().backend == "cuda"
    monkeypatch.setattr(dispatch, "_default", "triton")
    monkeypatch.setattr(dispatch._State, "forced", "triton")

    def in_a_new_thread():
        with FakeTensorMode():
            found.append(chosen())
            with gptkern.backend(None):
                found.append(chosen())
            found.append(chosen())

    found = []
    thread = threading.Thread(target=in_a_new_thread)
    thread.start()
    thread.join()
    assert [choice.backend for choice in found] == ["triton", "cuda", "triton"]


def test_what_is_measured_later_counts_from_then_on(asked):
    before = chosen(1024)
    assert chosen(2048) == before
    row = dict(bits=32, width=1024, last=True, fused=False, order=["triton", "cuda"], ratio=1.3, on="4x512")
    path = users_file(backends={"softmax": [row]})
    for _ in range(2):
        assert chosen(1024).backend == "triton" and "measured 1.30 x" in chosen(1024).reason
        # Of another class nothing was measured.
        assert chosen(2048) == before
    with gptkern.backend("cuda"):
        assert chosen(1024).backend == "cuda"
    path.unlink()
    dispatch.forget()
    assert chosen(1024) == before


def test_a_cpus_switches_are_read_at_each_call(monkeypatch):
    monkeypatch.setattr(dispatch, "_uncovered", lambda *_: None)
    call = rooms.contract("softmax").Call(torch.ones(3, 8), -1, None, 1.0, None, False)
    with gptkern.backend("triton"):
        for _ in range(2):
            monkeypatch.setenv("TRITON_INTERPRET", "1")
            assert dispatch.choose("softmax", call).backend == "triton"
            monkeypatch.delenv("TRITON_INTERPRET")
            with pytest.raises(gptkern.BackendError, match="TRITON_INTERPRET=1 is not set"):
                dispatch.choose("softmax", call)
