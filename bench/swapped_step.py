"""What a swap costs the host: a training step of a small GPT on the CPU, swapped against stock.

    python bench/swapped_step.py            a table; exit status 1 where a swapped step's CPU time is over the limit

The model has 4 layers of width 128. On the CPU a swapped model runs PyTorch's own operators: what is more than stock is
the way to them. A step is zero_grad, forward with the loss, backward, AdamW with a learning rate of 0.

Three models take turns, in an order that changes: stock, swapped, and a second stock one. A ratio is the median of the
rounds' ratios to the first, by the clock and of the CPU time that the process took, which other processes disturb less.
That of the second stock model shows what the machine adds: where it is not 1.00, believe nothing.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import gptkern
from gptkern.backends import dispatch
from gptkern.commands import training
from gptkern.measuring import timing
from gptkern.models import GPT, GPTConfig

# A swapped step may take so many times a stock one.
LIMIT = 1.05
LAYERS, WIDTH, HEADS, VOCABULARY = 4, 128, 4, 256
# (rows, tokens of each, steps of a sample): almost nothing but the host's time; what the demo trains; the whole context
# of the preset "nano".
BATCHES = ((1, 8, 5), (8, 64, 1), (2, 256, 1))
WARM_UPS = 3
CLOCK, CPU_TIME = "the clock", "CPU time"


def stepper(model: GPT, rows: int, length: int) -> Callable[[], None]:
    optimizer = training.optimizer_of(model, lr=0.0)
    ids, targets = torch.randint(VOCABULARY, (2, rows, length)).unbind()

    def step():
        optimizer.zero_grad(set_to_none=True)
        _, loss = model(ids, targets)
        loss.backward()
        optimizer.step()

    return step


def sampler(step: Callable[[], None], steps: int) -> Callable[[], tuple[float, float]]:
    """Gives the seconds of a step, by the clock and of the process."""
    for _ in range(WARM_UPS):
        step()

    def sample():
        start = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step()
        end = time.perf_counter(), time.process_time()
        return tuple((after - before) / steps for before, after in zip(start, end))

    return sample


def measured(rows: int, length: int, steps: int, rounds: int) -> list[tuple[float, float, float]]:
    """(seconds of a stock step, swapped / stock, second stock / stock), by the clock and of the process."""
    stock = GPT(GPTConfig(VOCABULARY, length, LAYERS, WIDTH, HEADS)).train()
    swapped, again = copy.deepcopy(stock), copy.deepcopy(stock)
    gptkern.swap(swapped)
    with dispatch.choices_made() as choices:
        swapped(torch.zeros(1, length, dtype=torch.long))
    if {choice.backend for choice in choices} != {"torch"}:
        raise SystemExit("the swapped model did not run on the torch backend: is GPTKERN_BACKEND set?")
    samplers = [sampler(stepper(model, rows, length), steps) for model in (stock, swapped, again)]
    found = []
    # zip: for each model, its samples by one of the two
    for first, *others in zip(*(zip(*samples) for samples in timing.in_turn(samplers, rounds))):
        ratios = (statistics.median(a / b for a, b in zip(other, first)) for other in others)
        found.append((statistics.median(first), *ratios))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    load = f", load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores" if hasattr(os, "getloadavg") else ""
    print(f"PyTorch {torch.__version__}, {arguments.threads} threads, {arguments.rounds} rounds{load}")
    print(f"{'rows x tokens':14} {'':9} {'stock':>10} {'swapped':>9} {'stock again':>12}   limit of swapped: {LIMIT}")
    over = False
    for rows, length, steps in BATCHES:
        for by, found in zip((CLOCK, CPU_TIME), measured(rows, length, steps, arguments.rounds)):
            seconds, swapped, again = found
            over |= by == CPU_TIME and swapped > LIMIT
            print(f"{f'{rows} x {length}':14} {by:9} {1e3 * seconds:7.2f} ms {swapped:8.3f}x {again:11.3f}x")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
