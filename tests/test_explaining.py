"""gptkern.explain of a whole model, and the backends in the reports of swap and unswap."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import gptkern
from gptkern.models import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("automatic_choice")

TOKENS = torch.arange(6)[None]


def gpt(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=11, context=8, layers=2, heads=2, width=16, **changes))


class Weighs(torch.nn.Module):
    """Two operators in one forward, a buffer, a random number and a branch that is seldom taken."""

    def __init__(self):
        super().__init__()
        self.norm, self.unused = torch.nn.LayerNorm(4), torch.nn.LayerNorm(4)
        self.batch_norm = torch.nn.BatchNorm1d(4)

    def forward(this, x, often=True):
        if not often:
            this.unused(x)
        x = this.batch_norm(this.norm(x)) + torch.randn(4)
        return F.softmax(F.layer_norm(x, (4,)), -1)


def test_a_model_is_explained_module_by_module():
    model = gpt()
    gptkern.swap(model)
    calls = gptkern.explain(model, TOKENS).calls
    block = [
        ("attention_norm", "layer_norm"), ("attention", "attention"), ("perceptron_norm", "layer_norm"),
        ("perceptron.activation", "nonlinearity"),
    ]  # fmt: skip
    blocks = [(f"blocks.{index}.{name}", operator) for index in range(2) for name, operator in block]
    assert [(call.name, call.operator) for call in calls] == [*blocks, ("final_norm", "layer_norm")]
    assert {call[3:] for call in calls} == {("torch", "the input is on the CPU")}
    text = str(gptkern.explain(model, TOKENS))
    assert "blocks.{0-1}.attention_norm, blocks.{0-1}.perceptron_norm, final_norm" in text and "LayerNorm" in text


def test_two_operators_of_one_module_and_what_is_not_reached():
    model = Weighs()
    gptkern.swap(model)
    calls = gptkern.explain(model, torch.randn(3, 4)).calls
    assert [call[:3] for call in calls] == [
        ("norm", "LayerNorm", "layer_norm"), ("(model)", "Weighs", "layer_norm"), ("(model)", "Weighs", "softmax"),
    ]  # fmt: skip
    names = [call.name for call in gptkern.explain(model, torch.randn(3, 4), often=False).calls]
    assert names == ["unused", "norm", "(model)", "(model)"]


def test_each_reason_of_a_module_stands_in_the_report():
    norm = gptkern.nn.LayerNorm(4)

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            with gptkern.backend("torch"):
                x = self.norm(x)
            return self.norm(self.norm(x))

    reasons = [call.reason for call in gptkern.explain(Twice(), torch.randn(3, 4)).calls]
    assert reasons == ["asked for by name", "the input is on the CPU"]


def test_explaining_a_model_changes_nothing():
    model = Weighs()
    gptkern.swap(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator, x = torch.get_rng_state(), torch.randn(3, 4, requires_grad=True)
    torch.set_rng_state(generator)
    classes = [type(module) for module in model.modules()]
    gptkern.explain(model, x)
    assert torch.equal(torch.get_rng_state(), generator) and x.grad is None and torch.is_grad_enabled()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [type(module) for module in model.modules()] == classes and model.training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError):
        gptkern.explain(model, torch.randn(3, 5))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_stock_model_calls_nothing_of_gptkern():
    report = gptkern.explain(gpt(), TOKENS)
    assert report.calls == [] and "gptkern.swap(model)" in str(report)


def test_a_compiled_model_is_explained_as_it_is_without_compilation():
    model = gpt()
    gptkern.swap(model)
    compiled = torch.compile(model, backend="eager")
    compiled(TOKENS)
    calls = gptkern.explain(compiled, TOKENS).calls
    assert len(calls) == 9 and calls[0].operator == "layer_norm"


def test_a_forced_backend_that_cannot_is_its_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = gpt()
    gptkern.swap(model)
    with gptkern.backend("triton"), pytest.raises(gptkern.BackendError, match="TRITON_INTERPRET=1 is not set"):
        gptkern.explain(model, TOKENS)


@pytest.mark.parametrize("device", ["meta", "lazy"])
def test_a_model_without_its_parameters_cannot_run(device):
    model = torch.nn.LazyLinear(3) if device == "lazy" else torch.nn.Linear(2, 3, device="meta")
    with pytest.raises(ValueError, match="explain: weight of the model is"):
        gptkern.explain(model, torch.randn(2, 2))


def test_the_report_of_a_swap_says_what_would_run(monkeypatch):
    report = gptkern.swap(gpt())
    assert {(entry.backend, entry.reason) for entry in report.replaced} == {("torch", "the model is on the CPU")}
    assert "runs on" in str(report) and "torch: the model is on the CPU" in str(report)
    with gptkern.backend("torch"):
        assert {entry.reason for entry in gptkern.swap(gpt()).replaced} == {"asked for by name"}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with gptkern.backend("triton"):
        report = gptkern.swap(gpt())
    assert {entry.backend for entry in report.replaced} == {"triton"}
    assert all("TRITON_INTERPRET=1 is not set" in entry.reason for entry in report.replaced)


def test_the_report_of_a_swap_on_a_gpu_names_the_first_backend_that_is_there(kernel_backend, device):
    with gptkern.backend(kernel_backend):
        report = gptkern.swap(gpt().to(device))
    assert {(entry.backend, entry.reason) for entry in report.replaced} == {(kernel_backend, "asked for by name")}


def test_unswap_reports_what_it_restored():
    model = gpt()
    gptkern.swap(model)
    report = gptkern.unswap(model)
    assert repr(report) == "UnswapReport(12 restored)"
    assert [tuple(entry) for entry in report.restored][:4] == [
        ("(model)", "GPT"), ("blocks.0", "Block"),
        ("blocks.0.attention_norm", "LayerNorm"), ("blocks.0.attention", "Attention"),
    ]  # fmt: skip
    assert str(report).startswith("12 modules restored") and "blocks.{0-1}.attention" in str(report)
    assert str(gptkern.unswap(model)) == "0 modules restored"


class KeepsBuffers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(3, 3))
        for name in ("rebound", "resized", "written"):
            self.register_buffer(name, torch.zeros(2))
        self.register_buffer("expanded", torch.ones(1).expand(3))

    def forward(self, x):
        self.rebound = self.rebound + 1
        self.resized.resize_(4).fill_(1)
        self.written.add_(1)
        self.register_buffer("new", torch.zeros(1))
        return F.scaled_dot_product_attention(x, x, x, self.bias)


def test_buffers_are_as_they_were_whatever_a_forward_does_with_them():
    model = KeepsBuffers()
    gptkern.swap(model)
    before = dict(model.named_buffers())
    gptkern.explain(model, torch.randn(1, 1, 3, 8))
    after = dict(model.named_buffers())
    assert list(after) == list(before) and all(after[name] is tensor for name, tensor in before.items())
    assert [tensor.tolist() for tensor in after.values()] == [[0, 0], [0, 0], [0, 0], [1, 1, 1]]


def test_a_parameter_among_the_arguments_is_seen_as_in_training(triton_backend):
    model = KeepsBuffers()
    gptkern.swap(model)
    with gptkern.backend("triton"):
        with pytest.raises(gptkern.BackendError, match="attn_mask requires"):
            gptkern.explain(model, torch.randn(1, 1, 3, 8))
        with torch.no_grad():
            (call,) = gptkern.explain(model, torch.randn(1, 1, 3, 8)).calls
    assert (call.operator, call.backend) == ("attention", "triton")


def test_what_runs_in_another_thread_is_not_claimed_to_run_on_pytorch():
    assert "in this thread" in str(gptkern.explain(torch.nn.Linear(2, 2), torch.randn(1, 2)))


def test_what_was_not_written_can_still_be_differentiated():
    class Scales(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor([1.0, float("nan")]))

        def forward(self, x):
            return torch.softmax(x * self.scale[:1], -1)

    model, x = Scales(), torch.randn(2, 3, requires_grad=True)
    gptkern.swap(model)
    y = model(x)
    gptkern.explain(model, x)
    y.sum().backward()
    assert x.grad is not None
    with torch.inference_mode():
        frozen = Scales()
        gptkern.swap(frozen)
        assert len(gptkern.explain(frozen, torch.randn(2, 3)).calls) == 1


def test_int8_weights_are_not_copied(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64))
    gptkern.quantize(model)
    copied, clone = [], torch.Tensor.clone
    monkeypatch.setattr(
        torch.Tensor, "clone", lambda tensor, *args: copied.append(tensor.numel()) or clone(tensor, *args)
    )
    gptkern.explain(model, torch.randn(3, 64))
    assert max(copied) == 64
