"""The whole model: a training step of the reference GPT, and the generation of a token.

    training step    forward under autocast, cross-entropy, backward, AdamW (fused, capturable). The learning rate is 0:
                     the same work on the same weights at every call, so that any call can be checked. All
                     implementations train the same parameters, gradients and moments, each with modules of its own.
    generation       one token after `length` others at batch 1, as GPT.generate makes it: the model keeps no keys and
                     values, so all `length` tokens are run again.

The check is the gradient of the position embedding (training: it has come through every layer, forward and back) or
the logits of the last position (generation), in float32 on a small model with the same head_dim. The weights are
drawn from a fixed seed: the inputs are the tokens alone.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch

import gptkern
from gptkern.backends.problem import FLOAT32_BYTES
from gptkern.measuring import machine, peers, rounding, tolerance
from gptkern.measuring.cells import Cell, Implementation, Missing
from gptkern.models.gpt import BYTES, GPT, PRESETS, GPTConfig
from gptkern.training.optimizers import optimizer_of

# Sets of inputs: the weights and activations are far larger than any L2 cache, the tokens need not be.
SETS = 2
SEED = 0
# Biases start at 0 and norms at 1, where some mistakes would not show, and a trained model has neither: this much is
# added to them at random.
PARAMETER_NOISE = 0.02

# Rows of a training step; each fits a GPU of GPU_BYTES by `training_memory`, with HEAD_ROOM left of it for what the
# allocator cannot use, compiled code, the CUDA contexts and libraries.
GPU_BATCHES = {"gpt2": (16, 4, 32), "gpt3-1.3B": (4, 2, 1)}
GPU_BYTES, HEAD_ROOM = 80e9, 0.2
QUICK_GPU_BATCH = 16
CPU_BATCH = 2
# Tokens before the one that is generated.
GENERATION_LENGTHS = (1, 16, 64, 512)
# As for int8_linear: so few tokens at once, and reading the weights is what takes the time.
COPY_BOUND_LENGTH = 64

TITLES = {"nano": "nano", "gpt2": "GPT-2 124M", "gpt3-1.3B": "GPT-3 1.3B"}
# What is checked in float64 instead, of the same head_dim; "tiny" is the smoke cells' own.
SMALL = {
    "tiny": GPTConfig(BYTES, context=16, layers=1, width=32, heads=2),
    "small, head_dim 32": GPTConfig(BYTES, context=64, layers=2, width=64, heads=2),
    "small, head_dim 64": GPTConfig(BYTES, context=64, layers=2, width=128, heads=2),
    "small, head_dim 128": GPTConfig(BYTES, context=64, layers=2, width=256, heads=2),
}
# At most as many as int8_linear takes with 16-bit activations: quantised ones round differently in float64.
CHECK_GENERATION_LENGTH = 8
CHECK_BATCH = 2


def cells(kind: str, extent: str) -> list[Cell]:
    if extent == "smoke":
        dtype = "bfloat16" if kind == "cuda" else "float32"
        return [_training_cell(dtype, "tiny", 2), _generation_cell(dtype, "tiny", "int8", 4)]
    if kind == "cpu":
        steps = [_training_cell("float32", "nano", CPU_BATCH)]
        if extent == "quick":
            return steps
        weights = ("float32", "int8")
        return steps + [_generation_cell("float32", "nano", w, length) for length in (16, 64) for w in weights]
    if extent == "quick":
        return [_training_cell("bfloat16", "gpt2", QUICK_GPU_BATCH)]
    found = [_training_cell("bfloat16", name, batch) for name, batches in GPU_BATCHES.items() for batch in batches]
    found += [
        _generation_cell("bfloat16", name, weights, length)
        for length in GENERATION_LENGTHS
        for name in GPU_BATCHES
        for weights in ("bfloat16", "int8")
    ]
    return found


def _config(name: str) -> GPTConfig:
    return SMALL.get(name) or PRESETS[name]


@functools.cache
def counts(name: str) -> tuple[int, int, int]:
    """Of a model: parameters that a token is multiplied with (all but the position embedding; the token embedding once,
    as the output's weight); of these the elements of the blocks' matrices; and their rows, one int8 scale each.
    """
    with torch.device("meta"):
        model = GPT(_config(name))
    matrices = [layer.weight for layer in model.blocks.modules() if isinstance(layer, torch.nn.Linear)]
    multiplied = sum(each.numel() for each in model.parameters()) - model.position_embedding.weight.numel()
    return multiplied, sum(weight.numel() for weight in matrices), sum(len(weight) for weight in matrices)


def _attention(config: GPTConfig, length: int) -> float:
    """Operations of one sequence's causal attention: two products of `width`, of which the triangle counts."""
    return config.layers * 4.0 * (length**2 / 2) * config.width


def training_flops(name: str, batch: int) -> float:
    """6 * parameters * tokens, plus attention's 6 * layers * width * length * tokens.

    The attention term is half of the source's 12 * layers * width * length, as the causal half counts here as well.
    Its backward counts twice its forward, as the products around it do, not 2.5 times.

    Source: Kaplan et al., 2020 (arXiv:2001.08361), section 2.1; Chowdhery et al., "PaLM", 2022 (arXiv:2204.02311),
    appendix B.
    """
    config = _config(name)
    return 6.0 * counts(name)[0] * batch * config.context + 3 * batch * _attention(config, config.context)


def training_bytes(name: str) -> int:
    """The float32 parameters and AdamW's two moments, each read and written once: 24 bytes a parameter.

    Gradients and activations come and go within the step and are not counted. Source: Loshchilov, Hutter, "Decoupled
    Weight Decay Regularization", 2019 (arXiv:1711.05101), algorithm 2.
    """
    parameter_and_moments, read_and_written = 3, 2
    return parameter_and_moments * read_and_written * FLOAT32_BYTES * counts(name)[0]


def training_memory(name: str, batch: int, graph: bool) -> int:
    """Bytes that a training step under autocast in bfloat16 holds at most, however many implementations there are.

        12 P                                    float32 parameters and AdamW's two moments
      + 4 P + 2 M                               a step's float32 gradients, and the matrices M in bfloat16
      + tokens * layers * (38 width + 4 heads)  what a block keeps for its backward
      + tokens * (6 width + 18 vocab_size)      the last norm's; logits, and around the loss

    of P parameters. A block keeps in float32 the inputs of its norms (8 width); in bfloat16 what goes into its products
    (2 + 2 + 2 + 8 width), query, key, value and attention's output (6 + 2 width), and GELU's input (8 width); and
    attention's log-sum-exp. Of the logits there are the bfloat16 ones and their gradient, and in float32 themselves,
    their logarithms and their gradient (2 + 4 + 4 + 4 + 4 bytes an element).

    Args:
        graph: a CUDA graph is held besides, with the memory of a step of its own: all but the first line twice.

    Sources: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022
    (arXiv:2205.05198), section 4.1, for the way of counting; a test follows a step's tensors.
    """
    config = _config(name)
    parameters = counts(name)[0] + config.context * config.width
    tokens = batch * config.context
    of_a_block = 38 * config.width + 4 * config.heads
    of_a_step = 4 * parameters + 2 * counts(name)[0]
    of_a_step += tokens * (config.layers * of_a_block + 6 * config.width + 18 * config.vocab_size)
    return 12 * parameters + (2 if graph else 1) * of_a_step


def graphed(cell: Cell) -> bool:
    """Whether a cell's calls are timed as a CUDA graph: where there is memory for one beside a plain step.

    A step that is too large for that keeps the GPU busy for longer than the host takes to queue it; the record says
    where it does not.
    """
    if cell.direction != "training step":
        return True
    return training_memory(cell.size("model"), cell.size("batch"), graph=True) <= GPU_BYTES * (1 - HEAD_ROOM)


def generation_flops(name: str, length: int) -> float:
    """2 * parameters * length, plus attention's: a token is generated by running all `length` tokens before it.

    models.gpt keeps no keys and values between tokens. Source: as training_flops, forward only.
    """
    return 2.0 * counts(name)[0] * length + _attention(_config(name), length)


def generation_bytes(name: str, weights: str, dtype: str) -> int:
    """The weights, each once: at batch 1 that is what a token costs at least.

    Where `weights` is "int8" the blocks' matrices are in that, and all else in `dtype`. Source: gpt-fast's "bandwidth
    achieved", the model's bytes times the tokens a second.
    """
    multiplied, in_int8, scales = counts(name)
    itemsize = getattr(torch, dtype).itemsize
    if weights != "int8":
        return multiplied * itemsize
    return in_int8 + scales * FLOAT32_BYTES + (multiplied - in_int8) * itemsize


def _training_cell(dtype: str, name: str, batch: int) -> Cell:
    length = _config(name).context
    return Cell(
        operator="model",
        direction="training step",
        dtype=dtype,
        sizes=(("model", name), ("batch", batch), ("length", length)),
        panel=f"training step, {TITLES.get(name, name)}",
        x="batch",
        bytes=training_bytes(name),
        flops=training_flops(name, batch),
        ceiling=dtype,
        tokens=batch * length,
    )


def _generation_cell(dtype: str, name: str, weights: str, length: int) -> Cell:
    return Cell(
        operator="model",
        direction="generation",
        dtype=dtype,
        sizes=(("model", name), ("weights", weights), ("batch", 1), ("length", length)),
        panel=f"generation, {TITLES.get(name, name)}, {weights} weights",
        x="length",
        bytes=generation_bytes(name, weights, dtype),
        flops=generation_flops(name, length),
        ceiling="copy" if length <= COPY_BOUND_LENGTH else dtype,
        tokens=1,
    )


def inputs(cell: Cell, device) -> tuple[torch.Tensor, ...]:
    """Training: ids and targets; generation: ids; each (batch, length)."""
    config = _config(cell.size("model"))
    shape = cell.size("batch"), cell.size("length")
    count = 2 if cell.direction == "training step" else 1
    return tuple(torch.randint(config.vocab_size, shape, device=device) for _ in range(count))


def differentiable(cell: Cell) -> tuple[int, ...]:
    return ()


def new_model(config: GPTConfig, device, dtype: torch.dtype) -> GPT:
    """Always the same weights on a device; drawn there in float32."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        with device:
            model = GPT(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() < 2:
                        parameter.add_(torch.randn_like(parameter), alpha=PARAMETER_NOISE)
    return model.to(dtype)


# --- Implementations ------------------------------------------------------------------------------------------------


def implementations(cell: Cell, kind: str) -> dict[str, Implementation | Missing]:
    int8 = dict(cell.sizes).get("weights") == "int8"

    def swapped(model):
        gptkern.swap(model)
        if int8:
            gptkern.quantize(model)
        return model

    trained = functools.cache(functools.partial(_trained, cell))

    def made(change):
        parts = _training(cell, change, trained) if cell.direction == "training step" else _generation(cell, change)
        return Implementation(*parts, graph=graphed(cell), or_events=True)

    found: dict[str, Implementation | Missing] = {"gptkern": made(swapped), peers.EAGER: made(lambda model: model)}
    if cell in cells(kind, "smoke"):
        # It shows that the bench runs; compiling would be all of its time.
        return found
    found[peers.COMPILE] = peers.compiled_model(made, kind)
    if int8:
        found[peers.TORCHAO] = peers.torchao_model(made, kind)
    return found


def _trained(cell: Cell, device: torch.device) -> tuple[GPT, torch.optim.Optimizer]:
    """The stock model and its optimizer, which all implementations of a cell share."""
    stock = new_model(_config(cell.size("model")), device, torch.float32).train()
    return stock, optimizer_of(stock, lr=0.0, capturable=device.type == "cuda")


def _beside(stock: GPT) -> GPT:
    """Modules of its own with the same parameters, the very objects."""
    return copy.deepcopy(stock, {id(parameter): parameter for parameter in stock.parameters()})


def _training(cell: Cell, change, trained) -> tuple[Callable, Callable]:
    """(call, prepare) of an implementation whose model is `change(modules of its own)`, made when inputs come.

    Args:
        trained: trained(device) -> (the stock model, its optimizer).
    """

    @functools.cache
    def made(device):
        stock, optimizer = trained(device)
        return stock, change(_beside(stock)), optimizer

    def call(ids, targets):
        """-> the gradient of the position embedding (context, width), and the loss."""
        stock, model, optimizer = made(ids.device)
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            lower = cell.dtype != "float32"
            with torch.autocast(ids.device.type, getattr(torch, cell.dtype), enabled=lower):
                _, loss = model(ids, targets)
            loss.backward()
        optimizer.step()
        return stock.position_embedding.weight.grad, loss.detach()

    return call, lambda ids, targets: made(ids.device) and (ids, targets)


def _generation(cell: Cell, change) -> tuple[Callable, Callable]:
    """(call, prepare), as `_training`."""

    @functools.cache
    def made(device):
        return change(new_model(_config(cell.size("model")), device, getattr(torch, cell.dtype)).eval())

    def call(ids):
        """-> the logits of the last position (1, vocab_size), and ids with the likeliest token behind them."""
        with torch.no_grad():
            logits, _ = made(ids.device)(ids)
            last = logits[:, -1].float()
            return last, torch.cat([ids, last.argmax(-1, keepdim=True)], dim=1)

    return call, lambda ids: made(ids.device) and (ids,)


# --- The check ------------------------------------------------------------------------------------------------------


def reference(cell: Cell, inputs: tuple[torch.Tensor, ...], precision: torch.dtype) -> torch.Tensor:
    """What the stock model returns in `precision`; with int8 weights, of their dequantised values."""
    ids, *targets = inputs
    model = new_model(_config(cell.size("model")), ids.device, torch.float32)
    quantised_values = _quantised_values(model) if dict(cell.sizes).get("weights") == "int8" else {}
    model = model.to(precision)
    for module, (q, scale) in quantised_values.items():
        module.weight.data = q.to(precision) * scale.to(precision)
    if cell.direction != "training step":
        with torch.no_grad():
            return model(ids)[0][:, -1]
    with torch.enable_grad():
        logits, _ = model(ids)  # GPT's own loss is in float32
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[0].flatten())
        return torch.autograd.grad(loss, model.position_embedding.weight)[0]


def _quantised_values(model: GPT) -> dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """Linear layer, but the output's -> its weight's rows rounded to max|row| / 127, and these scales."""
    found = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            weight = module.weight.detach()
            largest = weight.abs().amax(-1, keepdim=True)
            # By a tensor: on a GPU PyTorch multiplies with the reciprocal of a Python number, which rounds twice.
            scale = largest / torch.full_like(largest, 127)
            found[module] = torch.round(weight / scale), scale
    return found


def checked(cell: Cell) -> Iterator[tuple[str, float, float]]:
    device = torch.device(machine.kind())
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        tokens = inputs(cell, device)
    ours = implementations(cell, device.type)["gptkern"]
    actual = ours.call(*ours.prepare(*tokens))[0]
    expected, yardstick = (reference(cell, tokens, precision) for precision in (torch.float64, torch.float32))
    yield (
        cell.direction,
        *tolerance.verdict(
            actual,
            expected,
            yardstick,
            noise=lambda: rounding.noise(lambda: [reference(cell, tokens, torch.float64)])[0],
        ),
    )


def check_cell(cell: Cell) -> Cell:
    name = cell.size("model")
    small = name if name in SMALL else f"small, head_dim {_config(name).head_dim}"
    if cell.direction == "training step":
        return _training_cell("float32", small, CHECK_BATCH)
    weights = cell.size("weights")
    return _generation_cell("float32", small, "int8" if weights == "int8" else "float32", CHECK_GENERATION_LENGTH)
