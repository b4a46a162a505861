"""What a training needs of the process, for as long as it computes: random numbers, threads, deterministic algorithms.

PyTorch has one of each in a process. A trainer puts its own in place for an update and the others back after it: two
trainers in turn do not change each other, nor what else runs here, and what is drawn between two updates, for a sample
say, does not move the training. Two that train in two threads at once would.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator

import torch

from gptkern.formatting import shown
from gptkern.training.errors import UserError


class Generators:
    """The states of a trainer's random numbers: {"cpu": …} and, where it trains on a GPU, {"cuda": …}; uint8 tensors.

    Args:
        seed: as of torch.manual_seed. rank: which of several processes draws; each has a stream of its own.
    """

    def __init__(self, device: torch.device, seed: int, rank: int = 0):
        self.device, self.rank = device, rank
        if rank:
            # Not a sum: the next seed's first process would draw the same as this seed's second.
            seed = int.from_bytes(hashlib.sha256(f"{seed} {rank}".encode()).digest()[:8], "little")
        self.states = {"cpu": torch.Generator().manual_seed(seed).get_state()}
        if device.type == "cuda":
            self.states["cuda"] = torch.Generator(device).manual_seed(seed).get_state()

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Inside the block the process draws from these; what ends the block by an error leaves them as they were."""
        outside = self._of_process()
        self._set(self.states)
        try:
            yield
            self.states = self._of_process()
        finally:
            self._set(outside)

    def _of_process(self) -> dict[str, torch.Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if "cuda" in self.states:
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _set(self, states: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)


# cuBLAS's products are the same in every run with one of these alone (PyTorch refuses them otherwise).
CUBLAS_WORKSPACE, FIXED_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


@contextlib.contextmanager
def computing(threads: int | None, deterministic: bool) -> Iterator[None]:
    """Inside the block PyTorch has so many threads, None for its own, and, if asked, deterministic algorithms alone."""
    before = torch.get_num_threads()
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    change_threads = threads is not None and threads != before
    change_algorithms = deterministic and algorithms != (True, False)
    try:
        if change_threads:
            torch.set_num_threads(threads)
        if change_algorithms:
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        if change_threads:
            torch.set_num_threads(before)
        if change_algorithms:
            torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])


def check_deterministic(device: torch.device) -> None:
    """Whether deterministic algorithms can run there.

    Raises:
        UserError: cuBLAS may take any workspace; names the environment variable and what it needs.
    """
    workspace = os.environ.get(CUBLAS_WORKSPACE)
    if device.type == "cuda" and workspace not in FIXED_WORKSPACES:
        raise UserError(
            f"deterministic on a GPU needs the environment variable {CUBLAS_WORKSPACE}={FIXED_WORKSPACES[0]} or "
            f"{FIXED_WORKSPACES[1]}, set before the GPU is first used; it is {shown(workspace or '')}"
        )
