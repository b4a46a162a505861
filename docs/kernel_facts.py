"""Writes what README.md says of the kernels, and its picture, from docs/cuda_counters.md and docs/cuda_resources.md.

python docs/kernel_facts.py             (make docs)
python docs/kernel_facts.py --check     writes nothing; exits with 1 and names what is stale

Those tables are counts, not times: they are the same on every machine, and need no GPU.
"""

from __future__ import annotations

import re
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COUNTERS, RESOURCES = ROOT / "docs" / "cuda_counters.md", ROOT / "docs" / "cuda_resources.md"
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "figures" / "kernels.svg"
BEGIN, END = "<!-- kernels: begin -->", "<!-- kernels: end -->"

BYTES, MATRIX = "bytes", "matrix instructions"


class Count(NamedTuple):
    """A launcher at one shape: how much it does over the least possible (1.0), and with which kernels."""

    operator: str
    direction: str
    quantity: str
    shape: str
    ratio: float
    kernels: tuple[str, ...]
    conflicts: int


class Resources(NamedTuple):
    """What nvcc gave a kernel on one architecture."""

    registers: int
    spills: int


class Line(NamedTuple):
    """The counts of one operator, direction and quantity: a row of the table and of the picture."""

    name: str
    quantity: str
    counts: list[Count]


# --- The tables -------------------------------------------------------------------------------------------------------


def _rows(text: str) -> list[list[str]]:
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines]


def counted(text: str) -> list[Count]:
    """The launchers of docs/cuda_counters.md, a launcher and quantity each."""
    found = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        operator = section.partition("\n")[0].strip()
        heading, _, *rows = _rows(section)
        if heading != [
            "shape", "kernel", BYTES, "over the least", "sectors per request", "bank conflicts", MATRIX,
            "over the least",
        ]:  # fmt: skip
            raise ValueError(f"docs/cuda_counters.md: the columns of {operator} are {heading}")
        launches: list[list[list[str]]] = []
        for row in rows:
            # A launcher's further kernels have no shape.
            if row[0]:
                launches.append([])
            launches[-1].append(row)
        for launch in launches:
            shape, kernels = launch[0][0], tuple(row[1].strip("`") for row in launch)
            mode = re.search(r"w8a\d+", shape)
            name, direction = (f"{operator} {mode[0]}" if mode else operator), _direction(kernels[0])
            conflicts = sum(int(row[5]) for row in launch)
            for quantity, column in ((BYTES, 3), (MATRIX, 7)):
                if launch[0][column]:
                    ratio = float(launch[0][column])
                    found.append(Count(name, direction, quantity, shape, ratio, kernels, conflicts))
    return found


def _direction(kernel: str) -> str:
    if re.search("backward|gradient", kernel):
        return "backward"
    return "forward" if "forward" in kernel else ""


def resources(text: str) -> dict[tuple[str, str], Resources]:
    """(kernel, architecture) -> its row of docs/cuda_resources.md."""
    heading, _, *rows = _rows(text)
    if heading[:4] != ["kernel", "architecture", "registers", "spills"]:
        raise ValueError(f"docs/cuda_resources.md: its columns are {heading}")
    return {(row[0].strip("`"), row[1]): Resources(int(row[2]), int(row[3])) for row in rows}


def lines(counts: list[Count]) -> list[Line]:
    """What is bound by matrix products first, then what is bound by bytes."""
    groups: dict[tuple[str, str], list[Count]] = {}
    for count in sorted(counts, key=lambda count: count.quantity != MATRIX):
        groups.setdefault((f"{count.operator} {count.direction}".strip(), count.quantity), []).append(count)
    return [Line(name, quantity, group) for (name, quantity), group in groups.items()]


# --- The README -------------------------------------------------------------------------------------------------------


def table(found: list[Line], compiled: dict[tuple[str, str], Resources]) -> str:
    architectures = sorted({architecture for _, architecture in compiled})
    conflicts = sum(count.conflicts for line in found for count in line.counts)
    spills = sum(each.spills for each in compiled.values())
    parts = [
        f"| operator | over the least | at best | at worst | worst at | registers, {', '.join(architectures)} |",
        "|---|---|---:|---:|---|---|",
    ]
    for name, quantity, counts in found:
        best, worst = min(counts, key=lambda count: count.ratio), max(counts, key=lambda count: count.ratio)
        kernels = {kernel for count in counts for kernel in count.kernels}
        most = [
            max(each.registers for (kernel, on), each in compiled.items() if on == architecture and kernel in kernels)
            for architecture in architectures
        ]
        parts.append(
            f"| {name} | {quantity} | {best.ratio:.3f} | {worst.ratio:.3f} | "
            f"{'' if worst.ratio == best.ratio else worst.shape} | {', '.join(map(str, most))} |"
        )
    parts += [
        "",
        f"- {_amount(conflicts)} bank conflicts in shared memory at the shapes counted ([all](docs/cuda_counters.md)).",
        f"- {_amount(spills)} register spills in {len({kernel for kernel, _ in compiled})} compiled kernels on "
        f"{' and '.join(architectures)} ([all](docs/cuda_resources.md)); 255 registers are the most there are.",
    ]
    return "\n".join(parts)


def _amount(number: int) -> str:
    return f"{number:,}" if number else "No"


# --- The picture ------------------------------------------------------------------------------------------------------

WIDTH, LEFT, RIGHT, TOP, STEP = 860, 190, 70, 74, 24
HIGHEST = 2.2
TITLE = "Work of the CUDA kernels, over the least possible"
SUBTITLE = "A dot is a shape. Counted by an emulator on a CPU: these are no times, and no GPU was measured."
COLOURS = {MATRIX: "#b4530a", BYTES: "#1f5fae"}


def picture(found: list[Line]) -> str:
    """A row of dots for each line, one dot a shape; x is the ratio to the least possible."""
    bottom = TOP + STEP * len(found)
    ticks = [1.0, 1.25, 1.5, 1.75, 2.0]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 46}" font-family="sans-serif" '
        'font-size="13" fill="#222">',
        f'<rect width="{WIDTH}" height="{bottom + 46}" fill="#fff"/>',
        f'<text x="16" y="26" font-size="16" font-weight="bold">{TITLE}</text>',
        f'<text x="16" y="46" fill="#555">{SUBTITLE}</text>',
    ]
    for index, (quantity, colour) in enumerate(COLOURS.items()):
        x = 520 + 165 * index
        parts.append(f'<circle cx="{x}" cy="22" r="5" fill="{colour}" fill-opacity="0.6"/>')
        parts.append(f'<text x="{x + 10}" y="26">{"bytes moved" if quantity == BYTES else quantity}</text>')
    for tick in ticks:
        x = _x(tick)
        weight = "1.5" if tick == 1 else "0.5"
        parts.append(f'<path d="M{x} {TOP - 14}V{bottom}" stroke="#888" stroke-width="{weight}"/>')
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{tick:g}×</text>')
    parts.append(f'<text x="{_x(1)}" y="{bottom + 36}" text-anchor="middle" fill="#555">the least possible</text>')
    for index, (name, quantity, counts) in enumerate(found):
        y = TOP + STEP * index
        parts.append(f'<text x="{LEFT - 16}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        for count in sorted(counts, key=lambda count: count.ratio):
            x = _x(min(count.ratio, HIGHEST))
            parts.append(
                f'<circle cx="{x}" cy="{y}" r="5" fill="{COLOURS[quantity]}" fill-opacity="0.6">'
                f"<title>{escape(count.shape)}: {count.ratio:.3f}</title></circle>"
            )
            if count.ratio > HIGHEST:
                parts.append(f'<text x="{x + 10}" y="{y + 4}">→ {count.ratio:g}×</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _x(ratio: float) -> float:
    return round(LEFT + (WIDTH - LEFT - RIGHT) * (ratio - 1) / (HIGHEST - 1), 1)


# --- Writing ----------------------------------------------------------------------------------------------------------


def wanted() -> dict[Path, str]:
    """The whole text of each file."""
    found = lines(counted(COUNTERS.read_text(encoding="utf-8")))
    compiled = resources(RESOURCES.read_text(encoding="utf-8"))
    marked = re.fullmatch(rf"(.*{BEGIN}\n).*?({END}\n.*)", README.read_text(encoding="utf-8"), re.DOTALL)
    if marked is None:
        raise ValueError(f"{README.name}: it needs a line {BEGIN} and below it a line {END}")
    return {README: f"{marked[1]}\n{table(found, compiled)}\n\n{marked[2]}", PICTURE: picture(found)}


def stale(write: bool = False) -> list[str]:
    """What is not as the tables have it; written anew where `write`."""
    found = []
    for path, text in wanted().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            found.append(path.relative_to(ROOT).as_posix())
            if write:
                path.write_text(text, encoding="utf-8")
    return found


def main(arguments: list[str]) -> int:
    checking = arguments == ["--check"]
    if arguments and not checking:
        sys.exit(__doc__)
    found = stale(write=not checking)
    print(*found or ["README.md: nothing is stale"], sep="\n")
    return int(checking and bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
