"""What a swap costs the host: a training step of a small GPT on the CPU, swapped against stock.

    python bench/swapped_step.py            a table; exit status 1 where a swapped step's CPU time is over the limit

On the CPU a swapped model runs PyTorch's own operators: what is more than stock is the way to them. A step is
zero_grad, forward with the loss, backward, AdamW with a learning rate of 0.

Three models take turns, in an order that changes: stock, swapped, and a second stock one. A ratio is the median of the
rounds' ratios to the first, of the CPU time that the process took, which other processes disturb less than the clock.
That of the second stock model shows what the machine adds: where it is not 1.00, believe nothing.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import gptkern
from gptkern import formatting
from gptkern.backends import dispatch
from gptkern.measuring import timing
from gptkern.models import GPT, GPTConfig
from gptkern.training.optimizers import optimizer_of

# A swapped step may take so many times a stock one.
LIMIT = 1.05
LAYERS, WIDTH, HEADS, VOCABULARY = 4, 128, 4, 256
# (rows, tokens of each, steps of a sample): almost nothing but the host's time; what the demo trains; the whole context
# of the preset "nano".
BATCHES = ((1, 8, 5), (8, 64, 1), (2, 256, 1))
WARM_UPS = 3


def sampler(model: GPT, rows: int, length: int, steps: int) -> Callable[[], float]:
    """Gives the seconds of CPU time that a step takes."""
    optimizer = optimizer_of(model, lr=0.0)
    ids, targets = torch.randint(VOCABULARY, (2, rows, length)).unbind()

    def sample(count: int = steps) -> float:
        start = time.process_time()
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            _, loss = model(ids, targets)
            loss.backward()
            optimizer.step()
        return (time.process_time() - start) / count

    sample(WARM_UPS)
    return sample


def measured(rows: int, length: int, steps: int, rounds: int) -> tuple[float, float, float]:
    """(seconds of a stock step, swapped / stock, second stock / stock)"""
    stock = GPT(GPTConfig(VOCABULARY, length, LAYERS, WIDTH, HEADS)).train()
    swapped, again = copy.deepcopy(stock), copy.deepcopy(stock)
    gptkern.swap(swapped)
    with dispatch.choices_made() as choices:
        swapped(torch.zeros(1, length, dtype=torch.long))
    if {choice.backend for choice in choices} != {"torch"}:
        raise SystemExit("the swapped model did not run on the torch backend: is GPTKERN_BACKEND set?")
    samplers = [sampler(model, rows, length, steps) for model in (stock, swapped, again)]
    first, *others = timing.in_turn(samplers, rounds)
    ratios = (statistics.median(a / b for a, b in zip(other, first)) for other in others)
    return statistics.median(first), *ratios


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    found = {f"{rows} x {length}": measured(rows, length, steps, arguments.rounds) for rows, length, steps in BATCHES}
    rows = [(name, formatting.seconds(s), *map(formatting.times, ratios)) for name, (s, *ratios) in found.items()]
    print(formatting.columns(("rows x tokens", ">stock", f">swapped, at most {LIMIT}", ">stock again"), rows))
    return int(any(swapped > LIMIT for _, swapped, _ in found.values()))


if __name__ == "__main__":
    sys.exit(main())
