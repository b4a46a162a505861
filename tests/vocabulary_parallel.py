"""linear_cross_entropy of a vocabulary that is sharded over processes, beside the whole one in each of them.

    python tests/vocabulary_parallel.py RANK RANKS FOLDER       # test_linear_cross_entropy_parallel.py runs it

Each rank writes FOLDER/RANK.pt: {case: what differs, or ""}, and under "unequal" what parts of two sizes raise.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if len(sys.argv) == 4:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.distributed as dist

import gptkern
from gptkern import functional as F

ROWS, WIDTH, PART = 11, 6, 10
# name -> (dtype, options)
CASES = {
    "plain": (torch.float64, {}),
    "sum of bfloat16": (torch.bfloat16, dict(reduction="sum")),
    "each row": (torch.float64, dict(reduction="none")),
    "everything": (
        torch.float64,
        dict(label_smoothing=0.2, z_loss=0.1, softcap=2.0, logit_scale=0.7, weighted=True, ignore_index=3),
    ),
    "impossible classes": (torch.float64, dict(impossible=True)),
}  # fmt: skip


class Cut:
    """options: three tokens' logits are a chunk."""

    allow_retain_graph, chunking_method, acc_policy, acc_dtype = False, "auto", "auto", None
    batch_chunk_size = 3


def compared(name: str, group, rank: int, ranks: int) -> str:
    """What differs between the sharded and the whole, on this rank, or ""."""
    dtype, options = CASES[name]
    options, classes = dict(options), PART * ranks
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    input, weight, bias = random(ROWS, WIDTH), random(classes, WIDTH), random(classes)
    target = torch.randint(classes, (ROWS,), generator=generator)
    target[2] = options.get("ignore_index", -100)
    if options.pop("weighted", False):
        options["weight"] = random(classes).abs() + 0.5
    if options.pop("impossible", False):
        # All of the last rank's classes; and each class twice, so that the likeliest of all is one of two.
        bias[-PART:] = -torch.inf
        target[target >= classes - PART] = 0
        weight[PART : 2 * PART] = weight[:PART]
        bias[PART : 2 * PART] = bias[:PART] if ranks > 2 else bias[PART : 2 * PART]
    of_part = slice(rank * PART, (rank + 1) * PART)
    leaves = [one.clone().requires_grad_() for one in (input, weight[of_part], bias[of_part])]
    whole = [one.clone().requires_grad_() for one in (input, weight, bias)]
    options |= dict(options=Cut, return_stats=True)
    loss, stats = F.linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2], group=group, **options)
    right, of_whole = F.linear_cross_entropy(whole[0], whole[1], target, linear_bias=whole[2], **options)
    grad = torch.rand(right.shape, generator=generator, dtype=torch.float64).to(dtype) + 1
    found = torch.autograd.grad(loss, leaves, grad)
    dx, dweight, dbias = torch.autograd.grad(right, whole, grad)
    tolerances = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-9, atol=1e-11)
    pairs = dict(
        loss=(loss, right), lse=(stats.lse, of_whole.lse), entropy=(stats.entropy, of_whole.entropy),
        correct=(stats.correct, of_whole.correct), dx=(found[0], dx), dweight=(found[1], dweight[of_part]),
        dbias=(found[2], dbias[of_part]),
    )  # fmt: skip
    for what, (ours, expected) in pairs.items():
        try:
            torch.testing.assert_close(ours, expected, **tolerances)
        except AssertionError as error:
            return f"{what}: {error}"
    # The same bits on every rank.
    for what, ours in (("loss", loss), ("dx", found[0])):
        everywhere = [torch.empty_like(ours) for _ in range(ranks)]
        dist.all_gather(everywhere, ours.detach().contiguous(), group=group)
        if not all(torch.equal(one, ours) for one in everywhere):
            return f"{what} differs between ranks"
    return ""


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    group = dist.group.WORLD
    results = {name: compared(name, group, rank, ranks) for name in CASES}
    with gptkern.backend("triton"):
        CASES.update({"plain": (torch.float32, {}), "everything": (torch.float32, CASES["everything"][1])})
        input, weight = torch.randn(ROWS, WIDTH), torch.randn(PART * ranks, WIDTH)
        for tensor in (input, weight):
            dist.broadcast(tensor, 0)
        target = torch.arange(ROWS) % (PART * ranks)
        part = weight[rank * PART : (rank + 1) * PART]
        options = dict(label_smoothing=0.1, softcap=3.0, options=Cut)
        ours = F.linear_cross_entropy(input, part, target, group=group, **options)
        right = F.linear_cross_entropy(input, weight, target, **options)
        results["triton"] = "" if torch.allclose(ours, right, rtol=1e-5) else f"{ours} is not {right}"
    # Of parts of several sizes every rank says so.
    try:
        F.linear_cross_entropy(torch.ones(2, 3), torch.ones(4 + rank, 3), torch.zeros(2).long(), group=group)
    except ValueError as error:
        results["unequal"] = str(error)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
