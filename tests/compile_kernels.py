"""Compiles the Triton kernels ahead of time, for GPUs that are not here, and reads what they will use.

    python tests/compile_kernels.py                                     the table of all kernels, as Markdown
    python tests/compile_kernels.py --operator softmax --architecture 90    one line of JSON for each kernel

A program of its own, because the kernels of a process with TRITON_INTERPRET=1 are interpreted and cannot be
compiled. No GPU is needed: Triton's wheel brings the assembler (ptxas), cuobjdump and nvdisasm.

What was read is kept in the folder of pytest's cache, by what it depends on: the case as Triton's front end reads it
(in which comments, and where a function stands, do not show), the options, Triton and its assembler, and this file. So
the same code is compiled once, whichever cases it belongs to, and a second run compiles what has changed.

Where the numbers come from:
    registers, spill    `cuobjdump --dump-resource-usage` of the machine code. A Triton kernel has no local arrays and
                        no calls, so a stack frame means that registers spill to local memory.
    shared, tensor      Triton's metadata: bytes of shared memory and columns of tensor memory of one program
    notes               what ptxas says of lost performance (`ptxas -v`, as Triton runs it): wgmma that it serialises,
                        and why; a setmaxnreg that it ignores
    loops               of the machine code, the innermost loops that hold matrix instructions, or all innermost ones
                        where none does: instructions, and of these those that reach what was spilled (LDL, STL)
    float64             instructions of the PTX that compute in float64
    instructions        the matrix instructions in the PTX
    widest load         bytes that one thread reads at once from global memory, from the PTX
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROOMS, SHARED = ROOT / "gptkern" / "operators", ROOT / "gptkern" / "backends" / "triton"
CACHE = ROOT / ".pytest_cache" / "d" / "compiled_kernels"
ARCHITECTURES = (80, 90, 100)
# Bytes that one block may have: 163 KB on sm_80, 227 KB on sm_90 and sm_100 (CUDA C++ Programming Guide).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_MEMORY_LIMIT = 512  # columns, sm_100
WARP_SIZE = 32

MATRIX_INSTRUCTION = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
GLOBAL_LOAD = re.compile(r"\bld\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[busf](\d+)\b")
COPY_TO_SHARED = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+|\d+)")
TENSOR_COPY = re.compile(r"\bcp\.async\.bulk\.tensor\b")
# Where in a file an operation comes from: `loc(#loc5)` behind it, `#loc5 = loc("…":12:8)` at the end.
LOCATION = re.compile(r"^#loc.*$|loc\([^()]*(?:\([^()]*\))?[^()]*\)", re.MULTILINE)
TENSOR_COPY_BYTES = 16  # at least: the unit of the hardware's tensor copies
# `ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to … in the
# function '_forward_kernel'`: one a function, whichever of its loops is the cause. Newer ones add the line.
NOTE = re.compile(r"\((C\d+)\) (Potential Performance Loss: .*?)(?: in the function .*)?$", re.MULTILINE)
ASSEMBLED = "Compiling entry function"
FLOAT64 = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z]\w*(?:\.\w+)*\.f64(?:\.\w+)*)\b", re.MULTILINE)

LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*(\S+)(.*?);")
BRANCH_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
MATRIX_MACHINE_INSTRUCTION = re.compile(r"[HIDQO]G?MMA|UTC\w*MMA")
LOCAL_MEMORY = re.compile(r"LDL|STL")


def modules() -> list[str]:
    """The operators whose Triton kernels list compile cases; nothing is imported."""
    return sorted(path.parent.name for path in ROOMS.glob("*/triton.py") if "compile_cases" in path.read_text())


def cases_of(module: str, architecture: int):
    return importlib.import_module(f"gptkern.operators.{module}.triton").compile_cases(architecture)


def kernel_names() -> set[str]:
    """The jitted functions that are launched, `…_kernel` by name, of all rooms and of what they share."""
    paths = [*ROOMS.glob("*/triton*.py"), *SHARED.glob("*.py")]
    functions = (node for path in paths for node in ast.walk(ast.parse(path.read_text())))
    return {
        node.name
        for node in functions
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list
    }


def compiled(case, architecture: int) -> dict[str, Any]:
    """One case's use of the machine: from the cache, or compiled. Raises what the compiler raises."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    missing = set(case.kernel.arg_names) ^ set(case.signature)
    if missing or list(case.signature) != list(case.kernel.arg_names):
        raise ValueError(f"the signature differs from the kernel's arguments, in {sorted(missing) or 'their order'}")
    # A launch specialises what is divisible by 16: only so does the compiler know that it may load 16 bytes at once.
    aligned = [
        position
        for position, (name, type_) in enumerate(case.signature.items())
        if type_.startswith("*") or name in case.aligned
    ]
    source = ASTSource(
        fn=case.kernel,
        signature=case.signature,
        constexprs=case.constants,
        attrs={(position,): [["tt.divisibility", 16]] for position in aligned},
    )
    target = GPUTarget("cuda", architecture, WARP_SIZE)
    options = dict(num_warps=case.num_warps, num_stages=case.num_stages)
    kept = CACHE / f"{cache_key(source, target, options)}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    binary, said = assembled(source, target, options)
    ptx = binary.asm["ptx"]
    use = {
        **resource_usage(binary.asm["cubin"]),
        "notes": notes_of(said),
        "loops": loops_of(disassembly(binary.asm["cubin"])),
        "float64": sorted(set(FLOAT64.findall(ptx))),
        "shared": binary.metadata.shared,
        "tensor_memory": getattr(binary.metadata, "tmem_size", 0) or 0,
        "instructions": sorted(set(MATRIX_INSTRUCTION.findall(ptx))),
        "widest_load": widest_load(ptx),
    }
    CACHE.mkdir(parents=True, exist_ok=True)
    # Another process may write the same: each its own file, moved into place whole.
    with tempfile.NamedTemporaryFile("w", dir=CACHE, delete=False) as file:
        json.dump(use, file)
    os.replace(file.name, kept)
    return use


def assembled(source, target, options: dict[str, int]):
    """(the compiled kernel, what ptxas said of it): Triton runs `ptxas -v` anyway, and prints that when it is asked."""
    import triton

    knobs, said = triton.knobs, io.StringIO()
    # What Triton kept of an earlier run would not be assembled again, and nothing said.
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(said):
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        binary = triton.compile(source, target=target, options=options)
    return binary, said.getvalue()


def notes_of(said: str) -> list[str]:
    """ptxas's notes of lost performance, each once."""
    if ASSEMBLED not in said:
        raise ValueError(f"ptxas said nothing of a kernel, so that its notes are not known: {said!r}")
    return sorted({f"{code} {text}" for code, text in NOTE.findall(said)})


def cache_key(source, target, options: dict[str, int]) -> str:
    """A hash of all that a case's machine code depends on, and of what reads it."""
    import triton
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    backend = make_backend(target)
    parsed = backend.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(parsed)
    module = source.make_ir(target, parsed, functions, backend.get_module_map(), context)
    code = LOCATION.sub("", str(module))
    parts = (code, parsed.hash(), backend.hash(), triton.__version__, Path(__file__).read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read_by(tool: str, option: str, cubin: bytes) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, option, file.name], capture_output=True, text=True, check=True).stdout


def disassembly(cubin: bytes) -> str:
    return read_by("nvdisasm", "--print-code", cubin)


def loops_of(code: str) -> list[dict[str, int]]:
    """{"instructions", "spills"} of each of the loops that the module's docstring names, in the order of the code.

    A loop is what lies between a backward branch and its target. Waiting for a barrier is a loop too, inside of the one
    that computes: where there are matrix instructions, loops without them do not count.
    """
    instructions, labels = [], {}
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append((found[1], found[2]))
    if not instructions:
        raise ValueError(f"nvdisasm's output has no instructions: {code[:200]!r}")
    spans = set()
    for place, (name, operands) in enumerate(instructions):
        target = BRANCH_TARGET.search(operands) if name.startswith("BRA") else None
        # Code ends in a branch to itself, which is no loop.
        if target and labels.get(target[1], place) < place:
            spans.add((labels[target[1]], place + 1))
    with_products = {
        span for span in spans if any(MATRIX_MACHINE_INSTRUCTION.match(name) for name, _ in instructions[slice(*span)])
    }
    spans = with_products or spans
    inner = [
        span for span in sorted(spans)
        if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans)
    ]  # fmt: skip
    return [
        {
            "instructions": end - begin,
            "spills": sum(bool(LOCAL_MEMORY.match(name)) for name, _ in instructions[begin:end]),
        }
        for begin, end in inner
    ]


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread and bytes of its stack frame, which is where registers are spilled to."""
    dump = read_by("cuobjdump", "--dump-resource-usage", cubin)
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", dump)
    if usage is None:
        raise ValueError(f"cuobjdump's report has no resource usage: {dump!r}")
    registers, stack, local = map(int, usage.groups())
    return {"registers": registers, "spill": stack + local}


def widest_load(ptx: str) -> int:
    loads = [int(count or 1) * int(bits) // 8 for count, bits in GLOBAL_LOAD.findall(ptx)]
    copies = [int(size, 0) for size in COPY_TO_SHARED.findall(ptx)]
    return max([0, *loads, *copies, *([TENSOR_COPY_BYTES] if TENSOR_COPY.search(ptx) else [])])


def records(module: str, architecture: int):
    """One dictionary for each compile case of a module: its name, and its use or the compiler's error."""
    for case in cases_of(module, architecture):
        record = {
            "operator": module,
            "case": case.name,
            "architecture": architecture,
            "kernel": case.kernel.__name__,
            "num_warps": case.num_warps,
            "num_stages": case.num_stages,
            "aligned": bool(case.aligned),
            "matrix_product": case.matrix_product,
            "allowed_spill": case.allowed_spill_bytes,
            "is_float64": any(type_.endswith("fp64") for type_ in case.signature.values() if type_.startswith("*")),
            "scalars": sorted({type_ for type_ in case.signature.values() if type_.startswith("fp")}),
        }
        try:
            record |= compiled(case, architecture)
        except Exception as error:  # the compiler's errors are of many types; the test reports them all
            cause = error.__cause__ or error
            record["error"] = f"{type(error).__name__}: {error}; {type(cause).__name__}: {cause}"
        yield record


def run(module: str, architecture: int) -> list[dict[str, Any]]:
    """`records` in a process of its own. Triton's cache is its own too: what is kept of it is small."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--operator", module, "--architecture", str(architecture)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"compiling {module} for sm_{architecture} failed:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def run_all(workers: int) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """`run` of every module on every architecture, so many at a time."""
    jobs = [(module, architecture) for module in modules() for architecture in ARCHITECTURES]
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return dict(zip(jobs, pool.map(lambda job: run(*job), jobs)))


def table(reports: dict[tuple[str, int], list[dict[str, Any]]]) -> str:
    """The records of `run_all` as Markdown."""
    import triton

    lines = [
        "# What the Triton kernels use",
        "",
        f"Made by `python tests/compile_kernels.py` with Triton {triton.__version__}, which compiles for GPUs that are",
        "not present. Read from the compiled code, not measured on a GPU; the tests hold the limits.",
        "",
        "Registers are those of a thread (255 is the most there is). Spill is the bytes of registers that a thread",
        "keeps in local memory. Shared is the bytes of shared memory of one program; a program may have",
        ", ".join(f"{limit // 1024} KB on sm_{arch}" for arch, limit in SHARED_LIMIT.items()) + ".",
        "The widest load is the bytes that a thread reads at once from global memory.",
        "Loops are the innermost ones that hold matrix instructions, or all innermost ones where none does: their",
        "instructions, and in brackets those that reach spilled registers. ptxas notes the performance that it gives",
        "away, such as wgmma that wait for one another (C7510 and its like).",
    ]
    columns = ("case", "warps", "registers", "spill", "shared", "loops", "matrix instruction", "widest load", "notes")
    for (module, architecture), report in reports.items():
        lines += ["", f"## {module}, sm_{architecture}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for record in report:
            if "error" in record:
                raise SystemExit(f"{module} {record['case']} sm_{architecture}: {record['error']}")
            instructions = ", ".join(f"`{name}`" for name in record["instructions"])
            cells = [record["case"], record["num_warps"], record["registers"], record["spill"], record["shared"]]
            loops = [
                f"{loop['instructions']}" + f" ({loop['spills']})" * bool(loop["spills"]) for loop in record["loops"]
            ]
            cells += [", ".join(loops), instructions, record["widest_load"], ", ".join(record["notes"])]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operator", help="an operator")
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that make the table")
    args = parser.parse_args()
    if args.operator is None:
        print(table(run_all(args.workers)))
        return
    for record in records(args.operator, args.architecture):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("kernels cannot be compiled in a process with TRITON_INTERPRET=1")
    main()
