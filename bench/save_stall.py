"""For how long a checkpoint stops the training, and how much slower the steps are that run beside its writing.

    python bench/save_stall.py [--preset nano] [--batch 8] [--context N] [--saves 20] [--between 6] [--threads N]
                               [--folder FOLDER] [--limit 20]

One JSON object, a line:

    stall_ms    what a run does between two updates to save one: it looks at every parameter for a number that is not
                finite, asks for the state, and `Checkpoints.save` copies it and starts the thread; median, quartiles,
                the most. The first save, which allocates the copies, is `first_stall_ms`; `stall_processor_ms` is the
                training thread's time on a processor
    copied_ms   the same tensors copied once more, into memory that is there
    alone_ms    a step's time with no save on its way, beside_ms with one, in turns in one training
    written_ms  from the save's begin until the checkpoint has its name
    cost_ms     all that the training lost to a save: the stall and what the steps beside it took longer

Exit status: 1 where the median stall is above the limit. On a machine that does other things the stall still says
something with --threads 1, the steps little: `waited` is what the threads waited for a processor.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time

import torch

from gptkern.measuring.contention import Contention
from gptkern.models.gpt import BYTES, GPTConfig
from gptkern.training.checkpoints import Checkpoints
from gptkern.training.data import text
from gptkern.training.loop import Trainer, new_model
from gptkern.training.recipe import Recipe

WARM_UP = 4  # steps that are not counted: the first ones allocate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int)
    parser.add_argument("--saves", type=int, default=20)
    parser.add_argument("--between", type=int, default=3, help="steps with nothing to write, after each save")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--folder", help="on the disk that is measured")
    parser.add_argument("--limit", type=float, default=20.0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    config = GPTConfig.preset(args.preset, vocab_size=BYTES)
    length = args.context or config.context
    recipe = Recipe(steps=10**6, batch=args.batch, length=length, lr=1e-3)
    trainer = Trainer(new_model(config, recipe.seed), text.text_store(text.load(shortest=length + 1)), recipe)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measured(trainer, Checkpoints(folder), args.saves + 1, args.between)
    trainer.close()
    stall = found["stall_ms"]
    print(
        json.dumps(
            {
                "what": "checkpoint", "preset": args.preset, "batch": args.batch, "length": length,
                "threads": torch.get_num_threads(), "saves": args.saves, **found, "limit_ms": args.limit,
                "torch": torch.__version__, "machine": platform.machine(),
            }
        )
    )  # fmt: skip
    return int(stall["median"] > args.limit)


def measured(trainer: Trainer, checkpoints: Checkpoints, saves: int, between: int) -> dict:
    stalls, processor, alone, written, copies = [], [], [], [], []
    beside: list[list[float]] = []
    for _ in range(WARM_UP):
        trainer.update()
    copied = {name: tensor.clone() for name, tensor in trainer.state()[0].items()}
    contention = Contention()
    for _ in range(saves):
        for _ in range(between):
            alone.append(timed(trainer.update))
        copies.append(timed(lambda: [copied[name].copy_(tensor) for name, tensor in trainer.state()[0].items()]))
        begun = time.perf_counter()
        used = time.thread_time()
        stalls.append(timed(lambda: save(trainer, checkpoints)))
        processor.append(time.thread_time() - used)
        steps = []
        while checkpoints.saving:
            steps.append(timed(trainer.update))
        written.append(time.perf_counter() - begun)
        checkpoints.wait()
        beside.append(steps)
    step = statistics.median(alone)
    lost = [stall + sum(steps) - step * len(steps) for stall, steps in zip(stalls, beside)][1:]
    bytes_saved = sum(tensor.nbytes for tensor in copied.values())
    return {
        "bytes": bytes_saved, "stall_ms": spread(stalls[1:]), "stall_processor_ms": spread(processor[1:]),
        "first_stall_ms": milliseconds(stalls[0]),
        "copied_ms": spread(copies[1:]), "alone_ms": spread(alone),
        "beside_ms": spread([time for steps in beside[1:] for time in steps]),
        "written_ms": spread(written[1:]), "cost_ms": spread(lost), **contention.shares(),
    }  # fmt: skip


def save(trainer: Trainer, checkpoints: Checkpoints) -> None:
    assert trainer.finite()
    checkpoints.save(trainer.step, *trainer.state())


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def milliseconds(value: float) -> float:
    return round(1e3 * value, 3)


def spread(values: list[float]) -> dict[str, float]:
    first, median, third = statistics.quantiles(values, n=4)
    names = {"median": median, "quartiles": [first, third], "most": max(values)}
    return {
        name: [milliseconds(each) for each in value] if name == "quartiles" else milliseconds(value)
        for name, value in names.items()
    }


if __name__ == "__main__":
    sys.exit(main())
