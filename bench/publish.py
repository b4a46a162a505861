"""Writes the figures of the documentation from bench/results/<device>/: nothing in them is typed by hand.

    python bench/publish.py            (make figures)
    python bench/publish.py --check    exits with 1 and names what is stale

results.json is what `gptkern bench` wrote; loss_memory.json, where it lies beside, what bench/loss_memory.py did.

What is written: docs/performance.md between the lines BEGIN and END, and docs/figures/<device>/<operator>.svg.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from gptkern import formatting
from gptkern.measuring import plots, report
from gptkern.measuring import results as files

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
PAGE, RESULTS, FIGURES = Path("docs", "performance.md"), Path("bench", "results"), Path("docs", "figures")
NO_GPU = "**No GPU has been measured yet"
ON_CPUS = ".** What follows are CPUs, where no kernel runs: it shows what a call costs, and nothing about the kernels."
NOTHING = "**, nor is there a `bench/results/<device>/results.json` of a CPU."
LOSS_MEMORY = "loss_memory.json"
LOSS_FORMAT, LOSS_PARTS = 1, ("machine", "sizes", "least", "implementations")
LOSSES = {
    "gptkern": "`linear_cross_entropy`",
    "eager": "`F.cross_entropy(F.linear(…))`",
    "pytorch": "`F.linear_cross_entropy`, `LinearCrossEntropyOptions()`",
}
# Points by which a shape may be elsewhere where another processor has laid the same picture out.
APART = 0.05


def wanted(root: Path) -> dict[Path, str]:
    """The page and each picture, as the results have them; GPUs first."""
    found = {path.parent.name: files.load(path) for path in sorted((root / RESULTS).glob(f"*/{files.NAME}"))}
    found = dict(sorted(found.items(), key=lambda item: item[1]["machine"]["kind"] != "cuda"))
    kinds = {results["machine"]["kind"] for results in found.values()}
    parts = [] if "cuda" in kinds else [NO_GPU + (ON_CPUS if kinds else NOTHING)]
    pictures = {}
    for device, results in found.items():
        drawn = plots.draw_all(results)
        pictures |= {root / FIGURES / device / f"{operator}.svg": svg for operator, svg in drawn.items()}
        addresses = {operator: f"figures/{device}/{operator}.svg" for operator in drawn}
        parts.append(f'<a id="{device}"></a>\n\n' + report.markdown(results, addresses).strip())
        path = root / RESULTS / device / LOSS_MEMORY
        parts += [loss_memory(path)] if path.exists() else []
    page = (root / PAGE).read_text(encoding="utf-8")
    marked = re.fullmatch(rf"(.*?{BEGIN}\n).*?({END}.*)", page, re.DOTALL)
    if marked is None:
        raise files.ResultsError(f"{root / PAGE}: it needs a line {BEGIN} and below it a line {END}")
    return {root / PAGE: f"{marked[1]}\n" + "\n\n".join(parts) + f"\n\n{marked[2]}", **pictures}


def loss_memory(path: Path) -> str:
    """The section on the loss at the end of a model: memory and time, a line an implementation.

    Raises:
        ResultsError: it is no file that bench/loss_memory.py wrote.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != LOSS_FORMAT:
            raise ValueError(f"its format is {found['format']!r}; it needs {LOSS_FORMAT}")
        machine, sizes, least, measured = (found[part] for part in LOSS_PARTS)
        eager = next((each for each in measured if each["implementation"] == "eager" and "peak" in each), None)
        rows = [
            f"### The loss at the end of a model: {sizes['rows']:,} tokens, width {sizes['width']:,}, "
            f"{sizes['classes']:,} classes, {sizes['dtype']}",
            "Forward and backward, each implementation in a process of its own (`bench/loss_memory.py`). The peak is "
            "what the process had at most above input, weight and target: the gradients, "
            f"{formatting.size(least)}, are in it. Seconds are those of the processor.",
            formatting.table(
                ("loss", ">peak", ">of eager's", ">processor", ">of eager's"),
                [_loss_row(each, eager) for each in measured],
            ),
            f"Measured on {machine['date']}: {machine['device']}, threads: {machine['threads']}, torch "
            f"{machine['torch']}, gptkern {machine['gptkern']}, commit {(machine['commit'] or 'unknown')[:12]}"
            f"{', with changes' if machine['dirty'] else ''}.",
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise files.ResultsError(f"{path}: {why}; it needs to be a file that bench/loss_memory.py wrote") from error
    return "\n\n".join(rows)


def _loss_row(one: dict[str, Any], eager: dict[str, Any] | None) -> list[str]:
    name = LOSSES[one["implementation"]]
    if "missing" in one:
        return [name, formatting.escaped(one["missing"]), *[formatting.NONE] * 3]
    peak, processor = (formatting.times(one[key] / eager[key] if eager else None) for key in ("peak", "processor"))
    return [name, formatting.size(one["peak"]), peak, formatting.seconds(one["processor"]), processor]


def stale(root: Path, write: bool = False) -> list[str]:
    """What is not as the results have it, or is a picture of none; written anew or removed where `write`."""
    found, texts = [], wanted(root)
    for path, text in texts.items():
        if not path.exists() or not same(path.read_text(encoding="utf-8"), text):
            found.append(path.relative_to(root).as_posix())
            if write:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    for path in sorted(set((root / FIGURES).glob("*/*.svg")) - set(texts)):
        found.append(f"{path.relative_to(root).as_posix()}: no results have it")
        if write:
            path.unlink()
    return found


def same(one: str, other: str) -> bool:
    """Whether two texts are equal; two pictures, but for where roundings put their shapes and how these are named."""
    if not one.startswith("<?xml"):
        return one == other
    one, other = (re.sub(r'(id="|#)[mp][0-9a-f]{10}', r"\1", svg) for svg in (one, other))
    if re.findall(">[^<]+<", one) != re.findall(">[^<]+<", other):
        return False
    number = re.compile(r"(?<![\w#])-?\d+\.\d+")
    pairs = zip(number.findall(one), number.findall(other))
    return number.sub("", one) == number.sub("", other) and all(abs(float(a) - float(b)) <= APART for a, b in pairs)


def main(arguments: list[str]) -> int:
    checking = arguments == ["--check"]
    if arguments and not checking:
        sys.exit(__doc__)
    found = stale(ROOT, write=not checking)
    print(*found or ["everything is as the results have it"], sep="\n")
    return int(checking and bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
