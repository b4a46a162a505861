"""What is measured: every operator's cells, inputs, implementations and plain mathematics. Nothing is timed here."""

from __future__ import annotations

import functools
import itertools
import math

import oracles
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gptkern
from gptkern.measuring import peers, runner, tolerance
from gptkern.measuring.cells import Implementation, Missing
from gptkern.measuring.operators import model as of_models
from gptkern.models.gpt import GPT

KINDS, EXTENTS = ("cpu", "cuda"), ("smoke", "quick", "full")
KIND = "cuda" if torch.cuda.is_available() else "cpu"
# A table that is read in one piece, and that is measured in two minutes.
MOST_SMOKE, MOST_QUICK = 3, 6
NAMES = {
    "gptkern",
    "eager",
    "compile",
    "compile max-autotune",
    "SDPA flash",
    "SDPA efficient",
    "SDPA cuDNN",
    "FlexAttention",
    "Liger-Kernel",
    "flash-attn 2",
    "flash-attn 3",
    "flash-attn 4",
    "quack",
    "bf16 linear",
    "int_mm + dequantise",
    "torchao int8",
    "bitsandbytes int8",
}

operators = pytest.mark.parametrize("operator", runner.OPERATORS)
kinds = pytest.mark.parametrize("kind", KINDS)
extents = pytest.mark.parametrize("extent", EXTENTS)

SMOKE = [pytest.param(cell, id=cell.key.replace(" ", "-")) for cell in runner.cells(KIND, "smoke")]


@functools.cache
def cells(operator, kind, extent):
    return runner.module(operator).cells(kind, extent)


def every_cell(kind):
    """All cells of a kind of device that are checked and timed."""
    return itertools.chain(*(cells(operator, kind, extent) for operator in runner.OPERATORS for extent in EXTENTS))


# --- The cells ------------------------------------------------------------------------------------------------------


@kinds
@extents
def test_keys_are_unique(kind, extent):
    keys = [cell.key for cell in runner.cells(kind, extent)]
    assert keys and len(keys) == len(set(keys))


@operators
@kinds
def test_extents(operator, kind):
    smoke, quick, full = (cells(operator, kind, extent) for extent in EXTENTS)
    assert 1 <= len(smoke) <= MOST_SMOKE
    assert 1 <= len(quick) <= MOST_QUICK
    assert set(quick) <= set(full) and len(quick) < len(full)


@kinds
def test_every_cell_is_complete(kind):
    for cell in every_cell(kind):
        assert cell.bytes > 0 and isinstance(cell.bytes, int), cell.key
        assert cell.flops > 0, cell.key
        assert cell.ceiling in ("copy", "float32", "bfloat16", "int8"), cell.key
        assert isinstance(cell.size(cell.x), int), cell.key
        assert (cell.tokens is not None) == (cell.operator == "model"), cell.key
        assert set(dict(cell.limits)) <= NAMES, cell.key
        directions = ("training step", "generation") if cell.operator == "model" else ("forward", "backward", "both")
        assert cell.direction in directions, cell.key


@kinds
def test_panels_run_over_one_size(kind):
    """Cells of one panel and direction differ in the size that the panel is plotted over."""
    panels = {}
    for cell in itertools.chain(*(cells(operator, kind, "full") for operator in runner.OPERATORS)):
        panels.setdefault((cell.operator, cell.panel, cell.direction, cell.dtype), []).append(cell)
    for key, of_panel in panels.items():
        assert len({cell.x for cell in of_panel}) == 1, key
        assert len({cell.size(cell.x) for cell in of_panel}) == len(of_panel), key


@kinds
def test_limits_of_float32_on_a_cpu(kind):
    for operator in ("attention", "layer_norm", "rms_norm", "softmax"):
        for cell in cells(operator, kind, "quick"):
            assert dict(cell.limits) == ({"eager": 1.05} if kind == "cpu" else {}), cell.key
            if kind == "cpu":
                # The promise is for over 1 MB.
                assert cell.dtype == "float32" and cell.bytes > 2**20, cell.key


def test_the_shapes_that_the_tables_promise():
    full = runner.cells("cuda", "full")
    by_operator = {name: [cell for cell in full if cell.operator == name] for name in runner.OPERATORS}
    widths = {768, 1024, 1280, 1600, 2048, 4096, 5120, 12288}
    assert {cell.size("width") for cell in by_operator["layer_norm"]} == widths
    assert {cell.size("width") for cell in by_operator["rms_norm"]} == {128, 2048, 3072, 4096, 8192, 16384}
    softmax = [dict(cell.sizes) for cell in by_operator["softmax"]]
    assert {sizes["width"] for sizes in softmax if "width" in sizes} == widths | {50257}
    assert any(sizes.get("causal") for sizes in softmax)
    attention = [dict(cell.sizes) for cell in by_operator["attention"]]
    assert {sizes["head_dim"] for sizes in attention} == {64, 80, 96, 128}
    assert {sizes["length"] for sizes in attention} == {512 * 2**power for power in range(7)}
    assert {sizes["causal"] for sizes in attention} == {True, False}
    assert {sizes["batch"] * sizes["length"] for sizes in attention} == {16384, 32768}
    assert any(sizes.get("kv_heads", sizes["heads"]) < sizes["heads"] for sizes in attention)
    int8 = [dict(cell.sizes) for cell in by_operator["int8_linear"]]
    assert {sizes["M"] for sizes in int8} == {1, 4, 16, 17, 64, 512, 4096, 16384}
    assert {sizes["mode"] for sizes in int8} == {"w8a8", "w8a16", "auto"}
    for width in (768, 4096, 12288):
        features = {(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)}
        assert features <= {(sizes["in_features"], sizes["out_features"]) for sizes in int8}
    models = {(cell.direction, cell.size("model")) for cell in by_operator["model"]}
    assert models == set(itertools.product(("training step", "generation"), ("gpt2", "gpt3-1.3B")))


# --- Implementations ------------------------------------------------------------------------------------------------


class NothingIsComputed(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} ran")


@operators
@kinds
@pytest.mark.parametrize("extent", ["smoke", "full"])
def test_implementations_are_found_without_computing(operator, kind, extent):
    module = runner.module(operator)
    order = {}
    for cell in cells(operator, kind, extent):
        with NothingIsComputed():
            found = module.implementations(cell, kind)
        assert next(iter(found)) == "gptkern"
        assert set(found) <= NAMES
        assert isinstance(found["gptkern"], Implementation)
        assert isinstance(found.get("eager", found.get("bf16 linear")), Implementation), cell.key
        for name, implementation in found.items():
            assert isinstance(implementation, (Implementation, Missing)), (cell.key, name)
            assert not isinstance(implementation, Missing) or len(implementation.reason) > len("needs a")
        # One order for the rows of all tables of a dtype.
        order.setdefault((cell.dtype, cell.direction), []).append(list(found))
    for of_dtype in order.values():
        longest = max(of_dtype, key=len)
        for names in of_dtype:
            assert names == [name for name in longest if name in names]


@operators
def test_full_cells_have_the_peers(operator):
    (peers_of,) = {
        tuple(runner.module(operator).implementations(cell, "cuda")) for cell in cells(operator, "cuda", "quick")
    }
    expected = {
        "attention": ("compile", *peers.SDPA.values(), peers.FLEX, *peers.FLASH_ATTN.values()),
        "layer_norm": ("compile", "compile max-autotune", "Liger-Kernel", "quack"),
        "rms_norm": ("compile", "compile max-autotune", "Liger-Kernel", "quack"),
        "rotary": ("compile", "compile max-autotune"),
        "softmax": ("compile", "compile max-autotune", "Liger-Kernel", "quack"),
        "int8_linear": ("compile", "int_mm + dequantise", "torchao int8", "bitsandbytes int8"),
        "model": ("compile",),
    }[operator]
    first = "bf16 linear" if operator == "int8_linear" else "eager"
    assert peers_of == ("gptkern", first, *expected)


@kinds
def test_smoke_cells_compile_nothing(kind):
    for cell in runner.cells(kind, "smoke"):
        found = runner.module(cell.operator).implementations(cell, kind)
        assert len(found) == 2 and not any("compile" in name for name in found)


# --- Inputs and plain mathematics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", SMOKE)
def test_inputs_are_random_and_fresh(cell):
    module = runner.module(cell.operator)
    first, second = (module.inputs(cell, KIND) for _ in range(2))
    for tensor, other in zip(first, second):
        assert tensor.device.type == KIND and tensor.is_leaf and not tensor.requires_grad
        assert not torch.equal(tensor, other)
        if cell.operator != "model":
            assert tensor.dtype == getattr(torch, cell.dtype)
            assert tensor.count_nonzero() > 0.99 * tensor.numel()
            assert tensor.float().std() > 0.01


def converted(cell, inputs, precision):
    indices = runner.module(cell.operator).differentiable(cell) if cell.direction in ("backward", "both") else ()
    leaves = tuple(
        tensor.detach().to(precision, copy=True).requires_grad_(place in indices)
        if tensor.is_floating_point()
        else tensor
        for place, tensor in enumerate(inputs)
    )
    return leaves, [leaves[place] for place in indices]


def results(function, leaves, differentiated, dy):
    output = function(*leaves)
    output = output[0] if isinstance(output, tuple) else output
    return [
        output.detach(),
        *(torch.autograd.grad(output, differentiated, dy.to(output.dtype)) if differentiated else ()),
    ]


@pytest.mark.parametrize("cell", SMOKE)
@pytest.mark.parametrize("name", ["gptkern", "eager"])
def test_smoke_cells_are_right(cell, name):
    """Forward and, where it is timed, backward, against the module's own reference by the rule of tolerance."""
    module = runner.module(cell.operator)
    cell = module.check_cell(cell)
    inputs = module.inputs(cell, KIND)
    found = module.implementations(cell, KIND)
    implementation = found.get(name) or found[peers.BF16_LINEAR]
    expected = []
    dy = None
    for precision in (torch.float64, torch.float32):
        leaves, differentiated = converted(cell, inputs, precision)
        if dy is None:
            dy = torch.randn_like(module.reference(cell, leaves, precision))
        reference = functools.partial(lambda precision, *leaves: module.reference(cell, leaves, precision), precision)
        expected.append(results(reference, leaves, differentiated, dy))
    leaves, differentiated = converted(cell, inputs, getattr(torch, cell.dtype))
    if implementation.prepare is not None:
        leaves = implementation.prepare(*leaves)
        assert all(any(leaf is other for other in leaves) for leaf in differentiated), "what is differentiated is kept"
    actual = results(implementation.call, leaves, differentiated, dy)
    int8 = cell.operator == "int8_linear" or dict(cell.sizes).get("weights") == "int8"
    if name == "eager" and (int8 or cell.dtype != "float32"):
        # PyTorch's own, not quantised, or with less than float32 inside: as the runner compares peers.
        for result, right in zip(actual, expected[0], strict=True):
            assert runner._distance(result, right) < runner.AGREEMENT
        return
    for place, (result, reference, yardstick) in enumerate(zip(actual, *expected, strict=True)):
        factor = tolerance.GRADIENT_FACTOR if place else tolerance.FORWARD_FACTOR
        tolerance.assert_close(f"{cell.key}, result {place}", result, reference, yardstick, factor)


def test_reference_of_attention():
    module = runner.module("attention")
    for cell in (*cells("attention", "cpu", "smoke"), *cells("attention", "cuda", "full")):
        cell = module._cell(
            "float64", "forward", 1, *module._sizes(module.check_cell(cell))[1:3], 24, 16, cell.size("causal")
        )
        query, key, value = module.inputs(cell, "cpu")
        expected = oracles.attention(query, key, value, is_causal=cell.size("causal"))
        torch.testing.assert_close(module.reference(cell, (query, key, value), torch.float64), expected)


@pytest.mark.parametrize("residual", [False, True])
def test_reference_of_layer_norm(residual):
    module = runner.module("layer_norm")
    cell = module._cell("float64", "forward", 8, 24, residual)
    x, weight, bias, *added = module.inputs(cell, "cpu")
    expected, _ = oracles.layer_norm(x, (24,), weight, bias, residual=added[0] if residual else None)
    torch.testing.assert_close(module.reference(cell, (x, weight, bias, *added), torch.float64), expected)


def test_reference_of_rms_norm():
    module = runner.module("rms_norm")
    cell = module._cell("float64", "forward", 8, 24)
    x, weight = module.inputs(cell, "cpu")
    expected = oracles.rms_norm(x, (24,), weight, module.EPS)
    torch.testing.assert_close(module.reference(cell, (x, weight), torch.float64), expected)


def test_reference_of_softmax():
    module = runner.module("softmax")
    for cell, options in (
        (module._cell("float64", "forward", 8, 24), {}),
        (module._causal_cell("float64", "forward", 3, 24), {"scale": module.CAUSAL_SCALE, "is_causal": True}),
    ):
        (x,) = module.inputs(cell, "cpu")
        torch.testing.assert_close(module.reference(cell, (x,), torch.float64), oracles.softmax(x, -1, **options))


@pytest.mark.parametrize(("mode", "rows"), [("w8a8", 3), ("w8a16", 3), ("auto", 16), ("auto", 17)])
def test_reference_of_int8_linear(mode, rows):
    module = runner.module("int8_linear")
    cell = module._cell("float32", mode, rows, 32, 24)
    x, weight, bias = module.inputs(cell, "cpu")
    q, scale = oracles.quantize_int8(weight)
    eight_bits = mode == "w8a8" or (mode == "auto" and rows > 16)
    expected = oracles.int8_linear(x, q, scale, bias, quantized=oracles.quantize_int8(x) if eight_bits else None)
    # All of it is exact but the float64 sums.
    torch.testing.assert_close(module.reference(cell, (x, weight, bias), torch.float64), expected)


# --- The check's smaller twin ---------------------------------------------------------------------------------------

# Elements of the largest input, and of attention's scores, that float64 has room for.
MOST_ELEMENTS = 2**28


@kinds
def test_check_cells(kind):
    for cell in every_cell(kind):
        module = runner.module(cell.operator)
        small = module.check_cell(cell)
        assert (small.operator, small.direction) == (cell.operator, cell.direction), cell.key
        assert module.check_cell(small) == small, cell.key
        sizes, of_cell = dict(small.sizes), dict(cell.sizes)
        if cell.operator != "model":
            assert small.dtype == cell.dtype, cell.key
        for name in ("head_dim", "causal", "residual", "in_features", "mode"):
            assert sizes.get(name) == of_cell.get(name), cell.key
        if cell.operator == "attention":
            assert sizes["heads"] * of_cell.get("kv_heads", of_cell["heads"]) == of_cell["heads"] * sizes.get(
                "kv_heads", sizes["heads"]
            ), cell.key
            elements = sizes["batch"] * sizes["heads"] * sizes["length"] ** 2
        elif cell.operator == "model":
            config = of_models._config(small.size("model"))
            assert config.head_dim == of_models._config(cell.size("model")).head_dim, cell.key
            elements = config.vocab_size * sizes["batch"] * sizes["length"]
        elif cell.operator == "int8_linear":
            elements = sizes["in_features"] * max(sizes["M"], sizes["out_features"])
            assert module._resolved(sizes["mode"], sizes["M"]) == module._resolved(of_cell["mode"], of_cell["M"]), (
                cell.key
            )
        else:
            elements = math.prod(size for size in sizes.values() if size is not True) * (
                sizes["length"] if "matrices" in sizes else 1
            )
        assert elements <= MOST_ELEMENTS, cell.key


# --- The model ------------------------------------------------------------------------------------------------------


def smoke_model(direction):
    return next(cell for cell in cells("model", KIND, "smoke") if cell.direction == direction)


def prepared(cell, name):
    implementation = of_models.implementations(cell, KIND)[name]
    return implementation, implementation.prepare(*of_models.inputs(cell, KIND))


def test_a_training_step_can_be_repeated():
    implementation, inputs = prepared(smoke_model("training step"), "gptkern")
    stock = implementation.call.__self__.stock
    before = {name: value.clone() for name, value in stock.state_dict().items()}
    gradients = [implementation.call(*inputs)[0].clone() for _ in range(2)]
    assert torch.equal(*gradients) and gradients[0].count_nonzero() > 0
    assert all(torch.equal(value, before[name]) for name, value in stock.state_dict().items())
    assert len(implementation.call.__self__.optimizer.state) == len(list(stock.parameters())), "AdamW stepped"


@pytest.mark.parametrize("direction", ["training step", "generation"])
def test_gptkern_s_model_is_swapped_and_eager_s_is_not(direction):
    cell = smoke_model(direction)
    for name, swapped in (("gptkern", True), ("eager", False)):
        implementation, _ = prepared(cell, name)
        modules = list(implementation.call.__self__.model.modules())
        assert any(isinstance(module, gptkern.nn.LayerNorm) for module in modules) == swapped
        int8 = any(isinstance(module, gptkern.nn.Int8Linear) for module in modules)
        assert int8 == (swapped and direction == "generation")


def test_all_implementations_have_the_same_weights():
    cell = smoke_model("training step")
    states = [prepared(cell, name)[0].call.__self__.stock.state_dict() for name in ("gptkern", "eager")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(value.count_nonzero() > 0 for value in states[0].values()), "biases too"


def test_generation_appends_the_likeliest_token():
    implementation, (ids,) = prepared(smoke_model("generation"), "gptkern")
    logits, longer = implementation.call(ids)
    assert not logits.requires_grad
    assert torch.equal(longer[:, :-1], ids) and torch.equal(longer[:, -1], logits.argmax(-1))


def test_parameters_and_bytes_of_gpt2():
    config = of_models._config("gpt2")
    # 124,439,808 with the positions, 1024 x 768.
    assert of_models._multiplied(config) == 124_439_808 - 786_432
    assert of_models._weight_bytes(config, "bfloat16", "bfloat16") == 2 * 123_653_376
    # 12 blocks of 12 x 768^2 weights in int8, 9 x 768 scales each; the embedding, the norms and the biases in 16 bits.
    in_int8, scales = 84_934_656, 12 * 9 * 768
    assert of_models._weight_bytes(config, "int8", "bfloat16") == in_int8 + 4 * scales + 2 * (123_653_376 - in_int8)


@pytest.mark.parametrize("name", of_models.SMALL)
def test_parameters_are_the_model_s(name):
    config = of_models._config(name)
    positions = config.context * config.width
    assert of_models._multiplied(config) == GPT(config).parameter_count() - positions
