"""Where the tests run: on the GPU where there is one, else on the CPU, with interpreted and emulated kernels.

TRITON_INTERPRET is read when a kernel's module is first imported, so it is set before anything else.
"""

from __future__ import annotations

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["GPTKERN_EMULATE_CUDA"] = "1"

import contextlib
import importlib.util
import math

import pytest
from hypothesis import HealthCheck, settings

import gptkern
from gptkern.backends import dispatch

# Interpreted kernels are slow and their time says nothing; examples are derandomised so that CI repeats.
settings.register_profile(
    "gptkern", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], max_examples=20
)
settings.load_profile("gptkern")

# Two workers on two cores: more threads each would only wait for one another.
torch.set_num_threads(1)


def _no_cuda() -> str | None:
    """Why the cuda backend cannot run here."""
    if DEVICE == "cuda":
        from gptkern.backends.cuda import common

        return common.unavailable(0)
    from gptkern.backends.cuda import emulated

    return emulated.missing()


_NO_CUDA = _no_cuda()

KERNEL_BACKENDS = [
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    ),
    pytest.param("cuda", marks=pytest.mark.skipif(_NO_CUDA is not None, reason=_NO_CUDA or "")),
]


@pytest.fixture
def device() -> str:
    return DEVICE


@contextlib.contextmanager
def _forced(name, test):
    """The backend is forced; kernels that touch memory outside of their tensors raise."""
    with contextlib.ExitStack() as stack:
        if name == "triton" and DEVICE == "cpu":
            from bounds import inside_bounds

            stack.enter_context(inside_bounds())
        if name == "cuda" and DEVICE == "cpu":
            import emulation

            emulation.schedule_of(test)
            stack.enter_context(emulation.inside_bounds())
        stack.enter_context(gptkern.backend(name))
        yield


@pytest.fixture(params=["torch", *KERNEL_BACKENDS])
def backend(request):
    """The name of a backend, which is forced while the test runs."""
    with _forced(request.param, request.node.nodeid):
        yield request.param


@pytest.fixture(params=KERNEL_BACKENDS)
def kernel_backend(request):
    """As `backend`, without PyTorch: for what only kernels have to get right."""
    with _forced(request.param, request.node.nodeid):
        yield request.param


@pytest.fixture(params=KERNEL_BACKENDS[:1])
def triton_backend(request):
    """For what Triton's kernels alone have: tiles and limits that a test can set."""
    with _forced(request.param, request.node.nodeid):
        yield request.param


@pytest.fixture(params=["torch", *KERNEL_BACKENDS[:1]])
def plain_or_triton(request):
    """As `backend`, of an operator that CUDA C++ has not."""
    with _forced(request.param, request.node.nodeid):
        yield request.param


@pytest.fixture(params=KERNEL_BACKENDS[1:])
def cuda_backend(request):
    """For shapes that are sharp for the CUDA kernels' fixed tiles alone."""
    with _forced(request.param, request.node.nodeid):
        yield request.param


@pytest.fixture
def automatic_choice():
    """The test starts from the automatic choice of a backend, and from no warning given."""
    warned = set(dispatch._warned)
    dispatch._warned.clear()
    with gptkern.backend(None):
        yield
    dispatch._warned.clear()
    dispatch._warned.update(warned)


@pytest.fixture(autouse=True, scope="session")
def _products_are_tried():
    """What a machine too busy for a trial runs meanwhile may round otherwise: two calls of a test must not differ."""
    from gptkern.operators.int8_linear import products

    products.bfloat16_trial(math.inf)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _gpus_are_asked_anew():
    """What one test finds out about GPUs, which it may simulate, is not the next one's."""
    dispatch.forget_choices()


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN (the largest integer): a kernel that does not write all of its output shows it."""
    was_on, was_warning = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(4).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=was_warning)
        torch.utils.deterministic.fill_uninitialized_memory = was_filling


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current one, with a text to train on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("A kernel runs on the device; an operator is what it computes.\n" * 40)
    return tmp_path
