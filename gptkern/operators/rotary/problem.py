"""rotary: sizes, inputs, plain mathematics, bytes and operations; what is checked, timed, tuned and counted."""

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
    FLOAT16,
    FLOAT32,
    FORWARD,
    FOUR,
    HEAD_DIMS,
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

BASE = 10_000.0
# Tokens of a training step, as in the panels of attention.
TOKENS = 16384
LENGTHS = (1024, 4096, 16384)
# Positions that float64 has room for.
CHECK_LENGTH = 256
# Operations a pair of elements: four products, a sum and a difference. The angles' own are not counted.
_PAIR = 6


class Sizes(NamedTuple):
    batch: int
    heads: int
    length: int
    head_dim: int
    rotary_dim: int
    interleaved: bool
    batched: bool = False  # whether each sequence of the batch has angles of its own
    packed: bool = True  # whether the input is the first third of a packed projection


def _llama(batch: int, length: int) -> Sizes:
    """The query of Llama 3 8B."""
    return Sizes(batch, 32, length, 128, 128, False, packed=False)


def _gpt_j(batch: int, length: int) -> Sizes:
    """GPT-J's, of whose heads a quarter is turned."""
    return Sizes(batch, 16, length, 256, 64, True, packed=False)


class Rotary(Problem):
    coverage = "float16, bfloat16, float32, float64 (triton alone); any head_dim; cos and sin without gradient"
    classes = Classes(
        dict(bits=BITS, head_dim=HEAD_DIMS, interleaved=TRUTH),
        lambda call: (bits(call.input), least_size(HEAD_DIMS, call.input.shape[-1]), call.interleaved),
    )
    counted = (
        Counted(Sizes(2, 12, 64, 64, 64, False)), Counted(Sizes(1, 9, 40, 128, 128, False, packed=False)),
        Counted(Sizes(1, 8, 32, 128, 128, True)), Counted(Sizes(1, 4, 32, 256, 64, True)),
        Counted(Sizes(1, 4, 64, 96, 24, False)), Counted(Sizes(1, 4, 32, 64, 64, False), FLOAT32),
        Counted(Sizes(1, 32, 1, 128, 128, False), FLOAT16),
    )  # fmt: skip

    def inputs(self, sizes: Sizes, dtype, generator) -> Inputs:
        batch, heads, length, head_dim, rotary_dim, interleaved, batched, packed = sizes
        # As a projection leaves it, (batch, length, heads, head_dim) in memory: read in place.
        x = normal(generator, batch, length, 3 if packed else 1, heads, head_dim, dtype=dtype)[:, :, 0].transpose(1, 2)
        half, device = rotary_dim // 2, generator.device
        pair = torch.arange(half, device=device)
        # Each sequence of a batch at a position of its own.
        first = 100 * torch.arange(batch if batched else 1, device=device)
        position = first[:, None] + torch.arange(length, device=device)
        # angle = position * base^(-2 i / rotary_dim), (batch or 1, length, half)
        angles = position[:, :, None] * BASE ** (-2.0 * pair / max(rotary_dim, 1))
        cos, sin = angles.cos().float(), angles.sin().float()
        if not batched:
            cos, sin = cos[0], sin[0]

        def reference(x):
            a = 2 * pair if interleaved else pair
            b = a + 1 if interleaved else a + half
            # (batch or 1, 1, length, half)
            c, s = (tensor.to(x.dtype).view(-1, 1, length, half) for tensor in (cos, sin))
            x_a, x_b = x[..., a], x[..., b]
            # (y_a, y_b) = the rotation by the angle of (x_a, x_b); the others stay
            return x.index_copy(-1, a, x_a * c - x_b * s).index_copy(-1, b, x_a * s + x_b * c)

        options = dict(interleaved=interleaved, rotary_dim=rotary_dim)
        return Inputs(dict(input=x), dict(cos=cos, sin=sin), options, reference)

    def checks(self):
        return {
            "small": {
                "half-split, tails": Check(Sizes(2, 5, 37, 64, 64, False), FOUR),
                "interleaved, tails": Check(Sizes(2, 3, 37, 64, 64, True, batched=True)),
                "partial": Check(Sizes(1, 3, 9, 80, 32, False, batched=True)),
                "partial, interleaved": Check(Sizes(1, 3, 9, 48, 16, True)),
                "any head_dim": Check(Sizes(2, 2, 5, 25, 14, False)),
            },
            "realistic": {
                "Llama 3 8B": Check(Sizes(2, 32, 2048, 128, 128, False)),
                "GPT-J": Check(Sizes(2, 16, 1023, 256, 64, True, batched=True)),
                "GPT-NeoX 20B": Check(Sizes(1, 64, 1001, 96, 24, False, batched=True), FOUR),
                "Phi-2": Check(Sizes(1, 32, 1001, 80, 32, False)),
                "generation": Check(Sizes(8, 32, 1, 128, 128, False, batched=True)),
            },
        }

    def label(self, sizes: Sizes) -> str:
        turned = f"/{sizes.rotary_dim}" if sizes.rotary_dim != sizes.head_dim else ""
        return f"{sizes.batch}x{sizes.heads}x{sizes.length}x{sizes.head_dim}{turned}"

    def bytes(self, sizes: Sizes, itemsize: int, direction: str) -> int:
        """Forward: reads x, and cos and sin (length, rotary_dim / 2) of its dtype; writes y. Backward: as much.

        What passes through is read and written too, as the caller gets a full tensor.
        """
        elements = sizes.batch * sizes.heads * sizes.length * sizes.head_dim
        once = 2 * elements * itemsize + sizes.length * sizes.rotary_dim * itemsize
        return {FORWARD: once, BACKWARD: once, BOTH: 2 * once}[direction]

    def flops(self, sizes: Sizes, direction: str) -> float:
        """The angles' own operations not among them; backward is as much as forward. Source: our own count."""
        once = float(sizes.batch * sizes.heads * sizes.length * (sizes.rotary_dim // 2) * _PAIR)
        return {FORWARD: once, BACKWARD: once, BOTH: 2 * once}[direction]

    def cells(self, kind: str, extent: str) -> list[Timed]:
        if extent == "smoke":
            dtype = "bfloat16" if kind == "cuda" else "float32"
            sizes = Sizes(1, 2, 5, 16, 16, False, packed=False)
            return [Timed(direction, dtype, sizes) for direction in (FORWARD, BOTH)]
        if kind == "cpu":
            models = [_llama] if extent == "quick" else [_llama, _gpt_j]
            found = [
                Timed(direction, "float32", model(1, 256)) for model in models for direction in (FORWARD, BACKWARD)
            ]
            return found + ([Timed(FORWARD, "bfloat16", _llama(1, 256))] if extent == "full" else [])
        if extent == "quick":
            return [Timed(direction, "bfloat16", _llama(TOKENS // 4096, 4096)) for direction in (FORWARD, BACKWARD)]
        found = [
            Timed(direction, "bfloat16", model(TOKENS // length, length))
            for model in (_llama, _gpt_j)
            for length in middle_first(LENGTHS, 4096)
            for direction in DIRECTIONS
        ]
        return found + [Timed(direction, "float32", _llama(TOKENS // 4096, 4096)) for direction in (FORWARD, BACKWARD)]

    def shown(self, sizes: Sizes):
        names = ("batch", "heads", "length", "head_dim", "rotary_dim", "interleaved")
        return tuple((name, getattr(sizes, name)) for name in names)

    def panel(self, sizes: Sizes, dtype: str) -> str:
        layout = "interleaved" if sizes.interleaved else "half-split"
        tokens = sizes.batch * sizes.length
        return f"rotary, {layout}, {sizes.heads} heads of {sizes.head_dim}, {tokens} tokens, {dtype}"

    def x(self, sizes: Sizes) -> str:
        return "length"

    def plain(self, sizes: Sizes):
        return _interleaved_by_hand if sizes.interleaved else _by_hand

    def for_float64(self, sizes: Sizes) -> Sizes:
        return sizes._replace(batch=1, length=min(sizes.length, CHECK_LENGTH))

    def row(self, backend: str, head_dim: int | None) -> Tuned:
        timed = 512 if head_dim is None else head_dim
        large = Sizes(1, 32, max(1, ELEMENTS // (32 * timed)), timed, timed, False)
        return Tuned(FORWARD, BFLOAT16, Sizes(2, 5, 37, timed, timed, False), large)

    def class_tasks(self) -> dict[tuple, Tuned]:
        return {
            (16, head_dim, interleaved): Tuned(
                BOTH, BFLOAT16, Sizes(2, 5, 37, head_dim, head_dim, interleaved),
                Sizes(1, 32, ELEMENTS // (32 * head_dim), head_dim, head_dim, interleaved),
            )
            for head_dim in (64, 128, 256)
            for interleaved in (False, True)
        }  # fmt: skip


def _by_hand(x, cos, sin):
    """As models write it: in the input's dtype, an entry of cos for each element."""
    cos, sin = (torch.cat((angles, angles), -1).to(x.dtype) for angles in (cos, sin))
    turned, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), -1)
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def _interleaved_by_hand(x, cos, sin):
    cos, sin = (angles.repeat_interleave(2, -1).to(x.dtype) for angles in (cos, sin))
    turned, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), -1)
    swapped = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    turned = turned * cos + swapped * sin
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


PROBLEM = Rotary()
