"""Everything that a GPU has to say about this source tree, in one run of at most nine minutes, without a network.

    python bench/gpu.py --out FOLDER [--dry-run] [--seconds N]        (make gpu OUT=FOLDER [DRY=1])

The steps, in this order; each is a process of its own with a time of its own, and none stops those that follow:

    identify    what `gptkern info` and nvidia-smi say; no setting of the card is changed
    build       the CUDA kernels, for this GPU's architecture alone, in the source tree
    check       gptkern check: all kernels against float64
    tests       the test suite, on the GPU
    sanitizer   compute-sanitizer's memcheck and racecheck of one small forward and backward of each operator
    quick       gptkern bench --quick
    costs       what is no kernel, the quickest of it: host time, import
    bench       gptkern bench, the most important cells first, then the other costs, with the time that is left

How they are run is bench/steps.py.

FOLDER holds, without folders in it: gpu.log (what every step printed), steps.json (what became of each), check.json,
tests.txt, sanitizer.txt and the bench's results.json. Run again with the same sources on the same machine, the steps
that came to their end are not run again and the bench goes on where it was.

Exit status: 0; 1 where a step failed; 2 where there is no GPU or PyTorch; 130 after Ctrl-C. Needs what the Python that
runs it has: gptkern is taken from the source tree, nothing is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import steps
from steps import ROOT, Context, Machine, Step

PYTHON = sys.executable

# Seconds of the whole run.
SECONDS = 540
# `gptkern bench --seconds` starts no new cell after so long before the step's end: the last one has to finish.
BENCH_MARGIN = 25
# gptkern.measuring.runner.ROUNDS["quick"], which this file cannot import: PyTorch may be missing.
QUICK_ROUNDS = 20
CHECK_MARGIN = 10
# Characters of a failed test's report that are printed at once: its end, where the error is.
FAILURE_TEXT = 3000
# Cases of each operator that run under the sanitizer, where everything takes many times as long.
SANITIZED_CASES = 2
# GiB of the GPU's memory for each worker of the tests, and how many workers there are at most.
WORKER_GIBIBYTES, MOST_WORKERS = 4, 12

# The tests of kernels come first, in case that the time does not suffice for all.
KERNEL_TESTS = ("layer_norm", "rms_norm", "rotary", "softmax", "int8_linear", "attention", "check")
# What a GPU changes nothing about: compiling ahead of time, the interpreter, packaging, what runs on the CPU alone.
NOT_FOR_A_GPU = ("build", "compiled_kernels", "bounds", "package", "gpu_script", "demo", "gpt")
TESTS_NEED = ("pytest", "hypothesis")


# --- The steps --------------------------------------------------------------------------------------------------------


def _gptkern(*arguments: str) -> list[str]:
    return [PYTHON, "-m", "gptkern", *arguments]


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _identify(context: Context) -> list[list[str]]:
    query = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    commands = [_gptkern("info", "--json")]
    if shutil.which("nvidia-smi"):
        commands.append(["nvidia-smi", f"--query-gpu={query}", "--format=csv"])
    return commands


def _build(context: Context) -> list[list[str]]:
    return [[PYTHON, "-m", "building"]]


def _no_build(context: Context) -> str | None:
    """What is missing for a build is said by the build."""
    return None if list((ROOT / "csrc").glob("*.cu")) else "there are no CUDA kernels in csrc/"


def _check(context: Context) -> list[list[str]]:
    seconds = max(1, round(context.seconds - CHECK_MARGIN))
    return [_gptkern("check", "--json", str(context.out / "check.json"), "--seconds", str(seconds))]


def _tests(context: Context) -> list[list[str]]:
    # `-p gpu`: this file, for the hooks at its end.
    command = [PYTHON, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "gpu"]
    if not _found("pytest_timeout"):
        # Without pytest-timeout its `timeout` in pyproject.toml is unknown, which --strict-config takes for an error.
        command += ["-o", "addopts=-ra --strict-markers"]
    if _found("xdist"):
        machine = context.machine
        workers = min(machine.cores, MOST_WORKERS)
        if machine.gpu is not None:
            workers = max(1, min(workers, machine.gibibytes // WORKER_GIBIBYTES))
        # `load` hands tests out in their order, `worksteal` in one piece for each worker.
        command += ["-n", str(workers), "--dist", "load"]
    if not _found("expecttest"):
        # torch.library.opcheck imports it.
        command += ["-k", "not registered_ops"]
    return [command + test_files()]


def test_files() -> list[str]:
    """Of the tests that a GPU changes something about, the kernels' first."""
    names = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    first = [name for name in KERNEL_TESTS if name in names]
    return [f"tests/test_{name}.py" for name in [*first, *sorted(names - {*first, *NOT_FOR_A_GPU})]]


def _no_tests(context: Context) -> str | None:
    missing = [module for module in TESTS_NEED if not _found(module)]
    return f"the tests need {' and '.join(missing)}, which {PYTHON} does not have" if missing else None


def sanitizer() -> str | None:
    """Where compute-sanitizer is: on the PATH, or in a CUDA toolkit."""
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(toolkit, folder) for toolkit in toolkits if toolkit for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)]))


def _sanitizer(context: Context) -> list[list[str]]:
    calls = [PYTHON, str(Path(__file__).resolve()), "--calls"]
    # The first run is without: the kernels are compiled in it, which the sanitizer would only slow down.
    commands = [calls]
    for tool in ("memcheck", "racecheck"):
        options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", "1", "--print-limit", "20"]
        commands.append([sanitizer() or "compute-sanitizer", *options, *calls])
    return commands


def _no_sanitizer(context: Context) -> str | None:
    return None if sanitizer() else "compute-sanitizer is not installed: it is neither on the PATH nor in CUDA_HOME"


def _bench(context: Context, *options: str) -> list[list[str]]:
    seconds = max(1, round(context.seconds - BENCH_MARGIN))
    return [_gptkern("bench", *options, "--out", str(context.out), "--seconds", str(seconds))]


STEPS = [
    Step("identify", 25, "what this machine is", _identify),
    Step(
        "build", 45, "the CUDA kernels, for this GPU alone", _build, _no_build,
        environment=lambda c: {"GPTKERN_CUDA": "1"},
    ),
    Step("check", 50, "all kernels against float64", _check),
    Step(
        "tests", 145, "the test suite, on the GPU", _tests, _no_tests, output="tests.txt",
        environment=lambda c: {"PYTHONPATH": str(Path(__file__).resolve().parent)},
    ),
    Step(
        "sanitizer", 75, "memory errors and races, on small calls", _sanitizer, _no_sanitizer, output="sanitizer.txt",
        # Every tensor is an allocation of its own: PyTorch's allocator would put another one where a kernel goes wrong.
        environment=lambda c: {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    ),
    Step("quick", 90, "the most telling benchmarks", lambda c: _bench(c, "--quick", "--no-costs"), may_stop=True),
    Step(
        "costs", 40, "host time and import, which are no kernels", lambda c: _bench(c, "--quick", "--costs-only"),
        may_stop=True,
    ),
    # Its file says what is measured already; nothing else knows whether all is. As many samples as the quick ones
    # have: these would be measured again with more.
    Step(
        "bench", 70, "all benchmarks, with the time that is left",
        lambda c: _bench(c, "--no-costs", "--rounds", str(QUICK_ROUNDS)), again=True, may_stop=True,
    ),
]  # fmt: skip


# --- What is here -----------------------------------------------------------------------------------------------------

# A process of its own: CUDA's context would stay in the GPU's memory while the steps run.
_PROBE = """
import json, os
found = dict(torch=None, gpu=None, architecture=None, gibibytes=0, cores=os.cpu_count() or 1)
try:
    import torch
except ImportError:
    print(json.dumps(found))
    raise SystemExit
found["torch"] = torch.__version__
if hasattr(os, "sched_getaffinity"):
    found["cores"] = len(os.sched_getaffinity(0))
if torch.cuda.is_available() and torch.version.hip is None:
    properties = torch.cuda.get_device_properties(0)
    found.update(gpu=properties.name, architecture=f"{properties.major}{properties.minor}",
                 gibibytes=properties.total_memory >> 30)
print(json.dumps(found))
"""


def probe() -> Machine:
    done = subprocess.run([PYTHON, "-c", _PROBE], capture_output=True, text=True)
    try:
        return Machine(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        raise SystemExit(f"gpu.py: PyTorch cannot be asked for its GPU:\n{done.stdout}{done.stderr}") from None


def obstacles() -> list[str]:
    """What is missing that lets every kernel fail: said before the steps, because their errors would not say it."""
    found = []
    if not _found("torch"):
        found.append(f"{PYTHON} cannot import torch: every step needs it (make gpu PYTHON=another)")
    if not _found("triton"):
        found.append("triton cannot be imported, so there are no Triton kernels")
    # Triton compiles the function that starts a kernel with the machine's C compiler.
    if not os.environ.get("CC") and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        found.append("Triton needs a C compiler: there is no cc, gcc or clang on the PATH, and CC is not set")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        found.append(f"Triton needs Python.h, which is not in {sysconfig.get_path('include')}")
    return found


def source_digest() -> str:
    """Of everything that the steps run."""
    digest = hashlib.sha256()
    for pattern in (
        "gptkern/**/*.py",
        "gptkern/**/*.json",
        "csrc/**/*",
        "building/*.py",
        "tests/**/*.py",
        "bench/*.py",
        "*.py",
        "*.toml",
    ):
        for path in sorted(path for path in ROOT.glob(pattern) if path.is_file()):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


# --- What runs under the sanitizer ------------------------------------------------------------------------------------


def small_calls() -> None:
    """One small forward and backward of each operator, on every backend with kernels."""
    import torch

    import gptkern
    from gptkern.measuring import checking
    from gptkern.measuring.checking_cases import OPERATORS, cases_of

    device = torch.device(checking.default_device())
    for operator in OPERATORS:
        cases = [case for case in cases_of(operator, ("small",)) if case.dtype == torch.bfloat16][:SANITIZED_CASES]
        for case in cases:
            problem = case.build(case.dtype, torch.Generator(device).manual_seed(0))
            for backend in checking.available(device):
                leaves = [tensor.detach().requires_grad_() for tensor in problem.tensors.values()]
                try:
                    with gptkern.backend(backend):
                        outputs = problem.twin(*leaves)
                except gptkern.BackendError as error:
                    print(f"{operator}, {case.shape_class}, {backend}: not covered, {error}", flush=True)
                    continue
                output = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
                if output.requires_grad:
                    output.backward(torch.randn_like(output))
                if device.type == "cuda":
                    torch.cuda.synchronize()
                print(f"{operator}, {case.shape_class}, {backend}: ran", flush=True)


# --- What pytest calls ------------------------------------------------------------------------------------------------


def pytest_configure(config) -> None:
    config.pluginmanager.register(_FailuresAtOnce(config), "failures_at_once")


class _FailuresAtOnce:
    """Prints a failure when it happens: where the tests' time is over before they are, pytest's summary never comes."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:  # the workers of xdist have none
            terminal.write_line(f"\nFAILED at {report.when}: {report.nodeid}\n{report.longreprtext[-FAILURE_TEXT:]}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FOLDER", default="out/gpu", help="where everything goes (default: out/gpu)")
    parser.add_argument("--dry-run", action="store_true", help="list the steps and run none; needs no GPU")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="N", help=f"of all steps (default: {SECONDS})"
    )
    parser.add_argument("--calls", action="store_true", help="nothing but the small calls that the sanitizer watches")
    args = parser.parse_args(arguments)
    if args.calls:
        small_calls()
        return 0
    if not args.seconds > 0:
        parser.error(f"--seconds {args.seconds:g}: it needs to be above 0")
    start = time.monotonic()
    machine, out, source = probe(), Path(args.out).resolve(), source_digest()
    if args.dry_run:
        steps.dry_run(STEPS, out, machine, args.seconds, source, obstacles())
        return 0
    if machine.torch is None:
        print(f"gpu.py: PyTorch cannot be imported by {PYTHON}", file=sys.stderr)
        return 2
    if machine.gpu is None:
        print("gpu.py: there is no NVIDIA GPU here; --dry-run (make gpu DRY=1) lists what would run", file=sys.stderr)
        return 2
    # A shell or a scheduler that ends the run gets the same clean end as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return steps.run(STEPS, out, machine, args.seconds - (time.monotonic() - start), source, obstacles())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
