"""Which kernels are predicted: those that the bench's cells run, with their machine code and what a cell asks of them.

Of CUDA C++ bench/predict_cells.py names the cells, and has what the emulator counts of them. Of Triton the compile
cases are the shipped configurations; one is named for each cell here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(ROOT / "tests")]

import sass  # noqa: E402
from disassemble_cuda import Missing  # noqa: E402
from predict_cells import Cell, Counted, cells, counted, problem  # noqa: E402
from predict_model import Launch  # noqa: E402

CUDA, TRITON = "CUDA C++", "Triton"
# The architecture of a part -> what nvcc's code, and Triton's target, are called.
NVCC = {"sm_80": "sm_80", "sm_90": "sm_90a"}
TARGETS = {"sm_80": 80, "sm_90": 90}
BFLOAT16_BYTES = 2


class Code(NamedTuple):
    """A kernel's machine code on one architecture. share: of the bytes that a trip moves, from device memory."""

    trip: sass.Trip
    launch: Launch
    share: float | None


class Row(NamedTuple):
    """A kernel in a cell.

    Args:
        cell: as the bench prints it, with its direction.
        codes: architecture -> code.
        products: multiply-adds that the kernel does in the cell, of one whose limit is the matrix units; bytes: that it
            has to move, of one whose limit is the bandwidth. The other is None.
        flops, least: of the whole cell, all of its kernels.
    """

    backend: str
    operator: str
    cell: str
    kernel: str
    codes: dict[str, Code]
    products: float | None
    bytes: float | None
    flops: float
    least: float


# --- CUDA C++ ---------------------------------------------------------------------------------------------------------


def cuda_rows() -> list[Row]:
    runs = [(cell, counted(cell, cell.small)) for cell in cells()]
    code = _cuda_code({name for _, kernels in runs for name in kernels})
    found = []
    for cell, kernels in runs:
        of = problem(cell.operator)
        scale = _elements(cell.operator, cell.sizes) / _elements(cell.operator, cell.small)
        smaller = counted(cell, cell.smaller) if cell.smaller is not None else {}
        most = max(counts.large_loaded + counts.large_stored for counts in kernels.values())
        for name, counts in kernels.items():
            moved = counts.large_loaded + counts.large_stored
            # What sums partial results, or makes ready, moves little: it is left out.
            if not counts.products and 10 * moved < most:
                continue
            products = _products(cell, counts, smaller.get(name)) if counts.products else None
            few_rows = products is not None and of.ceiling(cell.sizes, "bfloat16") == "copy"
            bytes_ = cell.least if few_rows else moved * scale
            by_bytes = products is None or few_rows
            found.append(
                Row(
                    CUDA,
                    cell.operator,
                    cell.label,
                    name,
                    {part: _code(code[name, target], counts, by_bytes, cell.marks) for part, target in NVCC.items()},
                    None if by_bytes else products,
                    bytes_ if by_bytes else None,
                    of.flops(cell.sizes, cell.direction),
                    cell.least,
                )
            )
    return found


def _elements(operator: str, sizes: Any) -> int:
    if operator == "attention":
        return sizes.batch * sizes.heads * sizes.length_q * sizes.head_dim
    if operator == "rotary":
        return sizes.batch * sizes.heads * sizes.length * sizes.head_dim
    if operator == "softmax":
        return sizes.rows * sizes.width
    if operator == "cross_entropy":
        return sizes.tokens * sizes.classes
    if operator == "int8_linear":  # of the input: that of w8a8 is quantised by a kernel of its own
        return sizes.rows * sizes.in_features
    return sizes.rows * sizes.width


def _products(cell: Cell, counts: Counted, smaller: Counted | None) -> float:
    """Of the whole cell: of attention a L² + b L, from two lengths; else as many as the operator has."""
    if cell.operator != "attention":
        sizes = cell.sizes
        return float(sizes.rows * sizes.in_features * sizes.out_features)
    long, short, wanted = cell.small.length_q, cell.smaller.length_q, cell.sizes.length_q
    square = (counts.products / long - smaller.products / short) / (long - short)
    line = counts.products / long - square * long
    return cell.sizes.batch * cell.sizes.heads * (square * wanted * wanted + line * wanted)


def _code(found: tuple[list[sass.Instruction], int, int], counts: Counted, by_bytes: bool, marks: sass.Marks) -> Code:
    """by_bytes: of a kernel whose limit is the bandwidth."""
    instructions, registers, static = found
    if missing := marks.missing(instructions):
        raise LookupError(f"no instruction of the kernel has {missing}")
    launch, large = Launch(registers, counts.threads, static + counts.shared), counts.large_loaded + counts.large_stored
    known: dict[sass.Amounts, float] = {}
    if not counts.products and counts.large_stored:
        # In all; or parameters are loaded, and sums stored, outside of the loop; or it goes over its inputs twice, and
        # stores the second time. With what is of large tensors.
        amounts = (
            (counts.loaded, counts.stored, large), (counts.large_loaded, counts.large_stored, large),
            (counts.loaded, counts.large_stored, large),
            (counts.large_once, counts.large_stored, counts.large_once + counts.large_stored),
        )  # fmt: skip
        for amount in reversed(amounts):
            loaded, stored, of_large = (each / counts.warps for each in amount)
            known[loaded, stored] = of_large
        known = dict(reversed(known.items()))
    trip = sass.main_loop(instructions, tuple(known), marks)
    if not by_bytes:
        return Code(trip, launch, None)
    if not counts.products:
        sass.checked(trip, tuple(known), marks, (counts.loads / counts.warps, counts.stores / counts.warps))
    if trip.header is None and known:
        return Code(trip, launch, large / counts.warps / trip.moved)
    if not known:
        return Code(trip, launch, large / (counts.loaded + counts.stored))
    vectors = trip.vectors(marks.least)
    nearest = min(known, key=lambda each: sass.far_from_ratio(each, *vectors))
    return Code(trip, launch, sum(vectors) / trip.moved * known[nearest] / sum(nearest))


def _cuda_code(names: set[str]) -> dict[tuple[str, str], tuple[list[sass.Instruction], int, int]]:
    """(kernel, nvcc's architecture) -> instructions, registers, static shared memory."""
    import disassemble_cuda

    wanted: dict[tuple[str, str], tuple[list[sass.Instruction], int, int]] = {}
    for path in disassemble_cuda.objects():
        usage = _usage(disassemble_cuda._dump("--dump-resource-usage", path))
        readable = disassemble_cuda.demangled({mangled for _, mangled in usage})
        mangled = sorted(name for name in readable if readable[name] in names)
        if not mangled:
            continue
        # Of what the package is built for, all architectures; few functions of one are read.
        for target in NVCC.values():
            command = [
                disassemble_cuda.cuobjdump(),
                "--dump-sass",
                "-arch",
                target,
                "-fun",
                ",".join(mangled),
                str(path),
            ]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for (_, name), instructions in sass.kernels(text.splitlines()).items():
                registers, static = usage[target, name]
                # From sm_90 on the report has what the system takes as well.
                static = static if target == "sm_80" else max(0, static - 1024)
                wanted[readable[name], target] = instructions, registers, static
    missing = [(name, target) for name in names for target in NVCC.values() if (name, target) not in wanted]
    if missing:
        raise LookupError(f"no machine code of {missing}")
    return wanted


def _usage(lines: list[str]) -> dict[tuple[str, str], tuple[int, int]]:
    """(architecture, mangled name) -> registers, shared memory, of `cuobjdump --dump-resource-usage`."""
    found, architecture, function = {}, "", ""
    for line in lines:
        if match := re.match(r"\s*(?:arch = |code for )(sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+?):", line):
            function = match[1]
        elif match := re.search(r"REG:(\d+) STACK:\d+ SHARED:(\d+)", line):
            found[architecture, function] = int(match[1]), int(match[2])
    return found


def all_rows() -> list[Row]:
    """Of both languages.

    Raises:
        Missing: there is no compiler for the one, or no Triton.
    """
    if importlib.util.find_spec("triton") is None:
        raise Missing("there is no Triton")
    with tempfile.TemporaryDirectory() as folder:
        compiling = start_compiling(Path(folder))
        try:
            found = cuda_rows()
        finally:
            codes = [each.wait() for each in compiling]
        if any(codes):
            raise RuntimeError("compiling Triton's kernels failed: see above")
        return found + triton_rows(Path(folder))


# --- Triton -----------------------------------------------------------------------------------------------------------

# A cell's operator and direction, the sizes that are its own, and the compile cases that it runs.
_CASES = (
    *(
        ("attention", direction, dict(head_dim=head_dim, length_q=4096, kind="causal"),
         [f"{kernel} hd{head_dim} causal bf16" for kernel in kernels])
        for direction, kernels in (("forward", ["forward"]), ("backward", ["query", "key_value"]))
        for head_dim in (64, 80, 128)
    ),
    *(
        (operator, direction, dict(width=4096), [f"{direction} width 4096 bf16"])
        for operator in ("layer_norm", "rms_norm") for direction in ("forward", "backward")
    ),
    ("softmax", "forward", dict(width=2048), ["forward rows 2048 bf16"]),
    ("softmax", "backward", dict(width=2048), ["backward rows 2048 bf16"]),
    ("rotary", "backward", dict(length=4096, interleaved=False), ["backward half-split hd128 bf16 angles bf16"]),
    ("int8_linear", "forward", dict(mode="w8a16", rows=1, in_features=4096, out_features=16384), [r"w8a16 16x\d+x\d+"]),
    ("int8_linear", "forward", dict(mode="w8a16", rows=4096, in_features=4096, out_features=16384),
     [r"w8a16 128x128x\d+"]),
    ("int8_linear", "forward", dict(mode="w8a8", rows=4096, in_features=4096, out_features=16384),
     [r"w8a8 128x\d+x\d+"]),
)  # fmt: skip
# Of the forward's two products, how many each kernel does.
_PRODUCTS = {"forward": 2, "query": 3, "key_value": 4}


def start_compiling(folder: Path) -> list[subprocess.Popen]:
    """A process for each target, which leaves its machine code in the folder."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    return [subprocess.Popen([*command, str(target)], env=environment) for target in TARGETS.values()]


def triton_rows(folder: Path) -> list[Row]:
    """Of what `start_compiling` left."""
    compiled = {part: json.loads((folder / f"{target}.json").read_text()) for part, target in TARGETS.items()}
    found = []
    for number, (operator, direction, wanted, patterns) in enumerate(_CASES):
        sizes = _triton_sizes(operator, direction, wanted)
        for key in (f"{number} {pattern}" for pattern in patterns):
            codes = {part: _triton_code(operator, direction, sizes, compiled[part][key]) for part in TARGETS}
            found.append(_triton_row(operator, direction, sizes, compiled, key, codes))
    return found


def _triton_sizes(operator: str, direction: str, wanted: dict[str, Any]) -> Any:
    cells_ = problem(operator).cells("cuda", "full")
    for timed in cells_:
        if (timed.direction, timed.dtype) == (direction, "bfloat16") and all(
            getattr(timed.sizes, name) == value for name, value in wanted.items()
        ):
            return timed.sizes
    if operator == "softmax":
        return cells_[0].sizes._replace(shape=(cells_[0].sizes.rows, wanted["width"]))
    raise LookupError(f"no cell of {operator} {direction} has {wanted}")


def _triton_code(operator: str, direction: str, sizes: Any, case: dict[str, Any]) -> Code:
    import disassemble_cuda

    ((_, instructions),) = sass.kernels(disassemble_cuda._dump("--dump-sass", Path(case["path"]))).items()
    trip = sass.main_loop(instructions)
    share = None
    if case["few_rows"]:
        # The weight, of one byte an element; the input's rows, of two, are in the second cache.
        share = case["columns"] / (case["columns"] + BFLOAT16_BYTES * case["rows"])
    elif not case["matrix"]:
        least = problem(operator).bytes(sizes, BFLOAT16_BYTES, direction)
        written = _elements(operator, sizes) * BFLOAT16_BYTES
        share = min(1.0, trip.stored * least / written / trip.moved)
    return Code(trip, Launch(case["registers"], sass.WARP * case["warps"], case["shared"]), share)


def _triton_row(operator, direction, sizes, compiled, key, codes) -> Row:
    of, cases = problem(operator), {part: compiled[part][key] for part in TARGETS}
    case, label = cases["sm_90"], Cell(operator, direction, sizes, None).label
    least, flops = of.bytes(sizes, BFLOAT16_BYTES, direction), of.flops(sizes, direction)
    products = None
    if operator == "attention":
        pairs = sizes.batch * sizes.heads * sizes.length_q**2 / 2 * sizes.head_dim
        # Of tiles that the diagonal crosses, the half that is computed for nothing; on average of the two parts' tiles.
        extra = 1 + sum(each["rows"] + each["columns"] for each in cases.values()) / len(cases) / 2 / sizes.length_q
        padded = case["padded"] / sizes.head_dim
        products = _PRODUCTS[case["name"].split()[0]] * pairs * extra * padded
    elif operator == "int8_linear" and not case["few_rows"]:
        products = flops / 2
    name = " / ".join(dict.fromkeys(f"{each['name']}{each['tiles']}" for each in cases.values()))
    return Row(TRITON, operator, label, name, codes, products, None if products else least, flops, least)


def _compile(folder: Path, target: int) -> None:
    """Each case's cubin into the folder, and what is to be known of it into <target>.json. A process of its own."""
    import compile_kernels
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = {}
    for number, (operator, _, wanted, patterns) in enumerate(_CASES):
        cases = compile_kernels.cases_of(operator, target)
        for pattern in patterns:
            case = next((case for case in cases if re.fullmatch(pattern, case.name)), None)
            if case is None:
                raise LookupError(f"{operator} has no compile case {pattern!r} for {target}")
            aligned = [
                position for position, (name, type_) in enumerate(case.signature.items())
                if type_.startswith("*") or name in case.aligned
            ]  # fmt: skip
            source = ASTSource(
                fn=case.kernel, signature=case.signature, constexprs=case.constants,
                attrs={(position,): [["tt.divisibility", 16]] for position in aligned},
            )  # fmt: skip
            options = dict(num_warps=case.num_warps, num_stages=case.num_stages)
            binary = triton.compile(source, target=GPUTarget("cuda", target, sass.WARP), options=options)
            path = folder / f"{target}-{len(found)}.cubin"
            path.write_bytes(binary.asm["cubin"])
            constants = case.constants
            rows, columns = constants.get("BLOCK_M", 0), constants.get("BLOCK_N", 0)
            tile = "×".join(str(constants[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in constants)
            tiles = f", {tile + ', ' if tile else ''}{case.num_warps} warps"
            found[f"{number} {pattern}"] = dict(
                path=str(path), name=case.name, tiles=tiles, rows=rows, columns=columns, warps=case.num_warps,
                shared=binary.metadata.shared,
                registers=compile_kernels.resource_usage(binary.asm["cubin"])["registers"],
                padded=constants.get("BLOCK_D", 0), few_rows=wanted.get("rows") == 1,
                matrix=operator in ("attention", "int8_linear"),
            )  # fmt: skip
    (folder / f"{target}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    _compile(Path(sys.argv[1]), int(sys.argv[2]))
