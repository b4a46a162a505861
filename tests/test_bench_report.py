"""What the report says of measurements, and the figures of the documentation, on a recorded sample of invented numbers.

The sample's numbers are round where they are worked out here by hand: layer_norm in bfloat16 on 32768 rows.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest

from gptkern import formatting as form
from gptkern.measuring import plots, rates, report
from gptkern.measuring import results as files

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = Path(__file__).parent / "data" / "bench_sample.json"

_specification = importlib.util.spec_from_file_location("publish", ROOT / "bench" / "publish.py")
publish = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(publish)


@pytest.fixture
def results():
    return files.load(SAMPLE)


def _cell(results, operator, direction, label):
    return next(
        c for c in results["cells"] if (c["operator"], c["direction"], c["label"]) == (operator, direction, label)
    )


def _timed(cell, name):
    return rates.implementation(cell, name)


def _row(text, heading, label):
    """heading -> cell of the row of `label` in the table under `heading`."""
    lines = text[text.index(heading) :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    split = [[part.strip() for part in line.strip("| ").split(" | ")] for line in lines[start:]]
    return dict(zip(split[0], next(row for row in split[2:] if label in row[0])))


# --- What a file says -------------------------------------------------------------------------------------------------


def test_rates_and_shares_are_the_work_over_the_time(results):
    # 4 bytes an element (one read, one written, 16 bits each): 134,217,728 B in 50 µs.
    cell = _cell(results, "layer_norm", "forward", "32768x1024")
    assert rates.rate(cell, _timed(cell, "gptkern")) == pytest.approx(2.68435456e12)
    assert rates.least_seconds(cell, results["ceilings"]) == pytest.approx(33.554432e-6)
    assert rates.share(cell, _timed(cell, "gptkern"), results["ceilings"]) == pytest.approx(0.67108864)
    assert rates.share(cell, _timed(cell, "quack"), results["ceilings"]) == pytest.approx(0.8388608)
    assert rates.share(cell, _timed(cell, "gptkern"), {}) is rates.share(cell, None, results["ceilings"]) is None
    # Causal: 4 * 4 * 16 * 4096^2 / 2 * 128 operations, of a ceiling of 800 TFLOP/s.
    cell = _cell(results, "attention", "forward", "4x16x4096x128 causal")
    taken = rates.median(_timed(cell, "gptkern"))
    share = rates.share(cell, _timed(cell, "gptkern"), results["ceilings"])
    assert share == pytest.approx(274_877_906_944 / taken / 8e14)

    # int8 counts bytes where memory is the limit, and operations where arithmetic is.
    small = _cell(results, "int8_linear", "forward", "1x12288x4096 w8a8")
    large = _cell(results, "int8_linear", "forward", "4096x12288x4096 w8a8")
    assert [rates.unit(cells) for cells in ([small], [large], [small, large])] == ["B/s", "OP/s", "OP/s"]
    # 12288 * 4096 of the weight and 2 * (12288 + 4096) of one row: 50,364,416 B, at 55 % of 4 TB/s.
    assert rates.share(small, _timed(small, "gptkern"), results["ceilings"]) == pytest.approx(0.55, abs=1e-3)
    assert rates.share(large, _timed(large, "gptkern"), results["ceilings"]) == pytest.approx(0.62, abs=1e-3)


def test_the_best_peer_and_who_is_ahead(results):
    for width, best, lead, outcome in (
        (1024, "quack", 0.8, rates.BEHIND),  # 40 µs to 50 µs
        (4096, "quack", 0.99, rates.LEVEL),  # 158.4 µs to 160 µs: behind by 1 %
        (16384, "Liger-Kernel", 1.05, rates.FASTEST),  # 630 µs to 600 µs; the first of two that are equal
    ):
        cell = _cell(results, "layer_norm", "forward", f"32768x{width}")
        assert rates.best_peer(cell)["name"] == best and rates.outcome(cell) == outcome
        assert rates.lead(cell) == pytest.approx(lead)
    # The wall time counts where there is no device time: 630 µs * 1.03 + 12 µs to 600 µs * 1.03 + 12 µs.
    for implementation in cell["implementations"]:
        implementation["device_s"] = None
    assert rates.lead(cell) == pytest.approx(660.9 / 630)


@pytest.mark.parametrize(
    ("mine", "peer", "outcome"),
    [
        # (median, low, high)
        ((1.5, 1.4, 1.6), (1.0, 0.9, 1.1), rates.BEHIND),
        ((1.5, 1.4, 1.6), (1.0, 0.9, 1.4), rates.LEVEL),  # the peer's upper quartile is gptkern's lower one
        ((1.5, 1.4, 1.6), (2.1, 2.0, 2.2), rates.FASTEST),
        ((1.019, 1.018, 1.02), (1.0, 0.999, 1.001), rates.LEVEL),  # within the margin
        (None, (1.0, 0.9, 1.1), rates.FAILED),
        ((1.5, 1.4, 1.6), None, rates.ALONE),
    ],
)
def test_a_lead_or_a_loss_is_more_than_noise(results, mine, peer, outcome):
    def timed(name, time):
        return {"name": name, "device_s": dict(zip(("median", "low", "high"), time))} if time else {"name": name}

    cell = _cell(results, "layer_norm", "forward", "32768x1024")
    cell["implementations"] = [timed("gptkern", mine), timed("eager", peer)]
    assert rates.outcome(cell) == outcome
    assert rates.tally([cell, cell]) == {outcome: 2}


def test_what_is_noisy_or_host_bound_is_marked_and_has_no_verdict(results):
    cell = _cell(results, "layer_norm", "forward", "32768x1024")
    mine, best = _timed(cell, "gptkern"), _timed(cell, "quack")
    assert rates.outcome(cell) == rates.BEHIND and "▼ **32768x1024**" in report.markdown(results, {})
    best["noisy"] = "its quartiles are far apart"
    _cell(results, "layer_norm", "forward", "32768x4096")["implementations"][0]["host_bound"] = True
    cost = next(cost for cost in results["costs"] if cost["key"] == "host time, layer_norm")
    cost["noisy"] = "others had half of the processor"
    assert rates.outcome(cell) == rates.NOISY
    text = report.markdown(results, {})
    row, bound = (_row(text, "rows 32768, bfloat16: forward", f"32768x{width}") for width in (1024, 4096))
    assert row["quack"].endswith("~") and not row["time"].endswith("~") and bound["time"].endswith("‡")
    assert "▼ **32768x1024**" not in text and "not told in 1 (the times are noisy)" in text
    ends = text[text.index("Times that say less") :]
    assert "- ~ quack: layer\\_norm forward, 32768x1024: its quartiles are far apart" in ends
    assert "- **‡ gptkern**: host-bound (1 × layer\\_norm forward)" in ends
    assert "- ~ host time, layer\\_norm: others had half of the processor" in ends
    said = report.terminal(results)
    assert "NOISY: layer_norm forward, 32768x1024 bfloat16: its quartiles are far apart" in said
    assert (
        "HOST-BOUND: layer_norm forward, 32768x4096 bfloat16" in said
        and "LOST: layer_norm forward, 32768x1024" not in said
    )
    # No promise is broken, nor kept, by a time that says little.
    assert "host time, layer_norm" not in {promise.where for promise in rates.promises(results) if promise.broken}
    best["noisy"], mine["noisy"] = None, "it too"
    row = _row(report.markdown(results, {}), "rows 32768, bfloat16: forward", "32768x1024")
    assert rates.outcome(cell) == rates.NOISY and row["time"].endswith("~")
    cell["limits"] = {"quack": 1.0}
    assert [promise.measured for promise in rates.promises(results) if promise.peer == "quack"] == [None]


def test_promised_limits(results):
    broken = {promise.where: promise.measured for promise in rates.promises(results) if promise.broken}
    # 1.02 ms to 0.96 ms, promised 1.05; 20 µs to 5 µs, promised 3.
    assert broken == pytest.approx({"layer_norm backward, 32768x16384": 1.0625, "host time, layer_norm": 4})
    # A limit that is a value: the import takes 0.21 s of 0.3 s. Six of layer_norm's cells, two costs.
    assert rates.Promise("import", None, 0.3, 0.21) in rates.promises(results)
    assert len(rates.promises(results)) == 8
    _cell(results, "layer_norm", "forward", "32768x1024")["limits"] = {"flash-attn 3": 1.0}
    assert [p.broken for p in rates.promises(results) if p.measured is None] == [False], "a peer that is not there"


def test_panels_are_in_order_and_their_cells_rise(results):
    assert sum(len(panel.cells) for panel in rates.panels(results)) == len(results["cells"])
    results["cells"].reverse()
    attention = rates.by_operator(results)["attention"]
    assert [panel.direction for panel in attention] == ["forward", "backward"] * 2
    for panel in attention:
        assert [cell["sizes"]["length"] for cell in panel.cells] == [2**k for k in range(10, 15)]


# --- The report -------------------------------------------------------------------------------------------------------


def test_a_table_says_what_was_measured(results):
    text = report.markdown(results, {})
    assert _row(text, "rows 32768, bfloat16: forward", "32768x1024") == {
        "rows x width": "▼ **32768x1024**", "time": "50.0 µs", "spread": "2.0%", "rate": "2,684 GB/s",
        "of the copy ceiling": "67%", "eager": "1.80×", "compile": "1.20×", "Liger-Kernel": "1.10×",
        "quack": "**0.80×**", "best peer": "quack", "eager wall": "63.5 µs", "best peer's": "53.2 µs",
        "peak memory": "67.1 MB", "of best peer's": "0.50×",
    }  # fmt: skip
    # 158.4 µs and 160 µs, the quartiles 1 % to either side: they overlap.
    assert _row(text, "rows 32768, bfloat16: forward", "32768x4096")["quack"] == "0.99×≈"
    # A peer that no graph holds is marked; of two ceilings the cell's is shown.
    row = _row(text, "4096 to 12288, bfloat16: forward", "4096x12288x4096")
    assert (row["bitsandbytes int8"], row["of the int8 ceiling"], row["of the copy ceiling"]) == ("1.43×†", "62%", "–")
    assert _row(text, "plain, bfloat16: forward", "4096x65536")["time"] == "–"
    assert "| layer_norm | forward | 3 | 1 | 1 | **1** ▼ |" in text and "fastest in 8 of 36 cells" in text


def test_where_the_numbers_come_from(results):
    results["cells"][0] |= {"clocks": {"sm_mhz": 1400, "memory_mhz": 3201}, "options": ["--rounds", "9"]}
    results["machine"] |= {"backend": "triton", "tables": "fedcba987654"}
    text = report.markdown(results, {})
    for words in (
        "driver 580.00", "commit 0123456789ab with changes on top", "SM 1400 to 1980 MHz (it fell", "fedcba987654",
        "GPTKERN\\_BACKEND=triton gptkern bench --rounds 9",
    ):  # fmt: skip
        assert words in text


def test_the_terminal_names_what_is_lost(results):
    lines = report.terminal(results).splitlines()
    assert "LOST: layer_norm forward, 32768x1024 bfloat16: 0.80× of quack" in lines
    assert sum("LOST" in line for line in lines) == 26
    assert "BROKEN: host time, layer_norm: 4 × F.layer_norm's, promised 3 × F.layer_norm's" in lines


def test_numbers_in_words():
    shown = [form.times(ratio) for ratio in (1.154, 0.1, 0.0213, 5.5e-5, None)]
    assert shown == ["1.15×", "0.10×", "1/47", "1/18000", "–"]
    shown = [form.seconds(value) for value in (None, 3.21e-7, 1.234e-5, 9.999e-4, 0.05, 1.5)]
    assert shown == ["–", "0.321 µs", "12.3 µs", "1,000 µs", "50.0 ms", "1.50 s"]
    shown = [form.size(count) for count in (12, 1536, 181_234, 2_500_000_000)]
    assert shown == ["12 B", "1.54 kB", "181 kB", "2.50 GB"]
    shown = [form.rate(*rate) for rate in ((3.5e12, "FLOP/s"), (2.5e9, "OP/s"), (812.4, "tokens/s"), (3e12, "B/s"))]
    assert shown == ["3.50 TFLOP/s", "2.50 GOP/s", "812 tokens/s", "3,000 GB/s"]
    assert [form.percent(share) for share in (None, 0.0004, 0.666, 1.04)] == ["–", "<1%", "67%", "104%"]


# --- Pictures and files -----------------------------------------------------------------------------------------------


def _write(folder, results):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / files.NAME).write_text(json.dumps(results), encoding="utf-8")


def _only(results, *operators):
    return copy.deepcopy(results | {"cells": [cell for cell in results["cells"] if cell["operator"] in operators]})


def test_what_a_picture_shows(results):
    forward, _ = plots.plots_of(results, "layer_norm")
    assert (forward["unit"], forward["ticks"]) == ("B/s", ["1024", "4096", "16384"])
    assert forward["series"]["gptkern"][0] == (0, *(pytest.approx(134217728 / t) for t in (50e-6, 50.5e-6, 49.5e-6)))
    assert forward["limits"] == {place: pytest.approx(4e12) for place in range(3)}
    # Where the ceiling changes, it is a share; a peer that was left out at some shapes has points at the others.
    (int8,) = plots.plots_of(results, "int8_linear")
    assert int8["unit"] == plots.PERCENT and int8["series"]["gptkern"][0][1] == pytest.approx(55, abs=0.1)
    assert [place for place, *_ in int8["series"]["int_mm + dequantise"]] == [2, 3, 4]


def test_report_without_matplotlib_or_cells(results, tmp_path, monkeypatch):
    def absent(results):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr(plots, "draw_all", absent)
    for found in (results, results | {"cells": [], "costs": [], "ceilings": {}}):
        _write(tmp_path, found)
        assert [path.name for path in report.write(tmp_path)] == ["report.md"]


# --- The documentation ------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, results):
    """A copy of the page, with the sample's layer_norm and softmax as the results of a device."""
    (tmp_path / publish.PAGE).parent.mkdir()
    (tmp_path / publish.PAGE).write_bytes((ROOT / publish.PAGE).read_bytes())
    _write(tmp_path / publish.RESULTS / "sample-gpu", _only(results, "layer_norm", "softmax"))
    return tmp_path


def test_publish_fills_the_page_and_leaves_the_rest_alone(tree, results):
    def outside():
        page = (tree / publish.PAGE).read_text(encoding="utf-8")
        return page.split(publish.BEGIN)[0], page.split(publish.END)[1]

    before = outside()
    pictures = [f"docs/figures/sample-gpu/{operator}.svg" for operator in ("layer_norm", "softmax")]
    assert publish.stale(tree, write=True) == [publish.PAGE.as_posix(), *pictures]
    assert outside() == before and publish.stale(tree) == []
    page = (tree / publish.PAGE).read_text(encoding="utf-8")
    assert "](figures/sample-gpu/layer_norm.svg)" in page and "▼" in page and publish.NO_GPU not in page
    # A CPU alone is no measurement of the kernels.
    _write(
        tree / publish.RESULTS / "sample-gpu",
        _only(results, "softmax") | {"machine": results["machine"] | {"kind": "cpu"}},
    )
    publish.stale(tree, write=True)
    assert publish.NO_GPU + publish.ON_CPUS in (tree / publish.PAGE).read_text(encoding="utf-8")


def test_publish_shows_the_memory_of_the_loss_beside_the_results(tree, results):
    path = tree / publish.RESULTS / "sample-gpu" / publish.LOSS_MEMORY
    machine = results["machine"] | {"date": "2031-02-03", "commit": "0123456789abcdef", "dirty": True, "threads": 7}
    measured = [
        {"implementation": "gptkern", "peak": 50e6, "processor": 30.0},
        {"implementation": "eager", "peak": 1e9, "processor": 40.0},
        {"implementation": "pytorch", "missing": "none | here"},
    ]
    sizes = {"rows": 4096, "width": 8, "classes": 50257, "dtype": "bfloat16", "repeats": 1}
    found = {"format": 1, "machine": machine, "sizes": sizes, "least": 12_000_000, "implementations": measured}
    path.write_text(json.dumps(found))
    publish.stale(tree, write=True)
    page = (tree / publish.PAGE).read_text(encoding="utf-8")
    heading = "### The loss at the end of a model: 4,096 tokens, width 8, 50,257 classes, bfloat16"
    assert page.index("sample-gpu") < page.index(heading) < page.index(publish.END)
    section = page[page.index(heading) :]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    assert [line[1:] for line in lines] == [
        ["50.0 MB", "1/20", "30.0 s", "0.75×"],
        ["1.00 GB", "1.00×", "40.0 s", "1.00×"],
        ["none \\| here", "–", "–", "–"],
    ]
    assert "12.0 MB" in section and "2031-02-03" in section and "0123456789ab, with changes" in section
    # Without eager there is nothing to compare with.
    path.write_text(json.dumps(found | {"implementations": measured[:1]}))
    assert "| 50.0 MB | – | 30.0 s | – |" in publish.loss_memory(path)
    for broken in ("{", "[]", json.dumps(found | {"format": 2}), json.dumps(found | {"sizes": {"rows": 1}})):
        path.write_text(broken)
        with pytest.raises(files.ResultsError, match=r"loss_memory\.json.*bench/loss_memory\.py"):
            publish.stale(tree)


def test_what_is_stale_is_named(tree, results, monkeypatch):
    publish.stale(tree, write=True)
    monkeypatch.setattr(publish, "ROOT", tree)
    assert publish.main(["--check"]) == 0
    page, folder = publish.PAGE.as_posix(), "docs/figures/sample-gpu"

    source = tree / publish.RESULTS / "sample-gpu"
    changed = _only(results, "layer_norm", "softmax")
    _cell(changed, "layer_norm", "forward", "32768x1024")["implementations"][0]["device_s"]["high"] *= 1.1
    _write(source, changed)
    assert publish.stale(tree) == [page, f"{folder}/layer_norm.svg"]
    assert publish.main(["--check"]) == 1
    _write(source, _only(results, "layer_norm", "softmax"))

    # The text between the marks.
    text = (tree / publish.PAGE).read_text(encoding="utf-8")
    (tree / publish.PAGE).write_text(text.replace("2,684 GB/s", "3,684 GB/s"), encoding="utf-8")
    assert publish.stale(tree, write=True) == [page]
    picture = tree / folder / "layer_norm.svg"
    text = picture.read_text(encoding="utf-8")
    assert not publish.same(text, text.replace(">Liger-Kernel<", ">Liger<"))

    # A picture that is gone, and one that nothing is left of.
    picture.unlink()
    _write(source, _only(results, "layer_norm"))
    assert publish.stale(tree)[1:] == [f"{folder}/layer_norm.svg", f"{folder}/softmax.svg: no results have it"]
    publish.stale(tree, write=True)
    assert picture.exists() and not (tree / folder / "softmax.svg").exists() and publish.stale(tree) == []


def test_the_committed_figures_are_those_of_the_committed_results():
    assert publish.stale(ROOT) == [], "run `make figures`"
