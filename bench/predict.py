"""Writes docs/predictions.md: what the machine code lets expect of three GPUs (make tables). No GPU is needed.

    python bench/predict.py                  the page; needs nvcc, Triton and the emulator
    python bench/predict.py --print          the page on the standard output
    python bench/predict.py --before FILE    no page: the cells' predictions into FILE, to be compared with later ones

Of which kernels: bench/predict_rows.py. From what: bench/sass.py reads the machine code. How: bench/predict_model.py.
Rates: bench/predict_parts.py. What published numbers say of it: bench/predict_strangers.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(ROOT / "tests")]

import predict_model  # noqa: E402
import sass  # noqa: E402
from predict_model import Prediction, expected  # noqa: E402
from predict_parts import PARTS, SOURCES, Part, Rate  # noqa: E402
from predict_rows import CUDA, Row  # noqa: E402

PAGE = ROOT / "docs" / "predictions.md"
STRANGERS = Path(__file__).with_name("predict_strangers.json")
BEFORE = Path(__file__).with_name("predict_before.json")
# An expectation agrees with a published rate within this.
AGREES = 0.2
# Two predictions of a cell are different from so many points on.
DIFFERENT = 0.01


class Range(NamedTuple):
    """Shares of the limit, and the limit."""

    worst: float
    best: float
    limit: float
    by_bytes: bool

    @property
    def text(self) -> str:
        unit, scale = ("GB/s", 1e9) if self.by_bytes else ("TFLOP/s", 1e12)
        numbers = f"{self.worst * self.limit / scale:.0f} to {self.best * self.limit / scale:.0f} {unit}"
        if self.by_bytes:
            return f"{percent(self.worst)} to {percent(self.best)}%; {numbers}"
        middle = expected(self.worst, self.best)
        return f"**{percent(middle)}%**, {percent(self.worst)} to {percent(self.best)}; {numbers}"


def percent(share: float) -> str:
    return str(round(100 * share))


def predictions(row: Row) -> dict[str, Prediction]:
    """Part -> of this kernel."""
    found = {}
    for part in PARTS:
        trip, launch, share = row.codes[part.code]
        streamed = None if share is None else share * trip.moved
        found[part.name] = predict_model.predict(part, trip, launch, streamed)
    return found


def cells(rows: list[Row], made: list[dict[str, Prediction]]) -> dict[tuple[str, str, str], dict[str, Range]]:
    """(operator, cell, backend) -> part -> range: all kernels of the cell one after another."""
    found: dict[tuple[str, str, str], dict[str, Range]] = {}
    for key in dict.fromkeys((row.operator, row.cell, row.backend) for row in rows):
        own = [
            (row, each) for row, each in zip(rows, made) if (row.operator, row.cell, row.backend) == key
        ]  # fmt: skip
        by_bytes = all(row.products is None for row, _ in own)
        found[key] = {}
        for part in PARTS:
            limits = {predict_model.limit(part, each[part.name].trip, row.products is None) for row, each in own}
            limit = part.bandwidth.value if by_bytes else max(limits)
            seconds = [sum(_seconds(part, row, each[part.name], end) for row, each in own) for end in ("worst", "best")]
            done = own[0][0].least if by_bytes else own[0][0].flops
            found[key][part.name] = Range(*(done / each / limit for each in seconds), limit, by_bytes)
    return found


def _seconds(part: Part, row: Row, made: Prediction, end: str) -> float:
    by_bytes = row.products is None
    work = row.bytes if by_bytes else 2 * row.products
    return work / getattr(made, end) / predict_model.limit(part, made.trip, by_bytes)


HEAD = """\
# Predictions

Made by `make tables` from the machine code ({versions}). **Nothing on this page is measured on a GPU by us: every
share is a prediction.** The columns "measured" are empty until one is.

- A share is of the data sheet's peak of the matrix units, or of its bandwidth. It is a range: from *worst*, in which
  all warps of a scheduler do the same at the same time, so that no pipe works while another does, to *best*, in which
  pipes and latencies overlap perfectly. `bench/predict_model.py` has the rule.
- **In bold** what is expected: {overlap:g} of the way from worst to best. That one number is fitted, to
  the published rates [below](#calibration), and nothing else is. Of what the bandwidth limits nothing was calibrated:
  there is a range alone.
- Both ends are lowered by what clocks and memories sustain ([rates](#rates)): a copy does not reach the bandwidth
  either.
- Of what the bandwidth limits, a trip moves as many bytes for each that it stores, or a whole kernel as many, as the
  emulator counts of the kernel, and uses all that it loads (`bench/sass.py`, `checked`): else no page is made. What
  does not belong to the call (another activation, another dtype) is known by its instructions
  (`bench/predict_cells.py`).
- Not in it: the launch, the first and the last wave of blocks, what stands outside of the main loop, bank conflicts,
  and small kernels that sum partial results. They matter for short calls; the cells here are long.
- An RTX 4090 runs the code of sm_80 here, with its own rates. TFLOP/s are those of the operator, as the bench counts
  them: a causal kernel also computes what its tiles have above the diagonal, and the backward of attention seven
  products for five.
"""

# --- The page ---------------------------------------------------------------------------------------------------------


def table(columns: tuple[str, ...], rows: list[list]) -> list[str]:
    return [
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
        "",
    ]


def cell_tables(found: dict[tuple[str, str, str], dict[str, Range]]) -> list[str]:
    lines = ["## Cells", ""]
    columns = ("cell", "backend", *(text for part in PARTS for text in (part.name, "measured")))
    for operator in dict.fromkeys(operator for operator, *_ in found):
        lines += [f"### {operator}", ""]
        rows = [
            [cell, backend, *(text for part in PARTS for text in (ranges[part.name].text, ""))]
            for (of, cell, backend), ranges in found.items()
            if of == operator
        ]
        lines += table(columns, sorted(rows, key=lambda row: (row[0].split()[0] != "forward", row[0], row[1])))
    return lines


def kernel_tables(rows: list[Row], made: list[dict[str, Prediction]]) -> list[str]:
    lines = [
        "## Kernels",
        "",
        "What a warp's trip through the main loop executes, by pipe, and the cycles of a scheduler that it keeps",
        "each pipe busy; `alone`: the cycles that a trip takes where the scheduler has one warp; `in step`: where all",
        "its warps walk together, for one warp's trip. Of the pipes, `issue` is one instruction a cycle; `shared` also",
        "moves what is copied from global memory; `L2` and `memory` are bytes over the rates. `loop`: the address at",
        "which it is entered; none: a whole kernel without one. `bench/sass.py` says how loop and trip are found.",
        "",
    ]
    counted = (*sass.PIPES,)
    busy = (predict_model.ISSUE, *sass.PIPES[:5], predict_model.SECOND_CACHE, predict_model.MEMORY)
    for part in PARTS:
        lines += [f"### {part.name}", ""]
        columns = (
            "kernel", "operator", "loop", "registers", "warps", f"instructions: {', '.join(counted)}",
            f"busy: {', '.join(name.replace('second cache', 'L2') for name in busy)}", "alone", "in step", "binds",
            "worst", "best", "measured",
        )  # fmt: skip
        body, seen = [], set()
        for row, each in zip(rows, made):
            one = each[part.name]
            line = [
                f"`{row.kernel}`" if row.backend == CUDA else row.kernel,
                row.operator,
                "" if one.trip.header is None else f"{one.trip.header:x}",
                one.launch.registers,
                f"{one.warps:g}",
                ", ".join(str(one.trip.counts[name]) for name in counted),
                ", ".join(f"{one.busy.get(name, 0):.0f}" for name in busy),
                f"{one.alone:.0f}",
                f"{one.in_step / one.warps:.0f}",
                one.binds.replace("second cache", "L2"),
                f"{percent(one.worst)}%",
                f"{percent(one.best)}%",
                "",
            ]
            if (text := tuple(map(str, line))) not in seen:
                seen.add(text)
                body.append(line)
        lines += table(columns, body)
    return lines


def change_table(found: dict[tuple[str, str, str], dict[str, Range]], before: dict) -> list[str]:
    lines = [
        "## What changes did",
        "",
        f"Predicted before (commit {before['commit']}) and after, of the cells in which the two differ by a point or",
        "more. What stands here was kept; what was rejected is in [docs/log.md](log.md), and not in the tree.",
        "",
    ]
    rows = []
    for (operator, cell, backend), ranges in found.items():
        old = before["cells"].get(f"{operator}, {cell}, {backend}")
        for part, now in ranges.items():
            if old is None or part not in old:
                continue
            worst, best = old[part]
            if max(abs(worst - now.worst), abs(best - now.best)) >= DIFFERENT:
                rows.append(
                    [f"{operator} {cell}", backend, part, f"{percent(worst)} to {percent(best)}%",
                     f"{percent(now.worst)} to {percent(now.best)}%",
                     f"{percent(now.worst / worst - 1)}% / {percent(now.best / best - 1)}%", ""]
                )  # fmt: skip
    columns = ("cell", "backend", "part", "before", "after", "worst / best change by", "measured")
    return lines + (table(columns, rows) if rows else ["None differ.", ""]) + [*before.get("notes", []), ""]


def calibration(strangers: list[dict]) -> list[str]:
    lines = [
        "## Calibration",
        "",
        "The same program on the machine code of kernels that others wrote and measured: head_dim 128, the published",
        "rate at 16,384 tokens. Their code is not here; these are its counts, which `bench/predict_stranger.py` made",
        "from a cubin.",
        "",
    ]
    rows = []
    for each in strangers:
        tera = each["peak"] / 1e12
        middle = expected(each["worst"], each["best"]) * tera
        published = each["published"]
        rows.append(
            [
                each["kernel"],
                each["part"],
                each["made"],
                f"{each['warps']:g}",
                ", ".join(str(each["counts"][name]) for name in sass.PIPES),
                f"{each['alone']:.0f}",
                f"{each['in_step'] / each['warps']:.0f}",
                f"{each['worst'] * tera:.0f} to {each['best'] * tera:.0f}",
                f"{middle:.0f}",
                "; ".join(f"{one['rate']:g} ({one['source']})" for one in published) or "none found",
                " / ".join(f"{100 * (middle / one['rate'] - 1):+.0f}%" for one in published),
            ]
        )
    columns = (
        "kernel", "part", "made by", "warps", f"instructions: {', '.join(sass.PIPES)}", "alone", "in step",
        "predicted, TFLOP/s", "expected", "published, TFLOP/s", "expected over published",
    )  # fmt: skip
    fails = [
        f"{each['kernel']} on {each['part']}: {one['rate']:g} ({one['source']})"
        for each in strangers
        for one in each["published"]
        if abs(expected(each["worst"], each["best"]) * each["peak"] / 1e12 / one["rate"] - 1) > AGREES
    ]
    return [
        *lines,
        *table(columns, rows),
        f"- The first published rate of each was fitted: one number for {sum(bool(s['published']) for s in strangers)} "
        "kernels.",
        f"- The expectation is more than {percent(AGREES)}% off, and the model fails: {'; '.join(fails) or 'nowhere'}.",
        "- The published rates are of other compilers: nvcc 13.0 spills 136 and 176 bytes a thread of FlashAttention-2",
        "  for sm_80 to local memory, and Triton's tutorial has changed since its figures of 2024. The causal one is a",
        "  reading of a figure.",
        "- None of these comes near the upper end. A kernel whose warps are kept apart by design would.",
        "",
    ]


def rates() -> list[str]:
    lines = ["## Rates", ""]
    names = {
        "multiprocessors": "multiprocessors", "clock": "clock, Hz", "peak": "peak, 16 bits, operations/s",
        "peak_int8": "peak, int8, operations/s", "bandwidth": "bandwidth, bytes/s",
        "mma": "mma.sync, 16 bits: multiply-adds a cycle of a scheduler", "mma_int8": "the same, int8",
        "wgmma": "wgmma, 16 bits: the same", "wgmma_int8": "the same, int8", "float32": "cycles of a warp's FFMA",
        "half": "of a warp's HFMA2", "bfloat16": "the same, bfloat16", "imad": "IMAD",
        "integer": "integer, compare, select", "special": "special function",
        "shared": "shared memory and first cache, bytes a cycle of a multiprocessor", "l2": "second cache, the same",
        "memory": "latency of device memory, cycles", "cache": "of the second cache", "local": "of shared memory",
        "exponential": "of a special function", "warps": "warps a multiprocessor", "blocks": "blocks",
        "registers": "registers", "shared_bytes": "shared memory, bytes",
        "sustained": "of the peak, what a library's product sustains",
        "streamed": "of the bandwidth, what a kernel streams",
    }  # fmt: skip
    missing = set(Part._fields) - set(names) - {"name", "code"}
    if missing:
        raise LookupError(f"rates without a name on the page: {sorted(missing)}")
    body = []
    for field, name in names.items():
        values: list[Rate | None] = [getattr(part, field) for part in PARTS]
        sources = dict.fromkeys(rate.source for rate in values if rate is not None)
        body.append([name, *(f"{rate.value:.4g}" if rate else "" for rate in values), ", ".join(sources)])
    lines += table(("rate", *(part.name for part in PARTS), "source"), body)
    used = {rate.source for part in PARTS for rate in part if isinstance(rate, Rate)}
    lines += [f"- {name}: {SOURCES[name]}." for name in SOURCES if name in used]
    return [*lines, ""]


def versions(nvcc: str, triton: str) -> str:
    """Of what made the machine code, as the page has them."""
    return f"{nvcc}, Triton {triton}"


def page(rows: list[Row], made_by: str) -> str:
    made = [predictions(row) for row in rows]
    found = cells(rows, made)
    lines = [
        *HEAD.format(overlap=predict_model.OVERLAP, versions=made_by).splitlines(),
        "",
        *cell_tables(found),
        *change_table(found, json.loads(BEFORE.read_text("utf-8"))),
        *calibration(json.loads(STRANGERS.read_text("utf-8"))),
        *rates(),
        *kernel_tables(rows, made),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str]) -> int:
    match arguments:
        case [] | ["--print"] | ["--before", _]:
            pass
        case _:
            sys.exit(__doc__)
    os.environ["GPTKERN_EMULATE_CUDA"] = "1"
    import disassemble_cuda
    import predict_rows

    try:
        rows = predict_rows.all_rows()
    except predict_rows.Missing as missing:
        sys.exit(f"docs/{PAGE.name}: {missing}")
    if arguments[:1] == ["--before"]:
        found = cells(rows, [predictions(row) for row in rows])
        kept = {
            ", ".join(key): {part: [round(each.worst, 4), round(each.best, 4)] for part, each in ranges.items()}
            for key, ranges in found.items()
        }
        Path(arguments[1]).write_text(json.dumps({"commit": "", "cells": kept}, indent=1) + "\n", encoding="utf-8")
        return 0
    import triton

    text = page(rows, versions(disassemble_cuda.compiler_version(), triton.__version__))
    if arguments:
        print(text, end="")
        return 0
    PAGE.write_text(text, encoding="utf-8")
    print(f"docs/{PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
