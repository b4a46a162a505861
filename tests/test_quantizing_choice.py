"""quantize: which layers are left alone, by whose wish or for which reason."""

from __future__ import annotations

import pytest
import torch
from quantized_models import Pair, gpt, int8_names, quantized_names
from torch.nn.utils import prune

import gptkern
from gptkern.nn import Int8Linear


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["blocks.0.attention.qkv"], 7),  # a name
        (["qkv"], 6),  # the last part of two
        (["attention.project", "lm_head"], 6),  # the last parts of two
        (["blocks.0"], 4),  # what holds layers
        (["attention"], 4),
        (("0",), 4),
        (frozenset(["blocks"]), 0),  # anything that can be iterated over
    ],
    ids=str,
)
def test_skip(skip, left):
    model = gpt()
    report = gptkern.quantize(model, skip=skip)
    assert len(report.quantized) == len(int8_names(model)) == left
    assert sum(s.reason.startswith("skip names") for s in report.skipped) >= 8 - left


def test_a_name_is_no_part_of_a_word():
    with pytest.raises(ValueError, match="'head'"):
        gptkern.quantize(gpt(), skip=["head"])


def test_a_name_of_the_default_is_an_error_where_a_caller_gives_it_and_the_model_has_none():
    """The head may have another name, and would become int8 without a word."""
    with pytest.raises(ValueError, match="skip holds 'lm_head'"):
        gptkern.quantize(Pair(), skip=["lm_head"])
    assert len(gptkern.quantize(Pair()).quantized) == 2


def test_the_output_layer_is_quantised_where_it_is_not_skipped():
    model = gpt()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert "lm_head" in quantized_names(gptkern.quantize(model, skip=()))


def test_no_output_layer_is_no_error():
    assert quantized_names(gptkern.quantize(Pair())) == ["first", "second"]


def test_filter():
    asked = []

    def wide(name, module):
        asked.append((name, type(module)))
        return module.out_features > 64

    report = gptkern.quantize(gpt(), filter=wide)
    assert quantized_names(report) == [
        f"blocks.{i}.{n}" for i in (0, 1) for n in ("attention.qkv", "perceptron.expand")
    ]
    assert len(asked) == 8 and set(asked) >= {("blocks.1.attention.qkv", torch.nn.Linear)}
    assert ("blocks.0.attention.project", "Linear", "filter returned False") in report.skipped


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Named(torch.nn.Linear):
    pass


class Conv1D(torch.nn.Module):
    """Has the name of transformers' class and is not it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        return x @ self.weight


def prepared(change):
    layer = torch.nn.Linear(8, 6)
    return change(layer) or layer


def with_not_a_number(layer):
    layer.weight.data[2, 3] = float("nan")


def with_infinity(layer):
    layer.weight.data[2, 3] = -float("inf")


def with_forward(layer):
    layer.forward = lambda x: x[..., :6]


def with_buffer(layer):
    layer.register_buffer("seen", torch.zeros(()))


def sparse(layer):
    layer.weight = torch.nn.Parameter(layer.weight.detach().to_sparse())


class Subclass(torch.Tensor):
    pass


def subclassed(layer):
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Subclass))


OBSTACLES = {
    "a forward of its own": (lambda: Doubled(8, 6), "with a forward of its own"),
    "a subclass": (lambda: Named(8, 6), "a subclass of torch.nn.Linear"),
    "another Conv1D": (Conv1D, "not transformers' own Conv1D"),
    "parametrised": (lambda: prepared(torch.nn.utils.parametrizations.weight_norm), "parametrised"),
    "pruned": (lambda: prepared(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)), "pruned"),
    "one buffer more": (lambda: prepared(with_buffer), "more than a weight and a bias"),
    "forward set": (lambda: prepared(with_forward), "on the instance"),
    "not a number": (lambda: prepared(with_not_a_number), "NaN or an infinity"),
    "infinity": (lambda: prepared(with_infinity), "NaN or an infinity"),
    "no inputs": (lambda: torch.nn.Linear(0, 6), "empty"),
    "no outputs": (lambda: torch.nn.Linear(8, 0), "empty"),
    "float8": (lambda: torch.nn.Linear(8, 6).to(torch.float8_e4m3fn), "float8"),
    "complex": (lambda: torch.nn.Linear(8, 6, dtype=torch.complex64), "complex64"),
    "sparse": (lambda: prepared(sparse), "sparse"),
    "a tensor subclass": (lambda: prepared(subclassed), "Subclass"),
    "not initialised": (lambda: torch.nn.LazyLinear(6), "a subclass of torch.nn.Linear"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors", "ignore:Sparse", "ignore:Complex")
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_cannot_be_quantised_is_left_alone_and_said(obstacle):
    make, reason = OBSTACLES[obstacle]
    layer = make()
    model = Pair(layer)
    report = gptkern.quantize(model)
    assert quantized_names(report) == ["second"]
    ((name, original, said),) = report.skipped
    assert (name, original) == ("first", type(layer).__name__) and reason in said
    assert model.first is layer


def test_tied_weights_stay_tied():
    model = gpt()
    report = gptkern.quantize(model, skip=())
    assert ("lm_head", "Linear", "its weight is tied to token_embedding.weight") in report.skipped
    assert model.lm_head.weight is model.token_embedding.weight

    tied = Pair(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
    tied.second.weight = tied.first.weight
    report = gptkern.quantize(tied)
    assert [s.reason for s in report.skipped] == [
        "its weight is tied to second.weight", "its weight is tied to first.weight"
    ]  # fmt: skip


def test_weights_tied_by_memory_alone_are_tied():
    model = Pair(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
    model.second.weight = torch.nn.Parameter(model.first.weight.detach())
    assert len(gptkern.quantize(model).skipped) == 2


def test_two_weights_in_one_storage_are_not_tied():
    flat = torch.randn(72)
    model = Pair(torch.nn.Linear(6, 6, bias=False), torch.nn.Linear(6, 6, bias=False))
    for layer, part in zip((model.first, model.second), flat.view(2, 6, 6)):
        layer.weight = torch.nn.Parameter(part)
    assert len(gptkern.quantize(model).quantized) == 2


def test_weights_that_pytorch_s_modules_read_themselves():
    model = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    model = torch.nn.Sequential(model, torch.nn.Linear(16, 16))
    x = torch.randn(2, 5, 16)
    report = gptkern.quantize(model)
    assert quantized_names(report) == ["1"]
    reasons = {s.name: s.reason for s in report.skipped}
    assert "MultiheadAttention" in reasons["0.layers.0.self_attn.out_proj"]
    assert "TransformerEncoderLayer" in reasons["0.layers.1.linear2"]
    with torch.no_grad():
        model(x)


@pytest.mark.parametrize("meta", [False, True], ids=["", "meta"])
def test_parts_of_a_tensor_that_the_model_holds_are_tied(meta):
    model = Pair(torch.nn.Linear(6, 4, bias=False), torch.nn.Linear(6, 4, bias=False))
    model.fused = torch.nn.Parameter(torch.randn(12, 6, device="meta" if meta else None))
    model.first.weight, model.second.weight = (torch.nn.Parameter(model.fused.data[i : i + 4]) for i in (0, 8))
    report = gptkern.quantize(model)
    assert [s.reason for s in report.skipped] == ["its weight is tied to fused"] * 2
    model.second.weight = torch.nn.Parameter(model.fused.data.view(torch.int32)[2:6].view(torch.float32))
    model.fused = None
    assert "tied to second.weight" in gptkern.quantize(model).skipped[0].reason


class Reader(Pair):
    """Computes with its layers' weights itself: in forward, in a method of its own, in a module's module."""

    def __init__(self):
        super().__init__()
        self.inner = Pair()
        self.called = torch.nn.Linear(8, 8)

    def forward(self, x):
        x = self.called(x).to(self.called.weight.device)
        first = x @ self.first.weight.to(x.dtype).t()
        return self.after(first) + self.inner.second(x @ self.inner.first.weight.t())

    def after(self, x):
        return sum(torch.nn.functional.linear(x, weight) for weight in [self.second.weight])

    def reset_parameters(self):
        torch.nn.init.normal_(self.called.weight)
        torch.nn.init.normal_(self.inner.second.weight)


def test_weights_that_a_module_s_own_code_reads():
    model, x = Reader(), torch.randn(3, 8)
    before = model(x)
    report = gptkern.quantize(model)
    assert quantized_names(report) == ["inner.second", "called"]
    assert {s.name for s in report.skipped} == {"first", "second", "inner.first"}
    assert {s.reason for s in report.skipped} == {"its parent reads its weight"}
    assert (model(x) - before).norm() < 0.05 * before.norm()


class Blocks(torch.nn.Module):
    """What the forwards below are of."""

    def __init__(self):
        super().__init__()
        self.mlp = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))
        self.blocks = torch.nn.ModuleList(Pair(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)) for _ in range(2))
        self.named = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8)})
        self.unknown = [self.named["a"]]

    def last(self):
        return self.mlp[-1]

    @property
    def kind(self):
        return self.mlp[0].weight.dtype

    def forward(self, x):
        raise NotImplementedError


def dtype_of_subscripted(self, x):
    return self.mlp(x.to(self.mlp[0].weight.dtype))


def like_subscripted(self, x):
    return self.mlp(x.to(self.mlp[0].weight))


def through_a_variable(self, x):
    block = self.blocks[0]
    return x.type_as(block.first.weight) @ block.first.weight.T


def over_a_loop(self, x):
    for index, block in enumerate(self.blocks):
        if index:
            x = torch.nn.functional.linear(x, block.second.weight)
    return x


def over_a_comprehension(self, x):
    return sum(x @ layer.weight for layer in self.mlp if hasattr(layer, "weight"))


def from_a_dict(self, x):
    return x @ self.named["a"].weight


def from_a_list(self, x):
    return x @ self.unknown[0].weight


def from_a_method(self, x):
    return self.mlp(x.to(self.last().weight.dtype))


def from_a_property(self, x):
    return self.mlp(x.to(self.kind))


def under_another_name(self, x):
    module = self
    weight = (module.named["a"] if x.numel() else module.mlp[0]).weight
    return x @ weight


def from_its_modules(self, x):
    for name, module in self.blocks.named_modules():
        if name.endswith("first"):
            x = x @ module.weight
    return x


MLP, FIRST, SECOND = ["mlp.0", "mlp.2"], ["blocks.0.first", "blocks.1.first"], ["blocks.0.second", "blocks.1.second"]
READ = {
    dtype_of_subscripted: MLP,
    like_subscripted: MLP,
    through_a_variable: FIRST,
    over_a_loop: SECOND,
    over_a_comprehension: MLP,
    from_a_dict: ["named.a"],
    from_a_list: ["named.a"],
    from_a_method: MLP,
    from_a_property: MLP,
    under_another_name: [*MLP, "named.a"],
    from_its_modules: sorted(FIRST + SECOND),
}


@pytest.mark.parametrize("forward", READ)
def test_weights_that_code_reads_off_what_it_took_out_of_self(forward):
    torch.manual_seed(0)
    model, x = type("Model", (Blocks,), {"forward": forward})(), torch.randn(3, 8)
    before = model(x)
    report = gptkern.quantize(model)
    assert [s.name for s in report.skipped] == READ[forward]
    assert {s.reason for s in report.skipped} == {"its parent reads its weight"}
    assert torch.equal(model(x), before)


def called_alone(self, x):
    """Reads no weight of a linear layer but where it is."""
    for block in self.blocks:
        x = block.second(block.first(x.to(self.mlp[0].weight.device)))
    first = self.mlp[0]
    if first.weight.is_cuda:
        x = x.cuda()
    return self.mlp(self.last()(x)) + sum(layer(x) for layer in self.named.values())


def test_layers_that_code_takes_out_of_self_and_calls_are_quantised():
    model, x = type("Model", (Blocks,), {"forward": called_alone})(), torch.randn(3, 8)
    before = model(x)
    assert gptkern.quantize(model).skipped == []
    assert (model(x) - before).norm() < 0.05 * before.norm()


def test_a_shared_layer_is_quantised_once():
    shared = torch.nn.Linear(6, 6)
    model = torch.nn.ModuleDict({"a": torch.nn.Sequential(shared), "b": torch.nn.Sequential(shared, shared)})
    report = gptkern.quantize(model)
    assert quantized_names(report) == ["a.0"] and report.skipped == []
    assert type(model["a"][0]) is Int8Linear
    assert model["a"][0] is model["b"][0] is model["b"][1]


def test_a_shared_layer_that_is_skipped_under_one_name_is_skipped():
    shared = torch.nn.Linear(6, 6)
    model = Pair(shared, shared)
    assert [s.name for s in gptkern.quantize(model, skip=["second"]).skipped] == ["first"]
    assert model.first is model.second is shared
