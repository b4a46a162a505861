"""quantize, load_quantized: which layers become int8, what they keep, what memory holds, the way through a file."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import subprocess
import sys

import oracles
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import gptkern
from gptkern.quantizing import report as quantize_report
from gptkern.models import GPT, GPTConfig
from gptkern.nn import Int8Linear

SMALL = dict(vocab_size=61, context=24, layers=2, width=32, heads=2)


def gpt(**changes):
    torch.manual_seed(1)
    return GPT(GPTConfig(**SMALL | changes)).eval()


def ids(rows=2, length=10):
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(2))


def logits(model, *inputs):
    """Of the reference GPT, which returns a tuple, and of transformers' models."""
    with torch.no_grad():
        output = model(*(inputs or [ids()]))
    return output.logits if hasattr(output, "logits") else output[0]


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def int8_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, Int8Linear)]


def quantized_names(report):
    return [layer.name for layer in report.quantized]


class Pair(torch.nn.Module):
    """Two linear layers, and what a test adds to them."""

    def __init__(self, first=None, second=None):
        super().__init__()
        self.first = torch.nn.Linear(8, 6) if first is None else first
        self.second = torch.nn.Linear(6, 5) if second is None else second

    def forward(self, x):
        return self.second(self.first(x))


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers", reason="transformers is not installed")
    module.utils.logging.set_verbosity_error()
    return module


def gpt2(transformers):
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1 and not parameter.is_meta:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    return model


def llama(transformers):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=24, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


# --- What becomes int8 ------------------------------------------------------------------------------------------------


def test_the_linear_layers_of_a_gpt():
    model = gpt()
    float_model = copy.deepcopy(model)
    report = gptkern.quantize(model)
    names = [f"blocks.{i}.{name}" for i in range(2) for name in
             ("attention.qkv", "attention.project", "perceptron.expand", "perceptron.project")]  # fmt: skip
    assert quantized_names(report) == int8_names(model) == names
    assert report.skipped == [("lm_head", "Linear", "skip names 'lm_head'")]
    for name in names:
        q, scale = oracles.quantize_int8(float_model.get_submodule(name).weight)
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight, q) and torch.equal(layer.weight_scale, scale) and layer.mode == "auto"
    expected = copy.deepcopy(float_model)
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(expected.get_submodule(parent), attribute, Int8Linear.from_linear(float_model.get_submodule(name)))
    assert torch.equal(logits(model), logits(expected))
    assert not torch.equal(logits(model), logits(float_model))


@pytest.mark.parametrize("mode", ["w8a8", "w8a16"])
def test_the_mode_reaches_each_layer(mode):
    model = gpt()
    gptkern.quantize(model, mode)
    assert {model.get_submodule(name).mode for name in int8_names(model)} == {mode}


def test_each_backend_quantises_the_same(backend, device):
    model = Pair().to(device)
    expected = [oracles.quantize_int8(layer.weight.detach().cpu()) for layer in (model.first, model.second)]
    gptkern.quantize(model)
    for layer, (q, scale) in zip((model.first, model.second), expected):
        assert torch.equal(layer.weight.cpu(), q) and torch.equal(layer.weight_scale.cpu(), scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sizes_and_errors(dtype):
    model = Pair(torch.nn.Linear(8, 6, bias=False)).to(dtype)
    weight = model.first.weight.detach().double()
    itemsize = dtype.itemsize
    report = gptkern.quantize(model)
    first, second = report.quantized
    assert first[:5] == ("first", "Linear", (6, 8), 48 * itemsize, 48 + 6 * 4)
    assert second[:5] == ("second", "Linear", (5, 6), 35 * itemsize, 30 + 5 * 4 + 5 * itemsize)
    q, scale = oracles.quantize_int8(weight)
    expected = (weight - q * scale.double()[:, None]).norm() / weight.norm()
    assert 0 < first.error == pytest.approx(expected.item(), rel=1e-3)
    assert (report.bytes_before, report.bytes_after) == (83 * itemsize, 72 + 50 + 5 * itemsize)
    assert (report.model_bytes_before, report.model_bytes_after) == (report.bytes_before, report.bytes_after)


def test_the_model_s_bytes_count_shared_tensors_once():
    model = gpt()
    before = 4 * model.parameter_count()
    report = gptkern.quantize(model)
    assert report.model_bytes_before == before
    assert report.model_bytes_after == before - report.bytes_before + report.bytes_after


def test_a_weight_of_zeros_has_no_error():
    model = Pair()
    torch.nn.init.zeros_(model.first.weight)
    assert gptkern.quantize(model).quantized[0].error == 0


def test_a_second_call_changes_nothing():
    model = gpt()
    first = gptkern.quantize(model)
    layers = {name: id(model.get_submodule(name)) for name in int8_names(model)}
    second = gptkern.quantize(model, "w8a16")
    assert {name: id(model.get_submodule(name)) for name in int8_names(model)} == layers
    assert second.quantized == [] and second.bytes_before == 0
    assert {s.name for s in second.skipped if s.reason == "it is int8 already"} == set(quantized_names(first))


def test_the_report_is_a_table():
    report = gptkern.quantize(Pair(second=Pair()), skip=["second.second"])
    assert repr(report) == "QuantizeReport(2 quantized, 1 skipped)"
    lines = str(report).splitlines()
    assert lines[0] == "2 layers quantized, 1 skipped"
    assert lines[1].split() == ["layer", "class", "out", "x", "in", "before", "after", "smaller", "error"]
    assert lines[2].split()[:10] == ["first", "Linear", "6", "x", "8", "216", "B", "96", "B", "2.25"]
    assert lines[4].startswith("all of these") and lines[5].startswith("the model")
    assert lines[-1].split(maxsplit=2) == ["second.second", "Linear", "skip names 'second.second'"]
    # columns stand below one another
    assert len({line.index("Linear") for line in lines[2:4]}) == 1


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_000, "999.00 kB"), (1_230_000, "1.23 MB"),
     (7_500_000_000, "7.50 GB"), (2_000_000_000_000, "2000.00 GB")],
)  # fmt: skip
def test_sizes_are_shown_in_units(count, shown):
    assert quantize_report._size(count) == shown


def test_the_report_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="gptkern"):
        report = gptkern.quantize(Pair())
    (record,) = caplog.records
    assert record.name == "gptkern" and record.levelno == logging.INFO
    assert str(report) in record.getMessage()


# --- What is left alone -----------------------------------------------------------------------------------------------


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


# --- What a layer keeps -----------------------------------------------------------------------------------------------


def test_bias_flags_and_attributes_are_kept():
    model = Pair()
    model.first.bias.requires_grad_(False)
    model.second.eval()
    model.first.note = "mine"
    biases = model.first.bias, model.second.bias
    gptkern.quantize(model)
    assert (model.first.bias, model.second.bias) == biases
    assert not model.first.bias.requires_grad and model.second.bias.requires_grad
    assert model.first.training and not model.second.training
    assert model.first.note == "mine"


def test_hooks_are_kept_and_can_still_be_removed():
    model, seen = Pair(), []
    handles = [
        model.first.register_forward_hook(lambda module, args, output: seen.append(("after", type(module)))),
        model.first.register_forward_pre_hook(lambda module, args: seen.append(("before", type(module)))),
        model.first.register_full_backward_hook(lambda module, *grads: seen.append(("backward", type(module)))),
        model.first.register_forward_hook(lambda module, args, kwargs, output: seen.append("kw"), with_kwargs=True),
    ]
    gptkern.quantize(model)
    x = torch.randn(3, 8, requires_grad=True)
    model(x).sum().backward()
    assert seen == [("before", Int8Linear), ("after", Int8Linear), "kw", ("backward", Int8Linear)]
    for handle in handles:
        handle.remove()
    model(x)
    assert len(seen) == 4


def test_swap_before_quantize_after_and_the_other_way_round():
    stock = gpt()
    swapped_first, quantised_first, quantised = (copy.deepcopy(stock) for _ in range(3))
    gptkern.swap(swapped_first)
    gptkern.quantize(swapped_first)
    gptkern.quantize(quantised_first)
    gptkern.swap(quantised_first)
    gptkern.quantize(quantised)
    assert classes(swapped_first) == classes(quantised_first) != classes(quantised)
    assert torch.equal(logits(swapped_first), logits(quantised_first))
    torch.testing.assert_close(logits(swapped_first), logits(quantised))
    for model in (swapped_first, quantised_first):
        gptkern.unswap(model)
        assert classes(model) == classes(quantised)
        assert torch.equal(logits(model), logits(quantised))


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_a_model_that_is_cast_keeps_its_int8_weights_and_their_scales(convert):
    model = gpt()
    gptkern.quantize(model)
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    assert len(before) == 16
    dtype = convert(model).final_norm.weight.dtype
    assert dtype != torch.float32
    for name, tensor in model.named_buffers():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    assert logits(model).dtype == dtype


def test_copies():
    model = gpt()
    gptkern.swap(model)
    gptkern.quantize(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
    ):  # fmt: skip
        assert classes(other) == classes(model)
        assert torch.equal(logits(other), logits(model))
        assert other.blocks[0].attention.qkv.weight.data_ptr() != model.blocks[0].attention.qkv.weight.data_ptr()


def test_biases_and_norms_train_on():
    model = gpt().train()
    gptkern.swap(model)
    gptkern.quantize(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids(), ids())[1].backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"blocks.0.attention.project.bias", "blocks.1.attention_norm.weight", "lm_head.weight"} <= changed
    assert not [name for name in changed if name.endswith((".weight_scale", "qkv.weight", "expand.weight"))]


# --- Memory, and errors -----------------------------------------------------------------------------------------------


def test_one_float_weight_at_a_time(monkeypatch):
    model = gpt(layers=4)
    names = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear and name != "lm_head"]
    storages = [StorageWeakRef(model.get_submodule(name).weight.untyped_storage()) for name in names]
    from_linear, alive = Int8Linear.from_linear, []

    def counting(module, **options):
        alive.append(sum(not storage.expired() for storage in storages))
        return from_linear(module, **options)

    monkeypatch.setattr(Int8Linear, "from_linear", counting)
    gc.disable()  # what is freed is freed at once
    try:
        gptkern.quantize(model)
        assert alive == list(range(16, 0, -1))
        assert all(storage.expired() for storage in storages)
    finally:
        gc.enable()


BAD = {
    "model": (lambda m: gptkern.quantize("gpt"), TypeError, "model is a str; it needs a torch.nn.Module"),
    "a linear layer": (lambda m: gptkern.quantize(m.lm_head), TypeError, "itself a Linear.*Int8Linear.from_linear"),
    "mode": (lambda m: gptkern.quantize(m, "w4a16"), ValueError, "mode is 'w4a16'"),
    "skip, a string": (lambda m: gptkern.quantize(m, skip="lm_head"), TypeError, r"skip is 'lm_head'.*\['lm_head'\]"),
    "skip, a number": (lambda m: gptkern.quantize(m, skip=[3]), TypeError, "skip holds a int"),
    "skip, None": (lambda m: gptkern.quantize(m, skip=None), TypeError, "skip is None"),
    "skip, no module": (lambda m: gptkern.quantize(m, skip=["qkv", "fc1"]), ValueError, "skip holds 'fc1'"),
    "filter": (lambda m: gptkern.quantize(m, filter="qkv"), TypeError, "filter is a str"),
    "filter fails": (
        lambda m: gptkern.quantize(m, filter=lambda name, _: 1 / ("1" not in name)),
        ZeroDivisionError,
        "division",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_before_anything_changes(what):
    call, error, message = BAD[what]
    model = gpt()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=message):
        call(model)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_a_backend_that_cannot_is_refused_before_anything_changes(kernel_backend, device):
    model = Pair(second=torch.nn.Linear(6, 5, dtype=torch.float64)).to(device)
    with pytest.raises(gptkern.BackendError, match="quantize_int8"):
        gptkern.quantize(model)
    assert int8_names(model) == []


def test_an_error_in_the_middle_leaves_every_layer_whole(monkeypatch):
    model = gpt()
    expected = copy.deepcopy(model)
    gptkern.quantize(expected)
    from_linear, calls = Int8Linear.from_linear, []

    def failing(module, **options):
        calls.append(module)
        if len(calls) == 4:
            raise MemoryError
        return from_linear(module, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Int8Linear, "from_linear", failing)
        with pytest.raises(MemoryError):
            gptkern.quantize(model)
    assert int8_names(model) == int8_names(expected)[:3]
    logits(model)
    assert len(gptkern.quantize(model).quantized) == 5
    assert torch.equal(logits(model), logits(expected))


# --- Through a file ---------------------------------------------------------------------------------------------------


def on_meta(make, *arguments):
    with torch.device("meta"):
        return make(*arguments)


class Made(TorchDispatchMode):
    """The tensors off the meta device that operators gave inside."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.tensors.append(tensor)
        return result


def saved(model, path):
    from safetensors.torch import save_model

    save_model(model, str(path))
    return path


def read(path):
    from safetensors.torch import load_file

    return load_file(str(path))


def test_meta_quantise_and_load_state_dict_in_pytorch_s_own_words(tmp_path):
    from safetensors.torch import save_file

    model = Pair()
    gptkern.quantize(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh = on_meta(Pair)
    report = gptkern.quantize(fresh)
    assert [layer.error for layer in report.quantized] == [None, None]
    assert {tensor.device.type for tensor in fresh.state_dict().values()} == {"meta"}
    fresh.load_state_dict(read(tmp_path / "model.safetensors"), assign=True)
    x = torch.randn(3, 8)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("quantise_first", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_gpt_comes_back_bit_for_bit_and_its_float_weights_never_exist(tmp_path, swapped, quantise_first):
    def make():
        return gpt(vocab_size=29)  # an embedding smaller than the smallest linear layer's weight, of 32 x 32

    model, tokens = make(), ids() % 29
    gptkern.quantize(model)
    path = saved(model, tmp_path / "model.safetensors")
    fresh = on_meta(make)
    with Made() as made:
        if swapped:
            gptkern.swap(fresh)
        if quantise_first:
            gptkern.quantize(fresh)
        assert gptkern.load_quantized(fresh, read(path)) is fresh
    assert max(tensor.numel() for tensor in made.tensors if tensor.is_floating_point()) < 32 * 32
    assert int8_names(fresh) == int8_names(model)
    assert fresh.lm_head.weight is fresh.token_embedding.weight
    assert list(fresh.state_dict()) == list(model.state_dict())
    assert all(p.requires_grad for p in fresh.parameters())
    if swapped:
        gptkern.swap(model)
    assert torch.equal(logits(fresh, tokens), logits(model, tokens))
    assert torch.equal(fresh.generate(tokens, 8, temperature=0), model.generate(tokens, 8, temperature=0))


def test_loading_allocates_nothing(tmp_path):
    model = gpt()
    gptkern.quantize(model)
    state = read(saved(model, tmp_path / "model.safetensors"))
    fresh = on_meta(gpt)
    with Made() as made:
        gptkern.load_quantized(fresh, state)
    pointers = {tensor.data_ptr() for tensor in state.values()}
    assert {tensor.data_ptr() for tensor in made.tensors} <= pointers
    assert {tensor.data_ptr() for tensor in fresh.state_dict().values()} == pointers


def state_dict_hooks(layer, seen):
    """One of each kind -> their handles."""
    return [
        layer._register_state_dict_hook(lambda module, *_: seen.append(("saved", type(module)))),
        layer.register_state_dict_pre_hook(lambda module, *_: seen.append(("saving", type(module)))),
        layer.register_load_state_dict_pre_hook(lambda module, *_: seen.append(("loading", type(module)))),
        layer._register_load_state_dict_pre_hook(
            lambda state_dict, *_: seen.append(("loading it", "first.weight" in state_dict))
        ),
        layer.register_load_state_dict_post_hook(lambda module, _: seen.append(("loaded", type(module)))),
    ]


def test_state_dict_hooks_are_kept_and_can_still_be_removed():
    model, seen = Pair(), []
    handles = state_dict_hooks(model.first, seen)
    gptkern.quantize(model)
    gc.collect()
    state = model.state_dict()
    assert seen == [("saving", Int8Linear), ("saved", Int8Linear)]
    model.load_state_dict(state)
    assert seen[2:] == [("loading", Int8Linear), ("loading it", True), ("loaded", Int8Linear)]
    for handle in handles[1:]:
        handle.remove()
    del seen[:]
    model.load_state_dict(model.state_dict())
    assert [event for event, _ in seen] == ["saved"]

    fresh, seen = Pair(), []
    state_dict_hooks(fresh.first, seen)
    with pytest.raises(RuntimeError):
        gptkern.load_quantized(fresh, state | {"more": torch.ones(1)})
    del seen[:]
    gc.collect()
    fresh.load_state_dict(Pair().state_dict())
    assert [kind for event, kind in seen if event != "loading it"] == [torch.nn.Linear] * 2
    gptkern.load_quantized(fresh, state)
    assert [kind for event, kind in seen[3:] if event != "loading it"] == [Int8Linear] * 2


def test_a_model_with_weights_loses_them_and_keeps_the_rest():
    model = gpt()
    gptkern.quantize(model, "w8a16")
    fresh = gpt(dropout=0.1)
    fresh.blocks[0].attention.qkv.bias.requires_grad_(False)
    weights = [StorageWeakRef(block.attention.qkv.weight.untyped_storage()) for block in fresh.blocks]
    gptkern.load_quantized(fresh, model.state_dict(), "w8a16")
    assert all(weight.expired() for weight in weights)
    assert not fresh.blocks[0].attention.qkv.bias.requires_grad
    assert {fresh.get_submodule(name).mode for name in int8_names(fresh)} == {"w8a16"}
    assert torch.equal(logits(fresh), logits(model))


def test_what_was_skipped_is_float_again(tmp_path):
    model = gpt()
    gptkern.quantize(model, skip=["lm_head", "blocks.1"])
    fresh = gptkern.load_quantized(on_meta(gpt), read(saved(model, tmp_path / "model.safetensors")))
    assert int8_names(fresh) == int8_names(model) and len(int8_names(fresh)) == 4
    assert torch.equal(logits(fresh), logits(model))


def test_shared_layers_come_back_shared(tmp_path):
    def make():
        shared = torch.nn.Linear(6, 6)
        return torch.nn.Sequential(shared, torch.nn.Linear(6, 6), shared)

    model = make()
    gptkern.quantize(model)
    fresh = gptkern.load_quantized(on_meta(make), read(saved(model, tmp_path / "model.safetensors")))
    x = torch.randn(3, 6)
    assert fresh[0] is fresh[2] and torch.equal(fresh(x), model(x))


def test_another_dtype_is_the_file_s(tmp_path):
    model = gpt()
    gptkern.quantize(model)
    model.bfloat16()
    fresh = gptkern.load_quantized(on_meta(gpt), read(saved(model, tmp_path / "model.safetensors")))
    assert fresh.final_norm.weight.dtype == torch.bfloat16
    assert fresh.blocks[0].attention.qkv.weight_scale.dtype == torch.float32
    assert torch.equal(logits(fresh), logits(model))


def state_of_gpt(**changes):
    model = gpt()
    gptkern.quantize(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in (state | changes).items() if tensor is not None}


def quantised_pair():
    model = Pair()
    gptkern.quantize(model)
    return model


class WithBuffer(Pair):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(5.0), persistent=False)


REFUSED = {
    "model": (lambda: ("gpt", {}), TypeError, "model is a str"),
    "no mapping": (lambda: (gpt(), "model.safetensors"), TypeError, "state_dict is a str.*load_file"),
    "mode": (lambda: (gpt(), {}, "w4"), ValueError, "mode is 'w4'"),
    "a key too few": (lambda: (gpt(), state_of_gpt(**{"final_norm.bias": None})), RuntimeError, "final_norm.bias"),
    "a key too many": (lambda: (gpt(), state_of_gpt(more=torch.ones(1))), RuntimeError, "more"),
    "another shape": (lambda: (gpt(width=64), state_of_gpt()), RuntimeError, "size mismatch"),
    "no scales": (
        lambda: (gpt(), state_of_gpt(**{"blocks.0.attention.qkv.weight_scale": None})), RuntimeError, "weight_scale",
    ),
    "scales of 16 bits": (
        lambda: (gpt(), state_of_gpt(**{"blocks.0.attention.qkv.weight_scale": torch.ones(96).half()})),
        TypeError, "blocks.0.attention.qkv.weight_scale is torch.float16.*needs torch.float32",
    ),
    "a float weight for an int8 layer": (
        lambda: (quantised_pair(), {**quantised_pair().state_dict(), "second.weight": torch.zeros(5, 6)}),
        TypeError, "second.weight is torch.float32.*needs torch.int8",
    ),
    "no linear layer": (
        lambda: (Pair(torch.nn.Sequential()), {"first.weight": torch.zeros(2, 2, dtype=torch.int8)}),
        TypeError, "first, which is a Sequential",
    ),
    "ties that differ": (
        lambda: (gpt(), state_of_gpt(**{"lm_head.weight": torch.zeros(61, 32)})), ValueError, "the model ties",
    ),
    "a buffer on meta": (
        lambda: (on_meta(WithBuffer), Pair().state_dict()), RuntimeError, "table would stay on the meta device",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(what):
    make, error, message = REFUSED[what]
    model, *arguments = make()
    before = model
    if isinstance(model, torch.nn.Module):
        before = [(id(module), {**module._parameters, **module._buffers}) for module in model.modules()]
        before = [(key, {name: id(tensor) for name, tensor in tensors.items()}) for key, tensors in before]
    with pytest.raises(error, match=message):
        gptkern.load_quantized(model, *arguments)
    if isinstance(model, torch.nn.Module):
        after = [(id(module), {**module._parameters, **module._buffers}) for module in model.modules()]
        assert [(key, {name: id(tensor) for name, tensor in tensors.items()}) for key, tensors in after] == before


# --- transformers -----------------------------------------------------------------------------------------------------


def test_transformers_is_not_imported():
    program = """
import sys, torch, gptkern
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
gptkern.load_quantized(model, gptkern.quantize(model) and model.state_dict())
assert "transformers" not in sys.modules and "safetensors" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("make", [gpt2, llama])
def test_models_of_transformers(transformers, tmp_path, make):
    model = make(transformers)
    float_logits, keys = logits(model), list(model.state_dict())
    weights = {name: m.weight for name, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    conv1d = make is gpt2
    report = gptkern.quantize(model)
    assert len(report.quantized) == len(weights) - 1 == (8 if conv1d else 14)
    assert [s.name for s in report.skipped] == ["lm_head"]
    for layer in report.quantized:
        weight = weights[layer.name].t() if conv1d else weights[layer.name]
        assert layer.shape == tuple(weight.shape) and layer.error < 0.01
        q, scale = oracles.quantize_int8(weight.detach())
        int8 = model.get_submodule(layer.name)
        assert torch.equal(int8.weight, q) and torch.equal(int8.weight_scale, scale)
    assert 0 < (logits(model) - float_logits).norm() / float_logits.norm() < 0.02
    path = saved(model, tmp_path / "model.safetensors")

    if conv1d:
        fresh = on_meta(make, transformers)
    else:
        # Llama's rotary frequencies are a buffer that no state_dict holds.
        with pytest.raises(RuntimeError, match=r"rotary_emb\.inv_freq.* would stay on the meta device"):
            gptkern.load_quantized(on_meta(make, transformers), read(path))
        fresh = make(transformers)
        for name, parameter in list(fresh.named_parameters()):
            path_of, _, key = name.rpartition(".")
            setattr(fresh.get_submodule(path_of), key, torch.nn.Parameter(parameter.detach().to("meta")))
    gptkern.load_quantized(fresh, read(path))
    assert list(fresh.state_dict()) == list(model.state_dict()) != keys
    assert (fresh.lm_head.weight is fresh.get_input_embeddings().weight) == conv1d
    assert torch.equal(logits(fresh), logits(model))
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    generated = fresh.generate(ids(), **options)
    assert generated.shape[1] > ids().shape[1]
    assert torch.equal(generated, model.generate(ids(), **options))


@pytest.mark.parametrize("make", [gpt2, llama])
def test_models_of_transformers_swapped_and_quantised_in_either_order(transformers, make):
    plain, swapped_first, quantised_first = (make(transformers) for _ in range(3))
    gptkern.quantize(plain)
    gptkern.swap(swapped_first)
    gptkern.quantize(swapped_first)
    gptkern.quantize(quantised_first)
    gptkern.swap(quantised_first)
    assert classes(swapped_first) == classes(quantised_first) != classes(plain)
    expected = plain.generate(ids(), max_new_tokens=6, do_sample=False, pad_token_id=0)
    for model in (swapped_first, quantised_first):
        torch.testing.assert_close(logits(model), logits(plain))
        assert torch.equal(model.generate(ids(), max_new_tokens=6, do_sample=False, pad_token_id=0), expected)
        gptkern.unswap(model)
        assert classes(model) == classes(plain)
        assert torch.equal(logits(model), logits(plain))


def test_weights_of_transformers_are_freed_one_by_one(transformers, monkeypatch):
    model = gpt2(transformers)
    storages = [StorageWeakRef(block.mlp.c_fc.weight.untyped_storage()) for block in model.transformer.h]
    alive, from_linear = [], Int8Linear.from_linear
    monkeypatch.setattr(
        Int8Linear, "from_linear",
        lambda module, **o: alive.append(sum(not s.expired() for s in storages)) or from_linear(module, **o),
    )  # fmt: skip
    gptkern.quantize(model)
    # c_fc is the third of a block's four
    assert alive == [2, 2, 2, 1, 1, 1, 1, 0]
