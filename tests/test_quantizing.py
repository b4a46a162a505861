"""quantize: the layers that become int8, what they keep, what memory holds, what an error leaves."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle

import oracle_quantize_int8
import pytest
import torch
from quantized_models import Pair, classes, gpt, ids, int8_names, logits, quantized_names
from torch.multiprocessing.reductions import StorageWeakRef

import gptkern
from gptkern.nn import Int8Linear
from gptkern.quantizing import report as quantize_report


def test_the_linear_layers_of_a_gpt():
    model = gpt()
    float_model = copy.deepcopy(model)
    report = gptkern.quantize(model)
    names = [f"blocks.{i}.{name}" for i in range(2) for name in
             ("attention.qkv", "attention.project", "perceptron.expand", "perceptron.project")]  # fmt: skip
    assert quantized_names(report) == int8_names(model) == names
    assert report.skipped == [("lm_head", "Linear", "skip names 'lm_head'")]
    for name in names:
        q, scale = oracle_quantize_int8.quantize_int8(float_model.get_submodule(name).weight)
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
    expected = [
        oracle_quantize_int8.quantize_int8(layer.weight.detach().cpu()) for layer in (model.first, model.second)
    ]
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
    q, scale = oracle_quantize_int8.quantize_int8(weight)
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


@pytest.mark.parametrize(
    ("value", "reason"),
    [(1e300, "its weight goes up to 1e+300, past a scale of float32"),
     (-1e41, "its weight goes up to 1e+41, past a scale of float32"),
     (float("inf"), "its weight holds a NaN or an infinity"), (float("nan"), "its weight holds a NaN or an infinity")],
)  # fmt: skip
def test_float64_weights_that_no_float32_scale_holds_are_left_alone(value, reason):
    model = Pair().double()
    with torch.no_grad():
        model.first.weight[2, 3] = value
    report = gptkern.quantize(model)
    assert report.skipped == [("first", "Linear", reason)] and quantized_names(report) == ["second"]


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float64, 1e-60), (torch.float32, 1e-40)])
def test_weights_that_would_all_be_zero_are_left_alone(dtype, factor):
    model = Pair().to(dtype)
    with torch.no_grad():
        model.first.weight.fill_(factor)
        model.second.weight[1:] = factor
    report = gptkern.quantize(model)
    assert report.skipped == [("first", "Linear", f"its weight goes up to {factor:.2g}, below a scale of float32")]
    assert quantized_names(report) == ["second"] and report.quantized[0].error < 0.01


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


HOOKS = {
    "forward": (lambda m, f: m.register_forward_hook(f), 1),
    "forward, with kwargs": (lambda m, f: m.register_forward_hook(f, with_kwargs=True), 1),
    "forward, always": (lambda m, f: m.register_forward_hook(f, always_call=True), 2),
    "before the forward": (lambda m, f: m.register_forward_pre_hook(f), 2),
    "before the forward, with kwargs": (lambda m, f: m.register_forward_pre_hook(f, with_kwargs=True), 2),
    "backward": (lambda m, f: m.register_full_backward_hook(f), 1),
    "before the backward": (lambda m, f: m.register_full_backward_pre_hook(f), 1),
    "older backward": (lambda m, f: m.register_backward_hook(f), 1),
    "saved": (lambda m, f: m._register_state_dict_hook(f), 1),
    "before saving": (lambda m, f: m.register_state_dict_pre_hook(f), 1),
    "before loading": (lambda m, f: m.register_load_state_dict_pre_hook(f), 1),
    "loaded": (lambda m, f: m.register_load_state_dict_post_hook(f), 1),
}


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
@pytest.mark.parametrize("make", [gptkern.quantize, lambda model: gptkern.load_quantized(model, quantised_pair())])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_of_each_kind_is_called_as_often_as_before(kind, make):
    """By a forward and a backward, a forward that fails, a save and a load; and no more once it is removed."""
    register, times = HOOKS[kind]
    model, calls = Pair(), []
    handle = register(model.first, lambda module, *_: calls.append(type(module)))
    layer, hooks = model.first, {name: value for name, value in vars(model.first).items() if "hook" in name}
    make(model)
    assert type(model.first) is Int8Linear and model.first is not layer
    # Of the hooks that PyTorch has none is forgotten, of whatever kind: the same dictionaries, which handles know.
    assert len(hooks) >= 12 and all(vars(model.first)[name] is value for name, value in hooks.items())
    del calls[:]

    def all_of_it():
        model(torch.randn(3, 8, requires_grad=True)).sum().backward()
        with pytest.raises(RuntimeError):
            model.first(torch.randn(3, 7))
        model.load_state_dict(model.state_dict())

    all_of_it()
    assert calls == [Int8Linear] * times
    handle.remove()
    all_of_it()
    assert len(calls) == times


def quantised_pair():
    model = Pair()
    gptkern.quantize(model)
    return model.state_dict()


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


CASTS = {
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "to a dtype": lambda m: m.to(torch.bfloat16),
    "as a tensor is": lambda m: m.to(torch.zeros(1, dtype=torch.float64)),
    # These cast integers, too.
    "type": lambda m: m.type(torch.float16),
    "type, by name": lambda m: m.type("torch.DoubleTensor"),
    "applied": lambda m: m._apply(lambda tensor: tensor.to(torch.bfloat16)),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_model_that_is_cast_keeps_its_int8_weights_and_their_scales(cast):
    model = gpt()
    gptkern.quantize(model)
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    assert len(before) == 16
    dtype = CASTS[cast](model).final_norm.weight.dtype
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
    assert not [name for name in changed if name.endswith(("weight_scale", "int8_weight"))]


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
