"""Reads what nvcc made of the CUDA kernels: registers, shared memory, spills and instructions. No GPU is needed.

    python tests/disassemble_cuda.py      the table docs/cuda_resources.md, on the standard output

The machine code is that of gptkern._cuda where it was built from these sources for both architectures; else nvcc
compiles them, once, into gptkern's cache. cuobjdump is CUDA's own or the one in Triton's wheel.

    registers, stack, shared    cuobjdump --dump-resource-usage; a kernel calls nothing: a stack is an array, or spills
    spills                      instructions that reach local memory (STL, LDL) in the disassembly
    occupancy                   blocks that fit a multiprocessor, from registers, threads and shared memory; threads and
                                dynamic shared memory are those of the launches that tests/count_cuda.py counts
"""

from __future__ import annotations

import collections
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from gptkern.backends.cuda import emulated, sources
from gptkern.backends.tables import user

# "sm_90a": with Hopper's own instructions.
ARCHITECTURES = ("sm_80", "sm_90a")
# What else a build offers: of its default list, and what nvcc 13 knows beyond it (103, 110 and 121 are of the same
# families). All kernels are compiled for them when their table is made, and one, at the limit of registers, in a test.
OTHER_ARCHITECTURES = ("sm_86", "sm_89", "sm_100", "sm_120")
FLAGS = ("-std=c++20", "-O3")


class Limits(NamedTuple):
    """Of a multiprocessor. (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")"""

    shared_bytes: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    quarters: int = 4  # each has its share of the registers
    reserved: int = 1024  # bytes of shared memory that the system takes of each block


MULTIPROCESSOR = {"sm_80": Limits(164 * 1024), "sm_90a": Limits(228 * 1024)}


class Kernel(NamedTuple):
    name: str  # with its template arguments
    architecture: str
    registers: int
    stack: int
    shared: int  # static
    instructions: dict[str, int]  # "LDG.E.128.CONSTANT": how many stand in the code
    local_in_loops: int = 0  # instructions that reach local memory, between a backward branch and its target

    def count(self, *prefixes: str) -> int:
        """Instructions that begin with one of the prefixes, in parts between dots: "LDG.E.128" is not "LDG.E.12"."""
        return sum(
            n
            for name, n in self.instructions.items()
            if any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)
        )

    @property
    def local(self) -> int:
        return self.count("STL", "LDL")


class Missing(RuntimeError):
    """There is no machine code to read here; the message says why."""


@functools.cache
def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.is_file() else None
    if found is None:
        raise Missing("there is no cuobjdump: neither CUDA's nor Triton's")
    return found


@functools.cache
def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else None
    found = found or shutil.which("nvcc")
    if found is None:
        raise Missing("gptkern._cuda is not built from these sources for sm_80 and sm_90a, and there is no nvcc")
    return found


@functools.cache
def compiler_version() -> str:
    """Of what made the machine code: "nvcc 13.0.88"."""
    module = built_module()
    if module is not None:
        return module.compiler
    said = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {re.search(r'V([0-9.]+)', said)[1]}"


@functools.cache
def built_module():
    """gptkern._cuda, if it was built from the sources as they are for the architectures that are read."""
    if importlib.util.find_spec("gptkern._cuda") is None:
        return None
    try:
        import gptkern._cuda as module
    except ImportError:
        return None
    wanted = {architecture.removeprefix("sm_") for architecture in ARCHITECTURES}
    if not wanted <= set(module.architectures.split(";")):
        return None
    return module if getattr(module, "sources", None) == sources.digest(sources.folder()) else None


def objects() -> list[Path]:
    """Files with the machine code of the kernels for both architectures."""
    module = built_module()
    if module is not None:
        return [Path(module.__file__)]
    csrc = sources.folder()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda unit: compiled(unit, csrc), sources.kernel_units(csrc)))


def compiled(unit: sources.Unit, csrc: Path, architectures: tuple[str, ...] = ARCHITECTURES) -> Path:
    """The unit's fat binary, from the cache or compiled now."""
    folder = user.folder() / "compiled"
    folder.mkdir(parents=True, exist_ok=True)
    targets = [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in architectures]
    flags = [*FLAGS, *targets, f"-I{csrc}", *(f"-D{define}" for define in unit.defines)]
    digest = hashlib.sha256(repr((compiler_version(), flags)).encode())
    for path in sources.included(unit.source, csrc):
        digest.update(path.name.encode() + path.read_bytes())
    target = folder / f"{unit.name}-{digest.hexdigest()[:16]}.fatbin"
    emulated._once(target, [nvcc(), *flags, "--fatbin", str(unit.source), "-o"])
    return target


# --- Reading ----------------------------------------------------------------------------------------------------------

_LOCAL = re.compile(r"/\*([0-9a-f]{4,})\*/.*?\b(?:LDL|STL)\b")
_BRANCH = re.compile(r"/\*([0-9a-f]{4,})\*/.*?\bBRA\b.*?0x([0-9a-f]+)\s*;")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def kernels(paths: list[Path], architectures: tuple[str, ...] = ARCHITECTURES) -> list[Kernel]:
    """Every kernel in the files for these architectures, by name and architecture."""
    # What device/ has is compiled into each room that launches it: one of those is shown.
    found = {(kernel.name, kernel.architecture): kernel for path in paths for kernel in _kernels(path, architectures)}
    return [kernel for _, kernel in sorted(found.items())]


def _kernels(path: Path, architectures: tuple[str, ...]) -> Iterator[Kernel]:
    usage: dict[tuple[str, str], tuple[int, ...]] = {}
    architecture = function = ""
    for line in _dump("--dump-resource-usage", path):  # "arch = sm_80", "Function …:", then its usage
        if match := re.match(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+?):", line):
            function = match[1]
        elif match := _USAGE.search(line):
            usage[architecture, function] = tuple(map(int, match.groups()))
    instructions: dict[tuple[str, str], collections.Counter] = {}
    loops: dict[tuple[str, str], list[tuple[int, int]]] = {}
    local: dict[tuple[str, str], list[int]] = {}
    for line in _dump("--dump-sass", path):
        if match := re.match(r"\s*code for (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            key = architecture, match[1]
            counter = instructions.setdefault(key, collections.Counter())
            branches, places = loops.setdefault(key, []), local.setdefault(key, [])
        elif match := _INSTRUCTION.match(line):
            counter[match[1]] += 1
            if match := _LOCAL.search(line):
                places.append(int(match[1], 16))
            elif match := _BRANCH.search(line):
                place, target = (int(number, 16) for number in match.groups())
                if target < place:
                    branches.append((target, place))
    if instructions.keys() - usage.keys():
        raise ValueError(f"{path}: cuobjdump reports no resources of {sorted(instructions.keys() - usage.keys())}")
    names = demangled({function for _, function in instructions})
    for (architecture, function), counter in instructions.items():
        if architecture not in architectures:
            continue
        registers, stack, shared, array = usage[architecture, function]
        looped = sum(
            any(first <= place <= last for first, last in loops[architecture, function])
            for place in local[architecture, function]
        )
        # From sm_90 on the report has what the system takes of each block as well, where a block has any of its own.
        if architecture not in ("sm_80", "sm_86", "sm_89"):
            shared = max(shared - Limits._field_defaults["reserved"], 0)
        yield Kernel(names[function], architecture, registers, stack + array, shared, dict(counter), looped)


def _dump(what: str, path: Path) -> list[str]:
    return subprocess.run(
        [cuobjdump(), what, str(path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def demangled(names: set[str]) -> dict[str, str]:
    """ "attention_forward_kernel<float16, 64>": as the emulator calls it too."""
    ordered = sorted(names)
    # Both come with compilers that nvcc needs.
    program = shutil.which("c++filt") or shutil.which("cu++filt")
    if program is None or not ordered:
        return {name: name for name in ordered}
    said = subprocess.run([program], input="\n".join(ordered), capture_output=True, text=True, check=True).stdout
    return {name: plain(text) for name, text in zip(ordered, said.splitlines())}


def plain(name: str) -> str:
    """A demangled name without result, arguments, namespaces and casts."""
    for old, new in (
        ("(anonymous namespace)::", ""), ("{anonymous}::", ""), ("gptkern::", ""), ("__nv_bfloat16", "bfloat16"),
        ("__half", "float16"), ("(bool)1", "true"), ("(bool)0", "false"), ("unsigned char", "uint8"),
    ):  # fmt: skip
        name = name.replace(old, new)
    name = re.sub(r"\((?:int|unsigned int|unsigned|long|short)\)", "", name).removeprefix("void ")
    # Up to the parenthesis of the arguments, which is the first outside of <…>.
    depth = 0
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:place]
    return name


def occupancy(kernel: Kernel, threads: int, dynamic_bytes: int, limits: Limits | None = None) -> int:
    """Blocks of so many threads that a multiprocessor, by default the architecture's, holds at a time."""
    limits = limits or MULTIPROCESSOR[kernel.architecture]
    warps = -(-threads // 32)
    # Registers are given to a warp by 256, and a warp lives in one quarter.
    registers = -(-kernel.registers * 32 // 256) * 256
    by_registers = limits.registers // limits.quarters // registers * limits.quarters // warps
    shared = -(-(kernel.shared + dynamic_bytes + limits.reserved) // 128) * 128
    by_shared = limits.shared_bytes // shared if shared else limits.blocks
    return min(by_registers, by_shared, limits.warps // warps, limits.blocks)


# --- The table --------------------------------------------------------------------------------------------------------


def fits(kernel: Kernel, launch: tuple[int, int]) -> bool:
    """Whether a block can be launched at all."""
    return occupancy(kernel, *launch) > 0


def launches() -> dict[str, tuple[int, int]]:
    """Kernel -> (threads, dynamic shared memory): the most of the launches that count_cuda counts."""
    import count_cuda

    found: dict[str, tuple[int, int]] = {}
    for index in range(len(count_cuda.CASES)):
        for record in count_cuda.counted(index):
            for name, counts in record.kernels.items():
                threads, shared = found.get(plain(name), (0, 0))
                found[plain(name)] = max(threads, counts["threads"]), max(shared, counts["shared_bytes"])
    return found


def row(kernel: Kernel, launch: tuple[int, int] | None) -> str:
    threads, dynamic = launch or ("", "")
    cells = [
        f"`{kernel.name}`", kernel.architecture, kernel.registers, kernel.local, threads, kernel.shared, dynamic,
        occupancy(kernel, threads, dynamic) if launch else "",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def table() -> str:
    columns = ("kernel", "architecture", "registers", "spills", "threads", "static shared", "dynamic shared", "blocks")
    found = kernels(objects())
    launched = launches()
    lines = [
        "# What the CUDA kernels use",
        "",
        f"Made by `make tables` with {compiler_version()}: read from the machine code, not measured on a GPU;",
        "`tests/test_cuda_resources.py` holds the limits.",
        "",
        "- Registers are those of a thread (255 is the most there is).",
        "- Spills are instructions that reach local memory.",
        "- A block's threads and its dynamic shared memory, in bytes, are the most of the launches that",
        "  `docs/cuda_counters.md` counts; a kernel that none of them starts has none here.",
        "- Blocks: how many of those fit a multiprocessor at a time.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(row(kernel, launched.get(kernel.name)) for kernel in found),
    ]
    return "\n".join(lines) + "\n"


def other_kernels(of: str = "") -> list[Kernel]:
    """The kernels of units whose name begins so, for OTHER_ARCHITECTURES: nvcc compiles each unit once."""
    csrc = sources.folder()
    units = [unit for unit in sources.kernel_units(csrc) if unit.name.startswith(of)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        paths = list(pool.map(lambda unit: compiled(unit, csrc, OTHER_ARCHITECTURES), units))
    return kernels(paths, OTHER_ARCHITECTURES)


def other_table() -> str:
    """docs/cuda_other_architectures.md: what spills where the bench's GPUs are not, and the registers."""
    found: dict[str, dict[str, Kernel]] = {}
    for kernel in other_kernels():
        found.setdefault(kernel.name, {})[kernel.architecture] = kernel
    lines = [
        "# What the CUDA kernels use on other architectures",
        "",
        f"Made by `make tables` with {compiler_version()} from the sources {sources.digest(sources.folder())[:16]}:",
        "read from the machine code, not measured on a GPU; `tests/test_cuda_resources.py` holds the rule.",
        "",
        "A cell has the registers of a thread and, where it spills, the instructions that reach local memory: all of",
        "them, and those inside a loop. The tables of tiles and `cuda_resources.md` are for sm_80 and sm_90a.",
        "",
        f"| kernel | {' | '.join(OTHER_ARCHITECTURES)} |",
        "|---" * (1 + len(OTHER_ARCHITECTURES)) + "|",
    ]
    for name, by_architecture in found.items():
        cells = [other_cell(by_architecture[architecture]) for architecture in OTHER_ARCHITECTURES]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def other_cell(kernel: Kernel) -> str:
    if not kernel.local:
        return f"{kernel.registers}"
    return f"{kernel.registers}, {kernel.local} ({kernel.local_in_loops} in loops)"


if __name__ == "__main__":
    os.environ["GPTKERN_EMULATE_CUDA"] = "1"
    print(table(), end="")
