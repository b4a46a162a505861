"""LoRA: adapters beside linear layers, float and int8."""

import copy
import pickle

import pytest
import safetensors.torch
import torch
import torch.distributed
from torch import nn

import gptkern
from gptkern.models.gpt import GPT, GPTConfig
from gptkern.nn import Int8Linear
from gptkern.training import lora
from gptkern.training.optimizers import optimizer_of

CONFIG = GPTConfig(vocab_size=31, context=12, layers=2, width=16, heads=2)
IDS = torch.arange(24).view(2, 12) * 7 % 31
LAYERS = ["attention.qkv", "attention.project", "perceptron.expand", "perceptron.project"]
ALL = [f"blocks.{block}.{layer}" for block in range(2) for layer in LAYERS]


def gpt(kind: str = "float32", seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(CONFIG)
    if kind == "int8":
        # Of few rows and many the same products: those of w8a8 are rounded by the input's own scale.
        gptkern.quantize(model, mode="w8a16")
        return model
    return model.to(getattr(torch, kind))


def adapted(kind: str = "float32", **options) -> GPT:
    """With adapters that have learned something."""
    model = gpt(kind)
    lora.add(model, 3, **{"alpha": 6.0, **options})
    draw(model)
    return model


def draw(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.trainable(model).values():
        nn.init.normal_(parameter, std=0.2, generator=generator)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    # As bytes: a zero has a sign, too.
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(raw(a[k]), raw(b[k])) for k in a)


def raw(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", ["float64", "int8"])
def test_output_and_gradients_are_the_formula_s(kind):
    torch.manual_seed(2)
    linear = nn.Linear(7, 5, dtype=torch.float64)
    layer = Int8Linear.from_linear(linear, mode="w8a16") if kind == "int8" else linear
    weight = (layer.int8_weight.double() * layer.weight_scale.double()[:, None]) if kind == "int8" else linear.weight
    weight, bias = weight.detach().clone(), linear.bias.detach().clone()
    assert lora.add(layer, 2, alpha=3.0) == [""]
    draw(layer)
    a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 3, 5, dtype=torch.float64)
    y = layer(x)
    y.backward(dy)

    rows, drows = x.detach().view(6, 7), dy.view(6, 5)
    full = weight + 1.5 * b @ a
    near = dict(rtol=1e-12, atol=1e-12) if kind == "float64" else dict(rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(y.view(6, 5), rows @ full.T + bias, **near)
    torch.testing.assert_close(x.grad.view(6, 7), drows @ full, **near)
    torch.testing.assert_close(layer.lora_A.grad.double(), 1.5 * b.T @ drows.T @ rows, **near)
    torch.testing.assert_close(layer.lora_B.grad.double(), 1.5 * drows.T @ (rows @ a.T), **near)
    assert layer.bias.grad is None


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_step_0_is_the_base_and_training_leaves_the_base_alone(kind):
    model = gpt(kind)
    before, logits = bits(model), model(IDS)[0].detach()
    assert lora.add(model, 3) == ALL
    assert torch.equal(model(IDS)[0], logits)
    assert all(p.dtype == torch.float32 for p in lora.trainable(model).values())
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert own == lora.trainable(model).keys() == {f"{name}.{part}" for name in ALL for part in ("lora_A", "lora_B")}

    drawn = {name: value.detach().clone() for name, value in lora.trainable(model).items()}
    optimizer, losses = optimizer_of(model, 1e-2), []
    for _ in range(4):
        loss = model(IDS[:, :-1], IDS[:, 1:])[1]
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert same(bits(model), before)
    assert not any(torch.equal(value, drawn[name]) for name, value in lora.trainable(model).items())

    assert lora.remove(model) == ALL
    assert same(model.state_dict(), before) and torch.equal(model(IDS)[0], logits)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {type(model.get_submodule(name)) for name in ALL} == {Int8Linear if kind == "int8" else nn.Linear}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_merged_is_unmerged_within_rounding_and_back_to_the_bit(kind):
    model = adapted(kind)
    before, logits, parameters = bits(model), model(IDS)[0], lora.trainable(model)
    exact = {}
    for name in ALL:
        layer = model.get_submodule(name)
        base = layer.int8_weight.double() * layer.weight_scale.double()[:, None] if kind == "int8" else layer.weight
        exact[name] = base.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
    assert lora.merge(model) == ALL
    assert list(model.state_dict()) == list(GPT(CONFIG).state_dict())
    # The sum and the product in float32, and one rounding to the weight's dtype: half a unit of its last place.
    half = torch.finfo(torch.bfloat16 if kind == "bfloat16" else torch.float32).eps / 2
    for name in ALL:
        weight = model.get_submodule(name).weight
        assert type(model.get_submodule(name)) is nn.Linear
        slack = 1.001 if kind == "bfloat16" else 8
        assert bool(((weight.double() - exact[name]).abs() <= slack * half * exact[name].abs() + 1e-7).all())
    near = 0.06 if kind == "bfloat16" else 2e-5
    torch.testing.assert_close(model(IDS)[0], logits, rtol=near, atol=near)
    assert not torch.equal(model(IDS)[0], gpt(kind)(IDS)[0])

    assert lora.unmerge(model) == ALL
    assert same(bits(model), before) and torch.equal(model(IDS)[0], logits)
    assert all(value is parameters[name] for name, value in lora.trainable(model).items())

    lora.merge(model)
    merged = bits(model)
    lora.remove(model)
    assert same(model.state_dict(), before)

    final = adapted(kind)
    lora.merge(final, reversible=False)
    assert same(final.state_dict(), merged)
    assert all(parameter.requires_grad for parameter in final.parameters())
    for name in ALL:
        assert vars(final.get_submodule(name)).keys() == vars(nn.Linear(1, 1)).keys()
    with pytest.raises(ValueError, match="no layer of the model is merged"):
        lora.unmerge(final)


def test_merged_int8_layers_take_a_dtype_and_do_not_come_back_from_another_quantisation():
    model = adapted("int8")
    lora.merge(model, dtype=torch.bfloat16)
    assert {model.get_submodule(name).weight.dtype for name in ALL} == {torch.bfloat16}
    with pytest.raises(ValueError, match="adapters are merged"):
        lora.state(model)
    lora.unmerge(model)
    lora.merge(model)
    report = gptkern.quantize(model, mode="w8a16")
    assert len(report.quantized) == 8 and all(layer.error > 0 for layer in report.quantized)
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.qkv became a Int8Linear after it was merged"):
        lora.unmerge(model)


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_saved_adapters_come_back(kind, tmp_path):
    model = adapted(kind, alpha=0.3)
    safetensors.torch.save_file(lora.state(model), tmp_path / "adapters.safetensors")
    state = safetensors.torch.load_file(tmp_path / "adapters.safetensors")
    assert state.keys() == {f"{name}.{part}" for name in ALL for part in ("lora_A", "lora_B", "lora_alpha")}

    fresh = gpt(kind)
    assert lora.load(fresh, state) == ALL
    assert torch.equal(fresh(IDS)[0], model(IDS)[0])
    assert fresh.blocks[1].attention.qkv.lora_alpha == 0.3
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == lora.trainable(fresh).keys()

    there = gpt(kind)
    lora.add(there, 3, alpha=0.3)
    parameters = lora.trainable(there)
    lora.load(there, state)
    assert torch.equal(there(IDS)[0], model(IDS)[0])
    assert all(value is parameters[name] for name, value in lora.trainable(there).items())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"blocks.0.attention.qkv.lora_B": None}, "state has no blocks.0.attention.qkv.lora_B"),
        (
            {"blocks.0.attention.qkv.weight": torch.ones(1)},
            "state has blocks.0.attention.qkv.weight; it needs adapters",
        ),
        ({"blocks.7.attention.qkv.lora_A": torch.ones(3, 16)}, "state has no blocks.7.attention.qkv.lora_B"),
        ({"blocks.0.attention.qkv.lora_A": torch.ones(3, 15)}, r"has shape \(3, 15\); it needs \(3, 16\)"),
        ({"blocks.0.attention.qkv.lora_A": torch.ones(2, 16)}, r"lora_B has shape \(48, 3\); it needs \(48, 2\)"),
        ({"blocks.0.attention.qkv.lora_A": torch.full((3, 16), torch.nan)}, "it needs finite floating-point numbers"),
        ({"blocks.0.attention.qkv.lora_A": torch.ones(3)}, "of 2 dimensions"),
        ({"blocks.0.attention.qkv.lora_alpha": torch.tensor(-1.0)}, "lora_alpha is -1; it needs to be above 0"),
        ({"blocks.0.attention.qkv.lora_alpha": torch.tensor(5.0)}, "has rank 3 and alpha 5; the model's has rank 3"),
        (dict.fromkeys(f"{ALL[3]}.{part}" for part in ("lora_A", "lora_B", "lora_alpha")), f"state has no {ALL[3]}"),
    ],
)
def test_other_adapters_are_refused_and_nothing_is_changed(change, message):
    model = adapted()
    state = {name: value.clone() for name, value in lora.state(model).items()}
    other = {name: 2 * value if value.dim() else value for name, value in state.items()}
    given = {name: value for name, value in (other | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        lora.load(model, given)
    assert same(lora.state(model), state)


def test_adapters_of_another_model_are_refused_by_one_that_has_none():
    model, state = gpt(), lora.state(adapted())
    before = bits(model)
    other = {name.replace("blocks.1", "blocks.2"): value for name, value in state.items()}
    with pytest.raises(ValueError, match=r"blocks\.2\.attention\.qkv names no linear layer of the model"):
        lora.load(model, other)
    assert same(model.state_dict(), before) and all(parameter.requires_grad for parameter in model.parameters())


def shared() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    return model


class Reads(nn.Module):
    """Uses its layer's weight and does not call it: an adapter there would do nothing."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x @ self.fc.weight.T


@pytest.mark.parametrize(
    "make, arguments, message",
    [
        (gpt, dict(rank=0), "rank is 0; it needs a whole number of at least 1"),
        (gpt, dict(rank=True), "rank is True"),
        (gpt, dict(rank=17), r"rank is 17; blocks\.0\.attention\.qkv is 48 x 16 and needs one from 1 to 16"),
        (gpt, dict(rank=2, alpha=0.0), "alpha is 0.0; it needs a finite number above 0"),
        (gpt, dict(rank=2, alpha=float("nan")), "alpha is nan"),
        (gpt, dict(rank=2, dropout=1.0), "dropout is 1.0"),
        (gpt, dict(rank=2, targets=["attention.qkv", "c_attn"]), "c_attn names no linear layer of the model; it has"),
        (gpt, dict(rank=2, targets=[]), "no linear layer that can be adapted"),
        (gpt, dict(rank=2, targets=["lm_head"]), r"its weight is tied to token_embedding\.weight"),
        (shared, dict(rank=2), r"no linear layer that can be adapted \(a: its weight is tied to b\.weight\)"),
        (Reads, dict(rank=2, targets=["fc"]), "fc: its parent reads its weight past it"),
        (adapted, dict(rank=2, targets=["perceptron.expand"]), r"blocks\.0\.attention\.qkv has an adapter already"),
        (
            lambda: nn.Sequential(Int8Linear(4, 4, activation="gelu")),
            dict(rank=2, targets=["0"]),
            "its activation is 'gelu', which would have to follow the adapter",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_nothing_is_changed(make, arguments, message):
    model = make()
    before = [(name, p.requires_grad) for name, p in model.named_parameters()], list(map(type, model.modules()))
    with pytest.raises(ValueError, match=message):
        lora.add(model, **arguments)
    assert before == ([(n, p.requires_grad) for n, p in model.named_parameters()], list(map(type, model.modules())))


def test_merged_counts_as_adapted_too():
    model = adapted()
    lora.merge(model)
    for call in (
        lambda: lora.add(model, 2),
        lambda: lora.merge(model),
        lambda: lora.load(model, lora.state(adapted())),
    ):
        with pytest.raises(ValueError, match="merged"):
            call()
    with pytest.raises(ValueError, match=r"are none; it needs those that lora\.add adds"):
        lora.remove(gpt())


def test_targets_are_patterns_of_names():
    assert lora.add(gpt(), 2, targets=["attention.qkv"]) == [ALL[0], ALL[4]]
    assert lora.add(gpt(), 2, targets=["blocks.1.*", "blocks.0.attention.project"]) == [ALL[1], *ALL[4:]]


def test_a_seed_gives_the_same_adapters_and_frozen_parameters_stay_frozen():
    first, second = gpt(), gpt()
    second.position_embedding.weight.requires_grad_(False)
    for model in (first, second):
        lora.add(model, 3, generator=torch.Generator().manual_seed(5))
    assert same(lora.state(first), lora.state(second))
    lora.remove(second)
    assert [n for n, p in second.named_parameters() if not p.requires_grad] == ["position_embedding.weight"]


def test_dropout_is_of_the_adapter_s_input_alone():
    layer = nn.Linear(6, 4)
    lora.add(layer, 2, alpha=1.0, dropout=0.5)
    x = torch.randn(5, 6)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), base)
    draw(layer)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(y, base + 0.5 * dropped @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer.eval()(x), base + 0.5 * x @ layer.lora_A.T @ layer.lora_B.T)


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_swap_compile_copies_and_autocast(kind):
    model = adapted(kind)
    logits = model(IDS)[0].detach()
    gptkern.swap(model)
    torch.testing.assert_close(model(IDS)[0], logits)
    gptkern.unswap(model)
    assert torch.equal(model(IDS)[0], logits)

    swapped = gpt(kind)
    gptkern.swap(swapped)
    lora.load(swapped, lora.state(model))
    torch.testing.assert_close(swapped(IDS)[0], logits)
    assert torch.equal(copy.deepcopy(model)(IDS)[0], logits)
    assert torch.equal(pickle.loads(pickle.dumps(model))(IDS)[0], logits)

    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(IDS)[0]
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), logits, rtol=0.05, atol=0.05)


@pytest.mark.deep
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_compiled_model_follows(kind):
    model = gpt(kind)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    plain = compiled(IDS)[0]
    lora.add(model, 3)
    draw(model)
    gradients = []
    for each in (model, compiled):
        each(IDS[:, :-1], IDS[:, 1:])[1].backward()
        gradients.append([parameter.grad.clone() for parameter in lora.trainable(model).values()])
        model.zero_grad()
    torch.testing.assert_close(*gradients)
    with_adapters = compiled(IDS)[0]
    torch.testing.assert_close(with_adapters, model(IDS)[0])
    assert not torch.allclose(with_adapters, plain)
    lora.remove(model)
    assert torch.equal(compiled(IDS)[0], plain)


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def gradients(model: nn.Module, parameters: nn.Module) -> dict[str, torch.Tensor]:
    model(IDS[:, :-1], IDS[:, 1:])[1].backward()
    found = {name: parameter.grad for name, parameter in lora.trainable(parameters).items()}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def test_in_distributed_data_parallel(process_group):
    model, alone = adapted(), adapted()
    wrapped = nn.parallel.DistributedDataParallel(model)
    torch.testing.assert_close(gradients(wrapped, model), gradients(alone, alone))
    lora.remove(model)
    with pytest.raises(ValueError, match=r"it is wrapped \(DistributedDataParallel, FSDP\)"):
        lora.add(wrapped, 2)


@pytest.mark.deep
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_fully_sharded(kind, process_group):
    from torch.distributed.fsdp import fully_shard

    model, alone, late = adapted(kind), adapted(kind), gpt(kind)
    for module in (*model.blocks, model, late):
        fully_shard(module)
    torch.testing.assert_close(gradients(model, model), gradients(alone, alone))
    with pytest.raises(ValueError, match=r"no linear layer that can be adapted \(blocks\.0\.attention\.qkv: "):
        lora.add(late, 2)
