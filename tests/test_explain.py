"""gptkern.explain: the backend of a call and the reason for it, without running it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_calls import PAIRS, a_call, operators

import gptkern
import gptkern.functional as G
from gptkern.backends import dispatch

# The tests start from the automatic choice, and from no warning given.
pytestmark = pytest.mark.usefixtures("automatic_choice")


@operators
def test_explain_takes_the_twin_or_pytorchs_function(operator):
    pytorchs, twin = PAIRS[operator]
    assert gptkern.explain(pytorchs, *a_call(operator)) == gptkern.explain(twin, *a_call(operator))
    choice = gptkern.explain(pytorchs, *a_call(operator))
    assert (choice.backend, choice.reason) == tuple(choice)


@operators
def test_explain_runs_nothing(backend, device, monkeypatch, operator):
    call = a_call(operator, device, backend)

    def never(*arguments):
        raise AssertionError("explain ran a launcher")

    monkeypatch.setattr(dispatch.load(backend, operator), "forward", never)
    assert gptkern.explain(PAIRS[operator][1], *call).backend == backend


def test_explain_takes_keywords():
    assert gptkern.explain(F.softmax, input=torch.ones(2, 3), dim=1).backend == "torch"


@pytest.mark.parametrize(
    "function", [F.relu, torch.tanh, len, torch.nn.Softmax, print], ids=["relu", "tanh", "len", "Softmax", "print"]
)
def test_explain_of_another_function_is_a_value_error(function):
    with pytest.raises(ValueError, match="explain: function is"):
        gptkern.explain(function, torch.ones(3))


def test_explain_of_what_chooses_no_backend_is_a_value_error():
    with pytest.raises(ValueError, match="explain"):
        gptkern.explain(dispatch.twin_of)


@operators
def test_explain_raises_what_the_call_would_raise(kernel_backend, device, operator):
    call = (a_call(operator, device)[0].long(), *a_call(operator, device)[1:])
    with pytest.raises(RuntimeError) as raised:
        gptkern.explain(PAIRS[operator][1], *call)
    assert not isinstance(raised.value, gptkern.BackendError)


def test_after_explain_and_after_its_error_calls_run(kernel_backend, device):
    call = a_call("softmax", device)
    gptkern.explain(G.softmax, *call)
    assert G.softmax(*call).shape == call[0].shape
    with pytest.raises(IndexError):
        gptkern.explain(G.softmax, call[0], 5)
    assert G.softmax(*call).shape == call[0].shape


def test_explain_when_forced_and_unable_is_a_backend_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with gptkern.backend("triton"), pytest.raises(gptkern.BackendError, match="TRITON_INTERPRET=1 is not set"):
        gptkern.explain(F.softmax, *a_call("softmax"))
