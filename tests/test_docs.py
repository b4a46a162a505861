"""The documentation: what is generated is not stale, links lead somewhere, and what is written in code runs."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest

from gptkern import cli

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import api_pages  # noqa: E402
import kernel_facts  # noqa: E402

PAGES = sorted(path for path in (ROOT, ROOT / "docs", ROOT / "docs" / "api") for path in path.glob("*.md"))
# What people follow: here every block of Python runs, and every command is one that there is.
FOLLOWED = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("install.md", "models.md", "without_a_gpu.md"))]
MAKEFILE = (ROOT / "Makefile").read_text()


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- What is generated ------------------------------------------------------------------------------------------------


def test_the_pages_of_the_public_names_are_those_of_the_docstrings():
    assert api_pages.stale() == [], "run `make docs`"


def test_every_public_name_has_a_page_and_stands_in_the_index():
    import gptkern

    index = (ROOT / "docs" / "api" / "README.md").read_text()
    modules = {"": gptkern, "functional.": gptkern.functional, "autograd.": gptkern.autograd, "optim.": gptkern.optim}
    names = [prefix + name for prefix, module in modules.items() for name in module.__all__]
    for public in set(names) - {"__version__", "functional", "nn", "autograd", "optim"}:
        assert (ROOT / "docs" / "api" / f"{public}.md").is_file() and f"({public}.md)" in index, public
    assert "(docs/api/README.md)" in (ROOT / "README.md").read_text()


def test_a_docstring_becomes_markdown():
    docstring = (
        "A sum (*, width) < 1.\n\n    y = a * b\n\nArgs:\n    a: one. b, c: two,\n        on.\n\nReturns:\n    y.\n\n"
        "Backends: torch."
    )
    assert api_pages._markdown(docstring).split("\n\n") == [
        r"A sum (\*, width) &lt; 1.",
        "```text\ny = a * b\n```",
        "**Args**",
        "- `a`: one.\n- `b, c`: two, on.",
        "**Returns**",
        "y.",
        "**Backends**: torch.",
    ]


def test_what_the_readme_says_of_the_kernels_is_what_was_counted():
    assert kernel_facts.stale() == [], "run `make docs`"


def test_counts_are_read_off_the_tables():
    columns = (
        "shape", "kernel", "bytes", "over the least", "sectors per request", "bank conflicts", "matrix instructions",
        "over the least",
    )  # fmt: skip
    counters = f"""## softmax

| {" | ".join(columns)} |
|{"---|" * len(columns)}
| 2×4 bfloat16 | `softmax_forward_kernel<2>` | 1,000 | 1.000 | 16.0 | 0 |  |  |
| 2×9 bfloat16 | `softmax_forward_kernel<2>` | 1,000 | 1.250 | 16.0 | 3 |  |  |
| 2×9 bfloat16 | `softmax_backward_kernel<2>` | 1,000 |  | 16.0 | 1 | 8 | 4.000 |
|  | `softmax_reduce_kernel` | 1,000 |  | 16.0 | 2 |  |  |
"""
    found = kernel_facts.lines(kernel_facts.counted(counters))
    assert [(line.name, line.quantity, len(line.counts)) for line in found] == [
        ("softmax backward", "matrix instructions", 1),
        ("softmax forward", "bytes", 2),
    ]
    compiled = {
        (kernel, architecture): kernel_facts.Resources(registers, spills)
        for kernel, registers, spills in (
            ("softmax_forward_kernel<2>", 40, 0),
            ("softmax_backward_kernel<2>", 50, 0),
            ("softmax_reduce_kernel", 60, 7),
        )
        for architecture in ("sm_80", "sm_90a")
    }
    table = kernel_facts.table(found, compiled)
    assert "| softmax backward | matrix instructions | 4.000 | 4.000 |  | 60, 60 |" in table
    assert "| softmax forward | bytes | 1.000 | 1.250 | 2×9 bfloat16 | 40, 40 |" in table
    assert "- 6 bank conflicts" in table and "- 14 register spills in 3 compiled kernels" in table
    svg = kernel_facts.picture(found)
    assert svg.count("<title>") == 3 and "→ 4×" in svg


# --- Links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page, and those written out."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="(.*?)"', text))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`(?!\])", "", text)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert not broken


# --- Code -------------------------------------------------------------------------------------------------------------


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in FOLLOWED if blocks(page, "python")], ids=name)
def test_the_python_of_a_page_runs(page, monkeypatch, tmp_path):
    """From top to bottom, in one namespace; what would be downloaded is a small model of random weights."""
    if any("transformers" in block for block in blocks(page, "python")):
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=32, vocab_size=64)
        made = transformers.AutoModelForCausalLM.from_config
        monkeypatch.setattr(
            transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **options: made(config, **options)
        )
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for block in blocks(page, "python"):
            exec(compile(block, name(page), "exec"), namespace)
    assert printed.getvalue()


def commands(page: Path) -> list[str]:
    """What a page tells people to type: lines of its blocks, and code within its text."""
    text = page.read_text()
    typed = [line.partition(" #")[0].strip() for block in blocks(page, "") for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [re.sub(r"^([A-Z_]+=\S+ )+", "", command) for command in [*typed, *inline]]


@pytest.mark.parametrize(
    "command",
    sorted(
        {
            command
            for page in [*FOLLOWED, ROOT / "docs" / "performance.md"]
            for command in commands(page)
            if re.match(r"(gptkern|make) ", command)
        }
    ),
)
def test_a_command_is_one_that_there_is(command):
    program, *arguments = shlex.split(command)
    if program == "gptkern":
        assert arguments[0] in cli.COMMANDS
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(f"gptkern.commands.{arguments[0]}").add_arguments(parser)
        parser.parse_args(arguments[1:])
    else:
        targets = [argument for argument in arguments if "=" not in argument]
        missing = [target for target in targets if not re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)]
        assert not missing
