"""Costs that are not kernels: host time, import, first call, compiling, build, wheel; each measured, with its peers.

    host time       of one call on a 4x64 input, gradients on: what a call costs where nothing is computed
    to the launch   the same on the way to a kernel, without Triton's launch: checks, choice, allocation, autograd
    import          `import gptkern` after `import torch`, each time in a new process
    first call      from the call to its result, in a new process with empty caches
    compile         of the layer_norm kernels for sm_90, ahead of time: what a GPU's first call waits for; needs no GPU
    build, wheel    `pip wheel` of the source tree, and the size of what it makes

`costs(extent)` yields one record after the other, as the "costs" of a results file hold them:

    {"key", "what": in words, "unit": "s" | "B", "gptkern": {"median", "low", "high", "n"}, "peers": {name: the same},
     "limit": the promise or None, "limit_is": "ratio" (to the median of the peer `limit_to`) | "value"}

What cannot be measured here is {"skipped": why} in the place of the numbers. A peer that fails is skipped with the last
line of its error; gptkern that fails raises CostError with all of it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

import gptkern
import gptkern.functional as G
from gptkern.backends import dispatch
from gptkern.measuring import timing

# A call this small costs only what the host does.
ROWS, WIDTH = 4, 64
# A twin's call takes at most this many times the host time of PyTorch's function.
HOST_LIMIT = 3.0
# Seconds that `import gptkern` may add to `import torch`.
IMPORT_LIMIT = 0.3
# The kernels that are compiled: rows of this width, for this architecture.
COMPILED_WIDTH, COMPILED_FOR = 1024, 90
# Seconds that one process may take: torch.compile's first call starts a C++ compiler, a build may fetch its tools.
PATIENCE = 300
# The same for a build with CUDA kernels, on few cores.
BUILD_PATIENCE = 900
# Of the peer that is measured in every part where it has one.
LIGER, LIGER_MODULE, LIGER_PACKAGE = "Liger-Kernel", "liger_kernel", "liger-kernel"


class Effort(NamedTuple):
    """How many samples of each: rounds of host calls, new processes."""

    rounds: int
    processes: int


EFFORTS = {"smoke": Effort(10, 1), "quick": Effort(50, 3), "full": Effort(100, 5)}


EXTENTS = tuple(EFFORTS)

HOST_KEY, PATH_KEY, COMPILE_KEY = "host time, {}", "host time, {}, to the launch", "compile, layer_norm"


class CostError(RuntimeError):
    """gptkern's own part of a measurement failed; the message has its output."""


def costs(extent: str) -> Iterator[dict[str, Any]]:
    """The records, each measured when it is asked for."""
    return (measure() for _, measure in listed(extent))


def listed(extent: str) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """(key, the function that measures it) of every record.

    Args:
        extent: "smoke": the host times alone; "quick": all but build and wheel; "full": all.
    """
    if extent not in EXTENTS:
        raise ValueError(f"extent is {extent!r}; it needs one of {', '.join(map(repr, EXTENTS))}")
    rounds, processes = EFFORTS[extent]
    found = [(HOST_KEY.format(name), functools.partial(host_time, name, rounds)) for name in CALLS]
    found += [(PATH_KEY.format(name), functools.partial(kernels_path, name, rounds)) for name in CALLS]
    if extent != "smoke":
        for key, measure in (("import", import_time), ("first call", first_call), (COMPILE_KEY, compile_time)):
            found.append((key, functools.partial(measure, processes)))
    if extent == "full":
        build = Build(processes)
        found += [("build", build.time), ("wheel", build.size)]
    return found


def record(
    key: str,
    what: str,
    ours: dict[str, Any],
    peers: dict[str, dict[str, Any]],
    *,
    unit: str = "s",
    limit: float | None = None,
    limit_to: str | None = None,
) -> dict[str, Any]:
    """One record; a limit without `limit_to` is a value, with it a ratio."""
    return {
        "key": key,
        "what": what,
        "unit": unit,
        "gptkern": ours,
        "peers": peers,
        "limit": limit,
        "limit_to": limit_to,
        "limit_is": "ratio" if limit_to else "value",
    }


def numbers(samples: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and number of samples."""
    return timing.spread(samples)._asdict()


def skipped(reason: str) -> dict[str, Any]:
    return {"skipped": reason}


# --- Host time --------------------------------------------------------------------------------------------------------


def _tensor(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda" if torch.cuda.is_available() else "cpu", requires_grad=True)


def _layer_norm() -> tuple[Callable, Callable]:
    x, weight, bias = _tensor(ROWS, WIDTH), _tensor(WIDTH), _tensor(WIDTH)
    return tuple(functools.partial(f, x, (WIDTH,), weight, bias) for f in (G.layer_norm, F.layer_norm))


def _rms_norm() -> tuple[Callable, Callable]:
    x, weight = _tensor(ROWS, WIDTH), _tensor(WIDTH)
    return tuple(functools.partial(f, x, (WIDTH,), weight) for f in (G.rms_norm, F.rms_norm))


def _rotary() -> tuple[Callable, Callable]:
    x = _tensor(1, 1, ROWS, WIDTH)
    angles = torch.randn(ROWS, WIDTH, device=x.device)
    cos, sin = angles.cos(), angles.sin()

    def of_pytorch():
        return x * cos + torch.cat((-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]), -1) * sin

    return functools.partial(G.rotary_embedding, x, cos, sin), of_pytorch


def _softmax() -> tuple[Callable, Callable]:
    x = _tensor(ROWS, WIDTH)
    return tuple(functools.partial(f, x, -1) for f in (G.softmax, F.softmax))


def _attention() -> tuple[Callable, Callable]:
    call = [_tensor(1, 1, ROWS, WIDTH) for _ in range(3)]
    functions = (G.scaled_dot_product_attention, F.scaled_dot_product_attention)
    return tuple(functools.partial(f, *call, is_causal=True) for f in functions)


def _int8_linear() -> tuple[Callable, Callable]:
    x, weight, bias = _tensor(ROWS, WIDTH), _tensor(WIDTH, WIDTH), _tensor(WIDTH)
    quantised, scale = G.quantize_int8(weight.detach())
    return functools.partial(G.int8_linear, x, quantised, scale, bias), functools.partial(F.linear, x, weight, bias)


class Call(NamedTuple):
    """A small call of an operator."""

    build: Callable[[], tuple[Callable, Callable]]  # -> gptkern's call and PyTorch's, without arguments
    peer: str  # PyTorch's function, by name
    limit: float | None  # the ratio that is promised


CALLS = {
    "layer_norm": Call(_layer_norm, "F.layer_norm", HOST_LIMIT),
    "rms_norm": Call(_rms_norm, "F.rms_norm", HOST_LIMIT),
    # Five operators of PyTorch's.
    "rotary": Call(_rotary, "x * cos + rotate_half(x) * sin", None),
    "softmax": Call(_softmax, "F.softmax", HOST_LIMIT),
    "attention": Call(_attention, "F.scaled_dot_product_attention", HOST_LIMIT),
    # F.linear is another function: its weight is not int8. What nobody promised has no limit.
    "int8_linear": Call(_int8_linear, "F.linear", None),
}


def host_time(operator: str, rounds: int) -> dict[str, Any]:
    """A call of the twin, as a user makes it, against PyTorch's function."""
    build, peer, limit = CALLS[operator]
    ours, theirs = timing.host_durations(build(), rounds)
    return record(
        HOST_KEY.format(operator),
        f"one call of {operator} on {_size(operator)} with gradients on: the time of the host, not of the GPU",
        numbers(ours),
        {peer: numbers(theirs)},
        limit=limit,
        limit_to=peer if limit else None,
    )


def kernels_path(operator: str, rounds: int) -> dict[str, Any]:
    """The same call on the way to a Triton kernel that is then not launched."""
    build, peer, _ = CALLS[operator]
    key = PATH_KEY.format(operator)
    what = (
        f"one call of {operator} on {_size(operator)} with gradients on, on the way of a GPU's calls: checks, choice "
        "of the backend, allocation and autograd; Triton's launch itself is taken out"
    )
    try:
        module = dispatch.load("triton", operator)
    except ImportError as error:
        _, theirs = timing.host_durations(build(), rounds)
        return record(key, what, skipped(f"the Triton kernels cannot be imported: {error}"), {peer: numbers(theirs)})
    functions = build()
    # Entered once, outside of the samples: what the `with` block itself costs is no part of a call.
    with without_launches(module), gptkern.backend("triton"):
        ours, theirs = timing.host_durations(functions, rounds)
    return record(key, what, numbers(ours), {peer: numbers(theirs)})


def _size(operator: str) -> str:
    return f"1x1x{ROWS}x{WIDTH}" if operator in ("attention", "rotary") else f"{ROWS}x{WIDTH}"


class _NotLaunched:
    """In place of a kernel: kernel[grid](...) does nothing."""

    def __getitem__(self, grid):
        return _nothing


def _nothing(*arguments, **named) -> None:
    pass


@contextlib.contextmanager
def without_launches(module):
    """While it lasts, in this process: a Triton module's kernels start nothing, and take CPU tensors as well."""
    with contextlib.ExitStack() as stack:
        for name in vars(module).copy():
            if name.endswith("_kernel"):
                stack.enter_context(mock.patch.object(module, name, _NotLaunched()))
        if not torch.cuda.is_available():
            stack.enter_context(mock.patch.object(dispatch, "unavailable", lambda name, device: None))
        yield


# --- New processes ----------------------------------------------------------------------------------------------------


def in_new_processes(program: str, count: int) -> list[float]:
    """The last line that each of `count` new processes prints, a number; every process has empty caches of its own."""
    return [float(_run([sys.executable, "-c", program]).stdout.split()[-1]) for _ in range(count)]


def peers_numbers(program: str, count: int) -> dict[str, Any]:
    """As `in_new_processes`, of a peer: what fails is skipped with the last line of its error."""
    try:
        return numbers(in_new_processes(program, count))
    except CostError as error:
        return skipped(f"failed: {str(error).splitlines()[-1]}")


def _run(
    command: list[str], patience: float | None = None, variables: dict[str, str] | None = None, **options
) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as caches:
        # Kernels are compiled, not interpreted, and nothing is found that another process compiled.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": f"{caches}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}
        # The same gptkern as here, wherever that was found.
        paths = [str(Path(gptkern.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        environment |= variables or {}
        patience = PATIENCE if patience is None else patience
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=patience, **options)
        except subprocess.TimeoutExpired as error:
            raise CostError(f"{_shown(command)}\ndid not end within {patience:g} s") from error
    if done.returncode != 0:
        raise CostError(f"{_shown(command)}\nended with {done.returncode}:\n{done.stdout}{done.stderr}".rstrip())
    return done


def _shown(command: list[str]) -> str:
    return " ".join("…" if "\n" in part else part for part in command)


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _liger(program: str, count: int, needs_gpu: bool = False) -> dict[str, Any]:
    if not installed(LIGER_MODULE):
        return skipped(f"{LIGER_PACKAGE} is not installed")
    if needs_gpu and not torch.cuda.is_available():
        return skipped("its kernels run on a GPU alone")
    return peers_numbers(program, count)


_IMPORT = """
import time
import torch
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""


def import_time(processes: int) -> dict[str, Any]:
    return record(
        "import",
        "import gptkern, beyond import torch, in a new process",
        numbers(in_new_processes(_IMPORT.format(module="gptkern"), processes)),
        {LIGER: _liger(_IMPORT.format(module=f"{LIGER_MODULE}.transformers"), processes)},
        limit=IMPORT_LIMIT,
    )


# CUDA's own start, and that of its random numbers, are over before the clock starts.
_FIRST_CALL = """
import time
import torch
{imports}
device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.randn({rows}, {width}, device=device, requires_grad=True)
weight, bias = torch.randn(2, {width}, device=device).unbind()
synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
synchronize()
start = time.perf_counter()
({function})(x, ({width},), weight, bias)
synchronize()
print(time.perf_counter() - start)
"""


def first_call(processes: int) -> dict[str, Any]:
    def program(imports: str, function: str) -> str:
        return _FIRST_CALL.format(imports=imports, function=function, rows=ROWS, width=COMPILED_WIDTH)

    functional = "import torch.nn.functional as F"
    liger = program(
        f"from {LIGER_MODULE}.transformers import functional as L",
        "lambda x, shape, w, b: L.liger_layer_norm(x, w, b, 1e-5)",
    )
    return record(
        "first call",
        f"the first layer_norm of a new process with empty caches, {ROWS}x{COMPILED_WIDTH} float32, from the call to "
        "its result; kernels that are compiled on the first call are compiled in it",
        numbers(in_new_processes(program("import gptkern.functional as F", "F.layer_norm"), processes)),
        {
            "F.layer_norm": peers_numbers(program(functional, "F.layer_norm"), processes),
            "torch.compile": peers_numbers(
                program(functional, "torch.compile(F.layer_norm, dynamic=False)"), processes
            ),
            LIGER: _liger(liger, processes, needs_gpu=True),
        },
    )


# `sources` is a list of (kernel, signature, constants, options); what is divisible by 16 is not told, so that both
# libraries' kernels are compiled in the same way.
_COMPILE = """
import time
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
{sources}
assert len(sources) == 2, sources
start = time.perf_counter()
for kernel, signature, constants, options in sources:
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", {architecture}, 32), options=options)
print(time.perf_counter() - start)
"""

# Without the residual, which the peer's kernels do not have.
_OUR_SOURCES = """
from gptkern.operators.layer_norm.triton import compile_cases
names = ["forward width {width} bf16", "backward width {width} bf16"]
without = dict(HAS_RESIDUAL=False, HAS_GRAD_SUMMED=False)
sources = [
    (case.kernel, case.signature, case.constants | dict((n, v) for n, v in without.items() if n in case.constants),
     dict(num_warps=case.num_warps, num_stages=case.num_stages))
    for case in compile_cases({architecture}) if case.name in names
]
"""

_LIGERS_SOURCES = """
from liger_kernel.ops import layer_norm as kernels
from liger_kernel.ops.utils import calculate_settings
block, warps = calculate_settings({width})
values = dict(BLOCK_SIZE=block, rows_per_program=32, COMPUTE_DW=True, COMPUTE_DB=True)
statistics = ("Mean_ptr", "RSTD_ptr", "DW_ptr", "DB_ptr")

def kind(name):
    if name in values:
        return "constexpr"
    if name.endswith("_ptr"):
        return "*fp32" if name in statistics else "*bf16"
    return "fp32" if name == "eps" else "i32"

sources = [
    (kernel, dict((name, kind(name)) for name in kernel.arg_names),
     dict((name, value) for name, value in values.items() if name in kernel.arg_names), dict(num_warps=warps))
    for kernel in (kernels._layer_norm_forward_kernel, kernels._layer_norm_backward_kernel)
]
"""


def compile_time(processes: int) -> dict[str, Any]:
    def program(sources: str) -> str:
        sizes = dict(width=COMPILED_WIDTH, architecture=COMPILED_FOR)
        return _COMPILE.format(sources=sources.format(**sizes), **sizes)

    what = (
        f"compiling the forward and the backward kernel of layer_norm, width {COMPILED_WIDTH}, bfloat16, for "
        f"sm_{COMPILED_FOR}, in a new process with an empty cache: what a GPU's first calls wait for"
    )
    if not installed("triton"):
        reason = skipped("triton is not installed")
        return record(COMPILE_KEY, what, reason, {LIGER: reason})
    ours = numbers(in_new_processes(program(_OUR_SOURCES), processes))
    return record(COMPILE_KEY, what, ours, {LIGER: _liger(program(_LIGERS_SOURCES), processes)})


# --- Build and wheel --------------------------------------------------------------------------------------------------


def source_tree() -> Path | None:
    """The folder that the package is built from, where it is imported from there."""
    folder = Path(gptkern.__file__).parents[1]
    return folder if all((folder / name).is_file() for name in ("pyproject.toml", "setup.py")) else None


class Build:
    """Builds `count` times, when the first of its two records is asked for."""

    def __init__(self, count: int):
        # Without a GPU the CUDA kernels would be compiled for every GPU that there is, and be of no use here. With one,
        # they take minutes.
        self.kernels = torch.cuda.is_available()
        self.count = 1 if self.kernels else count

    @functools.cached_property
    def samples(self) -> list[tuple[float, int]] | str:
        """(seconds, bytes of the wheel) of each build, or why there is none."""
        tree = source_tree()
        if tree is None:
            return "the source tree is not here: gptkern is installed from a wheel"
        if not installed("pip"):
            return "pip is not installed"
        return [_built(tree, self.kernels) for _ in range(self.count)]

    def _numbers(self, place: int) -> dict[str, Any]:
        if isinstance(self.samples, str):
            return skipped(self.samples)
        return numbers([sample[place] for sample in self.samples])

    def time(self) -> dict[str, Any]:
        no_build = skipped("only its wheel is downloaded, which somebody else built")
        what = f"pip wheel --no-deps . in the source tree, {self._with()}"
        return record("build", what, self._numbers(0), {LIGER: no_build})

    def _with(self) -> str:
        return "with the CUDA kernels, for this GPU" if self.kernels else "without the CUDA kernels"

    def size(self) -> dict[str, Any]:
        peer, bytes_ = _ligers_size()
        what = f"the size of the wheel, as pip downloads it, {self._with()}"
        return record("wheel", what, self._numbers(1), {peer: bytes_}, unit="B")


def _built(tree: Path, kernels: bool) -> tuple[float, int]:
    """(seconds, bytes of the wheel) of one build, of a copy: a build writes into the tree that it builds.

    Args:
        kernels: whether the CUDA kernels are built; where they cannot be, the build fails and says so.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        unwanted = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "out", "*.egg-info", "*.so", "results")
        shutil.copytree(tree, source, ignore=unwanted)
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-cache-dir", "--wheel-dir", folder, "."]
        start = time.perf_counter()
        _run(command, BUILD_PATIENCE, {"GPTKERN_CUDA": "1" if kernels else "0"}, cwd=source)
        seconds = time.perf_counter() - start
        (wheel,) = Path(folder).glob("*.whl")
        return seconds, wheel.stat().st_size


def _ligers_size() -> tuple[str, dict[str, Any]]:
    """(the peer's name, its wheel's bytes), or where nothing can be downloaded those of its installed files."""
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--retries", "0"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            _run([sys.executable, "-m", "pip", "download", *options, "--dest", folder, LIGER_PACKAGE])
            (wheel,) = Path(folder).glob("*.whl")
            return LIGER, numbers([wheel.stat().st_size])
        except CostError as error:
            reason = str(error).splitlines()[-1]
    try:
        files = importlib.metadata.distribution(LIGER_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        return LIGER, skipped(f"it is not installed, and pip download failed: {reason}")
    # Not compressed, so another name: a reader must not take one for the other.
    return f"{LIGER}, unpacked", numbers([sum(file.size or 0 for file in files)])
