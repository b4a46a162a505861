"""swap of activations, and of products with them: what is found, what it computes, and what is left as it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from swapped_models import batch, gpt
from torch import nn

import gptkern
from gptkern.operators.nonlinearity import contract

WIDTH = 8


class Gated(nn.Module):
    """What an MLP of a Llama, or of a model that writes it in its own way, holds."""

    def __init__(self, act=None):
        super().__init__()
        torch.manual_seed(1)
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.both, self.act, self.scale = nn.Linear(WIDTH, 2 * WIDTH), act or nn.SiLU(), 2.0


class First(Gated):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Last(Gated):
    def forward(self, x):
        hidden = self.up(x) * self.act(self.gate(x))
        return self.down(hidden)


class Packed(Gated):
    def forward(self, x):
        both = self.both(x)
        gate, both = both.chunk(2, dim=-1)
        both = both * self.act(gate)
        return self.down(both)


class PackedOtherwise(Gated):
    """The second half is activated: no packed product, but one of two halves."""

    def forward(self, x):
        up, gate = self.both(x).chunk(2, -1)
        return self.down(self.act(gate) * up)


class Scaled(Gated):
    """The gate is another one by the time of the product."""

    def forward(self, x):
        gate, up = self.both(x).chunk(2, -1)
        gate = gate * self.scale
        return self.down(self.act(gate) * up)


class WithFunctions(Gated):
    def forward(self, x):
        hidden = F.silu(self.gate(x)) * self.up(x)
        hidden = nn.functional.gelu(hidden, approximate="tanh") * self.up(x)
        return self.down(self.up(x) * F.gelu(hidden))


class InALoop(Gated):
    def forward(self, x):
        for _ in range(2):
            gate, up = self.both(x).chunk(2, dim=-1)
            x = self.act(gate) * up
        return sum(self.act(gate) * up for gate, up in [(x, x)])


class Hooked(Gated):
    """What a half's gradient is can be changed, or seen: it has to reach the half."""

    def forward(self, x):
        gate, up = self.both(x).chunk(2, -1)
        up.register_hook(lambda gradient: gradient * 2)
        return self.down(self.act(gate) * up)


class Kept(Gated):
    def forward(self, x):
        gate, up = self.both(x).chunk(2, -1)
        hidden = self.act(gate) * up
        if gate.requires_grad:
            gate.register_hook(lambda gradient: gradient * 3)
        return self.down(hidden)


class Captured(Gated):
    def forward(self, x):
        def tripled():
            up.register_hook(lambda gradient: gradient * 3)

        gate, up = self.both(x).chunk(2, -1)
        tripled()
        return self.down(self.act(gate) * up)


class ReadInTheNextRound(Gated):
    def forward(self, x):
        up = x * 1
        for _ in range(2):
            up.register_hook(lambda gradient: gradient * 2)
            gate, up = self.both(x).chunk(2, dim=-1)
            x = self.act(gate) * up
        return x


class NamedBefore(Gated):
    def forward(self, x):
        x = self.both(x)
        gate, x = x.chunk(2, -1)
        return self.down(self.act(gate) * x)


@pytest.fixture
def calls(monkeypatch):
    """The function, packed or not, of each call of the operator."""
    seen = []
    applied = contract._applied

    def noting(name, call, *rest):
        seen.append((name, call.packed))
        return applied(name, call, *rest)

    monkeypatch.setattr(contract, "_applied", noting)
    return seen


def results(model, x):
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (First, [("swiglu", False)]),
        (Last, [("swiglu", False)]),
        (Packed, [("swiglu", True)]),
        (PackedOtherwise, [("swiglu", False)]),
        (Scaled, [("swiglu", False)]),
        (WithFunctions, [("swiglu", False), ("geglu", False), ("geglu", False)]),
        (InALoop, [("swiglu", True)] * 2),
        (Hooked, [("swiglu", False)]),
        (Kept, [("swiglu", False)]),
        (Captured, [("swiglu", False)]),
        (ReadInTheNextRound, [("swiglu", False)] * 2),
        (NamedBefore, [("swiglu", True)]),
    ],
)
def test_products(cls, expected, calls):
    model, x = cls(), torch.randn(3, 5, WIDTH)
    wanted = results(model, x)
    report = gptkern.swap(model)
    assert {entry.operator for entry in report.replaced} == {"nonlinearity"} and report.skipped == []
    actual = results(model, x)
    assert [call for call in calls if call[0] != "silu"] == expected
    for ours, theirs in zip(actual, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gptkern.unswap(model)
    assert type(model) is cls
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results(model, x), wanted))


@pytest.mark.parametrize(
    ("act", "name"),
    [(nn.SiLU(), "swiglu"), (nn.GELU(), "geglu"), (nn.GELU("tanh"), "geglu"), (nn.Tanh(), None), (nn.ReLU(), None),
     (nn.SiLU(inplace=True), None), (gptkern.nn.GELU("tanh"), "geglu")],
)  # fmt: skip
def test_what_is_asked_of_the_activation(act, name, calls):
    model, x = First(act), torch.randn(3, WIDTH)
    wanted = results(model, x)
    report = gptkern.swap(model)
    assert any(entry.name == "(model)" for entry in report.replaced) == (name is not None)
    for ours, theirs in zip(results(model, x), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert [found for found, _ in calls if found.endswith("glu")] == ([name] if name else [])


def test_an_activation_that_was_exchanged_or_has_a_hook_is_called(calls):
    model, x = First(), torch.randn(3, WIDTH)
    gptkern.swap(model)
    seen = []
    hook = model.act.register_forward_hook(lambda *parts: seen.append(parts))
    model(x)
    assert len(seen) == 1 and ("swiglu", False) not in calls
    hook.remove()
    model(x)
    assert ("swiglu", False) in calls
    model.act = nn.Tanh()
    expected = model.down(torch.tanh(model.gate(x)) * model.up(x))
    assert torch.equal(model(x), expected)


def test_what_broadcasts_or_has_two_dtypes_stays_a_product(calls):
    class Free(Gated):
        def forward(self, x, y):
            return self.act(x) * y

    model = Free()
    gptkern.swap(model)
    x = torch.randn(3, WIDTH)
    for y in (2.0, torch.randn(1, WIDTH), torch.randn(3, WIDTH, dtype=torch.float64), torch.tensor(3)):
        assert torch.equal(model(x, y), F.silu(x) * y) and model(x, y).dtype == (F.silu(x) * y).dtype
    assert all(name == "silu" for name, _ in calls)
    model(x, x)
    assert calls[-1] == ("swiglu", False)


@pytest.mark.parametrize("first", ["swap", "quantize"])
@pytest.mark.parametrize("cls", [First, Packed])
def test_int8_layers_inside_in_either_order(first, cls, calls):
    x = torch.randn(4, WIDTH)
    model, stock = cls(), cls()
    gptkern.quantize(stock)
    steps = [gptkern.swap, gptkern.quantize]
    for step in steps if first == "swap" else steps[::-1]:
        step(model)
    assert any(isinstance(layer, gptkern.nn.Int8Linear) for layer in model.children())
    torch.testing.assert_close(model(x), stock(x), rtol=1e-5, atol=1e-6)
    assert calls[-1][0] == "swiglu"


def test_functions_by_themselves(calls):
    class Free(nn.Module):
        def forward(self, x):
            return F.silu(F.gelu(x, approximate="tanh"))

    model, x = Free(), torch.randn(3, 4)
    expected = model(x)
    gptkern.swap(model)
    with gptkern.backend("torch:launchers"):
        assert torch.allclose(model(x), expected, atol=1e-6)
    assert [name for name, _ in calls] == ["gelu", "silu"]
    with gptkern.kernels(), gptkern.backend("torch:launchers"):
        F.silu(x)
    assert len(calls) == 3
    # ops may leave them out.
    stock = Free()
    assert gptkern.swap(stock, ["layer_norm"]).replaced == []


def nodes_of(model, *arguments):
    """The functions in the graph that torch.compile hands to Inductor."""
    found = []

    def backend(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend=backend)(*arguments)
    return found


class Lone(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.act, self.other = nn.Linear(4, 4), nn.GELU(), nn.SiLU()

    def forward(self, x):
        return self.other(F.silu(self.act(self.inside(x))))


def test_a_lone_activation_is_left_to_the_compiler(triton_backend, device):
    """Unless a backend is forced; a product is one node of gptkern's in any case."""
    model, x = Lone().to(device), torch.randn(3, 4, device=device)
    report = gptkern.swap(model)
    assert len(report.replaced) == 3
    with gptkern.backend(None):
        stock = nodes_of(model, x)
    with gptkern.backend("triton"):
        forced = nodes_of(model, x)
    assert ["linear" in node or "gelu" in node or "silu" in node for node in stock] == [True] * 4
    assert forced.count("autograd_function_apply") == 3 and not any("lu at" in node for node in forced)


def test_each_operator_of_a_compiled_model_is_one_node(triton_backend, device):
    """And none of PyTorch's that they take the place of is left."""
    model = gpt(layers=1).to(device)
    gptkern.swap(model, fused_loss=True)
    ids, targets = (part.contiguous().to(device) for part in batch())
    with gptkern.backend("triton"):
        nodes = nodes_of(model, ids, targets)
        called = [call.operator for call in gptkern.explain(model, ids, targets).calls]
    assert sorted(called) == ["attention", *["layer_norm"] * 3, "linear_cross_entropy", "nonlinearity"]
    assert nodes.count("autograd_function_apply") == len(called), nodes
    replaced = ("layer_norm", "scaled_dot_product", "gelu", "cross_entropy", "softmax")
    assert [node for node in nodes if any(name in node for name in replaced)] == []


def test_the_report_says_that_a_compiler_may_have_it():
    report = gptkern.swap(Lone())
    (entry,) = (entry for entry in report.replaced if entry.name == "act")
    assert entry.replacement == "gptkern.nn.GELU (PyTorch's while torch.compile compiles)"
    assert "PyTorch's while torch.compile compiles" in str(report)
    # F.silu, of Lone's own forward.
    (entry,) = (entry for entry in report.replaced if entry.name == "(model)")
    assert entry.replacement == "Lone, routed, activations by themselves PyTorch's while torch.compile compiles"
    report = gptkern.swap(WithFunctions(), ["nonlinearity"])
    (entry,) = (entry for entry in report.replaced if entry.name == "(model)")
    assert "compile" not in entry.replacement, "a product is gptkern's, compiled or not"


pytest.importorskip("transformers", reason="transformers is not installed")
import transformers.modeling_utils  # noqa: E402, F401  of which a model of transformers is made
from transformers.activations import ACT2FN  # noqa: E402


@pytest.mark.parametrize(
    ("key", "name"),
    [("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("silu", "silu"),
     ("gelu_python", None), ("quick_gelu", None), ("gelu_fast", None), ("relu", None), ("gelu_10", None)],
)  # fmt: skip
@pytest.mark.parametrize("product", [False, True])
def test_transformers_activations(key, name, product, monkeypatch):
    model = First(ACT2FN[key]) if product else nn.Sequential(ACT2FN[key])
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    model.double()
    wanted = results(model, x)
    report = gptkern.swap(model)
    functions = []
    on_pytorch = contract._on_pytorch
    monkeypatch.setattr(contract, "_on_pytorch", lambda call: functions.append(call.function) or on_pytorch(call))
    for ours, theirs in zip(results(model, x), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert bool(report.replaced) == (name is not None)
    if product and name:
        assert functions == [name]
    classes = {type(module).__name__ for module in model.modules()}
    gptkern.unswap(model)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results(model, x), wanted)), classes


def test_a_patched_class_of_transformers_keeps_its_own_forward(monkeypatch):
    act = ACT2FN["gelu_new"]
    assert len(gptkern.swap(nn.Sequential(ACT2FN["gelu_new"])).replaced) == 1
    monkeypatch.setattr(type(act), "forward", lambda self, input: input + 1)
    assert gptkern.swap(nn.Sequential(act)).replaced == []
