"""The demo's report: one HTML file that needs nothing else, readable in a light and in a dark browser."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gptkern import formatting as form
from gptkern.commands.findings import INT8_BOUND, Curve, Findings, signed
from gptkern.training import pages
from gptkern.training.pages import table as _table
from gptkern.training.pages import text as _text

# The training loss of the table is the mean over this many last steps.
LAST_STEPS = 20


def render(findings: Findings) -> str:
    """The page."""
    parts = [_head, _curves, _modules, _int8, _samples, _kernel_check, _environment]
    return pages.page("gptkern demo", [part(findings) for part in parts])


def _head(findings: Findings) -> str:
    problems = findings.problems()
    kind, title = ("wait", "Interrupted") if findings.interrupted else ("good", "All is well")
    if problems:
        kind, title = "bad", "Something is wrong"
    listed = "".join(f'<p class="bad">{_text(problem)}</p>' for problem in problems)
    subtitle = " · ".join(filter(None, [findings.model, findings.device, findings.dtype]))
    return (
        f'<h1>gptkern demo</h1>\n<p class="soft">{_text(subtitle)}</p>\n'
        f'<div class="card"><strong class="{kind}">{title}.</strong><p>{_text(findings.verdict())}</p>{listed}</div>'
    )


def _curves(findings: Findings) -> str:
    if not findings.steps_done:
        return ""
    planned = f" of {findings.steps:,} planned" if findings.steps_done < findings.steps else ""
    headings = ("", f">training loss, mean of the last {LAST_STEPS} steps", ">validation loss", ">bits per byte",
                ">bytes per second")  # fmt: skip
    rows = [_curve_row("stock", findings.stock), _curve_row("swapped", findings.swapped)]
    return (
        "<h2>Stock and swapped, side by side</h2>\n"
        f"<p>{_text(findings.recipe)} {findings.steps_done:,} steps{planned}, {findings.tokens_per_step:,} bytes each. "
        f'{_text(findings.cut_short)}</p>\n<div class="card">{_plot(findings)}</div>\n{_table(headings, rows)}'
        f'<p class="soft">Losses in nats per byte; a byte guessed blindly costs {math.log(256):.3f}. The validation '
        "loss in the table is the last one taken: at the end over all of the held-out text, on the way over a part. "
        f"The speed is the median over the training, evaluations left out.{_training_report(findings)}</p>"
    )


def _training_report(findings: Findings) -> str:
    if not findings.training_report:
        return ""
    return f' The swapped training alone, update by update: <a href="{findings.training_report}">its own report</a>.'


def _curve_row(name: str, curve: Curve) -> Sequence[str]:
    recent = curve.losses[-LAST_STEPS:]
    validation = (form.NONE,) * 2 if curve.final is None else (f"{curve.final:.4f}", f"{curve.final / math.log(2):.3f}")
    return name, f"{sum(recent) / len(recent):.4f}", *validation, f"{curve.tokens_per_second:,.0f}"


def _plot(findings: Findings) -> str:
    """Training and validation loss of both trainings over the steps, as SVG in the page's colours."""
    lines = []
    for name, curve, colour, width, marker in (
        ("stock", findings.stock, pages.FIRST, 3.5, "o"),
        ("swapped", findings.swapped, pages.SECOND, 1.1, "x"),
    ):
        steps = range(1, len(curve.losses) + 1)
        lines.append(pages.Line(name, steps, curve.losses, {"color": colour, "linewidth": width}))
        at, losses = zip(*curve.validations) if curve.validations else ([], [])
        style = {"color": colour, "linestyle": "none", "marker": marker}
        lines.append(pages.Line(f"{name}, validation", at, losses, style))
    return pages.plot([pages.Axes("loss, nats per byte", lines)], size=(8.6, 3.9), label="losses")


def _modules(findings: Findings) -> str:
    if not findings.swapped_modules:
        return ""
    rows = [
        (row.names, str(row.count), row.original, row.replacement, row.operator, row.backend, row.reason)
        for row in findings.swapped_modules
    ]
    rows += [(name, "", original, "left alone", "", "", reason) for name, original, reason in findings.skipped_modules]
    headings = ("module", ">count", "was", "became", "operator", "backend", "why")
    return (
        "<h2>What was swapped, and what ran it</h2>\n"
        "<p>One call, <code>gptkern.swap(model)</code>, on the model as it is; parameters and checkpoint keys stay. "
        "The backend is what <code>gptkern.explain</code> says of the calls of a training batch.</p>\n"
    ) + _table(headings, rows)


def _int8(findings: Findings) -> str:
    int8 = findings.int8
    if int8 is None:
        return ""
    smaller = [f"{before / after:.2f}×" for before, after in
               ((int8.linear_bytes, int8.linear_bytes_int8), (int8.model_bytes, int8.model_bytes_int8))]  # fmt: skip
    rows = [
        ("swapped", f"{int8.full_loss:.4f}", form.size(int8.linear_bytes), form.size(int8.model_bytes)),
        ("swapped, int8", f"{int8.loss:.4f}", form.size(int8.linear_bytes_int8), form.size(int8.model_bytes_int8)),
        ("", signed(int8.change), *smaller),
    ]
    headings = ("", ">validation loss", f">{int8.layers} linear layers", ">whole model")
    return (
        "<h2>int8 against full precision</h2>\n"
        "<p>Every linear layer of the trained swapped model except the output layer, whose weight is the embedding's, "
        "with int8 weights and a float32 scale for each output channel. The bound on the change is "
        f"{INT8_BOUND:g} nats per byte.</p>\n"
    ) + _table(headings, rows)


def _samples(findings: Findings) -> str:
    if not findings.samples:
        return ""
    parts = [
        "<h2>Samples</h2>\n<p>The same prompt (grey) and the same seed for each. A model this small, trained for this "
        "short, gets the look of the text and many of its words, not its sense.</p>"
    ]
    for sample in findings.samples:
        texts = {"stock": sample.stock, "swapped": sample.swapped, "swapped, int8": sample.int8}
        if sample.stock == sample.swapped:
            texts = {"stock and swapped: the same text": sample.stock, "swapped, int8": sample.int8}
        for title, generated in texts.items():
            rest = _text(generated.removeprefix(sample.prompt))
            parts.append(f'<div class="card">{title}<pre><mark>{_text(sample.prompt)}</mark>{rest}</pre></div>')
    return "\n".join(parts)


def _kernel_check(findings: Findings) -> str:
    check = findings.kernel_check
    if check is None:
        return ""
    rows = [
        (row.operator, row.backend, row.dtype, str(row.passed), str(row.failed),
         f"{row.worst:.2f}" if row.passed + row.failed else form.NONE, str(row.left_out or ""))
        for row in check.rows
    ]  # fmt: skip
    headings = ("operator", "backend", "dtype", ">passed", ">failed", ">worst error / bound", ">cases left out")
    return (
        "<h2>This machine's kernels against float64</h2>\n"
        f"<p>Results and gradients of small cases, {_text(check.note)}, in {check.seconds:.0f} s: {check.passed} "
        f"comparisons passed, {check.failed} failed, {check.left_out} cases left out for lack of time. A comparison "
        "passes up to 1.00 of its bound; <code>gptkern check</code> runs them all.</p>\n"
    ) + _table(headings, rows)


def _environment(findings: Findings) -> str:
    train, held_out = findings.text_bytes
    text = f"{findings.text}: {train:,} bytes to train on, {held_out:,} held out"
    return "<h2>Environment</h2>\n" + _table(
        ("", ""), [*findings.environment, ("text", text), ("this run", f"{findings.seconds:.0f} s")]
    )
