"""Writes the figures of the documentation from bench/results/<device>/results.json: nothing in them is typed by hand.

    python bench/publish.py            (make figures)
    python bench/publish.py --check    exits with 1 and names what is stale

What is written: docs/performance.md between the lines BEGIN and END, and docs/figures/<device>/<operator>.svg.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from gptkern.measuring import plots, report
from gptkern.measuring import results as files

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
PAGE, RESULTS, FIGURES = Path("docs", "performance.md"), Path("bench", "results"), Path("docs", "figures")
NO_GPU = "**No GPU has been measured yet"
ON_CPUS = ".** What follows are CPUs, where no kernel runs: it shows what a call costs, and nothing about the kernels."
NOTHING = "**, nor is there a `bench/results/<device>/results.json` of a CPU."
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
    page = (root / PAGE).read_text(encoding="utf-8")
    marked = re.fullmatch(rf"(.*?{BEGIN}\n).*?({END}.*)", page, re.DOTALL)
    if marked is None:
        raise files.ResultsError(f"{root / PAGE}: it needs a line {BEGIN} and below it a line {END}")
    return {root / PAGE: f"{marked[1]}\n" + "\n\n".join(parts) + f"\n\n{marked[2]}", **pictures}


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
