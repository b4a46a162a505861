"""Registration of records made up here: what writes in place, takes lists of tensors, or returns several."""

from __future__ import annotations

import types
from typing import NamedTuple

import pytest
import torch

import gptkern
from gptkern import operators as rooms
from gptkern.backends import dispatch, problem, registration
from gptkern.backends.registration import Operator, Written


class Step(NamedTuple):
    """p -= lr * g and m = g, of several tensors at once; a step that writes alone."""

    parameters: list[Written]
    gradients: list[torch.Tensor]
    momentum: Written | None
    lr: float
    clip: float | None
    count: int
    names: list[str]


class Plain(NamedTuple):
    input: torch.Tensor
    factor: float
    dtype: torch.dtype | None


class Gradient(NamedTuple):
    grad_output: torch.Tensor
    need_input: bool


def step(call: Step):
    for parameter, gradient in zip(call.parameters, call.gradients):
        size = gradient if call.clip is None else gradient.clamp(-call.clip, call.clip)
        parameter.sub_(call.lr * size)
    if call.momentum is not None:
        call.momentum.copy_(call.gradients[0])


@pytest.fixture
def operator(monkeypatch):
    """operator(name, record, …) -> the Operator, registered under a name that no other test has; its launchers are
    those in `of`."""
    of: dict[str, types.SimpleNamespace] = {}
    load, problem_of = dispatch.load, rooms.problem
    monkeypatch.setattr(dispatch, "load", lambda name, op: of[op] if op in of else load(name, op))
    classes = types.SimpleNamespace(classes=problem.Classes({"bits": problem.BITS}, lambda call: (16,)))
    monkeypatch.setattr(rooms, "problem", lambda name: classes if name in of else problem_of(name))

    def register(name, *arguments, **launchers):
        of[name] = types.SimpleNamespace(unsupported=lambda call: None, **launchers)
        for backend in ("cuda", "triton"):
            monkeypatch.setitem(dispatch._modules, (backend, name), of[name])
        return Operator(name, *arguments)

    return register


def schema(name):
    return str(getattr(torch.ops.gptkern, name).default._schema)


def test_the_schema_says_what_is_written_and_what_may_be_none(operator):
    operator("test_schema_step", Step, 0, lambda call: None, forward=step)
    assert schema("test_schema_step_forward") == (
        "gptkern::test_schema_step_forward(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)? momentum, "
        "float lr, float? clip, SymInt count, str[] names, str backend) -> ()"
    )
    fake = lambda call: (call.input, call.input)  # noqa: E731
    operator("test_schema_plain", Plain, 2, fake, Gradient, 1, lambda gradient, call: gradient.grad_output)
    assert schema("test_schema_plain_forward").endswith(
        "(Tensor input, float factor, ScalarType? dtype, str backend) -> (Tensor, Tensor)"
    )
    # A backward is not given what it does not read.
    assert schema("test_schema_plain_backward").endswith(
        "(Tensor grad_output, bool need_input, Tensor? input, float factor, ScalarType? dtype, str backend) -> Tensor"
    )


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_call_writes_in_place_and_returns_nothing(operator, clip):
    seen = []
    name = f"test_step_{clip is None}"
    of = operator(name, Step, 0, lambda call: None, forward=lambda call: seen.append(call) or step(call))
    parameters, gradients = [torch.ones(3), torch.ones(2, 2)], [torch.full((3,), 2.0), torch.full((2, 2), 4.0)]
    momentum, versions = torch.zeros(3), [parameter._version for parameter in parameters]
    assert of.forward(Step(parameters, gradients, momentum, 0.25, clip, 7, ["a", "b"]), "torch") is None
    (call,) = seen
    assert isinstance(call, Step) and (call.count, call.names, call.clip) == (7, ["a", "b"], clip)
    assert parameters[0].tolist() == [1 - 0.25 * (2 if clip is None else 0.5)] * 3
    assert parameters[1].tolist() == [[1 - 0.25 * (4 if clip is None else 0.5)] * 2] * 2
    assert momentum.tolist() == [2.0] * 3
    # Autograd and functionalisation are told that they changed, and that the others did not.
    assert all(parameter._version > before for parameter, before in zip(parameters, versions))
    assert gradients[0]._version == 0


def test_autograd_notices_what_a_kernel_writes(operator):
    """Of a launcher that PyTorch does not see writing, as it does not see a kernel."""

    def by_address(call):
        for parameter in (*call.parameters, *([] if call.momentum is None else [call.momentum])):
            parameter.numpy()[:] = 5.0

    of = operator("test_step_unseen", Step, 0, lambda call: None, forward=by_address)
    for place in ("parameters", "momentum"):
        weight, saved, other = torch.ones(3, requires_grad=True), torch.ones(3), torch.ones(3)
        loss = (weight * saved).sum()
        parameters, momentum = ([saved], other) if place == "parameters" else ([other], saved)
        of.forward(Step(parameters, [torch.ones(3)], momentum, 1.0, None, 1, []), "torch")
        assert saved.tolist() == [5.0] * 3
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    with torch.inference_mode():
        of.forward(Step([torch.ones(3)], [torch.ones(3)], None, 1.0, None, 1, []), "torch")


def test_what_is_written_is_seen_by_a_compiler(operator):
    of = operator("test_step_compiled", Step, 0, lambda call: None, forward=step)
    gradients = [torch.full((3,), 2.0)]

    def once(parameter):
        of.forward(Step([parameter], gradients, None, 0.5, None, 1, []), "torch")
        return parameter * 1

    torch._dynamo.reset()
    for function in (once, torch.compile(once, fullgraph=True, backend="aot_eager")):
        parameter = torch.ones(3)
        assert function(parameter).tolist() == [0.0] * 3 and parameter.tolist() == [0.0] * 3


def test_a_list_says_where_a_call_runs(operator, monkeypatch):
    """The device that is made current, and that the choice is for, is that of the list's tensors."""
    first = dispatch.first_tensor
    meta, cpu = torch.empty(3, device="meta"), torch.empty(3)
    assert first((1.0, [meta, cpu], cpu)) is meta and first(([], None, cpu)) is cpu
    with pytest.raises(ValueError, match="the call has no tensor"):
        first(([], None, 2))
    current = []
    monkeypatch.setattr(registration, "_is_elsewhere", lambda tensor: True)
    monkeypatch.setattr(registration, "on_device_of", lambda tensor: current.append(tensor) or torch.device("meta"))
    of = operator("test_step_device", Step, 0, lambda call: None, forward=lambda call: None)
    of.forward(Step([cpu], [cpu], None, 1.0, None, 1, []), "torch")
    assert current == [cpu] and current[0] is cpu


def test_the_choice_of_a_call_that_takes_lists(operator, monkeypatch):
    monkeypatch.setattr(dispatch, "unavailable", lambda name, device: None)
    operator("test_step_chosen", Step, 0, lambda call: None, forward=step)
    cpu, meta = torch.empty(3), torch.empty(3, device="meta")
    call = Step([cpu, cpu], [cpu, cpu], None, 1.0, None, 1, [])
    with gptkern.backend(None):
        assert dispatch.choose("test_step_chosen", call).backend == "torch"
        # Where something is able to run it, as on a GPU; a meta tensor stands in for the GPU's.
        all_meta = call._replace(parameters=[meta], gradients=[meta])
        assert dispatch.choose("test_step_chosen", all_meta).backend == "cuda"
    with gptkern.backend("triton"):
        assert dispatch.choose("test_step_chosen", call) == ("triton", "asked for by name")
        for mixed in (dict(gradients=[cpu, meta]), dict(parameters=[cpu, meta]), dict(momentum=meta)):
            with pytest.raises(gptkern.BackendError, match="tensors are on cpu and meta"):
                dispatch.choose("test_step_chosen", call._replace(**mixed))
        tagged = cpu.as_subclass(type("Tagged", (torch.Tensor,), {}))
        with pytest.raises(gptkern.BackendError, match="Tagged is a tensor subclass"):
            dispatch.choose("test_step_chosen", call._replace(gradients=[cpu, tagged]))


def test_two_fields_of_one_name_are_an_error(operator):
    class Twice(NamedTuple):
        grad_output: torch.Tensor
        factor: float

    with pytest.raises(
        TypeError, match="fields are grad_output, factor, input, factor, dtype; each needs a name of its"
    ):
        operator("test_twice", Plain, 1, lambda call: call.input, Twice, 1, lambda gradient, call: call.input)


@pytest.mark.parametrize("hint", [set, dict[str, int], complex, int | float | None, list[set]], ids=str)
def test_a_field_that_no_schema_knows_is_an_error(hint):
    with pytest.raises(TypeError, match=r"odd is .*; a registered op takes "):
        list(registration.schema_of([NamedTuple("Odd", [("odd", hint)])]))


def test_a_backward_writes_none_of_the_calls_tensors():
    class Step(NamedTuple):
        parameter: registration.Written
        state: list[registration.Written]

    class Both(NamedTuple):
        gradient: registration.Written

    arguments = list(registration.schema_of([Both, Step], read_only=Step))
    assert arguments == ["Tensor(a!) gradient", "Tensor? parameter", "Tensor[] state"]
    assert list(registration.schema_of([Both, Step])) == [
        "Tensor(a!) gradient", "Tensor(b!) parameter", "Tensor(c!)[] state",
    ]  # fmt: skip


def test_no_field_is_called_backend():
    class Named(NamedTuple):
        input: torch.Tensor
        backend: str

    with pytest.raises(TypeError, match="none is `backend`"):
        registration.Operator("test_named", Named, 1, lambda call: call.input)
