"""Runs emulated CUDA kernels that are built with AddressSanitizer and UndefinedBehaviorSanitizer.

test_cuda_sanitized.py starts it in a process of its own, with the sanitizers' libraries loaded before Python.

    python tests/sanitized_cuda.py operators        the small checks of every operator, forward and backward
    python tests/sanitized_cuda.py faults           each fault of tests/cuda/sanitized.cu, in a process of its own
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator

import torch

import gptkern
from gptkern import operators
from gptkern.backends.cuda import emulated


def calls(operator: str) -> Iterator[tuple[str, Callable]]:
    """(class of shapes, call) of each small check of the operator, in bfloat16 or the first dtype that it has."""
    problem, twin = operators.problem(operator), operators.contract(operator).TWIN
    for name, check in problem.checks()["small"].items():
        dtype = torch.bfloat16 if torch.bfloat16 in check.dtypes else check.dtypes[0]
        made = problem.inputs(check.sizes, dtype, torch.Generator().manual_seed(0))
        # An allocation of its own for each, beyond which lies what AddressSanitizer knows to be nobody's.
        tensors = {key: tensor.detach().clone().requires_grad_(not made.exact) for key, tensor in made.tensors.items()}
        constants = {key: tensor.clone() for key, tensor in made.constants.items()}
        yield name, functools.partial(twin, **tensors, **constants, **made.options)


def run_operators(names: list[str]) -> None:
    """Prints a JSON object: {operator: the classes that ran}, each twice, with another schedule of the threads."""
    ran = {}
    with gptkern.backend("cuda"):
        for name in names:
            for shape_class, call in calls(name):
                for seed in (0, 2):
                    emulated.load().set_seed(seed)
                    try:
                        results = call()
                    except gptkern.BackendError:  # left to Triton's kernels
                        continue
                    results = results if isinstance(results, tuple) else (results,)
                    if results[0].requires_grad:
                        sum(result.float().square().sum() for result in results).backward()
                    ran.setdefault(name, {})[shape_class] = None
    print(json.dumps({name: list(classes) for name, classes in ran.items()}))


def run_faults(count: int) -> None:
    """Prints a JSON list: (exit status, standard error) of each, the sound kernel first."""
    from cuda_modules import module

    kernels = module("sanitized")
    found = []
    for broken in range(count):
        with tempfile.TemporaryFile() as file:
            child = os.fork()
            if child == 0:
                os.dup2(file.fileno(), 2)
                x, y = torch.randn(100), torch.empty(100)
                kernels.set_seed(3)
                try:
                    # An exception leaves fibers behind, and their red zones.
                    kernels.failing(1)
                    os._exit(3)
                except RuntimeError:
                    kernels.failing(0)
                kernels.faulty(x.data_ptr(), y.data_ptr(), 100, broken)
                os._exit(0 if torch.equal(x, y) else 2)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            file.seek(0)
            found.append((status, file.read().decode(errors="replace")))
    print(json.dumps(found))


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    run_operators(arguments) if what == "operators" else run_faults(int(arguments[0]))
