"""What token data costs: the size of shards, the speed of the loader, the memory of both.

    python bench/data_figures.py [--what size speed memory] [--base TOKENS] [--scales 1 10 100] [--rounds N]

One JSON object a line:

    size      bytes of shards against raw 16-bit ids and against the text under gzip, of two texts that come with
              Python: the language reference (pydoc_data.topics) and the standard library's sources
    speed     tokens per second of the loader and of the nano preset's training, by turns. What is read is larger than
              what is kept of it in memory, and rows come from all of it. "thread": wall-clock time, read ahead by the
              thread, beside whatever else runs; "alone": the time of the processor of both, without the thread: what
              reading takes from the training
    memory    the most that a process held (resident, beyond what it held before) while it wrote so many tokens, and
              while another read 400 batches of them: the ids of a text, again and again, each time renumbered
              otherwise. The reader's 32 MiB of kept frames fill up with the data

Exit status: 0 where the loader is at least 20 × as fast as the training and the memory is flat (at the largest scale at
most 40 MB above the smallest), 1 where not.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from gptkern.measuring.contention import Contention
from gptkern.models.gpt import GPTConfig
from gptkern.training.data import text
from gptkern.training.data.loader import Batches
from gptkern.training.data.rows import Rows
from gptkern.training.data.shards import CACHE_BYTES, LEVEL, Layout, ShardTokens, ShardWriter, dtype_of, open_shard
from gptkern.training.data.store import ArrayTokens

FASTER, FLAT = 20, 40e6
VOCABULARY = 8192
BATCH = 32


def say(**values) -> None:
    print(json.dumps({**values, "machine": platform.machine(), "torch": torch.__version__}), flush=True)


def standard_library() -> list[str]:
    """Its modules, without tests and packages from elsewhere."""
    folder = Path(os.__file__).parent
    paths = sorted(path for path in folder.rglob("*.py") if not {"test", "tests", "site-packages"} & set(path.parts))
    return [path.read_text(errors="replace") for path in paths]


def written(folder: Path, parts, vocab_size: int, level: int = LEVEL) -> list[dict]:
    writer = ShardWriter(folder, "train", Layout(dtype_of(vocab_size), vocab_size), level=level)
    for part in parts:
        writer.write(part)
    return writer.close()


def opened(folder: Path, entries: list[dict], vocab_size: int) -> ShardTokens:
    layout = Layout(dtype_of(vocab_size), vocab_size)
    return ShardTokens([open_shard(folder, entry, layout) for entry in entries], layout.dtype)


def sizes() -> None:
    from gptkern.training.data.tokenizers import bytes_tokenizer, train_bpe

    texts = {"the language reference": text.default_text().split("\n\n"), "the standard library": standard_library()}
    for name, documents in texts.items():
        whole = "\n\n".join(documents).encode()
        zipped = len(gzip.compress(whole, 9))
        for tokenizer in (bytes_tokenizer(), train_bpe(documents, VOCABULARY)):
            ids = tokenizer.encode(whole.decode())
            with tempfile.TemporaryDirectory() as folder:
                start = time.process_time()
                entries = written(Path(folder), [ids], tokenizer.vocab_size)
                seconds = time.process_time() - start
            size = sum(entry["bytes"] for entry in entries)
            say(
                what="size", text=name, text_bytes=len(whole), gzip_bytes=zipped, tokenizer=tokenizer.name,
                tokens=len(ids), shard_bytes=size, of_raw_ids=round(size / (2 * len(ids)), 3),
                of_gzip_text=round(size / zipped, 3), of_text=round(size / len(whole), 3), level=LEVEL,
                written_tokens_per_second=round(len(ids) / seconds),
            )  # fmt: skip


def varied(total: int) -> Iterator[np.ndarray]:
    """So many ids: a text's bytes, again and again, each time renumbered otherwise."""
    base = np.frombuffer(text.default_text().encode(), np.uint8)
    for number in range(-(-total // len(base))):
        # An odd factor modulo 256 renumbers bytes one to one.
        renumbered = base * np.uint8(2 * (number % 128) + 1) + np.uint8(number // 128 % 256)
        yield renumbered[: total - number * len(base)]


def speed(rounds: int) -> bool:
    from gptkern.training.loop import Trainer, new_model
    from gptkern.training.recipe import Recipe

    config = GPTConfig.preset("nano")
    length = config.context
    recipe = Recipe(steps=10**6, batch=BATCH, length=length, lr=1e-3)
    store = text.text_store(text.load(shortest=length + 1))
    trainer = Trainer(new_model(config, 0), store, recipe)
    speeds: dict[str, list[float]] = {"training": [], "training, processor": [], "thread": [], "alone": []}
    contention = Contention()
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(trainer):
        folder = Path(folder)
        tokens = opened(folder, written(folder, varied(8 * CACHE_BYTES // 2), 257, level=1), 257)
        rows = Rows(tokens, length, 0)
        trainer.run(1)
        for number in range(rounds):
            start = time.process_time()
            trainer.run(2)
            speeds["training, processor"].append(2 * BATCH * length / (time.process_time() - start))
            speeds["training"].append(trainer.speeds[-1])
            for name, prefetch, clock in (("thread", 4, time.perf_counter), ("alone", 0, time.process_time)):
                with Batches(rows, BATCH, update=100 * number, prefetch=prefetch) as batches:
                    batches.next()
                    start = clock()
                    for _ in range(50):
                        batches.next()
                    speeds[name].append(50 * BATCH * length / (clock() - start))
    found = {name: statistics.median(values) for name, values in speeds.items()}
    of = {"thread": "training", "alone": "training, processor"}
    ratios = {
        name: statistics.median(ours / theirs for ours, theirs in zip(speeds[name], speeds[peer]))
        for name, peer in of.items()
    }
    say(
        what="speed", batch=BATCH, length=length, rounds=rounds, threads=torch.get_num_threads(),
        data_tokens=len(tokens), kept_bytes=CACHE_BYTES,
        tokens_per_second={name: round(value) for name, value in found.items()},
        ratio={name: round(value, 1) for name, value in ratios.items()}, goal=FASTER, **contention.shares(),
    )  # fmt: skip
    return min(ratios.values()) >= FASTER


def memory(base: int, scales: list[int]) -> bool:
    flat = True
    most: dict[str, list[int]] = {"write": [], "read": []}
    for scale in sorted(scales):
        with tempfile.TemporaryDirectory() as folder:
            for doing in ("write", "read"):
                command = [sys.executable, __file__, "--child", doing, folder, str(base * scale)]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                most[doing].append(found["bytes"])
                say(what="memory", doing=doing, scale=scale, tokens=base * scale, **found)
    for values in most.values():
        # What writes or reads takes some memory: without any it was not measured.
        flat &= min(values) > 0 and values[-1] - values[0] <= FLAT
    return flat


def child(doing: str, folder: Path, total: int) -> None:
    """Of `memory`: the most that this process held, beyond what it held when everything was imported."""
    with Batches(Rows(ArrayTokens(np.arange(1000)), 10, 0), 4) as batches:
        batches.next()
    before, start = peak(), time.perf_counter()
    if doing == "write":
        entries = written(folder, varied(total), 257, level=1)
        (folder / "entries.json").write_text(json.dumps(entries))
        found = {"shards": len(entries), "shard_bytes": sum(entry["bytes"] for entry in entries)}
    else:
        tokens = opened(folder, json.loads((folder / "entries.json").read_text()), 257)
        with Batches(Rows(tokens, 256, 0), BATCH) as batches:
            for _ in range(400):
                batches.next()
        found = {"kept_bytes": CACHE_BYTES}
    print(json.dumps({"bytes": peak() - before, "seconds": round(time.perf_counter() - start, 1), **found}))


def peak() -> int:
    """Linux's own count. Not getrusage's, which begins with what the process held that started this one."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=("size", "speed", "memory"), default=("size", "speed", "memory"))
    parser.add_argument("--base", type=int, default=4_000_000, help="tokens at scale 1 of `memory`")
    parser.add_argument("--scales", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    good = True
    if "size" in args.what:
        sizes()
    if "speed" in args.what:
        good &= speed(args.rounds)
    if "memory" in args.what:
        good &= memory(args.base, args.scales)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
