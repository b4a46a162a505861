"""The library's training step against a plain PyTorch loop of the same model on the same rows.

    python bench/training_step.py [--preset nano] [--batch 8] [--context N] [--pairs 60] [--threads N] [--limit 1.02]

Two JSON objects, a line each, `clock` "wall" and "processor": milliseconds of a step of each (medians), and the median
of the ratios of the pairs, with its quartiles. The two trainings take turns, one step each, the first of a pair in
turn; processor time counts every thread, the one that reads rows ahead among them. They begin with the same weights on
the same rows: `same_losses` says that they are still one training at the end, bit for bit.

The plain loop is what one writes by hand: it stacks slices of a tensor that holds all of the text, reads the loss of
each step, and keeps nothing else. Exit status: 1 where the ratio of processor time is above the limit or the losses
differ. Wall time on a machine that does other things says little: `waited` is what its threads waited for a processor.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time

import torch

from gptkern.measuring.contention import Contention
from gptkern.models.gpt import BYTES, GPT, GPTConfig
from gptkern.training.data import text
from gptkern.training.data.rows import Rows
from gptkern.training.data.store import Store
from gptkern.training.loop import Trainer, new_model
from gptkern.training.recipe import Recipe
from gptkern.training.schedule import lr_at

WARM_UP = 4  # pairs that are not counted: the first steps allocate


class Plain:
    """The loop by hand."""

    def __init__(self, model: GPT, store: Store, recipe: Recipe):
        self.model, self.recipe, self.step, self.losses = model.train(), recipe, 0, []
        self.data = torch.from_numpy(store.train.array).long()
        self.rows = Rows(store.train, recipe.length, recipe.seed)
        parameters = list(model.parameters())
        matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
        others = [parameter for parameter in parameters if parameter.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    def update(self) -> None:
        recipe = self.recipe
        starts = self.rows.starts(self.step * recipe.batch, recipe.batch).tolist()
        batch = torch.stack([self.data[start : start + recipe.length + 1] for start in starts])
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(recipe, self.step)
        _, loss = self.model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        self.step += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--limit", type=float, default=1.02)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    config = GPTConfig.preset(args.preset, vocab_size=BYTES)
    length = args.context or config.context
    steps = args.pairs + WARM_UP
    recipe = Recipe(steps=steps, batch=args.batch, length=length, lr=1e-3)
    store = text.text_store(text.load(shortest=length + 1))
    plain = Plain(new_model(config, recipe.seed), store, recipe)
    trainer = Trainer(new_model(config, recipe.seed), store, recipe)
    times = {clock: ([], []) for clock in ("wall", "processor")}
    contention = Contention()
    for pair in range(steps):
        for which in (0, 1) if pair % 2 else (1, 0):
            wall, processor = time.perf_counter(), time.process_time()
            plain.update() if which else trainer.run(1)
            times["wall"][which].append(time.perf_counter() - wall)
            times["processor"][which].append(time.process_time() - processor)
    trainer.close()
    same = trainer.losses == plain.losses
    ratios = {}
    for clock, (ours, theirs) in times.items():
        ours, theirs = ours[WARM_UP:], theirs[WARM_UP:]
        quartiles = statistics.quantiles([a / b for a, b in zip(ours, theirs)], n=4)
        ratios[clock] = quartiles[1]
        print(
            json.dumps(
                {
                    "what": "training step", "preset": args.preset, "batch": args.batch, "length": length,
                    "threads": torch.get_num_threads(), "pairs": args.pairs, "clock": clock,
                    "gptkern_ms": round(1e3 * statistics.median(ours), 3),
                    "plain_ms": round(1e3 * statistics.median(theirs), 3),
                    "ratio": round(ratios[clock], 4), "quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
                    "limit": args.limit, "same_losses": same, **contention.shares(),
                    "torch": torch.__version__, "machine": platform.machine(),
                }
            )
        )  # fmt: skip
    return int(not same or ratios["processor"] > args.limit)


if __name__ == "__main__":
    sys.exit(main())
