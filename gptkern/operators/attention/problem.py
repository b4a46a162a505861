"""attention: sizes, inputs, plain mathematics, bytes and operations; what is checked, timed, tuned and counted."""

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
    FLOAT16,
    FLOAT32,
    FLOAT32_BYTES,
    FORWARD,
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

# Lengths of a panel on a GPU. Batch x length is held at this many tokens, of a model about 2048 wide: the shapes of
# published numbers. Beyond, there is one row.
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
TOKENS = 16384
# head_dim -> heads: GPT-2's and GPT-3's 64 and 128 in a model 2048 wide, GPT-3 2.7B's 80 and 760M's 96.
HEADS = {64: 32, 80: 32, 96: 16, 128: 16}
# Query heads for each head of key and value in the panel of grouped heads.
GROUP = 4
# Where the quick table looks.
QUICK_LENGTH = 4096
# gptkern calls PyTorch's operator on a CPU: what it adds is the twin's own host time.
CPU_LIMITS = (("eager", 1.05),)
# What float64 has room for: of the same head_dim, limit and grouping, this long, with so many heads of key and value.
CHECK_LENGTH, CHECK_KV_HEADS = 512, 2
# Generation reads a query or a few at a time: another bottleneck than many.
CLASS_LENGTHS = (16, 512, 2048, 8192, None)

# The forward has two products, S = Q K^T and O = P V; the backward five: S once more, dV = P^T dO, dP = dO V^T,
# dQ = dS K and dK = dS^T Q.
_FACTOR = {FORWARD: 1.0, BACKWARD: 2.5, BOTH: 3.5}


class Sizes(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    length_q: int
    length_k: int
    head_dim: int
    kind: str  # "causal", "full", "lower right", "key padding" (a bool mask) or "additive"


def square(batch: int, heads: int, length: int, head_dim: int, causal: bool = True, group: int = 1) -> Sizes:
    return Sizes(batch, heads, heads // group, length, length, head_dim, "causal" if causal else "full")


class Attention(Problem):
    coverage = "float16, bfloat16, float32 (triton alone); head_dim a multiple of 8 to 256; mask, dropout: triton"
    classes = Classes(
        dict(bits=BITS, head_dim=HEAD_DIMS, length=CLASS_LENGTHS, causal=TRUTH),
        lambda call: (
            bits(call.query), least_size(HEAD_DIMS, call.query.shape[-1]),
            least_size(CLASS_LENGTHS, call.query.shape[-2]), call.is_causal,
        ),
    )  # fmt: skip
    # Keys and values are read once for each tile of queries: bytes have no limit.
    counted = tuple(
        Counted(sizes, dtype, limit=None)
        for sizes, dtype in (
            (square(1, 1, 1024, 64), BFLOAT16), (square(1, 1, 1024, 64, False), BFLOAT16),
            (square(1, 1, 512, 128), BFLOAT16), (square(1, 1, 512, 128, False), BFLOAT16),
            (square(1, 1, 512, 80), BFLOAT16), (square(1, 1, 512, 96), BFLOAT16), (square(1, 1, 256, 256), FLOAT16),
            (square(1, 4, 128, 64, group=2), FLOAT16), (Sizes(1, 1, 1, 100, 300, 64, "full"), BFLOAT16),
        )
    )  # fmt: skip

    def inputs(self, sizes: Sizes, dtype, generator) -> Inputs:
        batch, heads, kv_heads, length_q, length_k, head_dim, kind = sizes
        # (batch, length, heads, head_dim) in memory, as a GPT's projection leaves it: the kernels read it in place.
        query = normal(generator, batch, length_q, heads, head_dim, dtype=dtype).transpose(1, 2)
        key = normal(generator, batch, length_k, kv_heads, head_dim, dtype=dtype).transpose(1, 2)
        value = normal(generator, batch, length_k, kv_heads, head_dim, dtype=dtype).transpose(1, 2)
        is_causal, lower_right = kind in ("causal", "lower right"), kind == "lower right"
        mask, options = None, {"is_causal": is_causal}
        if lower_right:
            from torch.nn.attention.bias import causal_lower_right

            options = {"attn_mask": causal_lower_right(length_q, length_k)}
        elif kind == "key padding":
            # Every sequence has another length, at least half of the longest.
            lengths = length_k - torch.arange(batch, device=generator.device) % (length_k // 2 + 1)
            mask = (torch.arange(length_k, device=generator.device) < lengths[:, None])[:, None, None]
        elif kind == "additive":
            mask = normal(generator, batch, 1, length_q, length_k, dtype=FLOAT32, spread=2.0)
        if mask is not None:
            options = {"attn_mask": mask}
        # Only where it is needed: with it PyTorch, which this is timed against, has fewer kernels to choose from.
        options["enable_gqa"] = heads != kv_heads

        def reference(query, key, value):
            # (batch, kv_heads, …) -> (batch, heads, …): head h reads h // (heads // kv_heads)
            key, value = (tensor.repeat_interleave(heads // kv_heads, dim=1) for tensor in (key, value))
            scores = (query @ key.transpose(2, 3)) / math.sqrt(head_dim)
            if is_causal:
                seen = torch.ones(length_q, length_k, dtype=torch.bool, device=query.device)
                scores = scores.masked_fill(~seen.tril(length_k - length_q if lower_right else 0), -math.inf)
            if kind == "key padding":
                scores = scores.masked_fill(~mask, -math.inf)
            if kind == "additive":
                scores = scores + mask.to(scores.dtype)
            # P = exp(scores) / sum exp(scores); the largest score of a row is a constant that only keeps exp in range
            exponentials = torch.exp(scores - scores.detach().amax(-1, keepdim=True))
            return (exponentials / exponentials.sum(-1, keepdim=True)) @ value

        return Inputs(dict(query=query, key=key, value=value), {}, options, reference)

    def checks(self):
        small = {
            "causal": (1, 2, 2, 150, 150, 64, "causal"),
            "full, tails": (2, 1, 1, 37, 141, 16, "full"),
            "grouped heads": (1, 4, 2, 70, 70, 32, "causal"),
            "head_dim 80": (1, 1, 1, 100, 100, 80, "causal"),
            "more queries than keys": (1, 1, 1, 150, 40, 24, "causal"),
            "more keys than queries": (1, 1, 1, 40, 150, 24, "causal"),
            "head_dim 256": (1, 1, 1, 40, 40, 256, "causal"),
            "key padding": (2, 1, 1, 37, 70, 16, "key padding"),
            "additive mask": (2, 2, 1, 37, 70, 16, "additive"),
            "more keys than queries, additive mask": (1, 1, 1, 37, 150, 16, "additive"),
            "lower right": (1, 2, 1, 37, 70, 16, "lower right"),
        }
        realistic = {
            "GPT-2": (4, 12, 12, 1024, 1024, 64, "causal"),
            "head_dim 128": (1, 8, 8, 2048, 2048, 128, "causal"),
            "grouped heads": (1, 32, 8, 1000, 1000, 128, "causal"),
            "GPT-3 2.7B": (1, 16, 16, 1023, 1023, 80, "causal"),
            "full": (2, 8, 8, 1024, 1024, 64, "full"),
            "full, tails": (1, 4, 4, 500, 3001, 128, "full"),
            "long": (1, 2, 2, 4096, 4096, 64, "causal"),
            "head_dim 256": (1, 4, 4, 1024, 1024, 256, "causal"),
            "key padding": (8, 12, 12, 1000, 1000, 64, "key padding"),
            "additive mask": (2, 8, 8, 1000, 1003, 128, "additive"),
            "additive mask, head_dim 256": (1, 4, 4, 500, 500, 256, "additive"),
            "lower right": (1, 16, 4, 300, 2001, 128, "lower right"),
        }
        return {
            extent: {name: Check(Sizes(*sizes)) for name, sizes in shapes.items()}
            for extent, shapes in (("small", small), ("realistic", realistic))
        }

    def label(self, sizes: Sizes) -> str:
        grouped = f"/{sizes.kv_heads}" if sizes.heads != sizes.kv_heads else ""
        keys = f":{sizes.length_k}" if sizes.length_q != sizes.length_k else ""
        return f"{sizes.batch}x{sizes.heads}{grouped}x{sizes.length_q}{keys}x{sizes.head_dim}"

    def bytes(self, sizes: Sizes, itemsize: int, direction: str) -> int:
        """Forward: query, key, value and output. Backward: these four, the output's gradient and the log-sum-exp are
        read, three gradients written. A causal limit hides no argument of equal lengths: every key is seen by a query.

        Source: what a fused kernel keeps is from Dao, "FlashAttention-2", 2023 (arXiv:2307.08691), section 3.1.
        """
        batch, heads, kv_heads, length_q, length_k, head_dim, _ = sizes
        query = batch * heads * length_q * head_dim * itemsize  # output, dO and dQ are as large
        key = batch * kv_heads * length_k * head_dim * itemsize  # value, dK and dV are as large
        lse = batch * heads * length_q * FLOAT32_BYTES
        forward, backward = 2 * query + 2 * key, 4 * query + 4 * key + lse
        return {FORWARD: forward, BACKWARD: backward, BOTH: forward + lse + backward}[direction]

    def flops(self, sizes: Sizes, direction: str) -> float:
        """4 * batch * heads * pairs * head_dim forward, 2.5 times that backward, 3.5 times both.

        Pairs of query and key: a square has length^2, its triangle exactly half of that, queries past the last key see
        all keys. Softmax's own operations do not count; heads are the query's, as grouped heads share keys, not
        products.

        Source: the convention of FlashAttention (Dao, 2023, arXiv:2307.08691, section 4.1; and its benchmarks).
        """
        batch, heads, _, length_q, length_k, head_dim, kind = sizes
        pairs = float(length_q * length_k)
        if kind == "causal":
            diagonal = min(length_q, length_k)
            pairs = diagonal**2 / 2 + (length_q - diagonal) * length_k
        return 4.0 * batch * heads * pairs * head_dim * _FACTOR[direction]

    def cells(self, kind: str, extent: str) -> list[Timed]:
        if extent == "smoke":
            dtype = "bfloat16" if kind == "cuda" else "float32"
            return [Timed(direction, dtype, square(1, 2, 32, 16)) for direction in (FORWARD, BOTH)]
        if kind == "cpu":
            return [
                Timed(direction, "float32", square(1, 12, length, 64, causal), CPU_LIMITS)
                for length in ((256,) if extent == "quick" else (256, 512, 1024))
                for causal in (True, False)
                for direction in (FORWARD, BACKWARD)
            ]

        def cell(direction, head_dim, length=QUICK_LENGTH, causal=True, group=1):
            sizes = square(max(1, TOKENS // length), HEADS[head_dim], length, head_dim, causal, group)
            return Timed(direction, "bfloat16", sizes)

        if extent == "quick":
            return [cell(FORWARD, 128), cell(BACKWARD, 128)]
        found = []
        for length in middle_first(LENGTHS, 4096, 2048, 8192, 1024, 16384):
            for direction in (FORWARD, BACKWARD):
                for causal in (True, False):
                    found += [cell(direction, head_dim, length, causal) for head_dim in (128, 64, 80, 96)]
                found.append(cell(direction, 128, length, group=GROUP))
            found.append(cell(BOTH, 128, length))
        return found

    def shown(self, sizes: Sizes):
        grouped = (("kv_heads", sizes.kv_heads),) if sizes.kv_heads != sizes.heads else ()
        return (
            ("batch", sizes.batch), ("heads", sizes.heads), *grouped, ("length", sizes.length_q),
            ("head_dim", sizes.head_dim), ("causal", sizes.kind == "causal"),
        )  # fmt: skip

    def panel(self, sizes: Sizes, dtype: str) -> str:
        grouped = f", {sizes.heads // sizes.kv_heads} heads a group" if sizes.kv_heads != sizes.heads else ""
        return f"attention, {sizes.kind}, head_dim {sizes.head_dim}{grouped}"

    def x(self, sizes: Sizes) -> str:
        return "length"

    def ceiling(self, sizes: Sizes, dtype: str) -> str:
        return dtype

    def plain(self, sizes: Sizes):
        options = dict(is_causal=sizes.kind == "causal", enable_gqa=sizes.heads != sizes.kv_heads)
        if sizes.kind not in ("causal", "full"):
            return None
        return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, **options)

    def written_out(self, sizes: Sizes):
        """Attention as models write it by hand."""

        def call(query, key, value):
            if sizes.heads != sizes.kv_heads:
                key, value = (tensor.repeat_interleave(sizes.heads // sizes.kv_heads, 1) for tensor in (key, value))
            scores = query @ key.transpose(-1, -2) * sizes.head_dim**-0.5
            if sizes.kind == "causal":
                hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
                scores = scores.masked_fill(hidden, -torch.inf)
            return F.softmax(scores, -1) @ value

        return call

    def for_float64(self, sizes: Sizes) -> Sizes:
        few, length = min(sizes.kv_heads, CHECK_KV_HEADS), min(sizes.length_q, CHECK_LENGTH)
        heads = few * (sizes.heads // sizes.kv_heads)
        return sizes._replace(batch=1, heads=heads, kv_heads=few, length_q=length, length_k=length)

    def row(self, backend: str, kernel: str, key_bits: int, head_dim: int) -> Tuned:
        dtype = BFLOAT16 if key_bits == 16 else FLOAT32
        batch, heads, length = (4, 16, 2048) if key_bits == 16 else (1, 16, 1024)
        kind = "additive" if kernel.startswith("masked_") else "causal"
        wrt = {"forward": (), "query": ("query",), "key_value": ("key", "value")}[kernel.removeprefix("masked_")]
        checked = Sizes(1, 2, 1, 300, 300, head_dim, kind)
        timed = Sizes(batch, heads, heads, length, length, head_dim, kind)
        return Tuned(BACKWARD if wrt else FORWARD, dtype, checked, timed, wrt)

    def class_tasks(self) -> dict[tuple, Tuned]:
        found = {}
        for head_dim in (64, 128):
            for most, length, batch in ((512, 512, 16), (2048, 2048, 4), (8192, 8192, 1), (None, 16384, 1)):
                for causal in (True, False):
                    small, large = square(1, 2, 300, head_dim, causal), square(batch, 16, length, head_dim, causal)
                    found[16, head_dim, most, causal] = Tuned(BOTH, BFLOAT16, small, large)
            # Generation: one query, many keys, no backward.
            small, large = Sizes(1, 2, 2, 1, 300, head_dim, "full"), Sizes(8, 16, 16, 1, 2048, head_dim, "full")
            found[16, head_dim, 16, False] = Tuned(FORWARD, BFLOAT16, small, large)
        return found

    def shared_memory(self, backend: str, key: tuple, candidate) -> int:
        kernel, key_bits, head_dim = key
        kernel = kernel.removeprefix("masked_")
        block_m, block_n, stages = candidate.block_m, candidate.block_n, candidate.num_stages
        # The forward holds Q; the backward of queries Q and dO, that of keys K and V. What they meet comes in stages.
        held = {"forward": block_m, "query": 2 * block_m, "key_value": 2 * block_n}[kernel]
        loaded = 2 * (block_m if kernel == "key_value" else block_n)
        return key_bits // 8 * head_dim * (held + stages * loaded)

    def products(self, sizes: Sizes, direction: str) -> int | None:
        """Two products forward and five backward; a query sees the keys up to its own place."""
        length = sizes.length_q
        pairs = length * (length + 1) // 2 if sizes.kind == "causal" else length * sizes.length_k
        return {FORWARD: 2, BACKWARD: 5}[direction] * sizes.batch * sizes.heads * pairs * sizes.head_dim


PROBLEM = Attention()
