"""swap, unswap and kernels(): on the reference GPT, and on models in the styles that people write."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from swapped_models import BiaslessNorm, CausalAttention, batch, calls_of_twins, class_names, gpt

import gptkern
from gptkern.swapping.report import Skipped, SwapReport, where
from gptkern.swapping.routed_classes import calls
from gptkern.swapping.twins import SWAPPABLE


class ExplicitAttention(torch.nn.Module):
    """Masked softmax in Python: the softmax can be routed, the rest cannot."""

    def forward(self, x):
        scores = (x @ x.transpose(-2, -1)).masked_fill(torch.ones(x.shape[-2], x.shape[-2]).triu(1).bool(), -torch.inf)
        return F.softmax(scores, dim=-1) @ x


class NormWithForward(torch.nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


class CallsNothing(torch.nn.Module):
    """Names that look like operators and are none: a submodule, a method of its own."""

    def __init__(self):
        super().__init__()
        self.layer_norm = torch.nn.Identity()

    def forward(self, x):
        return self.softmax(self.layer_norm(x))

    def softmax(self, x):
        return x


GPT_OPERATORS = ("attention", "cross_entropy", "layer_norm", "nonlinearity", "residual_norm")


def test_swap_reports_each_module():
    report = gptkern.swap(gpt())
    assert len(report.replaced) == 2 * 5 + 2
    assert {operator for entry in report.replaced for operator in entry.operator.split(", ")} == set(GPT_OPERATORS)
    assert report.skipped == []
    assert "12 modules replaced, 0 skipped" in str(report)
    assert "blocks.{0-1}.attention" in str(report)


def test_swap_keeps_parameters_keys_and_flags():
    model = gpt()
    model.final_norm.weight.requires_grad_(False)
    model.blocks[0].eval()
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    keys, training = list(model.state_dict()), {name: module.training for name, module in model.named_modules()}
    gptkern.swap(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert list(model.state_dict()) == keys
    assert {name: module.training for name, module in model.named_modules()} == training
    assert not model.final_norm.weight.requires_grad
    assert isinstance(model.final_norm, torch.nn.LayerNorm)


def test_swapping_twice_changes_nothing():
    model = gpt()
    first = gptkern.swap(model)
    classes = class_names(model)
    second = gptkern.swap(model)
    assert class_names(model) == classes
    assert second.replaced == first.replaced


def test_unswap_restores_exactly():
    model = gpt()
    classes, dictionaries = class_names(model), {name: list(m.__dict__) for name, m in model.named_modules()}
    gptkern.swap(model)
    assert class_names(model) != classes
    gptkern.unswap(model)
    assert class_names(model) == classes
    assert {name: list(m.__dict__) for name, m in model.named_modules()} == dictionaries
    gptkern.unswap(model)
    assert class_names(model) == classes


def test_unswap_leaves_modules_that_were_built_on_gptkern():
    model = torch.nn.Sequential(gptkern.nn.LayerNorm(4), torch.nn.LayerNorm(4))
    gptkern.swap(model)
    gptkern.unswap(model)
    assert [type(module) for module in model] == [gptkern.nn.LayerNorm, torch.nn.LayerNorm]


def test_the_root_itself_is_swapped():
    norm = torch.nn.LayerNorm(4)
    assert gptkern.swap(norm).replaced[0].name == "(model)"
    assert type(norm) is gptkern.nn.LayerNorm
    gptkern.unswap(norm)
    assert type(norm) is torch.nn.LayerNorm


@pytest.mark.parametrize("ops", [["layer_norm"], ["attention"], ["softmax"], []])
def test_only_the_operators_asked_for(ops):
    report = gptkern.swap(gpt(), ops=ops)
    assert {entry.operator for entry in report.replaced} == set(ops) - {"softmax"}


def test_inline_calls_are_found_by_what_they_resolve_to():
    assert calls(CausalAttention).operators == {"attention"}
    assert calls(BiaslessNorm).operators == {"layer_norm"}
    assert calls(ExplicitAttention).operators == {"softmax"}
    assert calls(CallsNothing).operators == set()


def test_styles_of_models():
    model = torch.nn.Sequential(BiaslessNorm(), CausalAttention(), ExplicitAttention(), CallsNothing())
    x = torch.randn(2, 5, 8)
    expected = model(x)
    report = gptkern.swap(model)
    assert [(entry.name, entry.operator) for entry in report.replaced] == [
        ("0", "layer_norm"),
        ("1", "attention"),
        ("1.softmax", "softmax"),
        ("2", "softmax"),
    ]
    assert torch.equal(model(x), expected)
    gptkern.unswap(model)
    assert type(model[1]) is CausalAttention


def test_subclasses_are_left_alone_with_the_reason():
    model = torch.nn.Sequential(NormWithForward(4), torch.nn.LayerNorm(4))
    report = gptkern.swap(model)
    assert type(model[0]) is NormWithForward
    assert [(entry.name, entry.original) for entry in report.skipped] == [("0", "NormWithForward")]
    assert "subclass" in report.skipped[0].reason and "1 skipped" in str(report)


class OwnMultiheadAttention(torch.nn.MultiheadAttention):
    pass


def test_a_subclass_of_multihead_attention_is_named_as_skipped():
    report = gptkern.swap(OwnMultiheadAttention(8, 2))
    assert [entry.original for entry in report.skipped] == ["OwnMultiheadAttention"]
    assert gptkern.swap(OwnMultiheadAttention(8, 2), ops=["layer_norm"]).skipped == []


def test_explicit_attention_is_named_beside_its_softmax():
    report = gptkern.swap(ExplicitAttention())
    assert [entry.operator for entry in report.replaced] == ["softmax"]
    assert "matrix products around a softmax" in report.skipped[0].reason
    assert gptkern.swap(ExplicitAttention(), ops=["softmax"]).skipped == []


@pytest.mark.parametrize("ops", [["layer_norm"], ["attention"]])
def test_the_encoder_stays_in_python_in_eval_mode(monkeypatch, ops):
    """PyTorch's fused encoder would bypass whatever is swapped inside it."""
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        gptkern.swap(model, ops=ops)
        calls = {"layer_norm": 4, "attention": 2}[ops[0]]
        assert calls_of_twins(monkeypatch, lambda: model(x, src_key_padding_mask=padding)) == calls
        actual = model(x, src_key_padding_mask=padding)
        gptkern.unswap(model)
        assert torch.equal(model(x, src_key_padding_mask=padding), expected)
    torch.testing.assert_close(actual[~padding], expected[~padding])
    assert torch.backends.mha.get_fastpath_enabled()


def test_attention_weights_of_multihead_attention_are_still_given():
    model = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    expected = model(x, x, x)
    gptkern.swap(model)
    for actual, wanted in zip(model(x, x, x), expected):
        assert torch.equal(actual, wanted)


def test_the_report_is_a_table_of_kinds():
    model = torch.nn.Sequential(*(torch.nn.LayerNorm(4) for _ in range(3)), NormWithForward(4), torch.nn.LayerNorm(4))
    assert str(gptkern.swap(model)).splitlines() == [
        "4 modules replaced, 1 skipped",
        "",
        "replaced  module     operator    became                runs on  where",
        "4         LayerNorm  layer_norm  gptkern.nn.LayerNorm  torch    {0-2,4}",
        "",
        "torch: the model is on the CPU",
        "",
        f"skipped  module           {'reason':86}  where",
        "1        NormWithForward  a subclass of torch.nn.LayerNorm with a forward of its own, in which no call was "
        "found  3",
    ]
    assert str(gptkern.swap(torch.nn.Linear(2, 2))) == "0 modules replaced, 0 skipped"
    assert str(gptkern.swap(torch.nn.LayerNorm(4))).startswith("1 module replaced, 0 skipped\n")


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["h.0.ln_1", "h.1.ln_1", "h.2.ln_1", "h.0.ln_2", "ln_f"], "h.{0-2}.ln_1, h.0.ln_2, ln_f"),
        (["0", "2", "3"], "{0,2-3}"),
        (["h.10.a.0.b", "h.10.a.1.b"], "h.{10}.a.0.b, h.{10}.a.1.b"),
        (["layer1.x", "layer2.x"], "layer1.x, layer2.x"),
        (["(model)"], "(model)"),
    ],
)
def test_paths_in_short(names, short):
    assert where(names) == short.replace("{10}", "10")


def test_swap_is_logged(caplog):
    with caplog.at_level("INFO", logger="gptkern"):
        gptkern.swap(torch.nn.LayerNorm(4))
    assert caplog.records[-1].name == "gptkern" and "gptkern.nn.LayerNorm" in caplog.text


def test_a_forward_on_the_instance_is_left_alone():
    norm = torch.nn.LayerNorm(4)
    norm.forward = lambda x: x
    report = gptkern.swap(norm)
    assert type(norm) is torch.nn.LayerNorm and "instance" in report.skipped[0].reason


def test_strict_raises_and_changes_nothing():
    model = torch.nn.Sequential(torch.nn.LayerNorm(4), NormWithForward(4))
    with pytest.raises(RuntimeError, match=r"strict.*unchanged[\s\S]*NormWithForward"):
        gptkern.swap(model, strict=True)
    assert type(model[0]) is torch.nn.LayerNorm
    assert gptkern.swap(gpt(), strict=True).replaced


def test_bad_arguments():
    with pytest.raises(TypeError, match="model is a str"):
        gptkern.swap("model")
    with pytest.raises(TypeError, match="model is a NoneType"):
        gptkern.unswap(None)
    with pytest.raises(TypeError, match="needs a list"):
        gptkern.swap(gpt(), ops="layer_norm")
    with pytest.raises(ValueError, match=r"'gelu'.*'attention'"):
        gptkern.swap(gpt(), ops=["gelu"])
    with pytest.raises(ValueError, match="'conv'"):
        gptkern.kernels(["conv"])


def test_shared_modules_are_swapped_once():
    norm = torch.nn.LayerNorm(4)
    model = torch.nn.Sequential(norm, norm)
    assert len(gptkern.swap(model).replaced) == 1
    assert model[0] is model[1] and type(norm) is gptkern.nn.LayerNorm


def test_hooks_survive():
    model = gpt()
    seen = []
    model.blocks[0].attention.register_forward_hook(lambda *_: seen.append("attention"))
    model.final_norm.register_full_backward_hook(lambda *_: seen.append("norm"))
    gptkern.swap(model)
    model(*batch())[1].backward()
    assert seen == ["attention", "norm"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_stay_swapped_and_can_be_unswapped(copied):
    model = gpt()
    classes = class_names(model)
    gptkern.swap(model)
    twin = copied(model)
    assert class_names(twin) == class_names(model)
    ids, targets = batch()
    assert torch.equal(twin(ids, targets)[1], model(ids, targets)[1])
    gptkern.unswap(twin)
    assert class_names(twin) == classes
    assert type(model.final_norm) is gptkern.nn.LayerNorm


def test_swapped_modules_call_the_operators(monkeypatch):
    model = gpt()
    assert calls_of_twins(monkeypatch, lambda: model(*batch())) == 0
    gptkern.swap(model)
    assert calls_of_twins(monkeypatch, lambda: model(*batch())) == 10
    gptkern.unswap(model)
    assert calls_of_twins(monkeypatch, lambda: model(*batch())) == 0


def test_kernels_routes_inline_calls_only_inside(monkeypatch):
    x = torch.randn(2, 4, 8, 8)
    calls = [
        lambda: F.scaled_dot_product_attention(x, x, x),
        lambda: F.layer_norm(x, (8,)),
        lambda: F.rms_norm(x, (8,)),
        lambda: F.softmax(x, dim=-1),
        lambda: torch.softmax(x, -1),
        lambda: x.softmax(-1),
    ]
    for call in calls:
        expected = call()
        with gptkern.kernels():
            assert calls_of_twins(monkeypatch, call) == 1
            assert torch.equal(call(), expected)
            with gptkern.kernels():
                assert calls_of_twins(monkeypatch, call) >= 1
        assert calls_of_twins(monkeypatch, call) == 0
    with gptkern.kernels(["layer_norm"]):
        assert calls_of_twins(monkeypatch, calls[0]) == 0
        assert calls_of_twins(monkeypatch, calls[1]) == 1


def test_kernels_ends_with_an_exception_and_stays_in_its_thread(monkeypatch):
    x = torch.randn(2, 8)
    with pytest.raises(ZeroDivisionError), gptkern.kernels():
        raise ZeroDivisionError
    assert calls_of_twins(monkeypatch, lambda: F.layer_norm(x, (8,))) == 0

    def in_another_thread():
        worker = threading.Thread(target=lambda: F.layer_norm(x, (8,)))
        worker.start()
        worker.join()

    with gptkern.kernels():
        assert calls_of_twins(monkeypatch, in_another_thread) == 0


def test_what_can_be_swapped():
    assert SWAPPABLE == (
        "attention", "layer_norm", "rms_norm", "rotary", "softmax", "nonlinearity", "cross_entropy", "residual_norm",
    )  # fmt: skip


class CallsTwo(torch.nn.Module):
    def forward(self, x):
        return F.softmax(F.layer_norm(x, x.shape[-1:]), dim=-1)


def test_a_second_swap_adds_to_the_first(monkeypatch):
    model = CallsTwo()
    x = torch.randn(2, 8)
    gptkern.swap(model, ops=["softmax"])
    assert calls_of_twins(monkeypatch, lambda: model(x)) == 1
    report = gptkern.swap(model, ops=["layer_norm"])
    assert report.replaced[0].operator == "layer_norm, softmax"
    assert calls_of_twins(monkeypatch, lambda: model(x)) == 2
    gptkern.unswap(model)
    assert type(model) is CallsTwo


def test_a_class_that_changed_after_the_swap_is_left_alone():
    model = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.LayerNorm(4))
    gptkern.swap(model)
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", torch.nn.Identity())
    expected = model(torch.ones(1, 4))
    assert "changed after" in gptkern.swap(model).skipped[0].reason
    with pytest.raises(RuntimeError, match=r"unswap: 0 became.*unchanged"):
        gptkern.unswap(model)
    assert type(model[1]) is gptkern.nn.LayerNorm
    assert torch.equal(model(torch.ones(1, 4)), expected)
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    gptkern.unswap(model)
    assert type(model[0]) is torch.nn.LayerNorm


class WrittenOut(torch.nn.Module):
    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


class WrittenOutAroundAModule(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.normalise = torch.nn.Softmax(-1)

    def forward(self, x):
        return self.normalise(x @ x.mT) @ x


@pytest.mark.parametrize("cls", [WrittenOut, WrittenOutAroundAModule])
def test_attention_that_is_written_out_is_not_passed_over(cls):
    assert [entry.name for entry in gptkern.swap(cls()).skipped] == ["(model)"]
    with pytest.raises(RuntimeError, match="matrix products around a softmax"):
        gptkern.swap(cls(), strict=True)
    assert gptkern.swap(cls(), ops=["softmax"]).skipped == []


def test_a_subclass_without_a_forward_of_its_own_is_skipped_for_what_it_is():
    report = gptkern.swap(OwnMultiheadAttention(8, 2))
    assert report.skipped[0].reason == "a subclass of torch.nn.MultiheadAttention: only that class itself is replaced"


def test_the_report_counts_modules_and_not_reasons():
    report = SwapReport([], [Skipped("0", "A", "one"), Skipped("0", "A", "another"), Skipped("1", "A", "one")])
    assert str(report).startswith("0 modules replaced, 2 skipped\n")
