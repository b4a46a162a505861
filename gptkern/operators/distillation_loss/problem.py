"""distillation_loss: sizes, inputs, plain mathematics, bytes and operations; what is checked, timed and told apart."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gptkern.backends.problem import (
    BACKWARD,
    BFLOAT16,
    BITS,
    BOTH,
    DIRECTIONS,
    ELEMENTS,
    FLOAT32,
    FLOAT32_BYTES,
    FORWARD,
    Check,
    Classes,
    Inputs,
    Problem,
    Timed,
    Tuned,
    bits,
    least_size,
    normal,
)

# Tokens of a step whose logits of two models a GPU has room for, and the vocabularies of Llama 2 and 3.
ROWS, VOCABULARIES = 4096, (32000, 128256)
WIDTHS = (4096, 65536, None)
# Rows that float64 has room for.
CHECK_ROWS = 64
IGNORED = -100
# A class is 8 bytes; the forward keeps six statistics of a row.
CLASS_BYTES, STATISTICS = 8, 6
# Operations an element of both models, an exponential counting as one. Forward: maximum, subtraction, exponential and
# sum of both, their difference, weighted and summed; of jsd a logarithm too. Backward: both exponentials, the ratio.
_FORWARD, _BACKWARD = 11, 9


class Sizes(NamedTuple):
    rows: int
    classes: int
    divergence: str = "forward_kl"
    temperature: float = 1.0
    mix: float = 0.0
    stored: int = 0  # the teacher's likeliest classes that are known; 0: all


class DistillationLoss(Problem):
    coverage = "float16, bfloat16, float32; any number of classes"
    classes = Classes(
        dict(bits=BITS, classes=WIDTHS, divergence=("forward_kl", "reverse_kl", "jsd"), whole=(False, True)),
        lambda call: (
            bits(call.student), least_size(WIDTHS, call.student.shape[1]), call.divergence, call.teacher is not None,
        ),
    )  # fmt: skip

    def inputs(self, sizes: Sizes, dtype, generator) -> Inputs:
        rows, classes, divergence, temperature, mix, stored = sizes
        student = normal(generator, rows, classes, dtype=dtype, spread=2.0)
        teacher = normal(generator, rows, classes, dtype=dtype, spread=2.0)
        target = torch.randint(classes, (rows,), generator=generator, device=generator.device)
        # Every eighth is ignored.
        target[1::8] = IGNORED
        constants = dict(teacher_logits=teacher, target=target)
        options = dict(divergence=divergence, temperature=temperature, mix=mix)
        if stored:
            del constants["teacher_logits"]
            top = options["teacher_top"] = tuple(torch.log_softmax(teacher.float(), 1).topk(stored))
            others = torch.ones(rows, classes, device=target.device).scatter_(1, top[1], 0.0)

        def reference(s):
            q = torch.softmax(s / temperature, 1)
            p = torch.softmax(teacher.to(s.dtype) / temperature, 1)
            if stored:
                # All other classes are one.
                p, q = (torch.cat([x.gather(1, top[1]), (x * others).sum(1, keepdim=True)], 1) for x in (p, q))
            xlogy = torch.special.xlogy
            m = 0.5 * (p + q)
            found = {
                "forward_kl": lambda: (xlogy(p, p) - xlogy(p, q)).sum(1),
                "reverse_kl": lambda: (xlogy(q, q) - xlogy(q, p)).sum(1),
                "jsd": lambda: (0.5 * (xlogy(p, p) + xlogy(q, q)) - xlogy(m, m)).sum(1),
            }[divergence]()
            counts = target != IGNORED
            entropy = torch.logsumexp(s, 1) - s.gather(1, target.clamp(0)[:, None])[:, 0]
            losses = (1.0 - mix) * temperature**2 * found + mix * entropy
            return torch.where(counts, losses, 0.0).sum() / counts.to(s.dtype).sum()

        return Inputs(dict(student_logits=student), constants, options, reference)

    def checks(self):
        return {
            "small": {
                "tail": Check(Sizes(7, 33)),
                "reverse": Check(Sizes(9, 130, "reverse_kl", 2.0, 0.5)),
                "jsd": Check(Sizes(5, 70, "jsd", 1.5)),
                "stored": Check(Sizes(6, 65, "forward_kl", 1.0, 0.5, 4)),
                "wide": Check(Sizes(2, 5003), (FLOAT32, BFLOAT16)),
            },
            "realistic": {
                "Llama 3's": Check(Sizes(128, 128256)),
                "reverse": Check(Sizes(512, 32000, "reverse_kl", 2.0, 0.5)),
                "jsd": Check(Sizes(512, 50257, "jsd")),
                "stored": Check(Sizes(512, 32000, "jsd", 1.0, 0.5, 64)),
                "narrow": Check(Sizes(20_003, 65)),
            },
        }

    def label(self, sizes: Sizes) -> str:
        return f"{sizes.rows}x{sizes.classes}"

    def bytes(self, sizes: Sizes, itemsize: int, direction: str) -> int:
        """Forward: reads both models' logits and the targets. Backward: reads them and each row's statistics, writes
        dx. Both: the forward writes the statistics too."""
        rows, classes = sizes.rows, sizes.classes
        teacher = rows * (sizes.stored * (FLOAT32_BYTES + CLASS_BYTES) or classes * itemsize)
        read, statistics = rows * classes * itemsize + teacher + rows * CLASS_BYTES, rows * STATISTICS * FLOAT32_BYTES
        forward, backward = read, read + statistics + rows * classes * itemsize
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + statistics + backward}[direction]

    def flops(self, sizes: Sizes, direction: str) -> float:
        """Source: our own count."""
        elements = float(sizes.rows * sizes.classes)
        return {FORWARD: _FORWARD, BACKWARD: _BACKWARD, BOTH: _FORWARD + _BACKWARD}[direction] * elements

    def cells(self, kind: str, extent: str) -> list[Timed]:
        if extent == "smoke":
            dtype = "bfloat16" if kind == "cuda" else "float32"
            return [Timed(direction, dtype, Sizes(16, 65)) for direction in (FORWARD, BOTH)]
        if kind == "cpu":
            sizes = [Sizes(64, 32000)] + ([Sizes(64, 32000, "jsd")] if extent == "full" else [])
            return [Timed(direction, "float32", size) for size in sizes for direction in (FORWARD, BACKWARD)]
        sizes = [Sizes(ROWS, 128256)]
        if extent == "full":
            sizes += [Sizes(ROWS, classes, name) for classes in VOCABULARIES for name in ("reverse_kl", "jsd")]
        return [Timed(direction, "bfloat16", size) for size in sizes for direction in DIRECTIONS]

    def shown(self, sizes: Sizes):
        return ("rows", sizes.rows), ("classes", sizes.classes)

    def panel(self, sizes: Sizes, dtype: str) -> str:
        return f"distillation_loss, {sizes.divergence}, {dtype}"

    def x(self, sizes: Sizes) -> str:
        return "classes"

    def plain(self, sizes: Sizes):
        if sizes.stored or sizes.mix:
            return None

        def call(student, teacher, target):
            log_q, log_p = (torch.log_softmax(x.float() / sizes.temperature, 1) for x in (student, teacher))
            if sizes.divergence == "forward_kl":
                found = log_p.exp() * (log_p - log_q)
            elif sizes.divergence == "reverse_kl":
                found = log_q.exp() * (log_q - log_p)
            else:
                log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
                found = 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m))
            counts = target != IGNORED
            losses = found.sum(1).masked_fill(~counts, 0.0) * sizes.temperature**2
            return (losses.sum() / counts.sum()).to(student.dtype)

        return call

    def for_float64(self, sizes: Sizes) -> Sizes:
        return sizes._replace(rows=min(sizes.rows, CHECK_ROWS))

    def class_tasks(self) -> dict[tuple, Tuned]:
        return {
            (16, width, name, True): Tuned(
                BOTH, BFLOAT16, Sizes(9, min(classes, 5003), name), Sizes(ELEMENTS // classes, classes, name)
            )
            for width, classes in ((65536, 32000), (None, 128256))
            for name in ("forward_kl", "jsd")
        }


PROBLEM = DistillationLoss()
