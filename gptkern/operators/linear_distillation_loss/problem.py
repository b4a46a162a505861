"""linear_distillation_loss: sizes, inputs, plain mathematics, bytes and operations; what is checked and timed."""

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
    FLOAT32,
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

# Tokens of a step, and what distils into what: Llama 3 8B into 1B, of one vocabulary.
ROWS, VOCABULARY, STUDENT, TEACHER = 4096, 128256, 2048, 4096
WIDTHS = (4096, 65536, None)
# Rows and classes that float64 has room for.
CHECK_ROWS, CHECK_CLASSES = 64, 32000
IGNORED = -100


class Sizes(NamedTuple):
    rows: int
    width: int
    classes: int
    teacher_width: int
    divergence: str = "forward_kl"
    temperature: float = 1.0
    mix: float = 0.0


class LinearDistillationLoss(Problem):
    coverage = "float16, bfloat16, float32; any number of classes"
    classes = Classes(
        dict(bits=BITS, classes=WIDTHS, divergence=("forward_kl", "reverse_kl", "jsd")),
        lambda call: (bits(call.student), least_size(WIDTHS, call.student_weight.shape[0]), call.divergence),
    )

    def inputs(self, sizes: Sizes, dtype, generator) -> Inputs:
        rows, width, classes, teacher_width, divergence, temperature, mix = sizes
        tensors = dict(
            student=normal(generator, rows, width, dtype=dtype),
            student_weight=normal(generator, classes, width, dtype=dtype, spread=2.0 / width**0.5),
        )
        teacher = normal(generator, rows, teacher_width, dtype=dtype)
        teacher_weight = normal(generator, classes, teacher_width, dtype=dtype, spread=2.0 / teacher_width**0.5)
        target = torch.randint(classes, (rows,), generator=generator, device=generator.device)
        # Every eighth is ignored.
        target[1::8] = IGNORED
        constants = dict(teacher=teacher, teacher_weight=teacher_weight, target=target)
        options = dict(divergence=divergence, temperature=temperature, mix=mix)

        def reference(x, weight):
            s, t = x @ weight.T, teacher.to(x.dtype) @ teacher_weight.to(x.dtype).T
            q, p = (torch.softmax(logits / temperature, 1) for logits in (s, t))
            m = 0.5 * (p + q)
            xlogy = torch.special.xlogy
            found = {
                "forward_kl": lambda: (xlogy(p, p) - xlogy(p, q)).sum(1),
                "reverse_kl": lambda: (xlogy(q, q) - xlogy(q, p)).sum(1),
                "jsd": lambda: (0.5 * (xlogy(p, p) + xlogy(q, q)) - xlogy(m, m)).sum(1),
            }[divergence]()
            counts = target != IGNORED
            entropy = torch.logsumexp(s, 1) - s.gather(1, target.clamp(0)[:, None])[:, 0]
            losses = (1.0 - mix) * temperature**2 * found + mix * entropy
            return torch.where(counts, losses, 0.0).sum() / counts.to(s.dtype).sum()

        return Inputs(tensors, constants, options, reference)

    def checks(self):
        return {
            "small": {
                "tail": Check(Sizes(7, 12, 33, 20)),
                "reverse": Check(Sizes(9, 16, 130, 16, "reverse_kl", 2.0, 0.5)),
                "jsd": Check(Sizes(5, 8, 70, 24, "jsd", 1.5)),
                "wide": Check(Sizes(2, 8, 5003, 8), (FLOAT32,)),
            },
            "realistic": {
                "Llama 3's": Check(Sizes(128, 256, 32000, 512)),
                "reverse": Check(Sizes(512, 256, 32000, 256, "reverse_kl", 2.0, 0.5)),
                "jsd": Check(Sizes(512, 128, 50257, 128, "jsd")),
            },
        }

    def label(self, sizes: Sizes) -> str:
        return f"{sizes.rows}x{sizes.width}x{sizes.classes}"

    def bytes(self, sizes: Sizes, itemsize: int, direction: str) -> int:
        """Hidden states and weights once each way, and the student's gradients once: the logits are none of it."""
        rows, width, classes, teacher_width, *_ = sizes
        of_student, of_teacher = ((rows + classes) * columns * itemsize for columns in (width, teacher_width))
        forward, backward = of_student + of_teacher, 2 * of_student + of_teacher
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[direction]

    def flops(self, sizes: Sizes, direction: str) -> float:
        """Of the products: one of each model, and backward the student's two. What is computed again is not counted."""
        rows, width, classes, teacher_width, *_ = sizes
        forward, backward = 2.0 * rows * classes * (width + teacher_width), 4.0 * rows * classes * width
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[direction]

    def ceiling(self, sizes: Sizes, dtype: str) -> str:
        return dtype

    def cells(self, kind: str, extent: str) -> list[Timed]:
        if extent == "smoke":
            dtype = "bfloat16" if kind == "cuda" else "float32"
            return [Timed(direction, dtype, Sizes(16, 32, 65, 48)) for direction in (FORWARD, BOTH)]
        if kind == "cpu":
            sizes = [Sizes(128, 256, 32000, 512)] + ([Sizes(512, 256, 8192, 512, "jsd")] if extent == "full" else [])
            return [Timed(direction, "float32", size) for size in sizes for direction in (FORWARD, BOTH)]
        sizes = [Sizes(ROWS, STUDENT, VOCABULARY, TEACHER)]
        if extent == "full":
            sizes += [sizes[0]._replace(divergence=name) for name in ("reverse_kl", "jsd")]
        return [Timed(direction, "bfloat16", size) for size in sizes for direction in DIRECTIONS]

    def shown(self, sizes: Sizes):
        return ("rows", sizes.rows), ("width", sizes.width), ("classes", sizes.classes)

    def panel(self, sizes: Sizes, dtype: str) -> str:
        return f"linear_distillation_loss, {sizes.divergence}, {dtype}"

    def x(self, sizes: Sizes) -> str:
        return "rows"

    def plain(self, sizes: Sizes):
        if sizes.mix:
            return None

        def call(student, student_weight, teacher, teacher_weight, target):
            logits = F.linear(student, student_weight), F.linear(teacher, teacher_weight)
            log_q, log_p = (torch.log_softmax(x.float() / sizes.temperature, 1) for x in logits)
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
        return sizes._replace(rows=min(sizes.rows, CHECK_ROWS), classes=min(sizes.classes, CHECK_CLASSES))

    def class_tasks(self) -> dict[tuple, Tuned]:
        return {
            (16, width, name): Tuned(
                BOTH, BFLOAT16, Sizes(9, 16, 1003, 24, name), Sizes(2048, 1024, classes, 2048, name)
            )
            for width, classes in ((65536, 32000), (None, 128256))
            for name in ("forward_kl", "jsd")
        }


PROBLEM = LinearDistillationLoss()
