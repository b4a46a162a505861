"""adamw: sizes, inputs, plain mathematics, bytes and operations; what is checked, timed, tuned and counted."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gptkern.backends.problem import (
    BFLOAT16,
    BITS,
    ELEMENTS,
    FLOAT16,
    FLOAT32,
    FORWARD,
    Check,
    Classes,
    Counted,
    Inputs,
    Problem,
    Timed,
    Tuned,
    normal,
)

# Updates done before, and the hyperparameters of GPT-3, appendix B, with a learning rate that moves every parameter.
STEP, LR, BETAS, EPS, WEIGHT_DECAY = 3, 1e-2, (0.9, 0.95), 1e-8, 0.1
# Largest number of elements that a class serves.
COUNTS = (2**14, 2**20, 2**24, None)
# Additions, multiplications, divisions and roots of an element: decay 2, m 3, v 4, the quotient 5, the difference 1.
_OPERATIONS = 15


class Sizes(NamedTuple):
    rows: int
    width: int
    in_place: bool = False


def _count(call) -> int | None:
    """The class of the elements of a call of either kind, an update or a norm."""
    elements = sum(grad.numel() for grad in call.grads)
    for most in COUNTS:
        if most is None or elements <= most:
            return most
    raise AssertionError


class AdamW(Problem):
    coverage = "float16, bfloat16, float32; states of the same dtype, float32 or 8 bits; any sizes"
    classes = Classes(dict(bits=BITS, elements=COUNTS), lambda call: (8 * call.grads[0].dtype.itemsize, _count(call)))

    counted = tuple(
        Counted(Sizes(rows, width), dtype, backward=False)
        for rows, width, dtype in ((64, 1024, FLOAT32), (64, 1024, BFLOAT16), (33, 1000, FLOAT16))
    )

    def inputs(self, sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        rows, width, in_place = sizes
        tensors = {
            "param": normal(generator, rows, width, dtype=dtype),
            "grad": normal(generator, rows, width, dtype=dtype),
            "exp_avg": normal(generator, rows, width, dtype=dtype, spread=0.3),
            "exp_avg_sq": normal(generator, rows, width, dtype=FLOAT32).square().add(0.1).to(dtype),
        }
        step = torch.full((), float(STEP), device=generator.device)
        # In place the inputs are read again and again: they stay what they are.
        options = dict(lr=0.0 if in_place else LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, in_place=in_place)

        def reference(p, g, m, v):
            beta1, beta2 = BETAS
            p = p - LR * WEIGHT_DECAY * p
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            p = p - LR * (m / (1 - beta1 ** (STEP + 1))) / (torch.sqrt(v / (1 - beta2 ** (STEP + 1))) + EPS)
            return p, m, v

        return Inputs(tensors, {"step": step}, options, reference)

    def checks(self):
        return {
            "small": {
                "tail": Check(Sizes(7, 33)),
                "two chunks": Check(Sizes(5, 1000)),
                "one": Check(Sizes(1, 1)),
            },
            "realistic": {
                "GPT-2's embedding": Check(Sizes(50257, 768)),
                "tail": Check(Sizes(3001, 1023)),
            },
        }

    def label(self, sizes: Sizes) -> str:
        return f"{sizes.rows}x{sizes.width}"

    def bytes(self, sizes: Sizes, itemsize: int, direction: str) -> int:
        """Reads parameter, gradient and both averages; writes all but the gradient."""
        return 7 * sizes.rows * sizes.width * itemsize

    def least(self, sizes: Sizes, itemsize: int, direction: str) -> int:
        """All but the gradient is read and written."""
        return self.bytes(sizes, itemsize, direction)

    def flops(self, sizes: Sizes, direction: str) -> float:
        """Source: our own count."""
        return float(_OPERATIONS * sizes.rows * sizes.width)

    def cells(self, kind: str, extent: str) -> list[Timed]:
        if extent == "smoke":
            return [Timed(FORWARD, "float32", Sizes(16, 64, True))]
        if kind == "cpu":
            shapes = [(768, 3072)] + ([(50257, 768)] if extent == "full" else [])
            return [Timed(FORWARD, "float32", Sizes(rows, width, True)) for rows, width in shapes]
        # GPT-2 124M's and Llama 8B's largest.
        shapes = [("float32", 50257, 768)]
        if extent == "full":
            shapes += [("bfloat16", 50257, 768), ("float32", 4096, 14336), ("bfloat16", 4096, 14336)]
        return [Timed(FORWARD, dtype, Sizes(rows, width, True)) for dtype, rows, width in shapes]

    def shown(self, sizes: Sizes):
        return ("rows", sizes.rows), ("width", sizes.width)

    def panel(self, sizes: Sizes, dtype: str) -> str:
        return f"adamw, {dtype}"

    def plain(self, sizes: Sizes):
        (beta1, beta2), lr = BETAS, 0.0 if sizes.in_place else LR

        def call(p, g, m, v, step):
            with torch.no_grad():
                tensors = (p, m, v, step) if sizes.in_place else (p.clone(), m.clone(), v.clone(), step.clone())
                p, m, v, step = tensors
                torch._foreach_add_([step], 1)
                torch._fused_adamw_(
                    [p], [g], [m], [v], [], [step], lr=lr, beta1=beta1, beta2=beta2, weight_decay=WEIGHT_DECAY,
                    eps=EPS, amsgrad=False, maximize=False,
                )  # fmt: skip
            return p, m, v

        return call

    def written_out(self, sizes: Sizes):
        (beta1, beta2), lr = BETAS, 0.0 if sizes.in_place else LR

        def call(p, g, m, v, step):
            with torch.no_grad():
                dtype, t = p.dtype, step + 1
                x, g, m, v = (tensor.float() for tensor in (p, g, m, v))
                x = x - lr * WEIGHT_DECAY * x
                m = m + (1 - beta1) * (g - m)
                v = beta2 * v + (1 - beta2) * g * g
                x = x - lr / (1 - beta1**t) * m / ((v / (1 - beta2**t)).sqrt() + EPS)
            return x.to(dtype), m.to(dtype), v.to(dtype)

        return call

    def for_float64(self, sizes: Sizes) -> Sizes:
        return sizes._replace(rows=max(1, min(sizes.rows, ELEMENTS // 4 // sizes.width)), in_place=False)

    def class_tasks(self) -> dict[tuple, Tuned]:
        return {
            (16, most): Tuned(FORWARD, BFLOAT16, Sizes(9, 100), Sizes(rows, 1024))
            for most, rows in ((2**14, 16), (2**20, 1024), (2**24, 8192), (None, 65536))
        }


PROBLEM = AdamW()
