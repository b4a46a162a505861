"""The ways in which articles train a transformer, with swapped modules: the same numbers as stock ones.

A translation model on torch.nn.Transformer, under autocast and a GradScaler, with gradients accumulated over eight
batches; and in torch.nn.DataParallel, whose replicas are shallow copies that run in threads. What DataParallel does on
GPUs is done here on the CPU, by its own means: Module._replicate_for_data_parallel, copies of parameters that autograd
sums into the originals, a thread for each replica.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from checking import Watched
from torch import nn

import gptkern

# Of the stock encoder, where it has no fast path for nested tensors.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")

VOCABULARY, WIDTH, SOURCE, TARGET, ROWS, ACCUMULATED = 19, 16, 5, 4, 2, 8
PADDING = 0

both = pytest.mark.parametrize("batch_first", [False, True], ids=["length_first", "batch_first"])
norms = pytest.mark.parametrize("norm_first", [False, True], ids=["norm_last", "norm_first"])


class Translator(nn.Module):
    """An encoder-decoder on tokens, as the tutorials write it."""

    def __init__(self, batch_first: bool, norm_first: bool, layers: int = 1, dropout: float = 0.0):
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=PADDING)
        self.positions = nn.Parameter(torch.randn(SOURCE, WIDTH) / 4)
        # Not ReLU: where an input is near 0, a rounding of 16 bits turns a gradient on or off.
        self.transformer = nn.Transformer(
            WIDTH, 2, layers, layers, 2 * WIDTH, dropout, "gelu", batch_first=batch_first, norm_first=norm_first
        )
        self.generator = nn.Linear(WIDTH, VOCABULARY)

    def embedded(self, ids):
        x = self.embedding(ids) + self.positions[: ids.shape[1]]  # (batch, length, width)
        return x if self.batch_first else x.transpose(0, 1)

    def forward(self, source, target):
        """ids (batch, source length) and (batch, target length) -> logits (batch, target length, VOCABULARY)"""
        length, device = target.shape[1], source.device
        later = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        # The decoder looks no further into the source than four tokens beyond its own place.
        far = torch.ones(length, source.shape[1], dtype=torch.bool, device=device).triu(4)
        none = torch.zeros(source.shape[1], source.shape[1], dtype=torch.bool, device=device)
        mixed = self.transformer(
            self.embedded(source), self.embedded(target), src_mask=none, tgt_mask=later, memory_mask=far,
            src_key_padding_mask=source == PADDING, tgt_key_padding_mask=target == PADDING,
            memory_key_padding_mask=source == PADDING,
        )  # fmt: skip
        return self.generator(mixed if self.batch_first else mixed.transpose(0, 1))


def built(batch_first: bool, norm_first: bool, device="cpu", **options) -> Translator:
    torch.manual_seed(1)
    model = Translator(batch_first, norm_first, **options).to(device)
    with torch.no_grad():
        # Biases and norms start as zeros and ones, which would hide that they were left out.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batches(count: int, device="cpu"):
    """Pairs of ids (ROWS, SOURCE) and (ROWS, TARGET + 1); the last tokens of the first row are padding."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        source, target = (
            torch.randint(1, VOCABULARY, (ROWS, length), generator=generator) for length in (SOURCE, TARGET + 1)
        )
        source[0, -2:], target[0, -1:] = PADDING, PADDING
        yield source.to(device), target.to(device)


def loss_of(logits, target):
    return nn.functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PADDING)


def trained(model, dtype, device, updates=1, accumulated=ACCUMULATED):
    """The sample's loop: {name: value} of the losses, of the gradients before each step, and of the parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    found = {}
    for index, (source, target) in enumerate(batches(updates * accumulated, device)):
        with torch.autocast(device, dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
            loss = loss_of(model(source, target[:, :-1]), target)
            found[f"loss {index}"] = loss.detach().clone()
            loss = loss / accumulated
        scaler.scale(loss).backward()
        if (index + 1) % accumulated == 0:
            scaler.unscale_(optimizer)
            found |= {f"{name}.grad {index}": p.grad.clone() for name, p in model.named_parameters()}
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return found | {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def agree(found, stock, reference, unit: float):
    """By the norm of the error: no more than twice the stock model's, and a rounding of the dtype."""
    assert found.keys() == stock.keys() == reference.keys()
    for name, wanted in reference.items():
        error, usual = ((run[name].double() - wanted).norm() / wanted.norm() for run in (found, stock))
        assert error <= 2 * usual + unit, f"{name}: {error:.2e}, stock {usual:.2e}"


def swapped_copy(model):
    swapped = copy.deepcopy(model)
    report = gptkern.swap(swapped)
    # Two stacks' norms, five of their layers', three MultiheadAttentions, the encoder and its layer.
    assert len(report.replaced) == 12 and not report.skipped
    return swapped


def is_as_stock(batch_first, norm_first, dtype, device, **how) -> list[str]:
    """The names of gptkern's ops that ran in a training whose numbers are the stock model's."""
    stock = built(batch_first, norm_first, device)
    swapped, exact = swapped_copy(stock), copy.deepcopy(stock).double()
    expected, reference = trained(stock, dtype, device, **how), trained(exact, torch.float64, device, **how)
    with Watched() as watched:
        found = trained(swapped, dtype, device, **how)
    agree(found, expected, reference, torch.finfo(dtype).eps)
    return watched.names


def of_forwards(count: int) -> dict[str, int]:
    """The ops of so many forwards and backwards: attention of the encoder and twice of the decoder, seven norms."""
    calls = {"attention": 3 * count, "layer_norm": 7 * count}
    return {f"{name}_{direction}": calls[name] for name in calls for direction in ("forward", "backward")}


@both
@norms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_translation_under_autocast_with_accumulation(batch_first, norm_first, dtype, device):
    """On the operators that are chosen without being forced."""
    is_as_stock(batch_first, norm_first, dtype, device, updates=1 if batch_first else 2)


def test_translation_on_kernels(triton_backend, device):
    names = is_as_stock(False, True, torch.float16, device, accumulated=2)
    assert {name: names.count(name) for name in set(names)} == of_forwards(2)


@pytest.mark.deep
@both
@norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_translation_on_kernels(triton_backend, batch_first, norm_first, dtype, device):
    names = is_as_stock(batch_first, norm_first, dtype, device)
    assert {name: names.count(name) for name in set(names)} == of_forwards(ACCUMULATED)


# --- DataParallel -----------------------------------------------------------------------------------------------------


def replicas_of(network: nn.Module, count: int) -> list[nn.Module]:
    """torch.nn.parallel.replicate without its broadcast, which asks for GPUs: autograd sums the copies' gradients."""
    modules = list(network.modules())
    places = {module: index for index, module in enumerate(modules)}
    replicas = []
    for _ in range(count):
        copies = {parameter: parameter.clone() for parameter in network.parameters()}
        made = [module._replicate_for_data_parallel() for module in modules]
        for module, replica in zip(modules, made):
            for name, child in module._modules.items():
                if child is None:
                    replica._modules[name] = None
                else:
                    setattr(replica, name, made[places[child]])
            for name, parameter in module._parameters.items():
                if parameter is None:
                    replica._parameters[name] = None
                else:
                    setattr(replica, name, copies[parameter])  # no parameter, and no leaf
            for name, buffer in module._buffers.items():
                replica._buffers[name] = None if buffer is None else buffer.clone()
        replicas.append(made[0])
    return replicas


def in_threads(replicas, inputs, backend: str | None, at_once: bool, names: list[str]):
    """torch.nn.parallel.parallel_apply on a CPU: each replica on its part of the rows, in a thread of its own.

    Args:
        names: gets those of gptkern's ops that ran.

    Threads have their own modes, autocast and forced backend. Triton's interpreter has one grid: there it is one after
    another.
    """
    results: dict[int, object] = {}
    enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def work(index, replica, parts):
        try:
            with gptkern.backend(backend), torch.autocast("cpu", dtype, enabled=enabled), Watched() as watched:
                results[index] = replica(*parts)
            names.extend(watched.names)
        except BaseException as error:
            results[index] = error

    threads = []
    for index, (replica, parts) in enumerate(zip(replicas, inputs)):
        threads.append(threading.Thread(target=work, args=(index, replica, parts)))
        threads[-1].start()
        if not at_once:
            threads[-1].join()
    for thread in threads:
        thread.join()
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return [results[index] for index in range(len(replicas))]


class InReplicas(nn.DataParallel):
    """DataParallel as it is on GPUs: replicas of every forward, in threads."""

    def __init__(self, module, backend: str | None = None, at_once: bool = True):
        super().__init__(module)
        self.backend, self.at_once = backend, at_once
        self.names: list[str] = []  # of gptkern's ops that ran in the threads

    def forward(self, source, target):
        replicas = replicas_of(self.module, ROWS)
        inputs = list(zip(source.split(1), target.split(1)))
        return torch.cat(in_threads(replicas, inputs, self.backend, self.at_once, self.names))


def one_step(model, dtype=None):
    """{name: value} of the logits and of every gradient."""
    ((source, target),) = batches(1)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        logits = model(source, target[:, :-1])
    loss_of(logits, target).backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {"logits": logits.detach()} | gradients


on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="DataParallel replicates on GPUs itself")


@on_a_cpu
@both
@norms
@pytest.mark.parametrize("order, dtype", [("swap, wrap", None), ("wrap, swap", torch.bfloat16)], ids=str)
def test_replicas_in_threads(batch_first, norm_first, order, dtype):
    stock = built(batch_first, norm_first)
    swapped, exact = copy.deepcopy(stock), copy.deepcopy(stock).double()
    if order == "swap, wrap":
        gptkern.swap(swapped)
        wrapped = InReplicas(swapped)
    else:
        wrapped = InReplicas(swapped)
        gptkern.swap(wrapped)
    assert type(swapped.transformer.encoder.norm) is gptkern.nn.LayerNorm
    found, expected = one_step(wrapped, dtype), one_step(InReplicas(stock), dtype)
    if dtype is None:
        # The same operators of PyTorch; the replicas' gradients are summed in the order in which they come.
        torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-6, atol=1e-6)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    else:
        agree(found, expected, one_step(InReplicas(exact)), torch.finfo(dtype).eps)


@on_a_cpu
def test_replicas_on_kernels(triton_backend):
    stock = built(True, False)
    expected = one_step(stock)
    swapped = swapped_copy(built(True, False))
    model = InReplicas(swapped, "triton", at_once=False)
    with Watched() as watched:
        found = one_step(model)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    names = model.names + watched.names  # forwards in the threads, backwards here
    assert {name: names.count(name) for name in set(names)} == of_forwards(ROWS)


@on_a_cpu
def test_replicas_have_parameters_of_their_own_and_leave_the_original_alone():
    swapped = swapped_copy(built(True, False))
    ((source, target),) = batches(1)
    inputs = source, target[:, :-1]
    expected = swapped(*inputs)
    before = {name: (type(module), dict(vars(module))) for name, module in swapped.named_modules()}
    first, second = replicas_of(swapped, 2)
    with torch.no_grad():
        for parameter in swapped.parameters():
            parameter.zero_()
        second.transformer.decoder.norm.weight.mul_(2.0)
        second.transformer.decoder.norm.bias.mul_(2.0)
        second.generator.bias.zero_()
    first_alone, second_alone = (in_threads([replica], [inputs], None, True, [])[0] for replica in (first, second))
    torch.testing.assert_close(first_alone, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second_alone, 2 * (expected - first.generator.bias), rtol=1e-4, atol=1e-5)
    assert not swapped(*inputs).any()
    for name, module in swapped.named_modules():
        kind, attributes = before[name]
        assert type(module) is kind and vars(module).keys() == attributes.keys(), name
        assert all(vars(module)[key] is value for key, value in attributes.items()), name
    gptkern.unswap(swapped)
    assert type(swapped.transformer.decoder.norm) is nn.LayerNorm


@on_a_cpu
def test_replicas_keep_hooks():
    """A hook of a swapped module is called with the replica, in each of them."""
    swapped, seen = swapped_copy(built(True, True)), []
    watched = (
        swapped.transformer.encoder.norm,
        swapped.transformer.decoder.layers[0].multihead_attn,
        swapped.transformer,
    )
    for module in watched:
        module.register_forward_pre_hook(lambda module, _: seen.append(module))
        module.register_forward_hook(lambda module, *_: seen.append(module))
    one_step(InReplicas(swapped))
    # The decoder's calls of multihead_attn are seen with need_weights=False, as the stock ones are.
    assert len(seen) == ROWS * 2 * len(watched)
    assert not {id(module) for module in seen} & {id(module) for module in watched}
    assert {type(module) for module in seen} == {type(module) for module in watched}


@both
@norms
def test_data_parallel_without_gpus_trains_as_stock(batch_first, norm_first):
    """It calls its module: with dropout, from one seed, bit for bit."""
    stock = built(batch_first, norm_first, dropout=0.2)
    swapped = swapped_copy(stock)
    runs = []
    for model in (stock, swapped):
        torch.manual_seed(3)
        runs.append(trained(nn.DataParallel(model), torch.float32, "cpu", accumulated=2))
    for name, expected in runs[0].items():
        torch.testing.assert_close(runs[1][name], expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
