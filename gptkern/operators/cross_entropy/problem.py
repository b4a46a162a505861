"""cross_entropy: sizes, inputs, plain mathematics, bytes and operations; what is checked, timed and told apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from gptkern.backends.problem import (
    BACKWARD,
    BFLOAT16,
    BITS,
    BOTH,
    DIRECTIONS,
    ELEMENTS,
    FLOAT16,
    FLOAT32,
    FLOAT32_BYTES,
    FORWARD,
    TRUTH,
    Check,
    Classes,
    Counted,
    Inputs,
    Problem,
    Timed,
    Tuned,
    bits,
    least_size,
    middle_first,
    normal,
)

# Tokens of a training step, of the vocabularies that are usual: GPT-2's, Llama 2's and 3's, Gemma's.
ROWS = 16384
GPT2 = 50257
VOCABULARIES = (32000, GPT2, 128256, 262144)
WIDTHS = (4096, 65536, None)
# A 16384 x 262144 matrix of 16 bits is 8.6 GB, and so is its gradient.
WIDEST_ROWS = 4096
# Rows that float64 has room for.
CHECK_ROWS = 64
# gptkern calls PyTorch's operator on a CPU: what it adds is the twin's own host time.
CPU_LIMITS = {"float32": (("eager", 1.05),)}
# Of the inputs every eighth target is ignored.
IGNORED, _IGNORED_ROWS = -100, slice(1, None, 8)
# A class is 8 bytes; the forward keeps four statistics of a row.
CLASS_BYTES, STATISTICS = 8, 4
# Operations an element: the maximum, the subtraction, the exponential, the sum; and backward the subtraction, the
# exponential, the difference to the target, the product with the gradient that reaches the row.
_FORWARD, _BACKWARD = 4, 4


class Sizes(NamedTuple):
    rows: int
    classes: int
    positions: int = 0  # of each row's own, behind the classes: the input is (rows, classes, positions)
    target: str = "classes"  # or "probabilities"
    weight: bool = False
    reduction: str = "mean"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def tokens(self) -> int:
        return self.rows * max(self.positions, 1)


def _class_of(call) -> tuple:
    extended = call.softcap is not None or call.z_loss != 0.0 or call.logit_scale != 1.0 or call.need_stats
    return bits(call.input), least_size(WIDTHS, call.input.shape[1]), call.input.dim() > 2, extended


class CrossEntropy(Problem):
    coverage = "float16, bfloat16, float32; any number of classes; probabilities and weights without gradient"
    # For each of the extensions PyTorch takes passes over memory of their own.
    classes = Classes(dict(bits=BITS, classes=WIDTHS, positions=TRUTH, extended=TRUTH), _class_of)

    counted = (
        Counted(Sizes(4, GPT2)), Counted(Sizes(2, 128256)), Counted(Sizes(16, 4096), FLOAT32),
        Counted(Sizes(8, 2050), FLOAT16), Counted(Sizes(64, 1000)), Counted(Sizes(8, 4099, z_loss=1e-2, softcap=5.0)),
        Counted(Sizes(8, 4096, label_smoothing=0.1)),
    )  # fmt: skip

    def inputs(self, sizes: Sizes, dtype, generator) -> Inputs:
        rows, classes, positions, kind, has_weight, reduction, smoothing, z_loss, softcap, scale = sizes
        shape, behind = (rows, classes), ()
        if positions:
            shape, behind = (rows, classes, positions), (positions,)
        input = normal(generator, *shape, dtype=dtype, spread=3.0)
        constants = {}
        device = generator.device
        if kind == "probabilities":
            target = normal(generator, *shape, dtype=torch.float32).softmax(1).to(dtype)
        else:
            target = torch.randint(classes, (rows, *behind), generator=generator, device=device)
            target.view(-1)[_IGNORED_ROWS] = IGNORED
        constants["target"] = target
        if has_weight:
            constants["weight"] = (normal(generator, classes, dtype=torch.float32).abs() + 0.5).to(dtype)
        weight = constants.get("weight")

        def reference(x):
            s = x * scale
            s = s if softcap is None else softcap * torch.tanh(s / softcap)
            lse = torch.logsumexp(s, 1, keepdim=True)
            t = target.to(s.dtype) if kind == "probabilities" else None
            w = torch.ones(classes, dtype=s.dtype, device=s.device) if weight is None else weight.to(s.dtype)
            own = counts = torch.ones(lse.shape, dtype=s.dtype, device=s.device)
            if t is None:
                counts = (target != IGNORED).to(s.dtype).unsqueeze(1)
                at = target.clamp(0).unsqueeze(1)
                t = torch.zeros_like(s).scatter(1, at, 1.0)
                own = w[at] * counts
            t = t * (1.0 - smoothing) + smoothing / classes
            w = w.view(-1, *(1 for _ in behind))
            # sum_c t_c * w_c * (lse - s_c) + z_loss * lse² * own
            losses = counts * (t * w * (lse - s)).sum(1, keepdim=True) + z_loss * lse.square() * own
            losses = losses.squeeze(1)
            return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / own.sum()}[reduction]

        options = dict(reduction=reduction, label_smoothing=smoothing)
        options |= dict(z_loss=z_loss, softcap=softcap, logit_scale=scale)
        return Inputs(dict(input=input), constants, options, reference)

    def checks(self):
        return {
            "small": {
                "tail": Check(Sizes(7, 33)),
                "GPT-2's odd rows": Check(Sizes(3, GPT2), (FLOAT32, BFLOAT16)),
                "everything": Check(Sizes(9, 130, 0, "classes", True, "mean", 0.1, 1e-2, 5.0, 0.5)),
                "each row": Check(Sizes(19, 65, reduction="none", z_loss=1e-2)),
                "probabilities": Check(Sizes(5, 70, 0, "probabilities", True, "sum", 0.1)),
                "positions": Check(Sizes(2, 40, 17, softcap=3.0)),
            },
            "realistic": {
                "GPT-2's": Check(Sizes(512, GPT2)),
                "Llama 3's": Check(Sizes(256, 128256, z_loss=1e-4)),
                "widest": Check(Sizes(64, 262144, softcap=30.0)),
                "everything": Check(Sizes(1024, 32000, 0, "classes", True, "mean", 0.1, 1e-2, 30.0, 0.5)),
                "probabilities": Check(Sizes(512, 1003, 0, "probabilities", True, "sum", 0.1)),
                "positions": Check(Sizes(8, 1000, 1003)),
                "narrow": Check(Sizes(100_003, 9)),
            },
        }

    def label(self, sizes: Sizes) -> str:
        return f"{sizes.rows}x{sizes.classes}" + (f"x{sizes.positions}" if sizes.positions else "")

    def bytes(self, sizes: Sizes, itemsize: int, direction: str) -> int:
        """Forward: reads the logits and the targets. Backward: reads both and each row's statistics, writes dx. Both:
        the forward writes the statistics too."""
        logits = sizes.tokens * sizes.classes * itemsize
        targets = logits if sizes.target == "probabilities" else sizes.tokens * CLASS_BYTES
        targets += sizes.classes * itemsize * sizes.weight
        statistics = sizes.tokens * STATISTICS * FLOAT32_BYTES
        forward, backward = logits + targets, 2 * logits + targets + statistics
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + statistics + backward}[direction]

    def least(self, sizes: Sizes, itemsize: int, direction: str) -> int:
        """Of rows that are ignored nothing is read, and their gradient is written."""
        logits = sizes.tokens * sizes.classes * itemsize
        read = logits
        if sizes.target == "classes":
            read -= len(range(*_IGNORED_ROWS.indices(sizes.tokens))) * sizes.classes * itemsize
        return read if direction == FORWARD else read + logits

    def flops(self, sizes: Sizes, direction: str) -> float:
        """An exponential counts as one operation. Source: our own count."""
        elements = float(sizes.tokens * sizes.classes)
        return {FORWARD: _FORWARD, BACKWARD: _BACKWARD, BOTH: _FORWARD + _BACKWARD}[direction] * elements

    def cells(self, kind: str, extent: str) -> list[Timed]:
        if extent == "smoke":
            dtype = "bfloat16" if kind == "cuda" else "float32"
            return [Timed(direction, dtype, Sizes(16, 65)) for direction in (FORWARD, BOTH)]
        if kind == "cpu":
            shapes = [("float32", 256, GPT2), ("float32", 64, 128256)]
            if extent == "full":
                shapes += [("float32", 1024, 4096), ("bfloat16", 64, GPT2)]
            return [
                Timed(direction, dtype, Sizes(rows, classes), CPU_LIMITS.get(dtype, ()))
                for dtype, rows, classes in shapes
                for direction in (FORWARD, BACKWARD)
            ]
        if extent == "quick":
            return [Timed(direction, "bfloat16", Sizes(ROWS, GPT2)) for direction in (FORWARD, BACKWARD)]
        found = [
            Timed(direction, "bfloat16", Sizes(ROWS if classes < 262144 else WIDEST_ROWS, classes))
            for classes in middle_first(VOCABULARIES, GPT2, 128256)
            for direction in DIRECTIONS
        ]
        gemma = Sizes(ROWS, GPT2, z_loss=1e-4, softcap=30.0)
        return found + [Timed(direction, "bfloat16", gemma) for direction in (FORWARD, BACKWARD)]

    def shown(self, sizes: Sizes):
        found = ("rows", sizes.rows), ("classes", sizes.classes)
        return (*found, ("extended", True)) if sizes.softcap is not None else found

    def panel(self, sizes: Sizes, dtype: str) -> str:
        return f"cross_entropy with softcap and z-loss, {dtype}" if sizes.softcap else f"cross_entropy, {dtype}"

    def x(self, sizes: Sizes) -> str:
        return "classes"

    def plain(self, sizes: Sizes):
        def call(x, target, weight=None):
            s = x if sizes.logit_scale == 1.0 else x * sizes.logit_scale
            s = s if sizes.softcap is None else sizes.softcap * torch.tanh(s / sizes.softcap)
            loss = F.cross_entropy(s, target, weight, reduction=sizes.reduction, label_smoothing=sizes.label_smoothing)
            if not sizes.z_loss:
                return loss
            lse = torch.logsumexp(s, 1).square().masked_fill(target == IGNORED, 0.0)
            return loss + sizes.z_loss * lse.sum() / (target != IGNORED).sum()

        # Beside a weight, or of each row, users write the z-loss in their own ways.
        return None if sizes.z_loss and (sizes.weight or sizes.reduction != "mean") else call

    def for_float64(self, sizes: Sizes) -> Sizes:
        return sizes._replace(rows=min(sizes.rows, CHECK_ROWS))

    def class_tasks(self) -> dict[tuple, Tuned]:
        return {
            (16, width, False, extended): Tuned(
                BOTH, BFLOAT16, Sizes(9, classes, softcap=cap), Sizes(ELEMENTS // classes, classes, softcap=cap)
            )
            for width, classes in ((4096, 4096), (65536, GPT2), (None, 128256))
            for extended, cap in ((False, None), (True, 30.0))
        }


PROBLEM = CrossEntropy()
