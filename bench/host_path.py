"""The host's time of a call, from the twin to the launch of its kernel, without a GPU.

    python bench/host_path.py [--backend triton|cuda] [--rounds N] [--operator NAME …]

One JSON object a line: operator, backend, direction, microseconds, and the ratio to F.layer_norm's forward with
gradients in the same run. `forward` has gradients on, `forward without gradients` runs under torch.no_grad(),
`backward` is torch.autograd.grad of the result, the engine's own time included. Inputs are small: the host's time does
not depend on their size.

Everything that a call does on a GPU's host runs as it is, checks, dispatch, autograd and allocations included, down to
the driver's launch, which does nothing: a driver of a real GPU adds its own time, to PyTorch's own call as well. The
tensors lie in the CPU's memory, and say that they are on a GPU. Each backend runs in a process of its own, prepared by
host_path_<backend>.py, which has

    LIMIT          the ratio that layer_norm's and attention's forward may have
    prepare()      makes launches do nothing in this process; returns None, or why the backend cannot be measured here
    versions()     what each line says besides: a version, or which module was used

Calls take turns with F.layer_norm in rounds; of each the fastest round counts, since nothing but other work on the
machine makes one slower. Exit status: 0 within the limits, 1 above one of them, 2 where a backend cannot be measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

BACKENDS = ("triton", "cuda")
FORWARD, WITHOUT, BACKWARD = "forward", "forward without gradients", "backward"
# What the limits are for.
HELD = {("layer_norm", FORWARD), ("attention", FORWARD)}
# Few: a round that another process interrupts tells nothing.
CALLS_A_ROUND = 20


def calls(torch, G) -> dict[str, tuple[Callable, list]]:
    """operator -> (its twin's call of the tensors, the tensors, of which the floating ones get gradients)."""

    def leaf(*shape, dtype=torch.float32):
        return torch.randn(shape, dtype=dtype).requires_grad_()

    heads = [leaf(1, 2, 16, 64, dtype=torch.bfloat16) for _ in range(3)]
    angles = torch.randn(16, 32)
    weight = torch.randint(-127, 128, (64, 64), dtype=torch.int8)
    codes = weight, torch.rand(64) + 0.01, torch.randn(64)
    return {
        "layer_norm": (lambda x, w, b: G.layer_norm(x, (64,), w, b), [leaf(4, 64), leaf(64), leaf(64)]),
        "attention": (lambda q, k, v: G.scaled_dot_product_attention(q, k, v, is_causal=True), heads),
        "rms_norm": (lambda x, w: G.rms_norm(x, (64,), w), [leaf(4, 64), leaf(64)]),
        "softmax": (lambda x: G.softmax(x, -1), [leaf(4, 64)]),
        "rotary": (lambda x: G.rotary_embedding(x, angles, angles), [leaf(1, 2, 16, 64)]),
        "int8_linear": (lambda x: G.int8_linear(x, *codes, mode="w8a16"), [leaf(4, 64)]),
        "int8_linear w8a8": (lambda x: G.int8_linear(x, *codes, mode="w8a8"), [leaf(32, 64)]),
        "quantize_int8": (lambda x: G.quantize_int8(x), [torch.randn(4, 64)]),
    }


def as_on_a_gpu(torch) -> None:
    """From here on tensors say that they are on cuda:0, which is an H100, and stay in the CPU's memory.

    They say so at the cost of a look-up in the class, a little less than PyTorch's own.
    """
    device = torch.device("cuda", 0)
    torch.Tensor.is_cpu, torch.Tensor.is_cuda, torch.Tensor.device = False, True, device
    torch.Tensor.get_device = lambda self: 0
    torch.version.hip = None
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_name = lambda device=None: "NVIDIA H100 80GB HBM3"
    for name in ("empty", "zeros", "ones", "empty_strided"):
        setattr(torch, name, _without_device(getattr(torch, name)))
    # What a CPU's build of PyTorch does not have.
    torch._C._cuda_getDevice = lambda: 0
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    properties = argparse.Namespace(multi_processor_count=132)
    torch.cuda.get_device_properties = lambda device: properties


def _without_device(make: Callable) -> Callable:
    return lambda *args, device=None, **kwargs: make(*args, **kwargs)


def prefer(backend: str) -> None:
    """Dispatch finds the backend first in its order, as where it is measured or reasoned to be the fastest."""
    import gptkern
    from gptkern.backends import dispatch
    from gptkern.backends.tables.orders import Preference

    for operator in gptkern.operators.NAMES:
        dispatch._unmeasured[operator, "cuda", 0] = Preference((backend, "torch"), "asked for by this bench")


def measured(backend: str, rounds: int, names: list[str]) -> int:
    """Prints the lines of one backend; returns the exit status."""
    module = importlib.import_module(f"host_path_{backend}")
    reason = module.prepare()
    if reason is not None:
        print(json.dumps({"backend": backend, "cannot": reason}))
        return 2
    import torch
    import torch.nn.functional as F

    import gptkern.functional as G

    torch.set_num_threads(1)
    x, weight, bias = (torch.randn(shape).requires_grad_() for shape in ((4, 64), 64, 64))
    peer = "F.layer_norm"
    tasks: dict[tuple[str, str], Callable] = {
        (peer, FORWARD): lambda: F.layer_norm(x, (64,), weight, bias),
        (peer, BACKWARD): _backward(torch, F.layer_norm(x, (64,), weight, bias), [x, weight, bias]),
    }
    for name, (call, tensors) in calls(torch, G).items():
        if names and name.partition(" ")[0] not in names:
            continue
        result = call(*tensors)
        tasks[name, FORWARD] = lambda call=call, tensors=tensors: call(*tensors)
        tasks[name, WITHOUT] = _without_gradients(torch, tasks[name, FORWARD])
        if isinstance(result, torch.Tensor):
            tasks[name, BACKWARD] = _backward(torch, result, tensors)
    samples = {key: [] for key in tasks}
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for key, task in tasks.items():
            start = time.perf_counter()
            for _ in range(CALLS_A_ROUND):
                task()
            samples[key].append((time.perf_counter() - start) / CALLS_A_ROUND * 1e6)
    base = min(samples[peer, FORWARD])
    versions = dict(python=platform.python_version(), torch=str(torch.__version__), **module.versions())
    above = False
    for (operator, direction), found in samples.items():
        ratio = min(found) / base
        line = dict(operator=operator, backend="torch" if operator == peer else backend, direction=direction)
        line |= dict(
            microseconds=round(min(found), 2), median=round(statistics.median(found), 2), ratio=round(ratio, 2)
        )
        if (operator, direction) in HELD:
            line |= dict(limit=module.LIMIT, within=ratio <= module.LIMIT)
            above |= ratio > module.LIMIT
        print(json.dumps(line | versions), flush=True)
    return int(above)


def _backward(torch, result, tensors: list) -> Callable:
    dy = torch.randn_like(result)
    return lambda: torch.autograd.grad(result, tensors, dy, retain_graph=True)


def _without_gradients(torch, call: Callable) -> Callable:
    no_grad = torch.no_grad()

    def run():
        with no_grad:
            return call()

    return run


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: all, each in its own process")
    parser.add_argument("--operator", action="append", default=[], help="default: all")
    parser.add_argument("--rounds", type=int, default=300)
    given = parser.parse_args(arguments)
    backends = given.backend or list(BACKENDS)
    if len(backends) == 1:
        return measured(backends[0], given.rounds, given.operator)
    rest = [f"--rounds={given.rounds}", *(f"--operator={name}" for name in given.operator)]
    ran = [subprocess.run([sys.executable, __file__, f"--backend={backend}", *rest], env=_environment()).returncode
           for backend in backends]  # fmt: skip
    return max(ran)


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(sys.argv[1:]))
