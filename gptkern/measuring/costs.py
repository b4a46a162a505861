"""Costs that are not kernels: host time, import; each measured, with its peers.

    host time       of one call of each operator's smallest cell: what a call costs where nothing is computed
    to the launch   the same on the way to a kernel that is not launched: checks, choice, allocation, autograd; of the
                    CUDA kernels where GPTKERN_EMULATE_CUDA=1 has them run on the CPU
    swapped step    CPU time of a small model's training step on PyTorch's operators, swapped against stock
    import          `import gptkern` after `import torch`, each time in a new process

`listed(extent)` gives what measures each record, as the "costs" of a results file hold them, in seconds:

    {"key", "what": in words, "gptkern": {"median", "low", "high", "n"}, "peers": {name: the same},
     "limit": the promise or None, "limit_to": the peer whose median it is a ratio to, or None: a value}

What cannot be measured here is {"skipped": why} in the place of the numbers. A peer that fails is skipped with the last
line of its error; gptkern that fails raises CostError with all of it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import inspect
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import gptkern
from gptkern import operators
from gptkern.backends import dispatch
from gptkern.backends.cuda import emulated
from gptkern.measuring import machine, peers, runner, timing
from gptkern.measuring.cells import Cell
from gptkern.models.gpt import GPT, GPTConfig
from gptkern.training.optimizers import optimizer_of

# The twin of a function of PyTorch takes at most this many times that function's host time.
HOST_LIMIT = 3.0
# Seconds that `import gptkern` may add to `import torch`.
IMPORT_LIMIT = 0.3
# A swapped model's training step takes at most this many times a stock one's CPU time.
STEP_LIMIT = 1.05
# Seconds that one new process may take.
PATIENCE = 300
# extent -> (rounds of host calls, new processes)
EFFORTS = {"smoke": (10, 1), "quick": (50, 3), "full": (100, 5)}
PATH_KEY = "host time, {}, to the launch of {}"


class CostError(RuntimeError):
    """gptkern's own part of a measurement failed; the message has its output."""


def listed(extent: str) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """(key, the function that measures it) of every record.

    Args:
        extent: "smoke": the host times of a call alone; "quick" and "full": all.
    """
    rounds, processes = EFFORTS[extent]
    names = [name for name in operators.NAMES if name in runner.OPERATORS]
    found: dict[str, Callable] = {f"host time, {name}": functools.partial(host_time, name, rounds) for name in names}
    backends = ["triton"] if dispatch.unavailable("cuda", torch.device("cpu")) else ["triton", "cuda"]
    found |= {
        PATH_KEY.format(name, backend): functools.partial(kernels_path, name, backend, rounds)
        for backend in backends
        for name in names
        if importlib.util.find_spec(f"gptkern.operators.{name}.{backend}")  # a room may have no kernels of a language
    }
    if extent != "smoke":
        found |= {"host time, swapped step": lambda: swapped_step(rounds)}
        found |= {"import": lambda: import_time(processes)}
    return list(found.items())


def record(key, what, ours, peers=None, *, limit=None, limit_to=None) -> dict[str, Any]:
    found = {"key": key, "what": what, "gptkern": ours, "peers": peers or {}}
    return found | {"limit": limit, "limit_to": limit_to}


def numbers(samples: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and number of samples."""
    return timing.spread(samples)._asdict()


# --- Host time --------------------------------------------------------------------------------------------------------


def smallest(operator: str) -> Cell:
    return runner.cells(machine.kind(), "smoke", (operator,))[0]


def calls(cell: Cell) -> tuple[Callable, Callable, str]:
    """gptkern's call and its first peer's, without arguments, with gradients on; the peer's name."""
    kind, known = machine.kind(), runner.module(cell.operator)
    inputs = known.inputs(cell, kind)
    for index in known.differentiable(cell):
        inputs[index].requires_grad_()
    (_, ours), (peer, theirs) = list(known.implementations(cell, kind).items())[:2]

    def bound(implementation):
        prepared = implementation.prepare(*inputs) if implementation.prepare else inputs
        return functools.partial(implementation.call, *prepared)

    return bound(ours), bound(theirs), peer


@contextlib.contextmanager
def _one_thread():
    """Threads that wait for one another cost what the machine's other work decides."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def host_time(operator: str, rounds: int) -> dict[str, Any]:
    """A call of the twin, as a user makes it, against its first peer."""
    cell = smallest(operator)
    *both, peer = calls(cell)
    with _one_thread():
        ours, theirs = timing.host_durations(both, rounds)
    limited = any(f".{operator}." in twin.__module__ for twin in dispatch.TWINS.values())
    what = f"one call of {operator} on {cell.label} with gradients on: the time of the host, not of the GPU"
    limits = {"limit": HOST_LIMIT, "limit_to": peer} if limited else {}
    return record(f"host time, {operator}", what, numbers(ours), {peer: numbers(theirs)}, **limits)


def kernels_path(operator: str, backend: str, rounds: int) -> dict[str, Any]:
    """The same call on the way to a kernel that is then not launched, in bfloat16, which all kernels have."""
    cell = runner.cells("cuda", "smoke", (operator,))[0]
    *both, peer = calls(cell)
    key = PATH_KEY.format(operator, backend)
    what = (
        f"one call of {operator} on {cell.label} with gradients on, on the way of a GPU's calls: checks, choice of the "
        f"backend, allocation and autograd; the launch of {backend} itself is taken out"
    )
    try:
        module = dispatch.load(backend, operator)
    except ImportError as error:
        return record(key, what, {"skipped": f"the kernels cannot be imported: {error}"})
    # Entered once, outside of the samples: what the `with` block itself costs is no part of a call.
    with _one_thread(), _without_launches(module), gptkern.backend(backend):
        ours, theirs = timing.host_durations(both, rounds)
    return record(key, what, numbers(ours), {peer: numbers(theirs)})


class _NotLaunched:
    """In place of a Triton kernel: kernel[grid](...) does nothing."""

    def __getitem__(self, grid):
        return _nothing


def _nothing(*arguments, **named) -> None:
    pass


@contextlib.contextmanager
def _without_launches(module):
    """While it lasts, in this process: a module's kernels start nothing, and Triton's take CPU tensors as well."""
    with contextlib.ExitStack() as stack:
        if module.__name__.rpartition(".")[2] == "cuda":
            emulator = emulated.load()
            emulator.skip_launches(True)
            stack.callback(emulator.skip_launches, False)
        # Kernels that several operators have stand in modules of their own: these, or their launchers, are here.
        places = {module.__name__: module}
        for value in vars(module).values():
            home = value if inspect.ismodule(value) else inspect.isfunction(value) and inspect.getmodule(value)
            if home and home.__name__.startswith("gptkern."):
                places[home.__name__] = home
        for place in places.values():
            for name in vars(place).copy():
                if name.endswith("_kernel"):
                    stack.enter_context(mock.patch.object(place, name, _NotLaunched()))
        if not torch.cuda.is_available():
            stack.enter_context(mock.patch.object(dispatch, "unavailable", lambda name, device: None))
        yield


def swapped_step(rounds: int) -> dict[str, Any]:
    """zero_grad, forward with the loss, backward, AdamW: with all that gptkern has for it, and with PyTorch's; a second
    stock model shows what the machine adds."""
    stock = GPT(GPTConfig(vocab_size=256, context=64, layers=4, width=128, heads=4)).train()
    swapped, again = copy.deepcopy(stock), copy.deepcopy(stock)
    gptkern.swap(swapped, fused_loss=True)
    ids, targets = torch.randint(256, (2, 8, 64)).unbind()

    def sampler(model):
        optimizer = optimizer_of(model, lr=0.0)
        if model is not swapped:
            groups = [{name: group[name] for name in ("params", "weight_decay")} for group in optimizer.param_groups]
            optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optimizer.defaults["betas"], fused=True)

        def sample():
            # CPU time, which other processes disturb less than the clock.
            start = time.process_time()
            optimizer.zero_grad(set_to_none=True)
            model(ids, targets)[1].backward()
            optimizer.step()
            return time.process_time() - start

        sample()
        return sample

    with _one_thread(), gptkern.backend("torch"):
        ours, *theirs = map(numbers, timing.in_turn([sampler(model) for model in (swapped, stock, again)], rounds))
    what = "CPU time of a training step of a GPT of 4 layers of width 128, 8x64 tokens, on PyTorch's operators"
    limits = {"limit": STEP_LIMIT, "limit_to": "stock"}
    return record("host time, swapped step", what, ours, dict(zip(("stock", "stock again"), theirs)), **limits)


# --- New processes ----------------------------------------------------------------------------------------------------

_PROGRAM = """
import time
import torch
start = time.perf_counter()
import {}
print(time.perf_counter() - start)
"""


def import_time(processes: int) -> dict[str, Any]:
    """Of gptkern, and of a peer with kernels: each time in a new process."""
    liger, liger_module = {"skipped": "liger_kernel is not installed"}, "liger_kernel.transformers"
    if importlib.util.find_spec("liger_kernel") is not None:
        try:
            liger = numbers([_seconds(_PROGRAM.format(liger_module)) for _ in range(processes)])
        except CostError as error:
            liger = {"skipped": f"failed: {str(error).splitlines()[-1]}"}
    ours = numbers([_seconds(_PROGRAM.format("gptkern")) for _ in range(processes)])
    what = "import gptkern, beyond import torch, in a new process"
    return record("import", what, ours, {peers.LIGER: liger}, limit=IMPORT_LIMIT)


def _seconds(program: str) -> float:
    """The last line that the program prints in a new process, a number."""
    # The same gptkern as here, wherever that was found.
    paths = [str(Path(gptkern.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", program]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise CostError(f"a new process did not end within {PATIENCE:g} s:\n{program}") from error
    if done.returncode != 0:
        raise CostError(f"a new process ended with {done.returncode}:\n{done.stdout}{done.stderr}".rstrip())
    return float(done.stdout.split()[-1])
