"""linear_cross_entropy: sizes, inputs, plain mathematics, bytes and operations; what is checked and timed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from gptkern.backends.problem import (
    BACKWARD,
    BFLOAT16,
    BITS,
    BOTH,
    FLOAT32,
    FLOAT32_BYTES,
    FORWARD,
    TRUTH,
    Check,
    Classes,
    Inputs,
    Problem,
    Timed,
    Tuned,
    bits,
    least_size,
    middle_first,
    normal,
)

# Tokens of a step on one GPU; width and vocabulary of GPT-2, Llama 3 1B, 8B, Gemma 2 2B.
ROWS = 8192
MODELS = ((768, 50257), (2048, 128256), (4096, 128256), (2304, 256000))
VOCABULARIES = (4096, 65536, None)
# What float64 has room for.
CHECK_ROWS, CHECK_CLASSES = 256, 8192
IGNORED = -100
CLASS_BYTES, STATISTICS = 8, 3


class Sizes(NamedTuple):
    rows: int
    width: int
    classes: int
    bias: bool = False
    weight: bool = False
    reduction: str = "mean"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    ignored: bool = False  # every eighth row
    cut: int | None = None  # options.batch_chunk_size: so many rows' logits are a chunk, 0: as many as our formula has


class Cut(NamedTuple):
    """The fields of torch.nn.LinearCrossEntropyOptions, which PyTorch before 2.13 does not have."""

    allow_retain_graph: bool = False
    batch_chunk_size: int | None = None
    chunking_method: str | None = "auto"
    acc_policy: str = "auto"
    acc_dtype: torch.dtype | None = None


def _class_of(call) -> tuple:
    extended = call.softcap is not None or call.z_loss != 0.0 or call.label_smoothing != 0.0 or call.stats
    return bits(call.input), least_size(VOCABULARIES, call.linear_weight.shape[0]), extended


class LinearCrossEntropy(Problem):
    coverage = "float16, bfloat16, float32; any number of classes; class indices"
    classes = Classes(dict(bits=BITS, classes=VOCABULARIES, extended=TRUTH), _class_of)

    def inputs(self, sizes: Sizes, dtype, generator) -> Inputs:
        rows, width, classes, has_bias, has_weight, reduction, smoothing, z_loss, softcap, scale, ignored, cut = sizes
        device = generator.device
        tensors = dict(
            input=normal(generator, rows, width, dtype=dtype),
            # logits of a spread of 2
            linear_weight=normal(generator, classes, width, dtype=dtype, spread=2.0 / math.sqrt(width)),
        )
        if has_bias:
            tensors["linear_bias"] = normal(generator, classes, dtype=dtype)
        target = torch.randint(classes, (rows,), generator=generator, device=device)
        if ignored:
            target[1::8] = IGNORED
        constants = dict(target=target)
        if has_weight:
            constants["weight"] = (normal(generator, classes, dtype=torch.float32).abs() + 0.5).to(dtype)
        weight = constants.get("weight")

        def reference(x, w, bias=None):
            z = x @ w.T if bias is None else x @ w.T + bias
            s = z * scale
            s = s if softcap is None else softcap * torch.tanh(s / softcap)
            lse = torch.logsumexp(s, 1, keepdim=True)
            of_class = torch.ones(classes, dtype=s.dtype, device=s.device) if weight is None else weight.to(s.dtype)
            counts = (target != IGNORED).to(s.dtype)[:, None]
            at = target.clamp(0)[:, None]
            own = of_class[at] * counts
            t = torch.zeros_like(s).scatter(1, at, 1.0) * (1.0 - smoothing) + smoothing / classes
            # sum_c t_c * w_c * (lse - s_c) + z_loss * lse² * own
            losses = (counts * (t * of_class * (lse - s)).sum(1, keepdim=True) + z_loss * lse.square() * own)[:, 0]
            return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / own.sum()}[reduction]

        # As most call it, without `options`: few logits may then be whole.
        options = dict(reduction=reduction, label_smoothing=smoothing)
        if cut is not None:
            options["options"] = Cut(batch_chunk_size=cut or None)
        options |= dict(z_loss=z_loss, softcap=softcap, logit_scale=scale, loss_dtype=torch.float32)
        return Inputs(tensors, constants, options, reference)

    def checks(self):
        everything = dict(
            bias=True, weight=True, label_smoothing=0.1, z_loss=1e-2, softcap=5.0, logit_scale=0.5, ignored=True
        )
        return {
            "small": {
                "tails": Check(Sizes(7, 33, 65, cut=2)),
                "one chunk": Check(Sizes(3, 33, 40, cut=0)),
                "few": Check(Sizes(5, 24, 60)),
                "everything": Check(Sizes(19, 24, 130, **everything, cut=5)),
                "each row": Check(Sizes(17, 40, 97, reduction="none", ignored=True, cut=4)),
                "sum": Check(Sizes(5, 16, 1030, bias=True, reduction="sum", cut=3)),
            },
            "realistic": {
                "GPT-2": Check(Sizes(1024, 768, 50257), (BFLOAT16, FLOAT32)),
                "everything": Check(Sizes(1000, 1024, 32000, **everything)),
                "Llama 3 8B": Check(Sizes(512, 4096, 128256, ignored=True), (BFLOAT16,)),
                "each row": Check(Sizes(3001, 512, 9999, reduction="none")),
            },
        }

    def label(self, sizes: Sizes) -> str:
        return f"{sizes.rows}x{sizes.width}->{sizes.classes}"

    def bytes(self, sizes: Sizes, itemsize: int, direction: str) -> int:
        """Input, weight and targets, and backward their gradients: no logits, which need not be in memory at all."""
        operands = (sizes.rows + sizes.classes) * sizes.width * itemsize + sizes.classes * itemsize * sizes.bias
        targets, statistics = sizes.rows * CLASS_BYTES, sizes.rows * STATISTICS * FLOAT32_BYTES
        forward, backward = operands + targets, 2 * operands + targets + statistics
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + statistics + backward}[direction]

    def flops(self, sizes: Sizes, direction: str) -> float:
        """2 * M * N * K of each product: the logits forward, two backward; that they are computed again is not counted.
        Source: the convention of cuBLAS."""
        product = 2.0 * sizes.rows * sizes.width * sizes.classes
        return {FORWARD: product, BACKWARD: 2 * product, BOTH: 3 * product}[direction]

    def cells(self, kind: str, extent: str) -> list[Timed]:
        if extent == "smoke":
            dtype = "bfloat16" if kind == "cuda" else "float32"
            return [Timed(direction, dtype, Sizes(16, 32, 96)) for direction in (FORWARD, BOTH)]
        if kind == "cpu":
            shapes = ((256, 768, 50257),) if extent == "quick" else ((256, 768, 50257), (64, 2048, 128256))
            found = [Timed(direction, "float32", Sizes(*shape)) for shape in shapes for direction in (FORWARD, BOTH)]
            # Few logits, which are whole but for `options`.
            few = Sizes(64, 768, 50257)
            return [*found, *(Timed(BOTH, "float32", sizes) for sizes in (few, few._replace(cut=0)))]
        models = MODELS if extent == "full" else MODELS[2:3]
        found = [
            Timed(direction, "bfloat16", Sizes(ROWS, *model))
            for model in middle_first(models, MODELS[2])
            for direction in (FORWARD, BACKWARD, BOTH)
        ]
        if extent == "quick":
            return found[1:]
        others = (
            Timed(BOTH, "bfloat16", Sizes(4096, *MODELS[2])),
            Timed(BOTH, "float32", Sizes(ROWS, *MODELS[0])),
            Timed(BOTH, "bfloat16", Sizes(ROWS, *MODELS[0], cut=1024)),
        )
        return [*found, *others]

    def shown(self, sizes: Sizes):
        return ("rows", sizes.rows), ("width", sizes.width), ("classes", sizes.classes)

    def panel(self, sizes: Sizes, dtype: str) -> str:
        options = "" if sizes.cut is None else ", with options"
        return f"linear_cross_entropy, {sizes.rows} rows, width {sizes.width}, {dtype}{options}"

    def x(self, sizes: Sizes) -> str:
        return "classes"

    def ceiling(self, sizes: Sizes, dtype: str) -> str:
        return dtype

    def plain(self, sizes: Sizes):
        usual = dict(reduction=sizes.reduction, label_smoothing=sizes.label_smoothing, cut=sizes.cut)
        is_plain = sizes == Sizes(*sizes[:5], **usual)
        if not is_plain or sizes.bias:
            return None

        def call(x, w, target, weight=None):
            options = dict(reduction=sizes.reduction, label_smoothing=sizes.label_smoothing)
            return F.cross_entropy(F.linear(x, w).float(), target, weight, **options)

        return call

    def for_float64(self, sizes: Sizes) -> Sizes:
        return sizes._replace(rows=min(sizes.rows, CHECK_ROWS), classes=min(sizes.classes, CHECK_CLASSES))

    def class_tasks(self) -> dict[tuple, Tuned]:
        return {
            (16, vocabulary, extended): Tuned(
                BOTH, BFLOAT16, Sizes(9, 40, 130, softcap=cap), Sizes(2048, 2048, classes, softcap=cap)
            )
            for vocabulary, classes in ((4096, 4096), (65536, 50257), (None, 128256))
            for extended, cap in ((False, None), (True, 30.0))
        }


PROBLEM = LinearCrossEntropy()
