"""Runs emulated CUDA kernels that are built with AddressSanitizer and UndefinedBehaviorSanitizer.

test_cuda_sanitized.py starts it in a process of its own, with the sanitizers' libraries loaded before Python.

    python tests/sanitized_cuda.py operators        a few small calls of every operator, forward and backward
    python tests/sanitized_cuda.py faults           each fault of tests/cuda/sanitized.cu, in a process of its own
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

import torch

import gptkern
import gptkern.functional as G
from gptkern.backends.cuda import emulated


def tensor(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    """A tensor with an allocation of its own, beyond which lies what AddressSanitizer knows to be nobody's."""
    return torch.randn(shape).to(dtype).requires_grad_()


def layer_norm():
    for rows, width, dtype in [(5, 40, torch.float32), (3, 1001, torch.bfloat16), (2, 9000, torch.float16)]:
        yield G.layer_norm(tensor(rows, width, dtype=dtype), (width,), *(tensor(width, dtype=dtype) for _ in range(2)))
    output, summed = G.layer_norm(tensor(4, 72), (72,), residual=tensor(4, 72))
    yield output + summed


def rms_norm():
    for rows, width, dtype in [(5, 40, torch.float32), (3, 1001, torch.bfloat16), (2, 20000, torch.float16)]:
        yield G.rms_norm(tensor(rows, width, dtype=dtype), (width,), tensor(width, dtype=dtype))


def rotary():
    for heads, length, head_dim, rotary_dim, interleaved, dtype in [
        (2, 40, 64, 64, False, torch.bfloat16),
        (9, 3, 80, 32, True, torch.float16),
        (3, 5, 25, 14, False, torch.float16),
        (3, 5, 25, 14, True, torch.float32),
        (1, 3, 20, 10, False, torch.bfloat16),
    ]:
        angles = torch.randn(length, rotary_dim // 2)
        input = tensor(2, length, heads, head_dim, dtype=dtype).transpose(1, 2)
        yield G.rotary_embedding(input, angles.cos(), angles.sin(), interleaved=interleaved, rotary_dim=rotary_dim)


def softmax():
    for rows, width, dtype in [(5, 41, torch.float32), (3, 1001, torch.bfloat16), (2, 9000, torch.float16)]:
        yield G.softmax(tensor(rows, width, dtype=dtype), -1)
    yield G.softmax(tensor(2, 33, 33), -1, is_causal=True)
    yield G.softmax(tensor(2, 17, 24), 1)


def attention():
    for heads, key_heads, length, head_dim, causal, dtype in [
        (2, 1, 70, 64, True, torch.bfloat16),
        (1, 1, 33, 80, False, torch.float16),
        (1, 1, 20, 128, True, torch.float16),
    ]:
        query = tensor(1, heads, length, head_dim, dtype=dtype)
        key, value = (tensor(1, key_heads, length, head_dim, dtype=dtype) for _ in range(2))
        yield G.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=heads != key_heads)


def int8_linear():
    weight, scale = G.quantize_int8(tensor(40, 72, dtype=torch.float32).detach())
    for rows, mode in [(33, "w8a8"), (3, "w8a16")]:
        yield G.int8_linear(
            tensor(rows, 72), weight, scale, tensor(40, dtype=torch.float32), activation="gelu", mode=mode
        )


OPERATORS = {
    function.__name__: function for function in (layer_norm, rms_norm, rotary, softmax, attention, int8_linear)
}


def run_operators(names: list[str]) -> None:
    with gptkern.backend("cuda"):
        for seed in (0, 2):
            for name in names:
                emulated.load().set_seed(seed)
                for result in OPERATORS[name]():
                    result.float().square().sum().backward()
    print("clean")


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
