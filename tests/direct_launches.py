"""What a directly started Triton kernel hands to the driver, beside what Triton itself hands to it.

    python tests/direct_launches.py [--calls N]

A program of its own: the kernels of a process with TRITON_INTERPRET=1 are interpreted, and the driver is a stub for
good (bench/stub_driver.py). Every kernel of the rooms is called with random arguments, as no launcher would: pointers
of any dtype and alignment or None, integers of any width, any constants. Nothing is compiled but one kernel, whose
machine code stands for all: what is compared is which kernel Triton has for a call, and which bytes it gets. Prints one
object of JSON.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT)]

import stub_driver  # noqa: E402

stub_driver.activate()

import direct_plans  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from triton import knobs  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402

from gptkern.backends.triton import direct  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64)
# Around what Triton asks: 1, 16's multiples, and the ends of 32 and 64 bits.
INTEGERS = (0, 1, 2, 8, 15, 16, 17, 48, 1000, 4096, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1, 2**40, 2**63 - 16)
NEGATIVE = (-1, -16, -(2**31), -(2**31) - 1)
FLOATS = {
    "beta2",
    "eps",
    "keep_scale",
    "log_beta1",
    "log_beta2",
    "lr",
    "one_less_beta1",
    "one_less_beta2",
    "scale",
    "score_scale",
    "weight_decay",
}
MODULES = [f"gptkern.operators.{path.parent.name}.{path.stem}" for path in ROOT.glob("gptkern/operators/*/triton*.py")]
MODULES += ["gptkern.backends.triton.norms", "gptkern.backends.triton.quantize"]
MEMORY = {dtype: torch.zeros(256, dtype=torch.uint8).view(dtype) for dtype in DTYPES}


@direct.jit
def _base_kernel(x_ptr, n):
    pass


_base = _base_kernel.run(MEMORY[torch.float32], 16, grid=(1,), warmup=False)
compilations: list[str] = []


def compiled_alike(src, target=None, options=None, **_):
    """In Triton's compiler's place: the kernel of this source, its signature and constants, with one machine code."""
    compilations.append(src.fn.__name__)
    return CompiledKernel(src, _base.metadata_group, f"{len(compilations)}")


def kernels() -> list[direct.Kernel]:
    found = {}
    for name in sorted(MODULES):
        for kernel in vars(importlib.import_module(name)).values():
            if isinstance(kernel, direct.Kernel):
                found[f"{kernel.module}.{kernel.__name__}"] = kernel
    return list(found.values())


def prepared(kernel: direct.Kernel) -> direct.Kernel:
    # Triton puts its compiler there when it makes what it knows of a device.
    kernel.device_caches[0]
    kernel.compile = compiled_alike
    return kernel


def random_call(kernel: direct.Kernel, choose: random.Random) -> tuple[list, dict]:
    """(arguments, constants); near those of other calls, so that calls that differ in one fact come up."""
    arguments, constants = [], {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            constants[name] = choose.choice((16, 32, "gelu", None, True))
        elif name.endswith("_ptr"):
            tensor = MEMORY[choose.choice(DTYPES[:2] if choose.random() < 0.8 else DTYPES)]
            arguments.append(choose.choice((None, tensor, tensor, tensor[1:], tensor[8:])))
        elif name in FLOATS:
            arguments.append(choose.choice((1.0, 0.5, None)))
        else:
            pool = INTEGERS + NEGATIVE if parameter.do_not_specialize else (*INTEGERS, None)
            arguments.append(choose.choice(pool))
    return arguments, constants


def neighbours(kernel: direct.Kernel, calls: int, seed: int):
    """Calls of which each differs from an earlier one in one argument."""
    choose = random.Random(seed)
    known = [random_call(kernel, choose)]
    yield known[0]
    for _ in range(calls):
        arguments, constants = (type(part)(part) for part in choose.choice(known))
        others, other_constants = random_call(kernel, choose)
        place = choose.randrange(len(arguments) + len(constants))
        if place < len(arguments):
            arguments[place] = others[place]
        else:
            name = [*constants][place - len(arguments)]
            constants[name] = other_constants[name]
        known.append((arguments, constants))
        yield arguments, constants


def compare(kernel: direct.Kernel, calls: int, seed: int = 0, once: bool = False) -> tuple[list[str], int]:
    """(the calls that differ, how many launches went to Triton's launcher at once)."""
    different, began_directly = [], 0
    ran: list[int] = []
    own = triton.JITFunction.run

    def run(*arguments, **named):
        ran.append(1)
        return own(kernel, *arguments, **named)

    for index, (arguments, constants) in enumerate(neighbours(kernel, calls, seed)):
        grid = ((3,), (3, 2), (3, 2, 5))[index % 3]
        options = dict(num_warps=(4, 8)[index % 2])
        stub_driver.record({})
        wanted = own(kernel, *arguments, grid=grid, warmup=False, **constants, **options)
        stub_driver.record(wanted.src.signature)
        own(kernel, *arguments, grid=grid, warmup=False, **constants, **options)
        expected = stub_driver.launched()
        kernel.run = run
        kernel[grid](*arguments, **constants, **options)
        ran.clear()
        launches = stub_driver.launches()
        kernel[grid](*arguments, **constants, **options)
        began_directly += not ran
        del kernel.run
        if stub_driver.launched() != expected or stub_driver.launches() != launches + 1:
            different.append(f"{kernel.__name__}{arguments} {constants}: {stub_driver.launched()}, not {expected}")
            if once:
                break
    return different, began_directly


# What the key is made blind to -> what in its source is replaced.
BLIND = {
    "alignment": ("unaligned and ({alignments})", "0"),
    "dtypes": ("{dtypes}", ""),
    "integers": ("{fixed}", ""),
    "widths of integers": ("{varying}", ""),
    "constants": ("{varying} {constants}", "{varying}"),
    "options": ("num_warps, num_stages, {dtypes}", "{dtypes}"),
}


def sees(blindness: str, function: Callable, varying: list[str], calls: int) -> bool:
    """Whether the comparison finds the key that does not know of something."""
    stub_driver.record({})
    source = direct._SOURCE
    assert BLIND[blindness][0] in source
    direct._SOURCE = source.replace(*BLIND[blindness])
    try:
        return bool(compare(prepared(direct.Kernel(function, varying)), calls, once=True)[0])
    finally:
        direct._SOURCE = source


def hooks_see(kernel: direct.Kernel) -> dict[str, bool]:
    """What a launch hook gets of a kernel that was started before, and whether all is direct again without it."""
    stub_driver.record({})
    arguments, constants = random_call(kernel, random.Random(1))
    seen: list[str] = []

    def enter(metadata):
        seen.append(metadata.get()["name"])

    for _ in range(2):
        kernel[(1,)](*arguments, **constants)
    knobs.runtime.launch_enter_hook.add(enter)
    kernel[(1,)](*arguments, **constants)
    knobs.runtime.launch_enter_hook.remove(enter)
    kernel[(1,)](*arguments, **constants)
    chain, knobs.runtime.launch_enter_hook = knobs.runtime.launch_enter_hook, enter
    kernel[(1,)](*arguments, **constants)
    knobs.runtime.launch_enter_hook = chain
    return {"seen": len(seen) == 2, "by name": set(seen) == {_base.metadata.name}}


def kept_of_a_first_call(kernel: direct.Kernel) -> dict[str, bool]:
    """Whether a first call under debug, which compiles assertions in, is kept for later ones; and one without."""
    stub_driver.record({})
    arguments, constants = random_call(kernel, random.Random(2))
    kernel._kinds.clear()
    found = {}
    for name, is_on in (("debug", True), ("plain", False)):
        knobs.runtime.debug = is_on
        kernel[(1,)](*arguments, **constants)
        found[name] = bool(kernel._kinds)
    return found


def compiled_anew() -> dict[str, int]:
    """How many kernels are compiled for other rows and lengths than those of a first call of each launcher."""
    from gptkern import operators

    def norm(name, rows):
        contract = operators.contract(name)
        x, weight = torch.zeros(rows, 64), torch.zeros(64)
        bias = (weight,) if name == "layer_norm" else ()
        call = contract.Call(x, None, weight, *bias, 1e-5)
        kernels = importlib.import_module(f"gptkern.operators.{name}.triton")
        *_, statistics = kernels.forward(call)
        needs = (True, True, *(True for _ in bias))
        kernels.backward(contract.Gradient(x, None, statistics, *needs), call)

    def attention(lengths):
        contract = operators.contract("attention")
        query, key = (torch.zeros(2, 2, length, 64, dtype=torch.bfloat16) for length in lengths)
        call = contract.Call(query, key, key, False, 0.125)
        kernels = importlib.import_module("gptkern.operators.attention.triton")
        output, lse = kernels.forward(call)
        kernels.backward(contract.Gradient(output, output, lse, True, True, True), call)

    stub_driver.record({})
    sizes = (2, 1, 3, 16, 17, 31, 64)
    calls = {name: [functools.partial(norm, name, rows) for rows in sizes] for name in ("layer_norm", "rms_norm")}
    calls["attention"] = [functools.partial(attention, lengths) for lengths in zip(sizes, (64, 16, 17, 1, 2, 33, 8))]
    found = {}
    for name, (first, *others) in calls.items():
        first()
        before = len(compilations)
        for other in others:
            other()
        found[name] = len(compilations) - before
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=60)
    calls = parser.parse_args().calls
    found = {"triton": triton.__version__, "indirect": direct.indirect(), "kernels": {}, "different": []}
    every = kernels()
    for kernel in every:
        different, began_directly = compare(prepared(kernel), calls)
        found["kernels"][f"{kernel.module}.{kernel.__name__}"] = [calls + 1, began_directly]
        found["different"] += different
    largest = max(every, key=lambda kernel: len(kernel.params))
    varying = [parameter.name for parameter in largest.params if parameter.do_not_specialize]
    found["sees"] = {blindness: sees(blindness, largest.fn, varying, 40 * calls) for blindness in BLIND}
    found["hooks"] = hooks_see(every[0])
    found["first"] = kept_of_a_first_call(every[0])
    found["anew"] = compiled_anew()
    found["plans"] = direct_plans.report()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
