"""gptkern.nn: the modules behave as PyTorch's of the same name, and Int8Linear as the nn.Linear it was made from."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import oracle_int8_linear
import oracle_quantize_int8
import oracles
import pytest
import torch
from layouts import every_other_element, transposed

from gptkern import functional as F
from gptkern import nn
from gptkern.measuring.rounding import noise
from gptkern.measuring.tolerance import FORWARD_FACTOR, GRADIENT_FACTOR, assert_close

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


class Conv1D(torch.nn.Module):
    """What Hugging Face's GPT-2 has for a linear layer: the weight is (in_features, out_features)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = torch.nn.Parameter(torch.randn(nx, nf) * 0.02)
        self.bias = torch.nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


# --- LayerNorm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"normalized_shape": 33},
        {"normalized_shape": (3, 33), "eps": 0.5},
        {"normalized_shape": [33], "bias": False},
        {"normalized_shape": 33, "elementwise_affine": False},
        {"normalized_shape": 33, "dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_layer_norm_as_pytorch(backend, device, arguments):
    ours, theirs = nn.LayerNorm(**arguments, device=device), torch.nn.LayerNorm(**arguments, device=device)
    assert isinstance(ours, torch.nn.LayerNorm)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.extra_repr() == theirs.extra_repr()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    input = torch.randn(2, 3, 33, device=device).to(arguments.get("dtype", torch.float32))
    inputs = [input.clone().requires_grad_() for _ in range(2)]
    grad = torch.randn_like(input)
    outputs = [module(x) for module, x in zip((ours, theirs), inputs)]
    for output in outputs:
        output.backward(grad)
    # PyTorch's sums of bfloat16 on a CPU are in bfloat16
    tolerance = {"rtol": 0.05, "atol": 0.05} if input.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(*outputs, **tolerance)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **tolerance)
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine.grad, other.grad, **tolerance)


def test_layer_norm_survives_copies(backend, device):
    module = nn.LayerNorm(33, eps=0.25, device=device)
    torch.nn.init.normal_(module.weight)
    input = torch.randn(3, 33, device=device)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is nn.LayerNorm
        assert copied.weight is not module.weight
        assert torch.equal(copied(input), module(input))


def test_layer_norm_frozen(backend, device):
    module = nn.LayerNorm(33, device=device)
    module.weight.requires_grad_(False)
    module(torch.randn(3, 33, device=device)).sum().backward()
    assert module.weight.grad is None
    assert torch.equal(module.bias.grad, torch.full((33,), 3.0, device=device))


# --- Softmax --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_softmax_as_pytorch(backend, device, dim):
    ours, theirs = nn.Softmax(dim), torch.nn.Softmax(dim)
    assert isinstance(ours, torch.nn.Softmax)
    assert ours.extra_repr() == theirs.extra_repr()
    input = torch.randn(3, 5, 33, device=device)
    torch.testing.assert_close(ours(input), theirs(input))
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is nn.Softmax
        assert torch.equal(copied(input), ours(input))


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_softmax_without_a_dimension(backend, device):
    input = torch.randn(5, 33, device=device)
    torch.testing.assert_close(nn.Softmax()(input), torch.nn.Softmax()(input))


# --- Int8Linear -----------------------------------------------------------------------------------------------------


def linear(in_features=31, out_features=7, bias=True, dtype=torch.float32, device="cpu"):
    return torch.nn.Linear(in_features, out_features, bias=bias, dtype=dtype, device=device)


def judge(module, input, weight, bias):
    """module(input) and its gradients against the oracle on the quantised `weight`, (out_features, in_features)."""
    q, weight_scale = oracle_quantize_int8.quantize_int8(weight)
    assert torch.equal(module.weight.cpu(), q)
    assert torch.equal(module.weight_scale.cpu(), weight_scale)
    rows = input.numel() // input.shape[-1]
    quantized = oracle_quantize_int8.quantize_int8(input) if rows > 16 else None  # mode "auto"

    def oracle(precision):
        def layer(input, *bias):
            return oracle_int8_linear.int8_linear(
                input, q, weight_scale, *bias, quantized=quantized, precision=precision
            )

        tensors = [t.detach().cpu() for t in (input, bias) if t is not None]
        grads = oracles.gradients(layer, tensors, torch.ones(*input.shape[:-1], len(q)), precision)
        return [layer(*tensors), *grads]

    leaf = input.detach().requires_grad_()
    output = module(leaf)
    output.sum().backward()
    actual = [output, leaf.grad]
    assert output.dtype == leaf.grad.dtype == input.dtype
    if bias is not None and module.bias.requires_grad:
        assert module.bias.grad.dtype == module.bias.dtype
        actual.append(module.bias.grad)
    factors = (FORWARD_FACTOR, GRADIENT_FACTOR, GRADIENT_FACTOR)
    names = ("output", "gradient of input", "gradient of bias")
    noises = functools.cache(lambda: noise(lambda: oracle(oracles.ORACLE)))
    judged = zip(names, actual, oracle(oracles.ORACLE), oracle(oracles.YARDSTICK), factors)
    for place, (name, *values, factor) in enumerate(judged):
        assert_close(name, *values, factor, lambda place=place: noises()[place])
    if module.bias is not None:
        module.bias.grad = None


@pytest.mark.parametrize("rows", [3, 17])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear(backend, device, bias, dtype, rows):
    source = linear(bias=bias, dtype=dtype, device=device)
    before = copy.deepcopy(source.state_dict())
    module = nn.Int8Linear.from_linear(source)
    assert (module.in_features, module.out_features) == (31, 7)
    assert module.weight.dtype == torch.int8 and module.weight_scale.dtype == torch.float32
    assert not module.weight.requires_grad and not module.weight_scale.requires_grad
    assert module.weight.device == source.weight.device
    assert (module.bias is None) == (not bias)
    judge(module, torch.randn(rows, 31, device=device).to(dtype), source.weight, source.bias)
    for key, value in source.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("rows", [3, 17])
def test_from_conv1d(backend, device, rows):
    source = Conv1D(7, 31).to(device)
    module = nn.Int8Linear.from_linear(source)
    assert (module.in_features, module.out_features) == (31, 7)
    input = torch.randn(rows, 31, device=device)
    judge(module, input, source.weight.T, source.bias)
    # as the layer itself, but for the quantisation of both factors, each within half a step of 127
    assert (module(input) - source(input)).abs().max() < 0.02
    batch = torch.randn(2, 3, 31, device=device)
    assert module(batch).shape == source(batch).shape


@pytest.mark.parametrize("layout", [transposed, every_other_element])
def test_from_a_linear_whose_weight_is_strided(backend, device, layout):
    source = linear(device=device)
    source.weight = torch.nn.Parameter(layout(source.weight.detach()))
    module = nn.Int8Linear.from_linear(source)
    judge(module, torch.randn(3, 31, device=device), source.weight, source.bias)


def test_from_a_linear_with_a_row_of_zeros(backend, device):
    source = linear(device=device)
    source.weight.data[2] = 0
    judge(nn.Int8Linear.from_linear(source), torch.randn(3, 31, device=device), source.weight, source.bias)


@pytest.mark.parametrize(
    "source", [torch.nn.Conv1d(3, 5, 1), torch.nn.LayerNorm(5), None], ids=lambda s: type(s).__name__
)
def test_from_what_is_no_linear_layer(source):
    with pytest.raises(TypeError, match=type(source).__name__):
        nn.Int8Linear.from_linear(source)


def test_int8_linear_keeps_train_and_eval_and_frozen_biases(device):
    source = linear(device=device).eval()
    source.bias.requires_grad_(False)
    module = nn.Int8Linear.from_linear(source)
    assert not module.training
    assert not module.bias.requires_grad
    assert nn.Int8Linear.from_linear(linear(device=device)).bias.requires_grad


def test_int8_linear_shares_nothing_with_its_source(device):
    source = linear(device=device)
    before = copy.deepcopy(source.state_dict())
    module = nn.Int8Linear.from_linear(source)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(value, before[key]) for key, value in source.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
def test_int8_linear_state_dict(backend, device, bias):
    module = nn.Int8Linear.from_linear(linear(bias=bias, device=device))
    state = module.state_dict()
    assert set(state) == {"int8_weight", "weight_scale"} | ({"bias"} if bias else set())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    fresh = nn.Int8Linear(31, 7, bias=bias, device=device)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, state[key]) and value.dtype == state[key].dtype
    input = torch.randn(3, 31, device=device)
    assert torch.equal(fresh(input), module(input))
    with pytest.raises(RuntimeError, match="weight_scale"):
        fresh.load_state_dict({key: value for key, value in state.items() if key != "weight_scale"}, strict=True)


def test_int8_linear_survives_copies(backend, device):
    module = nn.Int8Linear.from_linear(linear(device=device))
    input = torch.randn(3, 31, device=device)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is nn.Int8Linear
        assert copied.weight.data_ptr() != module.weight.data_ptr()
        assert torch.equal(copied(input), module(input))


CONVERSIONS = {
    "half": (lambda module: module.half(), torch.float16),
    "bfloat16": (lambda module: module.to(torch.bfloat16), torch.bfloat16),
    "double": (lambda module: module.double(), torch.float64),
    "type, which casts integers too": (lambda module: module.type(torch.float16), torch.float16),
    "in a model": (lambda module: torch.nn.Sequential(module).to(dtype=torch.float16)[0], torch.float16),
    "there and back": (lambda module: module.half().float(), torch.float32),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_int8_linear_keeps_its_scales_when_the_model_is_cast(backend, device, name):
    convert, dtype = CONVERSIONS[name]
    if backend != "torch" and dtype == torch.float64:
        pytest.skip("there are no float64 kernels")
    source = linear(device=device)
    module = convert(nn.Int8Linear.from_linear(source))
    assert module.weight.dtype == torch.int8
    assert module.weight_scale.dtype == torch.float32
    assert module.bias.dtype == dtype
    # judge compares weight_scale to the bit: nothing was rounded on the way
    bias = source.bias.detach().half() if name == "there and back" else source.bias.detach()
    judge(module, torch.randn(3, 31, device=device).to(dtype), source.weight, bias.to(dtype))


def test_int8_linear_moves(device):
    module = nn.Int8Linear.from_linear(linear())
    assert {t.device.type for t in module.state_dict().values()} == {"cpu"}
    module.to("meta")
    assert {t.device.type for t in module.state_dict().values()} == {"meta"}
    assert (module.weight.dtype, module.weight_scale.dtype) == (torch.int8, torch.float32)
    module.to_empty(device=device)
    assert {t.device.type for t in module.state_dict().values()} == {device}
    module.half().to("meta")
    assert module.weight_scale.dtype == torch.float32
    assert module.weight_scale.device.type == "meta"
    cast_and_moved = nn.Int8Linear.from_linear(linear()).to("meta", torch.bfloat16)
    assert cast_and_moved.weight_scale.dtype == torch.float32
    assert cast_and_moved.bias.dtype == torch.bfloat16
    assert {t.device.type for t in cast_and_moved.state_dict().values()} == {"meta"}


def test_int8_linear_representation():
    text = repr(nn.Int8Linear.from_linear(linear(bias=False)))
    assert text.startswith("Int8Linear(in_features=31, out_features=7, bias=False")
    assert "bias=True" in repr(nn.Int8Linear.from_linear(linear()))


@pytest.mark.parametrize("frozen", [False, True])
def test_training_through_int8_linear(backend, device, frozen):
    # what is quantised does not learn: the layer below it and its bias do
    model = torch.nn.Sequential(linear(5, 31, device=device), nn.Int8Linear.from_linear(linear(device=device)))
    model[1].bias.requires_grad_(not frozen)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    input, target = torch.randn(24, 5, device=device), torch.randn(24, 7, device=device)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        loss = (model(input) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert (model[1].bias.grad is None) == frozen
    after = model.state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed == {"0.weight", "0.bias"} | (set() if frozen else {"1.bias"})


def test_int8_linear_is_the_functional(backend, device):
    module = nn.Int8Linear.from_linear(linear(device=device))
    for rows in (16, 17):
        input = torch.randn(rows, 31, device=device)
        assert torch.equal(module(input), F.int8_linear(input, module.weight, module.weight_scale, module.bias))


@pytest.mark.parametrize(("mode", "activation"), [("w8a8", None), ("w8a16", "gelu"), ("auto", "gelu_tanh")])
def test_int8_linear_hands_its_options_on(backend, device, mode, activation):
    module = nn.Int8Linear.from_linear(linear(device=device), mode=mode, activation=activation)
    input = torch.randn(3, 31, device=device)
    expected = F.int8_linear(input, module.weight, module.weight_scale, module.bias, mode=mode, activation=activation)
    for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(same(input), expected)


def test_a_new_int8_linear_gives_zeros(backend, device):
    module = nn.Int8Linear(31, 7, device=device, dtype=torch.bfloat16)
    assert module.bias.dtype == torch.bfloat16
    assert not module(torch.randn(3, 31, device=device).bfloat16()).any()


@pytest.mark.parametrize("options", [{"activation": "relu"}, {"mode": "w4a16"}], ids=str)
def test_int8_linear_refuses_unknown_options(options):
    (value,) = options.values()
    with pytest.raises(ValueError, match=value):
        nn.Int8Linear(31, 7, **options)
    with pytest.raises(ValueError, match=value):
        nn.Int8Linear.from_linear(linear(), **options)


def test_from_a_subclass_of_linear():
    class Renamed(torch.nn.Linear):
        pass

    class Doubled(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    assert type(nn.Int8Linear.from_linear(Renamed(31, 7))) is nn.Int8Linear
    with pytest.raises(TypeError, match="Doubled"):
        nn.Int8Linear.from_linear(Doubled(31, 7))


def test_torchscript_of_an_int8_layer_is_refused_by_name():
    layer, x = nn.Int8Linear.from_linear(torch.nn.Linear(8, 4)), torch.randn(3, 8)
    for model in (layer, torch.nn.Sequential(layer)):
        with pytest.raises(RuntimeError, match=r"gptkern\.nn\.Int8Linear, of which TorchScript .*; torch\.jit\.trace"):
            torch.jit.script(model)
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))
