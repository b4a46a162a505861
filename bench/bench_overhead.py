"""What gptkern costs where nothing is computed: the host time of a twin's call, and the import."""

from __future__ import annotations

import subprocess
import sys

import harness
import pytest
import torch
import torch.nn.functional as F

import gptkern.functional as G

ROWS, WIDTH = 4, 64
# A twin's call takes at most this many times the host time of PyTorch's function.
LIMIT = 3.0
# Seconds that `import gptkern` may add to `import torch`, and how many processes are asked.
IMPORT_LIMIT, IMPORTS = 0.3, 5


def tensor(*shape):
    return torch.randn(shape, device=harness.DEVICE, requires_grad=True)


def layer_norm():
    x, weight, bias = tensor(ROWS, WIDTH), tensor(WIDTH), tensor(WIDTH)
    return (lambda f: f(x, (WIDTH,), weight, bias)), G.layer_norm, F.layer_norm


def softmax():
    x = tensor(ROWS, WIDTH)
    return (lambda f: f(x, -1)), G.softmax, F.softmax


def scaled_dot_product_attention():
    query, key, value = (tensor(1, 1, ROWS, WIDTH) for _ in range(3))
    call = lambda f: f(query, key, value, is_causal=True)  # noqa: E731
    return call, G.scaled_dot_product_attention, F.scaled_dot_product_attention


TWINS = [layer_norm, softmax, scaled_dot_product_attention]


@pytest.mark.parametrize("of", TWINS, ids=lambda of: of.__name__)
def test_host_time_of_a_call(benchmark, of):
    call, twin, function = of()
    ours, theirs = call(twin), call(function)
    comparison = harness.Comparison(f"host time, {of.__name__}", f"{ROWS}x{WIDTH} with gradients", "eager", LIMIT)
    comparison.check(ours.detach(), theirs.detach().double(), theirs.detach())
    samples = harness.host_durations([lambda: call(twin), lambda: call(function)])
    comparison.record(benchmark, *samples)


def test_import(benchmark):
    code = (
        "import time; start = time.perf_counter(); import torch; middle = time.perf_counter(); import gptkern; "
        "print(middle - start, time.perf_counter() - middle)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(IMPORTS)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    of_torch, added = zip(*(map(float, run.stdout.split()) for run in runs))
    comparison = harness.Comparison("import gptkern", f"after torch; limit {IMPORT_LIMIT} s", "import torch")
    comparison.checked = True
    comparison.record(benchmark, list(added), list(of_torch))
