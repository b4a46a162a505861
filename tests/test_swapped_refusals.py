"""swap on modules that refuse another class, change it themselves at their first call, or are to be scripted."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from swapped_models import BiaslessNorm, CausalAttention, calls_of_twins, class_names
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

import gptkern


def state_of(model):
    return class_names(model), {name: list(module.__dict__) for name, module in model.named_modules()}


# --- Modules that refuse another class --------------------------------------------------------------------------------


class Refuses(BiaslessNorm):
    def __setattr__(self, name, value):
        if name == "__class__":
            raise TypeError("no other class")
        super().__setattr__(name, value)


class Frozen(BiaslessNorm):
    """Refuses any attribute once it is frozen."""

    frozen = False

    def __setattr__(self, name, value):
        if self.frozen:
            raise AttributeError(f"{name}: frozen")
        super().__setattr__(name, value)

    def freeze(self):
        self.__dict__["frozen"] = True
        return self


class Ignores(BiaslessNorm):
    def __setattr__(self, name, value):
        if name != "__class__":
            super().__setattr__(name, value)


class RefusesTooLate(BiaslessNorm):
    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "__class__":
            raise RuntimeError("too late")


class Fixed(BiaslessNorm):
    """Whose `__class__` is a property without a setter."""

    @property
    def __class__(self):
        return Fixed


REFUSING = {
    Refuses: "TypeError: no other class",
    lambda: Frozen().freeze(): "AttributeError: __class__: frozen",
    Ignores: "stayed",
    RefusesTooLate: "RuntimeError: too late",
    Fixed: "its class",
}
refusing = pytest.mark.parametrize(
    ("make", "reason"), REFUSING.items(), ids=["refuses", "frozen", "ignores", "too late", "property"]
)


@refusing
def test_a_module_that_refuses_is_skipped_and_the_rest_is_swapped(make, reason, monkeypatch):
    model = torch.nn.Sequential(BiaslessNorm(), make(), torch.nn.LayerNorm(8), CausalAttention())
    before, x = state_of(model), torch.randn(2, 5, 8)
    expected = model(x)
    report = gptkern.swap(model)
    assert [entry.name for entry in report.skipped] == ["1"] and reason in report.skipped[0].reason
    assert [entry.name for entry in report.replaced] == ["0", "2", "3", "3.softmax"]
    assert (type(model[1]), list(model[1].__dict__)) == (before[0]["1"], before[1]["1"])
    assert calls_of_twins(monkeypatch, lambda: torch.testing.assert_close(model(x), expected)) == 3
    gptkern.unswap(model)
    assert state_of(model) == before


@refusing
def test_strict_refuses_before_anything_is_changed(make, reason):
    model = torch.nn.Sequential(BiaslessNorm(), make(), torch.nn.LayerNorm(8))
    before = state_of(model)
    with pytest.raises(RuntimeError, match=r"strict[\s\S]*unchanged[\s\S]*" + reason):
        gptkern.swap(model, strict=True)
    assert state_of(model) == before


def test_a_module_that_was_frozen_after_the_swap_is_given_back():
    model = torch.nn.Sequential(Frozen(), torch.nn.LayerNorm(8))
    before = class_names(model)
    gptkern.swap(model)
    model[0].freeze()
    gptkern.unswap(model)
    assert class_names(model) == before


class CallsTwo(torch.nn.Module):
    def forward(self, x):
        return F.softmax(F.layer_norm(x, x.shape[-1:]), dim=-1)


def test_a_second_swap_that_fails_leaves_the_first(monkeypatch):
    model = torch.nn.Sequential(CallsTwo(), Refuses())
    before = state_of(model)
    gptkern.swap(model, ops=["softmax"])
    swapped = state_of(model)
    with pytest.raises(RuntimeError, match="no other class"):
        gptkern.swap(model, ops=["layer_norm"], strict=True)
    assert state_of(model) == swapped
    assert calls_of_twins(monkeypatch, lambda: model(torch.randn(2, 8))) == 1
    gptkern.unswap(model)
    assert state_of(model) == before


# --- Lazy modules -----------------------------------------------------------------------------------------------------


class LazyLayerNorm(LazyModuleMixin, torch.nn.LayerNorm):
    """As torch.nn.LazyLinear is of Linear."""

    cls_to_become = torch.nn.LayerNorm

    def __init__(self):
        super().__init__(0)
        self.weight, self.bias = UninitializedParameter(), UninitializedParameter()

    def initialize_parameters(self, x):
        if self.has_uninitialized_params():
            self.normalized_shape = x.shape[-1:]
            self.weight.materialize(self.normalized_shape)
            self.bias.materialize(self.normalized_shape)
            self.reset_parameters()


class LazyNorm(LazyModuleMixin, BiaslessNorm):
    cls_to_become = BiaslessNorm

    def __init__(self):
        super().__init__(0)
        self.weight = UninitializedParameter()

    def initialize_parameters(self, x):
        if self.has_uninitialized_params():
            self.weight.materialize(x.shape[-1:])
            torch.nn.init.ones_(self.weight)


class StaysLazy(LazyNorm):
    cls_to_become = None


class BecomesItself(LazyNorm):
    pass


BecomesItself.cls_to_become = BecomesItself


class CallsLess(LazyNorm):
    """Its own forward calls nothing: what it becomes does."""

    def forward(self, x):
        return x


LAZY = {
    LazyLayerNorm: torch.nn.LayerNorm,
    LazyNorm: BiaslessNorm,
    StaysLazy: StaysLazy,
    BecomesItself: BecomesItself,
}
lazy = pytest.mark.parametrize(("cls", "after"), LAZY.items())


@lazy
def test_a_lazy_module_keeps_its_swap(cls, after, monkeypatch):
    model, x = torch.nn.Sequential(cls()), torch.randn(2, 8)
    report = gptkern.swap(model)
    assert [entry.operator for entry in report.replaced] == ["layer_norm"]
    for _ in range(2):
        assert calls_of_twins(monkeypatch, lambda: model(x)) == 1
    torch.testing.assert_close(model(x), F.layer_norm(x, (8,)))
    assert issubclass(type(model[0]), after) and type(model[0]) is not after
    again = gptkern.swap(model)
    assert [(entry.name, entry.operator) for entry in again.replaced] == [("0", "layer_norm")]
    copied = copy.deepcopy(model)
    assert [entry.original for entry in gptkern.unswap(model).restored] == [after.__name__]
    assert type(model[0]) is after and not any("gptkern" in name for name in model[0].__dict__)
    assert calls_of_twins(monkeypatch, lambda: model(x)) == 0
    assert calls_of_twins(monkeypatch, lambda: copied(x)) == 1


@lazy
def test_a_lazy_module_that_was_not_called_is_given_back(cls, after):
    model, x = torch.nn.Sequential(cls()), torch.randn(2, 8)
    gptkern.swap(model)
    gptkern.unswap(model)
    assert type(model[0]) is cls
    model(x)
    assert type(model[0]) is after


def test_a_lazy_module_is_swapped_for_what_it_becomes(monkeypatch):
    model, x = CallsLess(), torch.randn(2, 8)
    gptkern.swap(model)
    assert torch.equal(model(x), x)
    assert calls_of_twins(monkeypatch, lambda: model(x)) == 1
    gptkern.unswap(model)
    assert type(model) is BiaslessNorm


def test_a_lazy_module_becomes_no_more_than_was_asked_for():
    model = LazyLayerNorm()
    assert gptkern.swap(model, ops=["softmax"]).replaced == []
    model(torch.randn(2, 8))
    assert type(model) is torch.nn.LayerNorm


@lazy
def test_a_lazy_module_through_pickle(cls, after, monkeypatch):
    model, x = cls(), torch.randn(2, 8)
    gptkern.swap(model)
    model(x)
    loaded = pickle.loads(pickle.dumps(model))
    assert calls_of_twins(monkeypatch, lambda: loaded(x)) == 1
    gptkern.unswap(loaded)
    assert type(loaded) is after


# --- torch.jit.script -------------------------------------------------------------------------------------------------


class Holds(torch.nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x) + 1


SCRIPTED = {
    "LayerNorm": lambda: torch.nn.LayerNorm(8),
    "RMSNorm": lambda: torch.nn.RMSNorm(8),
    "Softmax": lambda: torch.nn.Softmax(-1),
    "a routed class": BiaslessNorm,
    "an encoder": lambda: torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16), 1),
}


@pytest.mark.parametrize("name", SCRIPTED)
@pytest.mark.parametrize("around", [lambda part: part, Holds, lambda part: torch.nn.ModuleList([Holds(part)])])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_a_swapped_model_is_not_scripted_and_says_why(name, around):
    model = around(SCRIPTED[name]())
    gptkern.swap(model)
    before = state_of(model)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script: .*gptkern\.unswap\(model\) first"):
        torch.jit.script(model)
    assert state_of(model) == before
    gptkern.unswap(model)
    assert isinstance(torch.jit.script(model), torch.jit.ScriptModule)


@pytest.mark.deep
def test_a_model_whose_attention_comes_by_name_is_not_scripted():
    """No class of it has changed: what says so stands beside the noted config."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, vocab_size=31, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    before = state_of(model)
    gptkern.swap(model, ops=["attention"])
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for swapped in (model, copied):
        with pytest.raises(RuntimeError, match=r"gptkern\.unswap\(model\) first"):
            torch.jit.script(swapped)
        gptkern.unswap(swapped)
        assert state_of(swapped) == before


class AttendsInAMethod(torch.nn.Module):
    def attend(self, x):
        return torch.nn.functional.softmax(x, -1)

    def forward(self, x):
        return self.attend(x)


def test_a_method_that_is_set_on_the_instance_would_not_be_routed():
    model = torch.nn.Sequential(AttendsInAMethod(), AttendsInAMethod())
    model[0].attend = torch.compile(model[0].attend, backend="eager")
    report = gptkern.swap(model)
    assert [entry.name for entry in report.replaced] == ["1"]
    ((name, _, reason),) = report.skipped
    assert name == "0" and reason == "attend, which its forward calls, was set on the instance itself"
    assert [call.name for call in gptkern.explain(model, torch.randn(2, 3)).calls] == ["1"]


class KnowsItself(torch.nn.Module):
    WEIGHTS = 2.0

    def scale(self):
        raise NotImplementedError

    def forward(self, x):
        return torch.nn.functional.softmax(x, -1) * self.scale()


class ByIs(KnowsItself):
    def scale(self):
        return 2.0 if type(self) is ByIs else 3.0


class ByATable(KnowsItself):
    def scale(self):
        return {ByATable: 2.0}.get(type(self), 3.0)


class ByClass(KnowsItself):
    def scale(this):
        return 2.0 if ByClass == this.__class__ else 3.0


class TakesAnAttribute(KnowsItself):
    def scale(self):
        return type(self).WEIGHTS if self.__class__.__name__ else 0.0


@pytest.mark.parametrize("cls", [ByIs, ByATable, ByClass])
def test_a_module_that_asks_for_its_exact_class_keeps_it(cls):
    model, x = cls(), torch.randn(2, 3)
    expected = model(x)
    ((_, _, reason),) = gptkern.swap(model).skipped
    assert "its code asks for its exact class" in reason and torch.equal(model(x), expected)


def test_an_attribute_of_the_class_is_no_question():
    model, x = TakesAnAttribute(), torch.randn(2, 3)
    expected = model(x)
    assert len(gptkern.swap(model).replaced) == 1 and torch.equal(model(x), expected)


# --- Generated code ---------------------------------------------------------------------------------------------------


class NormThenSoftmax(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, x):
        return F.softmax(self.norm(x), dim=-1)


def test_a_graph_module_keeps_its_class_and_what_is_in_it_is_swapped():
    x = torch.randn(2, 8)
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(NormThenSoftmax()))
    expected, before = graph(x), type(graph)
    report = gptkern.swap(graph)
    assert type(graph) is before and [entry.operator for entry in report.replaced] == ["layer_norm"]
    assert [(entry.name, "generated" in entry.reason) for entry in report.skipped] == [("(model)", True)]
    for again in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        again.recompile()
        torch.testing.assert_close(again(x), expected)
    gptkern.unswap(graph)
    with pytest.raises(RuntimeError, match="its code is generated"):
        gptkern.swap(graph, strict=True)
    assert gptkern.swap(torch.fx.symbolic_trace(torch.nn.Linear(8, 8)), strict=True).skipped == []


# --- What is called by super() ----------------------------------------------------------------------------------------


class Base(torch.nn.Module):
    def forward(self, x):
        return self.normalised(x)

    def normalised(self, x):
        return F.softmax(x, dim=-1)


class CallsForward(Base):
    def forward(self, x):
        return super().forward(x) * 2


class CallsForwardOfItsClass(CallsForward):
    """By the longer form, over a class in which the call is another super()'s, beside a call that is routed."""

    def forward(self, x):
        return F.layer_norm(super(CallsForward, self).forward(x), (8,))


class CallsAnotherMethod(Base):
    def forward(self, x):
        return self.twice(x)

    def twice(self, x):
        return 2 * super().normalised(x)


class CallsAttention(torch.nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0] + F.softmax(x, dim=-1)


class CallsNothing(torch.nn.Embedding):
    def forward(self, x):
        return F.softmax(super().forward(x), dim=-1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (CallsForward(), "super().forward of Base is not rerouted: softmax"),
        (CallsForwardOfItsClass(), "super().forward of Base is not rerouted: softmax"),
        (CallsAnotherMethod(), "super().normalised of Base is not rerouted: softmax"),
        (CallsAttention(8, 2), "super().forward of MultiheadAttention is not rerouted: attention, softmax"),
        (CallsNothing(4, 8), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_what_is_called_by_super_is_named(model, reason):
    report = gptkern.swap(model)
    assert [entry.reason for entry in report.skipped if entry.name == "(model)"] == ([reason] if reason else [])
    assert gptkern.swap(model, ops=["rms_norm"]).skipped == []
    gptkern.unswap(model)
    if reason is not None:
        with pytest.raises(RuntimeError, match="is not rerouted"):
            gptkern.swap(model, strict=True)
