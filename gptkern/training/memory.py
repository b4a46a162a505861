"""What a training holds in memory, and how much memory there is.

    parameters   V·w + C·w + L·(12·w² + 13·w) + 2·w        V tokens, context C, L layers, width w; the output weight is
                                                           the embedding's
    bytes        parameters · (4 weights + 4 gradients + 8 for AdamW's two averages), all float32
                 + of each token of a batch at least  L·16·w·(bytes of the products' dtype) + 8·V

The last line is what every backend keeps for the backward of a layer (four inputs and outputs of the norms, query, key
and value, attention's output, the perceptron's two of 4·w), and the logits with their gradient in float32: less than
what is needed, so that nothing is refused that would have fitted.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import torch

from gptkern.models.gpt import GPTConfig

FLOAT32 = 4
MOMENTS = 2  # AdamW's


class Needed(NamedTuple):
    """Bytes that a training holds at once."""

    parameters: int  # and copies of them
    gradients: int
    optimizer: int
    activations: int  # at least

    @property
    def total(self) -> int:
        """At least: a backward frees activations while it makes gradients."""
        return self.parameters + self.optimizer + max(self.gradients, self.activations)


def parameter_count(config: GPTConfig) -> int:
    """What `GPT(config).parameter_count()` is, of a model that is never made."""
    width = config.width
    return (config.vocab_size + config.context) * width + config.layers * (12 * width + 13) * width + 2 * width


def needed(config: GPTConfig, tokens: int, itemsize: int, *, models: int = 1, copies: int = 0) -> Needed:
    """Of models of these sizes that are trained in turn.

    Args:
        tokens: of a batch. itemsize: bytes of an element of the matrix products.
        copies: of the parameters, beside those that are trained.
    """
    parameters = FLOAT32 * parameter_count(config)
    activations = tokens * (config.layers * 16 * config.width * itemsize + 2 * FLOAT32 * config.vocab_size)
    return Needed((models + copies) * parameters, parameters, models * MOMENTS * parameters, activations)


def available(device: torch.device) -> int | None:
    """Bytes that a process can still have on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    limits = [_free(), *_limits()]
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def _free() -> int | None:
    """What the system could hand out without swapping."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _limits() -> list[int]:
    """Of the container (control groups, both versions) and of the shell (`ulimit -v`), where they are set."""
    found = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(Path(path).read_text()))
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            found.append(limit)
    return found
