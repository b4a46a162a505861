"""What a training holds in memory, from its sizes alone, before anything is allocated.

The parameters P = V·w + C·w + L·(12·w² + 13·w) + 2·w of V tokens, context C, L blocks of width w (the output weight is
the embedding's) are held in float32 once, and twice more as AdamW's averages, from the beginning to the end. All else
comes and goes within an update. It is the most at one of these moments, of which `needed` takes the largest:

    loss        every block's activations; logits, and what the loss makes of them
    output      activations; the logits' gradient and that of the output weight
    block i     activations of the blocks up to i, gradients of those behind it, and what its backward makes on the way
    embedding   all gradients, and the embedding's twice more: its own and the output weight's are summed into a third
    validation  no activations but a block's; logits and their logarithms of EVALUATION_ROWS rows at most

What autograd keeps of a piece of R rows, T = R·length tokens, with c bytes an element of the products' dtype (4 or 2):

    a norm          input T·w·4, mean and 1/std T·4 each
    a linear layer  input T·in·c; with c = 2 the weight in·out·2 that autocast cast, too
    attention       query, key, value 3·T·w·c, output T·w·c, log-sum-exp T·heads·4; swapped on a CPU with c = 2 the
                    four in float32
    GELU            input T·4·w·c
    dropout         a mask of each element: on a CPU of the tensor's dtype, on a GPU a byte
    attention's     on a CPU PyTorch writes down the probabilities, in float32: themselves, their mask and their product
    dropout         with it, 3·R·heads·length²·4, and query, key and value, 3·T·w·4
    the loss        log-probabilities T·V·4; with the z-loss the logits, too; their gradients T·V·4 twice
    many logits     in chunks (on a CPU from 2²² on): a chunk of them in float32, and their gradient's in 16 bits. On a
                    CPU in float32 the forward keeps the gradients of input and weight, T·w·4 and V·w·4, and no more

A block that is recomputed keeps its input, T·w·4, until its own moment. So a test of `tests/test_training_memory.py`
counts them; others hold the total against the peak of processes that train.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import NamedTuple

import torch

from gptkern import formatting
from gptkern.backends import vocabulary
from gptkern.models.gpt import GPTConfig
from gptkern.training.errors import UserError
from gptkern.training.free_memory import available, resident
from gptkern.training.recipe import Recipe

__all__ = ["Needed", "available", "check", "needed", "parameter_count", "return_freed"]

FLOAT32, INT64 = 4, 8
MOMENTS = 2  # AdamW's
EVALUATION_ROWS = 16  # loop.EVALUATION_BATCH; of a smaller piece its rows
PREFETCHED = 4 + 2  # batches: read ahead, the one that waits for room, the one in use

# What PyTorch loads when a first optimizer is made (its compiler, in Python) and a first backward runs (measured,
# torch 2.13 on x86-64: 147 + 20 MB), in a process that has imported gptkern and torch alone.
LIBRARIES = 147 * 10**6
FIRST_UPDATE = 20 * 10**6

# glibc's malloc maps what is at least this large by itself, and returns it to the system when it is freed.
MAPPED_ALONE = 32 * 2**20
# What is smaller lies in a heap, where freed places stay resident, and serve what fits into them alone: it stays as
# large as it was at its own moment, and beside 100 bytes of activations, logits and gradients 25 to 60 of holes were
# measured.
HOLES = 0.37  # the middle of 25 sizes: 0.88 to 1.13 of what was measured
# Gradients that wait for the next piece lie between what it keeps, and leave holes that are too small for it: a part of
# what is kept, and of as many of the gradients. Five sizes come to 0.88 to 1.13 of what was measured, 0.81 without.
HOLES_OF_PIECES = 0.3
# Of recomputed blocks the heap stays nearly as large as if their activations were kept (measured: 0.55 to 0.9 of them).
HOLES_OF_RECOMPUTED = 0.7
RETURNED = 2**20  # bytes; what `return_freed` sets in place of MAPPED_ALONE
_M_MMAP_THRESHOLD = -3  # of malloc.h

_mapped_alone = MAPPED_ALONE


class Needed(NamedTuple):
    """Bytes that a training holds at the moment at which it holds the most; `moment` says which that is."""

    parameters: int  # of the models that are trained
    optimizer: int  # AdamW's averages
    gradients: int
    activations: int  # what is kept for the backward, and what the backward makes of it
    logits: int  # and what the loss makes of them
    casts: int  # parameters in 16 bits, which autocast makes
    copies: int  # of the parameters
    checkpoint: int  # the copy of parameters and averages that is written in the background
    batches: int  # read ahead
    heap: int  # freed, and held by malloc all the same
    process: int  # Python, PyTorch, gptkern
    moment: str
    device: str

    @property
    def total(self) -> int:
        """On the device."""
        return sum(self._on_device()) + (sum(self._on_cpu()) if self.device == "cpu" else 0)

    @property
    def host(self) -> int:
        """In the CPU's memory; a model's first weights are drawn there, whatever the device."""
        return self.total if self.device == "cpu" else sum(self._on_cpu()) + self.parameters

    @property
    def more(self) -> int:
        """In the CPU's memory, beyond what this process has already."""
        return self.host - min(self.process, resident())

    def _on_device(self) -> tuple[int, ...]:
        return self[:6]

    def _on_cpu(self) -> tuple[int, ...]:
        return self[6:11]

    def parts(self) -> list[tuple[str, int]]:
        """(what, bytes) for people; of what not every training has, only what this one has."""
        names = (
            "parameters", "AdamW's averages", "gradients", "activations", "logits", "parameters in 16 bits",
            "copies of parameters", "a checkpoint's copy", "batches", "malloc's holes", "the process",
        )  # fmt: skip
        return [(name, bytes_) for index, (name, bytes_) in enumerate(zip(names, self[:11])) if bytes_ or index < 5]

    def listed(self) -> str:
        """ "parameters 3.44 MB, AdamW's averages 6.89 MB, … in the loss" """
        return (
            ", ".join(f"{name} {formatting.size(bytes_)}" for name, bytes_ in self.parts()) + f" in the {self.moment}"
        )

    def described(self) -> str:
        """ "memory: 1.2 GB (parameters 498 MB, … in the loss)" """
        return f"memory: {formatting.size(self.total)} ({self.listed()})"


def parameter_count(config: GPTConfig) -> int:
    """What `GPT(config).parameter_count()` is, of a model that is never made."""
    width = config.width
    return (config.vocab_size + config.context) * width + config.layers * _block_parameters(width) + 2 * width


def _block_parameters(width: int) -> int:
    return (12 * width + 13) * width


def needed(
    config: GPTConfig,
    recipe: Recipe,
    *,
    swapped: bool = True,
    models: int = 1,
    copies: int = 0,
    saves: bool = True,
    world: int = 1,
    learning: int | None = None,
) -> Needed:
    """What training a GPT of these sizes takes, in this process.

    torch.compile may take less: what it fuses is not written down.

    Args:
        swapped: the model runs on gptkern's operators. models: trained in turn.
        copies: of the parameters, in the CPU's memory. saves: checkpoints are written in the background.
        world: processes that share a batch. learning: parameters that learn, with adapters beside the others; None for
            all of them. What no gradient of the others takes of malloc's heap is not taken off.
    """
    sizes = _Sizes(config, recipe, swapped, world)
    parameters = FLOAT32 * parameter_count(config)
    learns = parameters if learning is None else FLOAT32 * learning
    moments = list(sizes.moments())
    heap = sizes.heap(moments)
    # Of moments that take the same, with the heap as it was, the one that holds the most itself.
    most = max(moments, key=lambda moment: (moment.size + max(0, heap - sizes.in_heap(moment.tensors)), moment.size))
    return Needed(
        parameters=models * parameters,
        optimizer=models * MOMENTS * learns,
        gradients=sum(most.gradients) if learning is None else min(sum(most.gradients), learns),
        activations=sum(most.activations),
        logits=sum(most.logits),
        casts=sum(most.casts),
        copies=copies * parameters,
        checkpoint=(1 + MOMENTS) * learns if saves else 0,
        batches=PREFETCHED * recipe.batch // world * (recipe.length + 1) * 2 * INT64,
        heap=max(0, heap - sizes.in_heap(most.tensors)),
        process=_process(),
        moment=most.name,
        device=torch.device(recipe.device).type,
    )


class _Moment(NamedTuple):
    """Sizes of the tensors that are there, in bytes."""

    name: str
    activations: list[int]
    logits: list[int]
    gradients: list[int]
    casts: list[int]

    @property
    def tensors(self) -> list[int]:
        return self.activations + self.logits + self.gradients + self.casts

    @property
    def size(self) -> int:
        return sum(self.tensors)


class _Sizes:
    """The tensors of an update's piece."""

    def __init__(self, config: GPTConfig, recipe: Recipe, swapped: bool, world: int):
        self.config, self.recipe = config, recipe
        self.on_cpu = torch.device(recipe.device).type == "cpu"
        self.element = FLOAT32 if recipe.precision == "fp32" else 2
        self.rows = max(1, recipe.batch // (recipe.accumulate * world))
        self.tokens = self.rows * recipe.length
        self.wide = self.tokens * config.width * FLOAT32  # (tokens, width) in float32
        self.narrow = self.tokens * config.width * self.element  # (tokens, width) of the products
        self.table = config.vocab_size * config.width  # elements of the embedding
        self.swapped = swapped
        self.recomputed = [self.every is not None and index % self.every == 0 for index in range(config.layers)]

    @property
    def every(self) -> int | None:
        return self.recipe.recompute_every

    @property
    def is_cut(self) -> bool:
        """Whether linear_cross_entropy computes the logits in chunks."""
        return self.cuts(self.tokens)

    def cuts(self, tokens: int) -> bool:
        return not self.on_cpu or tokens * self.config.vocab_size > vocabulary.FEW_LOGITS

    def chunk(self) -> int:
        """Logits of a chunk."""
        tokens, vocab_size = self.tokens, self.config.vocab_size
        if self.is_ahead:
            # Whole rows.
            return min(max(vocabulary.LEAST_ELEMENTS // vocab_size, 1), tokens) * vocab_size
        return self.chunk_of(tokens)

    def chunk_of(self, tokens: int) -> int:
        dtype = torch.float32 if self.element == FLOAT32 else torch.bfloat16
        return tokens * vocabulary.at_a_time(tokens, self.config.width, self.config.vocab_size, dtype)

    @property
    def is_ahead(self) -> bool:
        """Whether the forward of the loss computes its gradients."""
        return self.is_cut and self.on_cpu and self.element == FLOAT32

    # --- What a forward leaves behind ---------------------------------------------------------------------------------

    def attention(self) -> list[int]:
        """Of the first half of a block, from its norm's input on."""
        config, wide, narrow = self.config, self.wide, self.narrow
        statistics = 2 * self.tokens * FLOAT32
        kept = [wide, statistics, narrow]  # the norm's input, its statistics, and the input of qkv
        widened = self.on_cpu and self.swapped and self.element < FLOAT32
        if config.dropout and self.on_cpu:
            probabilities = self.rows * config.heads * self.recipe.length**2 * FLOAT32
            kept += 3 * [wide] + 3 * [probabilities]
        else:
            of_a_third = wide if widened else narrow
            kept += [3 * of_a_third] if not widened else 3 * [of_a_third]
            kept += [of_a_third, self.tokens * config.heads * FLOAT32]  # the output, the log-sum-exp
        if widened or (config.dropout and self.on_cpu):
            kept.append(narrow)  # the input of project is another tensor than attention's output
        return kept + self.mask(narrow)

    def perceptron(self) -> list[int]:
        kept = [self.wide, 2 * self.tokens * FLOAT32, self.narrow]  # as of attention: a norm, and the input of expand
        return [*kept, 4 * self.narrow, 4 * self.narrow, *self.mask(self.narrow)]  # GELU's input and output

    def mask(self, size: int) -> list[int]:
        """Of a dropout of a tensor of `size` bytes of the products' dtype."""
        return ([size] if self.on_cpu else [size // self.element]) if self.config.dropout else []

    def block(self) -> list[int]:
        return self.attention() + self.perceptron()

    def casts(self) -> list[int]:
        """Of a block's parameters."""
        squares = (3, 1, 4, 4)  # qkv, project, expand, project: times width²
        width = self.config.width
        return [square * width * width * self.element for square in squares] if self.element < FLOAT32 else []

    def head_casts(self) -> list[int]:
        return [self.table * self.element] if self.element < FLOAT32 else []

    def ends(self) -> list[int]:
        """Before the blocks and behind them: ids and targets, the embedding's dropout, the last norm and its output."""
        kept = 2 * [self.tokens * INT64]
        if self.config.dropout:
            kept += [self.wide if self.on_cpu else self.tokens * self.config.width]
        return [*kept, self.wide, 2 * self.tokens * FLOAT32, self.narrow]

    def up_to(self, blocks: int) -> list[int]:
        """What the first `blocks` blocks have kept."""
        kept: list[int] = []
        for index in range(blocks):
            kept += [self.wide] if self.recomputed[index] else self.block()
        return kept

    def casts_up_to(self, blocks: int) -> list[int]:
        return [size for index in range(blocks) if not self.recomputed[index] for size in self.casts()]

    def gradients_of_a_block(self) -> list[int]:
        width = self.config.width
        return [size * width * width * FLOAT32 for size in (3, 1, 4, 4)]

    def gradients(self) -> list[int]:
        """Of all parameters."""
        of_positions = self.config.context * self.config.width * FLOAT32
        return [*(self.config.layers * self.gradients_of_a_block()), self.table * FLOAT32, of_positions]

    # --- The moments --------------------------------------------------------------------------------------------------

    def moments(self):
        layers, table = self.config.layers, self.table * FLOAT32
        of_a_block = self.gradients_of_a_block()
        # From the second piece on those of the first are there, and the new ones are added one by one.
        before = self.gradients() if self.recipe.accumulate > 1 else []
        yield from self.loss(before)
        yield self.validation()
        # The logits' gradient goes into two products; the weight's gradient is widened to float32.
        logits = [] if self.is_cut else [self.tokens * self.config.vocab_size * self.element]
        of_table = [table] if self.element == FLOAT32 else [table, self.table * self.element]
        yield _Moment(
            "backward of the output", self.up_to(layers) + self.ends() + [self.narrow], logits,
            before + of_table, self.casts_up_to(layers) + self.head_casts(),
        )  # fmt: skip
        for index in reversed(range(layers)):
            behind = [] if before else (layers - 1 - index) * of_a_block
            kept = self.up_to(index) + self.ends()[: 3 if self.config.dropout else 2]
            casts = self.casts_up_to(index) + self.casts()
            for made, gradients in self.on_the_way():
                # The output weight's gradient waits for the embedding's.
                yield _Moment(
                    f"backward of block {index}", kept + made, [], [*before, table, *behind, *gradients], casts
                )
        # All of them; the embedding's own beside the output weight's, and their sum; the gradient that reaches it.
        gradients = [*before, table] if before else self.gradients()
        yield _Moment("backward of the embedding", [self.wide, self.wide], [], [*gradients, table, table], [])

    def loss(self, before: list[int]):
        recipe, layers = self.recipe, self.config.layers
        logits = self.tokens * self.config.vocab_size
        wide, narrow = logits * FLOAT32, logits * self.element
        kept = self.up_to(layers) + self.ends()
        # In the forward autocast still has all that it cast.
        casts = layers * self.casts() + self.head_casts()
        if self.is_cut:
            yield from self.cut_loss(before, kept, casts)
            return
        forward = [narrow, wide] if self.element == FLOAT32 else [narrow, wide, wide]
        yield _Moment("loss", kept, forward, before, casts)
        # The log-probabilities and two gradients. Before those, with the z-loss: the log-probabilities, the logits, and
        # three of exp(logits - lse) on its way to a gradient.
        backward = (5 if recipe.z_loss else 3) * [wide]
        yield _Moment("loss", kept, backward, before, self.casts_up_to(layers) + self.head_casts())

    def cut_loss(self, before: list[int], kept: list[int], casts: list[int]):
        table, z = self.table * FLOAT32, self.chunk() * FLOAT32
        if self.is_ahead:
            yield _Moment("loss", [*kept, self.wide], [z], [*before, table], casts)
            return
        # 16 bits: on a CPU the operands are widened, a chunk of the weight too, on a GPU the gradient stands beside z.
        width = self.config.width
        of_chunk = [self.chunk() // self.tokens * width * FLOAT32]
        widened = [self.wide, *of_chunk] if self.on_cpu else []
        yield _Moment("loss", kept + widened, [z], before, casts)
        g = [] if self.on_cpu or self.element == FLOAT32 else [self.chunk() * self.element]
        yield _Moment(
            "loss", [*kept, *widened, self.wide, *(of_chunk if self.on_cpu else [])], [z, *g],
            [*before, self.table * self.element], self.casts_up_to(self.config.layers) + self.head_casts(),
        )  # fmt: skip

    def on_the_way(self):
        """Pairs (tensors that a block's backward holds, those of its gradients), where they are the most."""
        wide, narrow = self.wide, self.narrow
        width = self.config.width
        of_expand = [4 * width * width * size for size in sorted({FLOAT32, self.element})]
        reached = [wide] if self.element == FLOAT32 else [wide, narrow]  # the block's output's gradient, and cast
        # The perceptron's: GELU's output, then its input, while all of the block is there.
        yield self.block() + reached + [4 * narrow], of_expand
        if self.config.dropout and self.on_cpu:
            # Attention's: the gradient of the probabilities, beside the three that are kept.
            probabilities = self.rows * self.config.heads * self.recipe.length**2 * FLOAT32
            gradients = [8 * width * width * FLOAT32, *of_expand]
            yield self.attention() + reached + [wide, probabilities], gradients

    def validation(self) -> _Moment:
        """Its rows are no more than a piece's."""
        rows = min(EVALUATION_ROWS, self.rows)
        tokens = rows * self.recipe.length
        hidden = tokens * self.config.width
        if self.cuts(tokens):
            found = [self.chunk_of(tokens) * FLOAT32]
        else:
            found = [tokens * self.config.vocab_size * FLOAT32] * (2 if self.element == FLOAT32 else 3)
        casts = self.config.layers * self.casts() + self.head_casts()
        return _Moment("validation", [hidden * FLOAT32, hidden * self.element], found, [], casts)

    # --- malloc -------------------------------------------------------------------------------------------------------

    def heap(self, moments: list[_Moment]) -> int:
        """How large the heap becomes by all but the parameters: by what is the most of it at a moment, and for good."""
        if not self.on_cpu or platform.libc_ver()[0] != "glibc":
            return 0
        most = max(self.in_heap(moment.tensors) for moment in moments)
        recomputed = sum(self.recomputed) * (self.in_heap(self.block()) - self.in_heap([self.wide]))
        pinned = 0
        if self.recipe.accumulate > 1:
            kept = self.in_heap(self.up_to(self.config.layers) + self.ends())
            pinned = kept + min(kept, self.in_heap(self.gradients()))
        return int((1 + HOLES) * most + HOLES_OF_RECOMPUTED * recomputed + HOLES_OF_PIECES * pinned)

    @staticmethod
    def in_heap(tensors: list[int]) -> int:
        return sum(size for size in tensors if size < _mapped_alone)


def _process() -> int:
    """What this process has now, and what PyTorch loads before the first update has ended."""
    if sys.platform != "linux":
        return 0  # not measured
    return resident() + (0 if "torch._dynamo" in sys.modules else LIBRARIES) + FIRST_UPDATE


def return_freed(recipe: Recipe) -> bool:
    """Let this process's malloc return what is freed from 1 MiB on, where blocks are recomputed on a CPU.

    Recomputing is asked for to save memory, and glibc's heap keeps nearly all of what is saved as holes: 515 MB
    resident were 208 after this (12 blocks of width 256, 2048 tokens), for 15 to 20% more processor time. It is of the
    process, for good: a command's affair. False where nothing was set.
    """
    global _mapped_alone
    if recipe.recompute_every is None or torch.device(recipe.device).type != "cpu":
        return False
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    if not ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, RETURNED):
        return False
    _mapped_alone = RETURNED
    return True


def check(config: GPTConfig, recipe: Recipe, *, name: str | None = None, **how) -> Needed:
    """`needed`, if there is as much; nothing is allocated for it.

    Args:
        name: what the sizes come from, for people: "--preset gpt2". how: as `needed` takes it.

    Raises:
        UserError: there is less memory than that; names the parts, and what to make smaller.
    """
    need = needed(config, recipe, **how)
    places = [(torch.device("cpu"), need.host, need.more)]
    if need.device != "cpu":
        places.insert(0, (torch.device(recipe.device), need.total, need.total))
    for place, total, more in places:
        free = available(place)
        if free is None or more <= free:
            continue
        subject = "the training" if name is None else name
        raise UserError(
            f"{subject} needs {formatting.size(total)} of memory on {place} and there are {formatting.size(free)} "
            f"({need.listed()}): {_advice(recipe, need)}"
        )
    return need


def _advice(recipe: Recipe, need: Needed) -> str:
    """What takes less, by the recipe's keys; first what most of it is for."""
    fixed = need.parameters + need.optimizer + need.gradients + need.casts + need.checkpoint + need.copies
    of_pieces = need.activations + need.logits
    smaller = []
    if recipe.batch > recipe.accumulate:
        smaller += [f"a smaller batch (now {recipe.batch})", f"more pieces of it (accumulate, now {recipe.accumulate})"]
    smaller.append(f"a shorter context (now {recipe.length})")
    if recipe.recompute != "full" and need.activations > need.logits // 4:
        smaller.append("recompute full")
    if recipe.precision == "fp32":
        smaller.append("precision bf16")
    preset = ["a smaller preset"]
    found = preset + smaller if fixed > of_pieces else smaller + preset
    return f"it takes less with {', '.join(found)}"
