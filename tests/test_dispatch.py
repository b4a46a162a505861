"""Which backend runs a call: forced, automatic and unable, explained, warned of once, and restored."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from small_calls import PAIRS, a_call, operators

import gptkern
import gptkern.functional as G
from gptkern.backends import dispatch

# The tests start from the automatic choice, and from no warning given.
pytestmark = pytest.mark.usefixtures("automatic_choice")


def in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key not in ("GPTKERN_BACKEND", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(code)],
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )


# --- Forced ---------------------------------------------------------------------------------------------------------


@operators
def test_a_forced_backend_runs_the_call(backend, device, operator):
    choice = gptkern.explain(PAIRS[operator][1], *a_call(operator, device, backend))
    assert choice == (backend, "asked for by name")


def test_backends_nest_and_restore(device):
    call = a_call("softmax", device)

    def backend_now():
        return gptkern.explain(G.softmax, *call).backend

    with gptkern.backend("torch"):
        assert backend_now() == "torch"
        with gptkern.backend("triton"):
            assert backend_now() == "triton"
            with gptkern.backend(None):
                assert gptkern.explain(G.softmax, *call).reason != "asked for by name"
            assert backend_now() == "triton"
        assert gptkern.explain(G.softmax, *call) == ("torch", "asked for by name")
    assert gptkern.explain(G.softmax, *call).reason != "asked for by name"


def test_an_exception_restores_the_choice_before(device):
    call = a_call("softmax", device)
    with gptkern.backend("torch"):
        with pytest.raises(ZeroDivisionError), gptkern.backend("triton"):
            raise ZeroDivisionError
        assert gptkern.explain(G.softmax, *call) == ("torch", "asked for by name")
        with pytest.raises(IndexError), gptkern.backend("triton"):
            G.softmax(call[0], 5)
        assert gptkern.explain(G.softmax, *call) == ("torch", "asked for by name")
    assert gptkern.explain(G.softmax, *call).reason != "asked for by name"


@pytest.mark.parametrize("name", ["cpu", "Triton", "", 3, b"torch"], ids=repr)
def test_a_name_that_is_no_backend(name):
    with pytest.raises(ValueError, match="'cuda', 'triton', 'torch'") as raised, gptkern.backend(name):
        raise AssertionError("the block must not run")
    assert repr(name) in str(raised.value)


@operators
def test_forced_and_unable_says_why(monkeypatch, operator):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with gptkern.backend("triton"), pytest.raises(gptkern.BackendError) as raised:
        PAIRS[operator][1](*a_call(operator))
    message = str(raised.value)
    for words in ("'triton'", operator, "the input is on the CPU", "TRITON_INTERPRET=1 is not set"):
        assert words in message


@pytest.fixture
def nothing_looked_up():
    """What is installed is looked up once a process; here it is looked up anew, and again afterwards."""
    dispatch._installed.cache_clear()
    yield
    dispatch._installed.cache_clear()


def test_forced_and_not_installed_says_so(monkeypatch, nothing_looked_up):
    found = dispatch.importlib.util.find_spec
    monkeypatch.setattr(
        dispatch.importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else found(name, *rest)
    )
    with gptkern.backend("triton"), pytest.raises(gptkern.BackendError, match="triton is not installed"):
        G.softmax(*a_call("softmax"))


def test_forced_and_not_built_says_so(monkeypatch):
    from gptkern.backends.cuda import common

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(common, "unavailable", lambda index: "there are no CUDA kernels in this build")
    assert dispatch.unavailable("cuda", torch.device("cuda", 0)) == "there are no CUDA kernels in this build"
    monkeypatch.delenv("GPTKERN_EMULATE_CUDA", raising=False)
    with gptkern.backend("cuda"), pytest.raises(gptkern.BackendError, match="GPTKERN_EMULATE_CUDA=1 is not set"):
        G.softmax(*a_call("softmax"))


def test_forced_and_emulated_without_a_compiler_says_so(monkeypatch):
    from gptkern.backends.cuda import emulated

    monkeypatch.setenv("GPTKERN_EMULATE_CUDA", "1")
    monkeypatch.setattr(dispatch, "_emulator_missing", lambda: emulated.missing())
    monkeypatch.setattr(emulated, "compiler", lambda: None)
    monkeypatch.setenv("CXX", "/nonexistent")
    with (
        gptkern.backend("cuda"),
        pytest.raises(gptkern.BackendError, match="CXX is '/nonexistent', which is not found"),
    ):
        G.softmax(*a_call("softmax", "cpu"))


def test_forced_and_a_module_that_does_not_import_says_what_failed(monkeypatch):
    def load(name, operator):
        raise ImportError("libsomething.so: cannot open")

    monkeypatch.setattr(dispatch, "load", load)
    with gptkern.backend("triton"), pytest.raises(gptkern.BackendError, match=r"ImportError: libsomething\.so"):
        G.softmax(*a_call("softmax", "cpu"))


def test_a_backend_error_is_a_runtime_error():
    assert issubclass(gptkern.BackendError, RuntimeError)


@operators
def test_forced_and_given_a_tensor_subclass(kernel_backend, device, operator):
    class Tagged(torch.Tensor):
        pass

    call = a_call(operator, device)
    call = (call[0].as_subclass(Tagged), *call[1:])
    with pytest.raises(gptkern.BackendError, match="Tagged is a tensor subclass"):
        PAIRS[operator][1](*call)


@operators
def test_a_parameter_is_no_foreign_subclass(kernel_backend, device, operator):
    call = a_call(operator, device, kernel_backend)
    choice = gptkern.explain(PAIRS[operator][1], torch.nn.Parameter(call[0]), *call[1:])
    assert choice.backend == kernel_backend


# --- GPTKERN_BACKEND ------------------------------------------------------------------------------------------------

# Each of these tests starts a process of its own, which imports torch: they ask several things of it.


def test_the_environment_forces_every_thread_and_the_block_still_wins():
    code = """
        import threading, torch, gptkern
        def show():
            print(*gptkern.explain(torch.nn.functional.softmax, torch.ones(2, 3), -1))
        show()
        thread = threading.Thread(target=show); thread.start(); thread.join()
        with gptkern.backend(None):
            show()
        show()
    """
    forced = "triton asked for by name"
    run = in_a_new_process(code, GPTKERN_BACKEND="triton", TRITON_INTERPRET="1")
    assert run.stdout.splitlines() == [forced, forced, "torch the input is on the CPU", forced], run.stderr


@pytest.mark.deep
def test_a_bad_value_in_the_environment_fails_at_import():
    run = in_a_new_process("import gptkern", GPTKERN_BACKEND="metal")
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: GPTKERN_BACKEND got 'metal'; it needs one of 'cuda', 'triton', 'torch'")


def test_an_empty_environment_variable_is_the_automatic_choice_and_the_import_is_light():
    code = """
        import sys, torch
        before = set(sys.modules)
        import gptkern
        print(*(name for name in ("triton", "torch._dynamo") if name in sys.modules and name not in before))
        print(torch.cuda.is_initialized())
        print(*gptkern.explain(torch.nn.functional.softmax, torch.ones(2, 3), -1))
    """
    run = in_a_new_process(code, GPTKERN_BACKEND="")
    assert run.stdout.splitlines() == ["", "False", "torch the input is on the CPU"], run.stderr


# --- The automatic choice -------------------------------------------------------------------------------------------


@operators
def test_the_cpu_gets_pytorch_without_a_warning(operator):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PAIRS[operator][1](*a_call(operator))
        choice = gptkern.explain(PAIRS[operator][1], *a_call(operator))
    assert choice == ("torch", "the input is on the CPU")


@operators
def test_meta_tensors_get_pytorch_without_a_warning(operator):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = PAIRS[operator][1](*a_call(operator, "meta"))
        choice = gptkern.explain(PAIRS[operator][1], *a_call(operator, "meta"))
    assert output.device.type == "meta"
    assert choice.backend == "torch"
    assert "meta" in choice.reason


# --- Threads --------------------------------------------------------------------------------------------------------


def in_a_thread(function):
    """The result of function(), called in another thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_a_forced_backend_is_this_threads_alone():
    def choice():
        return gptkern.explain(G.softmax, *a_call("softmax")).reason

    with gptkern.backend("torch"):
        assert choice() == "asked for by name"
        assert in_a_thread(choice) == "the input is on the CPU"


def test_a_thread_does_not_change_the_others():
    inside, checked = threading.Event(), threading.Event()

    def force():
        with gptkern.backend("torch"):
            inside.set()
            checked.wait(10)

    thread = threading.Thread(target=force)
    thread.start()
    assert inside.wait(10)
    try:
        assert gptkern.explain(G.softmax, *a_call("softmax")).reason == "the input is on the CPU"
    finally:
        checked.set()
        thread.join()


def test_the_backward_uses_the_forwards_backend_outside_the_block(kernel_backend, device):
    input = torch.randn(3, 8, device=device, requires_grad=True)
    output = G.softmax(input, -1)
    with gptkern.backend("torch"):
        output.sum().backward()
    assert input.grad.abs().max() < 1e-6


# --- torch.compile --------------------------------------------------------------------------------------------------


def test_compiled_code_follows_the_forced_backend(device, monkeypatch):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: G.layer_norm(x, (8,)), fullgraph=True, backend="aot_eager")
    kernels = dispatch.load("triton", "layer_norm")
    launched = []
    forward = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *call: launched.append(1) or forward(*call))
    input = torch.randn(3, 8, device=device)
    counts = []
    for name in ("torch", "triton", "torch", "triton"):
        with gptkern.backend(name):
            torch.testing.assert_close(compiled(input), F.layer_norm(input, (8,)))
        counts.append(len(launched))
    assert counts == [0, 1, 1, 2]


def test_compiled_code_follows_the_block_that_is_still_open(monkeypatch):
    """Blocks of two threads end out of order: that of the thread which began first, first."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: G.layer_norm(x, (8,)), fullgraph=True, backend="eager")
    input = torch.randn(3, 8)
    begun, end = threading.Event(), threading.Event()

    def first():
        with gptkern.backend("triton"):
            begun.set()
            end.wait(10)

    launchers, launched = dispatch.load("torch:launchers", "layer_norm"), []
    forward = launchers.forward
    monkeypatch.setattr(launchers, "forward", lambda *call: launched.append(1) or forward(*call))
    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(10)
    with gptkern.backend("torch:launchers"):
        end.set()
        thread.join()
        compiled(input)
        assert launched == [1]
    compiled(input)
    assert launched == [1]
