"""Writes the figures of the documentation from bench/results/<device>/results.json: nothing in them is typed by hand.

    python bench/publish.py            (make figures)
    python bench/publish.py --check    exits with 1 and names what is stale

What is written: docs/performance.md and README.md between the lines BEGIN and END, and
docs/figures/<device>/<operator>.svg. A picture is drawn again when the digest of what it shows changes, or when
the file is not as it was drawn (measuring.plots); checking draws nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptkern.measuring import plots, rates, report
from gptkern.measuring import results as files

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
PAGE, README = Path("docs", "performance.md"), Path("README.md")
RESULTS, FIGURES = Path("bench", "results"), Path("docs", "figures")
NO_GPU = "**No GPU has been measured yet"
ON_CPUS = ".** What follows are CPUs, where no kernel runs: it shows what a call costs, and nothing about the kernels."
NOTHING = "**, nor is there a `bench/results/<device>/results.json` of a CPU."


class PublishError(Exception):
    """A page has no place for the figures; the message names it."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if anything is stale")
    options = parser.parse_args(arguments)
    try:
        changes = stale(ROOT) if options.check else publish(ROOT)
    except (files.ResultsError, PublishError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.check and changes:
        print("Stale, `make figures` writes them anew:", *changes, sep="\n  ")
        return 1
    if not options.check:
        print(*changes or ["everything is as the results have it"], sep="\n")
    return 0


def publish(root: Path) -> list[str]:
    """Writes what is stale under `root`; -> what was written or removed."""
    done = []
    for path, text in _pages(root).items():
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            done.append(_name(root, path))
    pictures = _pictures(root)
    for path, (results, operator) in pictures.items():
        if _stale_picture(path, results, operator):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(plots.draw(results, operator), encoding="utf-8")
            done.append(_name(root, path))
    for path in _left_over(root, pictures):
        path.unlink()
        done.append(f"{_name(root, path)}: removed, no results have it")
    return done


def stale(root: Path) -> list[str]:
    """What `publish` would write or remove, and why."""
    found = [
        f"{_name(root, path)}: its figures are not those of the results"
        for path, text in _pages(root).items()
        if path.read_text(encoding="utf-8") != text
    ]
    pictures = _pictures(root)
    for path, (results, operator) in pictures.items():
        reason = _stale_picture(path, results, operator)
        if reason:
            found.append(f"{_name(root, path)}: {reason}")
    return found + [f"{_name(root, path)}: no results have it" for path in _left_over(root, pictures)]


# --- What there should be ---------------------------------------------------------------------------------------------


def _measured(root: Path) -> dict[str, dict[str, Any]]:
    """The name of a device's folder -> its results, GPUs first, samples last."""
    found = {path.parent.name: files.load(path) for path in sorted((root / RESULTS).glob(f"*/{files.NAME}"))}
    return dict(sorted(found.items(), key=lambda item: (item[1]["sample"], item[1]["machine"]["kind"] != "cuda")))


def _pages(root: Path) -> dict[Path, str]:
    """The whole text of each page."""
    measured = _measured(root)
    return {
        root / PAGE: _filled(root / PAGE, _performance(measured)),
        root / README: _filled(root / README, _readme(measured)),
    }


def _pictures(root: Path) -> dict[Path, tuple[dict[str, Any], str]]:
    """The path of each picture, and what it is of."""
    return {
        root / FIGURES / device / f"{operator}.svg": (results, operator)
        for device, results in _measured(root).items()
        for operator in _drawn_operators(results)
    }


def _performance(measured: dict[str, dict[str, Any]]) -> str:
    parts = [*_without_gpu(measured)]
    for device, results in measured.items():
        addresses = {operator: f"figures/{device}/{operator}.svg" for operator in _drawn_operators(results)}
        parts.append(f'<a id="{device}"></a>\n\n' + report.markdown(results, addresses).strip())
    return "\n\n".join(parts)


def _readme(measured: dict[str, dict[str, Any]]) -> str:
    page = PAGE.as_posix()
    parts = [*_without_gpu(measured)]
    parts += [report.summary(results, f"{page}#{device}") for device, results in measured.items()]
    if measured:
        parts.append(
            "A lead or loss with × is the best peer's time ÷ gptkern's: above 1 gptkern is faster; – where there "
            f"is none beyond noise. All cells, costs, ceilings and pictures: [{page}]({page})."
        )
    return "\n\n".join(parts)


def _without_gpu(measured: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What is to be said first while no GPU has been measured."""
    kinds = {results["machine"]["kind"] for results in measured.values() if not results["sample"]}
    if "cuda" in kinds:
        return
    yield NO_GPU + (ON_CPUS if kinds else NOTHING)


def _drawn_operators(results: dict[str, Any]) -> list[str]:
    return [operator for operator in rates.operators(results) if plots.drawn(results, operator)["plots"]]


def _filled(path: Path, text: str) -> str:
    """The page with `text` between its two marks."""
    page = path.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise PublishError(f"{path}: it needs one line {BEGIN} and below it one line {END}")
    before, after = page[: page.index(BEGIN)], page[page.index(END) :]
    return f"{before}{BEGIN}\n\n{text}\n\n{after}"


def _stale_picture(path: Path, results: dict[str, Any], operator: str) -> str | None:
    """Why a picture has to be drawn again, or None."""
    if not path.exists():
        return "is missing"
    svg = path.read_text(encoding="utf-8")
    if plots.embedded_digest(svg) != plots.digest(results, operator):
        return "shows other results"
    return None if plots.intact(svg) else "was changed after it was drawn"


def _left_over(root: Path, pictures: dict[Path, Any]) -> list[Path]:
    """Pictures that were drawn here of results that are gone."""
    drawn = sorted((root / FIGURES).glob("*/*.svg"))
    return [path for path in drawn if path not in pictures and plots.embedded_digest(path.read_text(encoding="utf-8"))]


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


if __name__ == "__main__":
    sys.exit(main())
