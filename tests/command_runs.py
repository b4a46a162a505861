"""A training on the command line that takes no time."""

from __future__ import annotations

from gptkern import cli
from gptkern.models.gpt import GPTConfig

TINY = GPTConfig(vocab_size=256, context=16, layers=1, width=32, heads=2)


def train(*arguments: str, steps: int = 4) -> int:
    sizes = ["--steps", str(steps), "--context", "16", "--batch", "2", "--device", "cpu", "--tensorboard", "off"]
    return cli.main(["train", "--text", "text.txt", *sizes, *arguments])
