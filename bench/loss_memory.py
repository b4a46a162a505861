"""Time and memory of the loss at the end of a model, logits included: gptkern's, PyTorch's own, and eager.

    python bench/loss_memory.py [--rows 8192] [--width 768] [--classes 128000] [--dtype float32] [--threads N]
                                [--repeats 1] [--only gptkern] [--limit 0.1] [--out bench/results/DEVICE]

A JSON object a line, of each implementation, in a process of its own: `forward` and `forward_and_backward`, seconds of
wall time, `processor`, those of all its threads for both (medians of the repeats), and `peak`, bytes that the process
had at most above what it had with input, weight and target made (VmHWM): gradients included. Then one of the ratios to
eager's. `least` is what the gradients alone take. With --out FOLDER all of it is kept in FOLDER/loss_memory.json, from
which bench/publish.py makes a table of docs/performance.md:

    {"format": 1, "machine": {...}, "sizes": {...}, "least": bytes, "implementations": [{...}, ...]}

    gptkern     gptkern.functional.linear_cross_entropy
    eager       F.cross_entropy(F.linear(input, weight), target)
    pytorch     torch.nn.functional.linear_cross_entropy with LinearCrossEntropyOptions() (PyTorch 2.13)

Exit status: 1 where gptkern's peak is above the limit, a share of eager's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional

from gptkern.backends.tables import files
from gptkern.measuring import machine
from gptkern.training import free_memory

NAMES = ("gptkern", "eager", "pytorch")
FORMAT, FILE = 1, "loss_memory.json"


def _implementation(name: str):
    if name == "gptkern":
        from gptkern.functional import linear_cross_entropy

        return linear_cross_entropy
    if name == "pytorch":
        options = torch.nn.LinearCrossEntropyOptions()
        return lambda *call: torch.nn.functional.linear_cross_entropy(*call, options=options)
    return lambda x, w, y: torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w), y)


def measured(name: str, rows: int, width: int, classes: int, dtype: torch.dtype, repeats: int) -> dict:
    """Of one implementation, in this process."""
    loss_of = _implementation(name)
    # What is loaded and made once is not the loss's.
    small = [torch.randn(size, 8, dtype=dtype, requires_grad=True) for size in (64, 128)]
    loss_of(*small, torch.zeros(64, dtype=torch.int64)).backward()
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(classes, width, generator=generator) / width**0.5).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,), generator=generator)
    forward, both, processor = [], [], []
    free_memory.forget_peak()
    before = free_memory.resident()
    for _ in range(repeats):
        input.grad = weight.grad = None
        start, begun = time.perf_counter(), time.process_time()
        loss = loss_of(input, weight, target)
        forward.append(time.perf_counter() - start)
        loss.backward()
        both.append(time.perf_counter() - start)
        processor.append(time.process_time() - begun)
    return {
        "implementation": name,
        "forward": statistics.median(forward),
        "forward_and_backward": statistics.median(both),
        "processor": statistics.median(processor),
        "peak": free_memory.peak() - before,
        "loss": loss.item(),
        "gradient": weight.grad.double().norm().item(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--classes", type=int, default=128_000)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", choices=NAMES)
    parser.add_argument("--limit", type=float, default=0.1)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"keeps what was measured in FOLDER/{FILE}")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out is not None and not args.out.is_dir():
        parser.error(f"--out is {args.out}; it needs to be a folder that is there")
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    if args.here:
        print(json.dumps(measured(args.only, args.rows, args.width, args.classes, dtype, args.repeats)))
        return 0
    sizes = {name: getattr(args, name) for name in ("rows", "width", "classes", "dtype", "repeats")}
    about = sizes | dict(threads=torch.get_num_threads(), torch=torch.__version__, machine=platform.machine())
    about["least"] = (args.rows + args.classes) * args.width * dtype.itemsize
    # The sources as they are when the runs begin.
    about_machine = machine.identify() if args.out is not None else None
    found, missing = {}, []
    for name in (args.only,) if args.only else NAMES:
        if name == "pytorch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            missing.append({"implementation": name, "missing": "PyTorch before 2.13 has none"})
            print(json.dumps(about | missing[-1]), flush=True)
            continue
        # The last --only counts.
        command = [sys.executable, __file__, *sys.argv[1:], "--here", "--only", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = next(iter(done.stderr.strip().splitlines()[-1:]), f"exit status {done.returncode}")
            missing.append({"implementation": name, "missing": reason})
            print(json.dumps(about | missing[-1]), flush=True)
            continue
        found[name] = json.loads(done.stdout)
        print(json.dumps(about | found[name]), flush=True)
    if args.out is not None:
        kept = {"format": FORMAT, "machine": about_machine, "sizes": sizes, "least": about["least"]}
        kept["implementations"] = [*found.values(), *missing]
        files.replace(args.out / FILE, json.dumps(kept, indent=1, allow_nan=False) + "\n")
    if not {"gptkern", "eager"} <= found.keys():
        return 0
    eager = found["eager"]
    ratios = {
        name: {what: one[what] / eager[what] for what in ("forward_and_backward", "processor", "peak")}
        for name, one in found.items()
    }
    print(json.dumps({"ratios_to_eager": ratios}), flush=True)
    return int(ratios["gptkern"]["peak"] > args.limit)


if __name__ == "__main__":
    sys.exit(main())
