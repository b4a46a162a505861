"""The demo's report: one HTML file that needs nothing else, readable in a light and in a dark browser."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from gptkern.commands import plots
from gptkern.commands.findings import INT8_BOUND, Curve, Findings, signed

_STYLE = """
:root { --sans: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
        --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
        --page: #fbfbf9; --card: #ffffff; --ink: #20242b; --soft: #5c6470; --faint: #d9dce1;
        --stock: #d97706; --swapped: #1d4ed8; --good: #15803d; --bad: #b91c1c; --wait: #a16207; }
@media (prefers-color-scheme: dark) {
:root { --page: #14171c; --card: #1b1f26; --ink: #e6e8eb; --soft: #9aa3af; --faint: #343a44;
        --stock: #f59e0b; --swapped: #7aa2ff; --good: #4ade80; --bad: #f87171; --wait: #facc15; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 var(--sans); color-scheme: light dark; }
main { max-width: 920px; margin: 0 auto; padding: 48px 24px 72px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 48px 0 8px; letter-spacing: -0.005em; }
p { margin: 8px 0 12px; max-width: 72ch; }
.soft { color: var(--soft); }
code { font: 0.9em var(--mono); }
.verdict { background: var(--card); border: 1px solid var(--faint); border-left: 5px solid var(--good);
           border-radius: 8px; padding: 16px 22px; margin: 22px 0; }
.verdict.bad { border-left-color: var(--bad); } .verdict.wait { border-left-color: var(--wait); }
.verdict p { max-width: none; margin: 4px 0; }
.verdict strong { font-size: 17px; }
strong.good { color: var(--good); } strong.wait { color: var(--wait); }
p.bad, span.bad, strong.bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.tile { background: var(--card); border: 1px solid var(--faint); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 25px; font-weight: 600; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13.5px; line-height: 1.35; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; white-space: nowrap; }
th, td { padding: 7px 18px 7px 0; border-bottom: 1px solid var(--faint); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
.number { text-align: right; white-space: nowrap; }
td code { white-space: nowrap; }
figure { background: var(--card); border: 1px solid var(--faint); border-radius: 8px; margin: 14px 0; padding: 12px; }
svg { display: block; width: 100%; height: auto; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 14px; }
.samples h3 { font-size: 13px; color: var(--soft); margin: 0 0 6px; font-weight: 600; }
pre { background: var(--card); border: 1px solid var(--faint); border-radius: 8px; padding: 12px 14px; margin: 0;
      font: 13px/1.5 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; }
pre mark { background: none; color: var(--soft); }
@media print { body { background: none; } main { padding: 0; } }
"""


def render(findings: Findings) -> str:
    """The page."""
    sections = [
        _head(findings), _tiles(findings), _curves(findings), _modules(findings), _int8(findings), _samples(findings),
        _kernel_check(findings), _environment(findings),
    ]  # fmt: skip
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>gptkern demo</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _head(findings: Findings) -> str:
    problems = findings.problems()
    if problems:
        kind, title = "bad", "Something is wrong"
    elif findings.interrupted:
        kind, title = "wait", "Interrupted"
    else:
        kind, title = "good", "All is well"
    listed = "".join(f'<p class="bad">{_text(problem)}</p>' for problem in problems)
    subtitle = " · ".join(filter(None, [findings.model, findings.device, findings.dtype]))
    return (
        f'<h1>gptkern demo</h1>\n<p class="soft">{_text(subtitle)}</p>\n'
        f'<div class="verdict {kind}"><p><strong class="{kind}">{title}.</strong></p>'
        f"<p>{_text(findings.verdict())}</p>{listed}</div>"
    )


def _tiles(findings: Findings) -> str:
    tiles = []
    if findings.steps_done:
        if findings.swapped.final is not None:
            tiles.append((f"{findings.swapped.final:.3f}", "validation loss, nats per byte (swapped)"))
        tiles.append((f"{findings.largest_difference:.2g}", "largest difference, stock to swapped, nats per byte"))
        if findings.speed_up:
            tiles.append((f"{findings.speed_up:.2f}×", "training speed, swapped to stock"))
    if findings.int8:
        tiles.append(
            (
                f"{findings.int8.linear_bytes / findings.int8.linear_bytes_int8:.2f}×",
                "smaller: the linear layers in int8",
            )
        )
        tiles.append((signed(findings.int8.change), "change of the validation loss by int8, nats per byte"))
    cells = "".join(
        f'<div class="tile"><b>{_text(value)}</b><span>{_text(label)}</span></div>' for value, label in tiles
    )
    return f'<div class="tiles">{cells}</div>' if cells else ""


def _curves(findings: Findings) -> str:
    if not findings.steps_done:
        return ""
    planned = f" of {findings.steps:,} planned" if findings.steps_done < findings.steps else ""
    parts = [
        "<h2>Stock and swapped, side by side</h2>",
        f"<p>{_text(findings.recipe)} {findings.steps_done:,} steps{planned}, "
        f"{findings.tokens_per_step:,} bytes each. {_text(findings.cut_short)}</p>",
        f"<figure>{plots.losses(findings)}</figure>",
    ]
    if any(difference > 0 for difference in findings.differences):
        parts.append(f"<figure>{plots.differences(findings)}</figure>")
    elif findings.largest_difference == 0:
        parts.append("<p>The difference is exactly 0 at every step, so there is no plot of it.</p>")
    mean = "training loss, mean of the last 20 steps"
    columns = ("", (mean, True), ("validation loss", True), ("bits per byte", True), ("bytes per second", True))
    rows = [_curve_row("stock", findings.stock), _curve_row("swapped", findings.swapped)]
    parts.append(_table(columns, rows))
    parts.append(
        '<p class="soft">Losses in nats per byte; a byte guessed blindly costs '
        f"{math.log(256):.3f}. The validation loss in the table is over all of the held-out text"
        f"{' at the end' if not findings.interrupted else ', or where interrupted the last one taken'}; on the way it "
        "is over a part. The speed is the median over the training, evaluations left out.</p>"
    )
    return "\n".join(parts)


def _curve_row(name: str, curve: Curve) -> Sequence[str]:
    recent = curve.losses[-20:]
    validation = ("–", "–") if curve.final is None else (f"{curve.final:.4f}", f"{curve.final / math.log(2):.3f}")
    return (name, f"{sum(recent) / len(recent):.4f}", *validation, f"{curve.tokens_per_second:,.0f}")


def _modules(findings: Findings) -> str:
    if not findings.swapped_modules:
        return ""
    rows = [
        (_code(row.names), str(row.count), row.original, row.replacement, row.operator, _code(row.backend), row.reason)
        for row in findings.swapped_modules
    ]
    columns = ("module", ("count", True), "was", "became", "operator", "backend", "why this backend")
    parts = [
        "<h2>What was swapped, and what ran it</h2>",
        "<p>One call, <code>gptkern.swap(model)</code>, on the model as it is; parameters and checkpoint keys stay. "
        "The backend is what <code>gptkern.explain</code> says of the calls of a training batch.</p>",
        _table(columns, rows),
    ]
    if findings.skipped_modules:
        rows = [(_code(name), original, reason) for name, original, reason in findings.skipped_modules]
        parts.append(_table(("left alone", "class", "reason"), rows))
    return "\n".join(parts)


def _int8(findings: Findings) -> str:
    int8 = findings.int8
    if int8 is None:
        return ""
    rows = [
        ("swapped", f"{int8.full_loss:.4f}", "", _bytes(int8.linear_bytes), "", _bytes(int8.model_bytes), ""),
        (
            "swapped, int8", f"{int8.loss:.4f}", signed(int8.change),
            _bytes(int8.linear_bytes_int8), f"{int8.linear_bytes / int8.linear_bytes_int8:.2f}×",
            _bytes(int8.model_bytes_int8), f"{int8.model_bytes / int8.model_bytes_int8:.2f}×",
        ),
    ]  # fmt: skip
    columns = ("", ("validation loss", True), ("change", True), (f"{int8.layers} linear layers", True),
               ("smaller", True), ("whole model", True), ("smaller", True))  # fmt: skip
    return (
        "<h2>int8 against full precision</h2>\n"
        "<p>Every linear layer of the trained swapped model except the output layer, whose weight is the embedding's, "
        "with int8 weights and a float32 scale for each output channel. The bound on the change is "
        f"{INT8_BOUND:g} nats per byte.</p>\n" + _table(columns, rows)
    )


def _samples(findings: Findings) -> str:
    if not findings.samples:
        return ""
    parts = [
        "<h2>Samples</h2>",
        "<p>The same prompt (grey) and the same seed for each. A model this small, trained for this short, gets the "
        "look of the text and many of its words, not its sense.</p>",
    ]
    for sample in findings.samples:
        columns = [("stock", sample.stock), ("swapped", sample.swapped), ("swapped, int8", sample.int8)]
        if sample.stock == sample.swapped:
            columns = [("stock and swapped: the same text", sample.stock), columns[2]]
        cells = "".join(
            f"<div><h3>{title}</h3><pre>{_prompted(sample.prompt, generated)}</pre></div>"
            for title, generated in columns
        )
        parts.append(f'<div class="samples" style="margin-bottom: 18px">{cells}</div>')
    return "\n".join(parts)


def _prompted(prompt: str, generated: str) -> str:
    if generated.startswith(prompt):
        return f"<mark>{_text(prompt)}</mark>{_text(generated[len(prompt) :])}"
    return _text(generated)


def _kernel_check(findings: Findings) -> str:
    check = findings.kernel_check
    if check is None:
        return ""
    rows = [
        (
            row.operator, _code(row.backend), row.dtype, str(row.passed),
            f'<span class="bad">{row.failed}</span>' if row.failed else "0",
            f"{row.worst:.2f}" if row.passed + row.failed else "–", str(row.left_out) if row.left_out else "",
        )
        for row in check.rows
    ]  # fmt: skip
    columns = ("operator", "backend", "dtype", ("passed", True), ("failed", True), ("worst error / bound", True),
               ("cases left out", True))  # fmt: skip
    failures = "".join(f'<p class="bad">{_text(failure)}</p>' for failure in check.failures)
    return (
        "<h2>This machine's kernels against float64</h2>\n"
        f"<p>Results and gradients of small cases, {_text(check.note)}, in {check.seconds:.0f} s: "
        f"{check.passed} comparisons passed, {check.failed} failed, {check.left_out} cases left out for lack of time. "
        "A comparison passes up to 1.00 of its bound; <code>gptkern check</code> runs them all.</p>\n"
        + failures
        + _table(columns, rows)
    )


def _environment(findings: Findings) -> str:
    rows = [(name, _text(value)) for name, value in findings.environment]
    rows.append(("text", _text(f"{findings.text}: {findings.text_bytes[0]:,} bytes to train on, "
                               f"{findings.text_bytes[1]:,} held out")))  # fmt: skip
    rows.append(("this run", f"{findings.seconds:.0f} s"))
    return "<h2>Environment</h2>\n" + _table(("", ""), rows)


def _table(columns: Iterable[str | tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table; a column given as (heading, True) holds numbers. The cells are HTML."""
    columns = [(column, False) if isinstance(column, str) else column for column in columns]
    kinds = [' class="number"' if is_number else "" for _, is_number in columns]
    lines = ['<div class="scroll"><table>']
    if any(heading for heading, _ in columns):
        lines.append(
            "<tr>" + "".join(f"<th{kind}>{_text(heading)}</th>" for (heading, _), kind in zip(columns, kinds)) + "</tr>"
        )
    for row in rows:
        lines.append("<tr>" + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds)) + "</tr>")
    return "\n".join([*lines, "</table></div>"])


def _bytes(count: int) -> str:
    return f"{count:,} B"


def _code(value: str) -> str:
    return f"<code>{_text(value)}</code>"


def _text(value: str) -> str:
    return html.escape(value)
