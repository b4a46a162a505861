"""The report of measurements and the figures of the documentation, on a recorded sample of invented numbers.

The sample's numbers are round where they are worked out here by hand: layer_norm in bfloat16 on 32768 rows. A GPU is
not needed, and nothing is measured.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from gptkern.measuring import plots, rates, report, wording
from gptkern.measuring import results as files

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = Path(__file__).parent / "data" / "bench_sample.json"


def _publish():
    specification = importlib.util.spec_from_file_location("publish", ROOT / "bench" / "publish.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


publish = _publish()


@pytest.fixture
def results():
    return files.load(SAMPLE)


def _cell(results, operator, direction, label):
    def names(cell):
        return cell["operator"], cell["direction"], cell["label"]

    return next(cell for cell in results["cells"] if names(cell) == (operator, direction, label))


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
    assert rates.counted([cell]) == "bytes"
    assert rates.rate(cell, _timed(cell, "gptkern")) == pytest.approx(2.68435456e12)
    assert rates.least_seconds(cell, results["ceilings"]) == pytest.approx(33.554432e-6)
    assert rates.share(cell, _timed(cell, "gptkern"), results["ceilings"]) == pytest.approx(0.67108864)
    assert rates.share(cell, _timed(cell, "quack"), results["ceilings"]) == pytest.approx(0.8388608)

    # Causal: 4 * 4 * 16 * 4096^2 / 2 * 128 operations, of a ceiling of 800 TFLOP/s.
    cell = _cell(results, "attention", "forward", "4x16x4096x128 causal")
    taken = files.seconds(_timed(cell, "gptkern"))["median"]
    assert cell["flops"] == 274_877_906_944
    assert rates.rate(cell, _timed(cell, "gptkern")) == pytest.approx(274_877_906_944 / taken)
    assert rates.share(cell, _timed(cell, "gptkern"), results["ceilings"]) == pytest.approx(
        274_877_906_944 / taken / 8e14
    )


def test_int8_counts_bytes_where_memory_is_the_limit_and_operations_where_arithmetic_is(results):
    small = _cell(results, "int8_linear", "forward", "1x12288x4096 w8a8")
    large = _cell(results, "int8_linear", "forward", "4096x12288x4096 w8a8")
    assert rates.counted([small]) == "bytes"
    assert rates.counted([large]) == "ops"
    assert rates.counted([small, large]) == "ops"
    # 12288 * 4096 of the weight and 2 * (12288 + 4096) of one row: 50,364,416 B, at 55 % of 4 TB/s.
    assert small["bytes"] == 50_364_416
    assert rates.share(small, _timed(small, "gptkern"), results["ceilings"]) == pytest.approx(0.55, abs=1e-3)
    assert rates.share(large, _timed(large, "gptkern"), results["ceilings"]) == pytest.approx(0.62, abs=1e-3)


def test_a_missing_ceiling_is_no_share(results):
    cell = _cell(results, "layer_norm", "forward", "32768x1024")
    assert rates.share(cell, _timed(cell, "gptkern"), {}) is None
    assert rates.share(cell, None, results["ceilings"]) is None


@pytest.mark.parametrize(
    ("width", "best", "lead", "outcome"),
    [
        (1024, "quack", 0.8, rates.BEHIND),  # 40 µs to 50 µs
        (4096, "quack", 0.99, rates.LEVEL),  # 158.4 µs to 160 µs: behind by 1 %
        (16384, "Liger-Kernel", 1.05, rates.FASTEST),  # 630 µs to 600 µs; the first of two that are equal
    ],
)
def test_the_best_peer_and_who_is_ahead(results, width, best, lead, outcome):
    cell = _cell(results, "layer_norm", "forward", f"32768x{width}")
    assert files.best_peer(cell)["name"] == best
    assert rates.lead(cell) == pytest.approx(lead)
    assert rates.outcome(cell) == outcome
    assert files.lost(cell) == (outcome == rates.BEHIND)


def test_the_margin_within_which_a_cell_is_not_lost(results):
    cell = _cell(results, "layer_norm", "forward", "32768x1024")
    best = files.seconds(files.best_peer(cell))["median"]
    files.best_peer(cell)["device_s"] |= {"low": best * 0.999, "high": best * 1.001}
    for factor, outcome in ((0.99, rates.FASTEST), (1.019, rates.LEVEL), (1.021, rates.BEHIND)):
        mine = best * factor
        _timed(cell, "gptkern")["device_s"] |= {"median": mine, "low": mine * 0.999, "high": mine * 1.001}
        assert rates.outcome(cell) == outcome


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (0.9, 1.1, rates.BEHIND),  # 1.5 s, 1.4 s to 1.6 s, to a peer's 1 s
        (0.9, 1.4, rates.LEVEL),  # the peer's upper quartile is gptkern's lower one
        (2.1, 2.2, rates.FASTEST),  # a peer of 2.15 s
        (1.6, 2.2, rates.LEVEL),
    ],
)
def test_a_lead_or_a_loss_is_more_than_noise(results, low, high, outcome):
    cell = _cell(results, "layer_norm", "forward", "32768x1024")
    cell["implementations"] = [
        {"name": "gptkern", "timed": "graph", "device_s": {"median": 1.5, "low": 1.4, "high": 1.6, "n": 9}},
        {"name": "eager", "timed": "graph", "device_s": {"median": 1.0 if low < 1 else 2.15, "low": low, "high": high}},
    ]
    cell["limits"] = {}
    results["cells"], results["costs"] = [cell], []
    assert rates.outcome(cell) == outcome
    # The ratio alone is another thing: the widest of losses may be noise.
    assert files.lost(cell) == (low < 1)
    text, line = report.markdown(results, {}), report.summary(results, "").splitlines()[-1]
    row = _row(text, "rows 32768, bfloat16: forward", "32768x1024")
    ratio = "0.67×" if low < 1 else "1.43×"
    if outcome == rates.LEVEL:
        assert (row["rows x width"], row["eager"]) == ("32768x1024", f"{ratio}≈")
        assert line == "| layer_norm | 0 / 1 / 0 | – | – |"
        assert "| layer_norm | forward | 1 | 0 | 1 | 0 |  | – | – |" in text
    elif outcome == rates.BEHIND:
        assert (row["rows x width"], row["eager"]) == ("▼ **32768x1024**", f"**{ratio}**")
        assert line.startswith(f"| layer_norm | 0 / 0 / 1 | – | **{ratio} eager** ▼:")
    else:
        assert (row["rows x width"], row["eager"]) == ("32768x1024", ratio)
        assert line.startswith(f"| layer_norm | 1 / 0 / 0 | {ratio} eager:")


def test_a_peer_that_is_not_the_best_may_be_level(results):
    # Liger-Kernel at 1.10 of gptkern's 50 µs, its quartiles made wide.
    cell = _cell(results, "layer_norm", "forward", "32768x1024")
    peer = _timed(cell, "Liger-Kernel")
    assert rates.outcome(cell, peer) == rates.FASTEST
    peer["device_s"]["low"] = 45e-6
    assert rates.outcome(cell, peer) == rates.LEVEL
    assert rates.outcome(cell) == rates.BEHIND


@pytest.mark.parametrize(("low", "high", "unclear"), [(0.9, 0.99, False), (0.9, 1.0, True), (1.2, 1.3, False)])
def test_a_difference_is_unclear_where_the_quartiles_overlap(low, high, unclear):
    ours, peer = ({"wall_s": {"median": 1, "low": l, "high": h}} for l, h in ((1.0, 1.1), (low, high)))
    assert rates.unclear(ours, peer) == rates.unclear(peer, ours) == unclear


def test_cells_are_counted_by_outcome(results):
    # layer_norm forward: lost, level, ahead; backward: ahead, ahead, lost (eager is faster at 16384).
    cells = [cell for cell in results["cells"] if cell["operator"] == "layer_norm"]
    assert list(rates.tally(cells).values()) == [3, 1, 2, 0, 0]
    assert report.verdict(cells) == (
        "gptkern is fastest in 3 of 6 cells, level with the best peer (within 2%, or within the noise) in 1, "
        "behind in 2"
    )
    # softmax: two ahead; in the third gptkern was wrong and has no time.
    cells = [cell for cell in results["cells"] if cell["operator"] == "softmax"]
    assert list(rates.tally(cells).values()) == [2, 0, 0, 0, 1]
    assert "not timed in 1 (it failed or was wrong)" in report.verdict(cells)
    # Without its peers a cell is neither won nor lost.
    cells[0]["implementations"] = cells[0]["implementations"][:1]
    assert "without a peer in 1" in report.verdict(cells)


def test_the_wall_time_counts_where_there_is_no_device_time(results):
    cell = _cell(results, "layer_norm", "forward", "32768x1024")
    for implementation in cell["implementations"]:
        implementation["device_s"] = None
    # 40 µs * 1.03 + 12 µs to 50 µs * 1.03 + 12 µs.
    assert rates.lead(cell) == pytest.approx(53.2 / 63.5)


def test_promised_limits(results):
    broken = {(promise.where, promise.peer): promise for promise in rates.all_promises(results) if promise.broken}
    assert set(broken) == {("layer_norm backward, 32768x16384", "eager"), ("host time, layer_norm", "F.layer_norm")}
    # 1.02 ms to 0.96 ms, promised 1.05; 20 µs to 5 µs, promised 3.
    assert broken["layer_norm backward, 32768x16384", "eager"].ratio == pytest.approx(1.0625)
    assert broken["host time, layer_norm", "F.layer_norm"].ratio == pytest.approx(4)
    # A limit that is a value: the import takes 0.21 s of 0.3 s.
    value = next(promise for promise in rates.all_promises(results) if promise.where == "import")
    assert (value.limit, value.ratio, value.broken) == (0.3, 0.21, False)
    # Six of layer_norm's cells, two costs.
    assert len(rates.all_promises(results)) == 8


def test_a_promise_to_a_peer_that_is_not_there_is_neither_kept_nor_broken(results):
    cell = _cell(results, "layer_norm", "forward", "32768x1024")
    cell["limits"] = {"flash-attn 3": 1.0}
    assert [(promise.ratio, promise.broken) for promise in rates.promises(cell)] == [(None, False)]
    assert "≤ 1 × flash-attn 3's time: not measured" in report.markdown(results, {})


def test_panels_are_in_order_and_their_cells_rise(results):
    results["cells"].reverse()
    panels = rates.panels(results)
    assert [panel.operator for panel in panels] == sorted(
        (panel.operator for panel in panels), key=rates.OPERATORS.index
    )
    attention = [panel for panel in panels if panel.operator == "attention"]
    assert [panel.direction for panel in attention] == ["forward", "backward"] * 2
    assert all(
        [cell["sizes"]["length"] for cell in panel.cells] == [2**k for k in range(10, 15)] for panel in attention
    )


# --- The report -------------------------------------------------------------------------------------------------------


def test_a_table_says_what_was_measured(results):
    text = report.markdown(results, {})
    row = _row(text, "rows 32768, bfloat16: forward", "32768x1024")
    assert row == {
        "rows x width": "▼ **32768x1024**", "time": "50.0 µs", "spread": "2.0%", "rate": "2,684 GB/s",
        "of the copy ceiling": "67%", "eager": "1.80×", "compile": "1.20×", "Liger-Kernel": "1.10×",
        "quack": "**0.80×**", "best peer": "quack", "eager wall": "63.5 µs", "best peer's": "53.2 µs",
        "peak memory": "67.1 MB", "of best peer's": "0.50×", "promised": "≤ 1.05 × eager's time: 0.56",
    }  # fmt: skip
    row = _row(text, "rows 32768, bfloat16: backward", "32768x16384")
    assert row["rows x width"].startswith("▼")
    assert row["eager"] == "**0.94×**"
    assert row["promised"] == "≤ 1.05 × eager's time: **1.06** ✗"
    # Level is not lost; a peer that no graph holds is marked; another ceiling is named.
    # 158.4 µs and 160 µs, the quartiles 1 % to either side: they overlap.
    assert _row(text, "rows 32768, bfloat16: forward", "32768x4096")["quack"] == "0.99×≈"
    row = _row(text, "4096 to 12288, bfloat16: forward", "4096x12288x4096")
    assert (row["bitsandbytes int8"], row["of the ceiling"]) == ("1.43×†", "62% (int8)")
    assert _row(text, "plain, bfloat16: forward", "4096x65536")["time"] == "**not timed**"


def test_the_report_names_machine_ceilings_command_and_costs(results):
    text = report.markdown(results, {})
    for words in (
        "sm\\_90", "driver 580.00", "PyTorch 2.13.0", "Triton 3.7.1", "commit 0123456789ab with changes on top",
        "2026-01-01", "SM 1980 MHz, memory 3201 MHz", "liger-kernel 0.6.1", "digest of the sources 0123456789ab",
        "spread of gptkern's times: 2.0% in the middle, 2.0% at most",
        "git checkout 0123456789ab", "gptkern bench --out bench/results/sample-gpu-invented",
        "| copy | 4,000 GB/s |", "| bfloat16 | 800 TFLOP/s |", "| int8 | 1,400 TOP/s |",
        "fastest in 8 of 36 cells, level with the best peer (within 2%, or within the noise) in 1, behind in 26, "
        "not timed in 1",
        "at full size results and gradients against eager's in 6 cells: a relative difference of 2.4e-03 at most",
        "6 of 8 kept, **2 broken**, 0 not measured.",
        "≤ 3 × F.layer\\_norm: **4.00** ✗", "≤ 300 ms: kept",
        "the peer's time ÷ gptkern's: above 1.00 gptkern is faster",
    ):  # fmt: skip
        assert words in text, words


def test_each_reason_stands_once(results):
    text = report.markdown(results, {})
    assert text.count("flash\\_attn\\_interface cannot be imported") == 1
    line = (
        "- flash-attn 3: flash\\_attn\\_interface cannot be imported (10 × attention forward, 10 × attention backward)"
    )
    assert line in text
    assert "- **gptkern**: wrong: the output's worst error" in text
    # A bar or a line's end within a reason breaks no table.
    assert "CUDAGraph \\| accessing tensor output of a replay" in text


def test_a_clock_that_fell_is_named(results):
    assert "it fell" not in report.markdown(results, {})
    results["cells"][0]["clocks"] = {"sm_mhz": 1400, "memory_mhz": 3201}
    assert "SM 1400 to 1980 MHz (it fell during the run), memory 3201 MHz" in report.markdown(results, {})


def test_a_sample_says_so_everywhere_and_a_measurement_nowhere(results, capsys):
    text = report.markdown(results, {"softmax": "softmax.svg"})
    tables = re.split(r"^#### ", text, flags=re.MULTILINE)[1:]
    assert len(tables) == len(rates.panels(results))
    assert all(table.split("\n| ")[0].endswith(f"**{report.SAMPLE}**\n") for table in tables)
    head, costs = text[: text.index("## attention")], text[text.index("What is no kernel") :]
    assert report.SAMPLE in head and report.SAMPLE in costs
    report.terminal_table(results)
    assert capsys.readouterr().out.startswith(report.SAMPLE)
    assert report.SAMPLE in report.summary(results, "")
    assert "SAMPLE" in plots.draw(results, "softmax")

    results["sample"] = False
    results["machine"]["device"] = "GPU"
    assert "SAMPLE" not in report.markdown(results, {}) + report.summary(results, "") + plots.draw(results, "softmax")


def test_a_cpu_has_no_columns_of_a_gpu(results):
    results["machine"] |= {"kind": "cpu", "architecture": None, "multiprocessors": None, "driver": None, "cuda": None}
    for cell in results["cells"]:
        cell["clocks"] = None
        for implementation in cell["implementations"]:
            if "skipped" not in implementation:
                implementation |= {"device_s": None, "peak_bytes": None, "timed": "wall", "backend": "torch"}
    text = report.markdown(results, {})
    for words in ("eager wall", "peak memory", "clocks", "driver", "MHz", "†**"):
        assert words not in text
    assert "gptkern ran torch in 35 cells" in text
    assert "8 threads on 16 cores" in text
    assert "OMP_NUM_THREADS=8 gptkern bench" in text


def test_the_terminal_marks_what_is_lost(results, capsys):
    report.terminal_table(results)
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("forward") and "32768x1024 " in line)
    assert re.findall(r"\S+ µs|\S+ GB/s|67%|quack|0\.80×|LOST", row) == [
        "50.0 µs", "2,684 GB/s", "67%", "quack", "0.80×", "LOST",
    ]  # fmt: skip
    assert sum("LOST" in line for line in lines) == 26
    assert any("4096x65536" in line and "FAILED" in line for line in lines)
    assert "BROKEN: host time, layer_norm: 4 x F.layer_norm's, promised 3 x F.layer_norm's" in lines


def test_the_readme_names_the_widest_lead_and_loss(results):
    lines = report.summary(results, "page").splitlines()
    assert len(lines) <= 20
    row = next(line for line in lines if line.startswith("| layer_norm"))
    assert "| 3 / 1 / 2 | 1.34× compile: backward, 32768x1024 bfloat16, 2,369 GB/s, 59% of the copy ceiling |" in row
    assert "**0.80× quack** ▼: forward, 32768x1024 bfloat16, 2,684 GB/s, 67% of the copy ceiling" in row
    assert "✗ 2 promised limits broken" in lines[0]


def test_the_readme_has_a_few_costs_with_their_peers(results):
    table = report.summary(results, "page").split("\n\n")[-1].splitlines()
    assert table == [
        "| what is no kernel | gptkern | peers |",
        "|---|---:|---|",
        "| import | 210 ms | Liger-Kernel: 1.90 s (gptkern takes 0.11×) |",
        "| first call | 500 µs | torch.compile: 9.00 s (gptkern takes 1/18000); "
        "F.layer\\_norm: 400 µs (gptkern takes 1.25×) |",
        "| host time, layer\\_norm | 20.0 µs ✗ | F.layer\\_norm: 5.00 µs (gptkern takes 4.00×) |",
        "| host time, layer\\_norm, to the launch | 60.0 µs | F.layer\\_norm: 10.0 µs (gptkern takes 6.00×) |",
        "| wheel | 181 kB | – |",
    ]
    # What was not measured has no row; a file of costs alone has the table.
    results["costs"] = [cost for cost in results["costs"] if cost["key"] in ("import", "build")]
    results["cells"] = []
    text = report.summary(results, "page")
    assert "no cell has been measured" in text and text.endswith("(gptkern takes 0.11×) |")
    results["costs"] = []
    assert "what is no kernel" not in report.summary(results, "page")


def test_a_time_taken_with_events_is_marked(results, capsys):
    # Every implementation of the training step was timed so; of int8_linear one peer alone.
    text = report.markdown(results, {})
    row = _row(text, "GPT-2 124M, bfloat16: training step", "16x1024")
    assert (row["time"], row["eager"], row["compile"]) == ("36.0 ms†", "1.50×†", "1.14×†")
    row = _row(text, "4096 to 12288, bfloat16: forward", "4096x12288x4096")
    assert row["bitsandbytes int8"].endswith("†") and "†" not in row["time"] + row["compile"]
    assert "†: timed with events around plain calls, no CUDA graph could hold it: gaps between launches count" in text
    report.terminal_table(results)
    out = capsys.readouterr().out
    assert "36.0 ms†" in out and "†: timed with events" in out


@pytest.mark.parametrize("part", ["cells", "ceilings", "costs"])
def test_a_smoke_run_says_loudly_that_it_means_nothing(results, capsys, part):
    def shown():
        report.terminal_table(results)
        return report.markdown(results, {}), report.summary(results, ""), capsys.readouterr().out

    assert not any("SMOKE" in text for text in shown())
    if part == "ceilings":
        results["ceilings"]["copy"]["extent"] = "smoke"
    elif part == "costs":
        results["costs"][0]["extent"] = "smoke"
    else:
        results["cells"][3]["options"] = ["--smoke"]
    assert all(text.count("SMOKE") == 1 and "mean nothing" in text for text in shown())
    # Files that say nothing of it.
    for entry in (*results["cells"], *results["costs"], *results["ceilings"].values()):
        entry.pop("extent", None), entry.pop("options", None)
    assert not any("SMOKE" in text for text in shown())


def test_several_commands_dates_and_choices_of_peers(results):
    def commands():
        text = report.markdown(results, {})
        return [line for line in text.splitlines() if line.startswith("gptkern bench")]

    out = "--out bench/results/sample-gpu-invented"
    results["machine"]["options"] = ["--op", "softmax"]
    # All cells by one command: what the machine's record says.
    assert commands() == [f"gptkern bench --op softmax {out}"]
    for cell in results["cells"][:4]:
        cell |= {"options": ["--op", "attention"], "date": "2026-01-03", "peers_asked": ["eager", "compile"]}
    results["cells"][5]["peers_asked"] = []
    assert commands() == [f"gptkern bench --op attention {out}", f"gptkern bench {out}"]
    text = report.markdown(results, {})
    assert "| measured | 2026-01-01 to 2026-01-03 |" in text
    assert "| peers asked for | eager, compile alone in 4 cells; none in 1 cell |" in text
    assert "In 5 cells not every peer was asked for." in report.summary(results, "")
    for cell in results["cells"]:
        for name in ("options", "date", "peers_asked", "agreement"):
            cell.pop(name, None)
    results["machine"]["date"] = "2026-02-02"
    text = report.markdown(results, {})
    assert commands() == [f"gptkern bench --op softmax {out}"]
    assert "| measured | 2026-02-02 |" in text
    assert "peers asked for" not in text and "at full size" not in text
    assert "was asked for" not in report.summary(results, "")


def test_what_was_in_force_is_named(results):
    assert "| in force |" not in report.markdown(results, {})
    results["machine"] |= {"backend": "triton", "tables": "fedcba987654"}
    text = report.markdown(results, {})
    words = "GPTKERN\\_BACKEND=triton, tables of gptkern tune in the user's cache, digest fedcba987654"
    assert f"| in force | {words} |" in text
    assert "GPTKERN_BACKEND=triton gptkern bench --out" in text


def test_numbers_in_words():
    shown = [wording.times(ratio) for ratio in (1.154, 0.1, 0.0213, 5.5e-5, 0.0)]
    assert shown == ["1.15×", "0.10×", "1/47", "1/18000", "0.00×"]
    shown = [wording.seconds(value) for value in (None, 3.21e-7, 1.234e-5, 9.999e-4, 0.05, 1.5)]
    assert shown == ["–", "0.321 µs", "12.3 µs", "1,000 µs", "50.0 ms", "1.50 s"]
    assert [wording.size(count) for count in (12, 1536, 181_234, 2_500_000_000)] == [
        "12 B",
        "1.54 kB",
        "181 kB",
        "2.50 GB",
    ]
    assert [wording.rate(value, what) for value, what in ((3.5e12, "flops"), (2.5e9, "ops"), (812.4, "tokens"))] == [
        "3.50 TFLOP/s", "2.50 GOP/s", "812 tokens/s",
    ]  # fmt: skip
    assert [wording.percent(share) for share in (None, 0.0004, 0.666, 1.04)] == ["–", "<1%", "67%", "104%"]


# --- The folder and its pictures --------------------------------------------------------------------------------------


def _write(folder, results):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / files.NAME).write_text(json.dumps(results), encoding="utf-8")


def _only(results, *operators):
    chosen = [cell for cell in results["cells"] if cell["operator"] in operators]
    return copy.deepcopy(results | {"cells": chosen})


def test_report_writes_the_tables_and_a_picture_an_operator(results, tmp_path):
    _write(tmp_path, _only(results, "layer_norm", "model"))
    written = report.write(tmp_path)
    assert [path.name for path in written] == ["report.md", "layer_norm.svg", "model.svg"]
    text = written[0].read_text(encoding="utf-8")
    assert "](layer_norm.svg)" in text and "](model.svg)" in text
    for path in written[1:]:
        svg = path.read_text(encoding="utf-8")
        ElementTree.fromstring(svg)
        words = re.sub(r"<[^>]+>", " ", svg)
        for name in ("gptkern", "eager", "compile", "Liger-Kernel", "ceiling", "SAMPLE GPU (invented)"):
            assert name in words, name
        # Nothing that changes from run to run.
        assert "<dc:date>" not in svg
    again = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in report.write(tmp_path)] == again


def test_what_a_picture_shows(results):
    # A panel over several widths is lines; one of a single shape is bars; where the ceiling changes, it is a share.
    layer_norm = plots.drawn(results, "layer_norm")
    assert layer_norm["names"] == ["gptkern", "eager", "compile", "Liger-Kernel", "quack"]
    forward = layer_norm["plots"][0]
    assert (forward["what"], forward["xs"], forward["bars"]) == ("bytes", [1024, 4096, 16384], False)
    assert forward["series"]["gptkern"][0] == [0, *(pytest.approx(134217728 / t) for t in (50e-6, 50.5e-6, 49.5e-6))]
    assert forward["limits"] == [[place, pytest.approx(4e12), "copy"] for place in range(3)]
    assert "quack" not in layer_norm["plots"][1]["series"]
    assert all(plot["bars"] for plot in plots.drawn(results, "softmax")["plots"])
    int8 = plots.drawn(results, "int8_linear")["plots"][0]
    assert int8["what"] == "share"
    assert int8["series"]["gptkern"][0][1] == pytest.approx(55, abs=0.1)
    # A peer that was left out at some shapes has points at the others.
    assert [point[0] for point in int8["series"]["int_mm + dequantise"]] == [2, 3, 4]


def test_a_shape_measured_twice_becomes_bars(results):
    cells = [cell for cell in results["cells"] if cell["operator"] == "layer_norm" and cell["direction"] == "forward"]
    cells[1]["sizes"] = cells[0]["sizes"] | {"rows": 16384}
    cells[1]["label"] = "16384x1024"
    picture = plots.drawn(results | {"cells": cells}, "layer_norm")
    assert picture["plots"][0]["bars"]
    svg = plots.draw(results | {"cells": cells}, "layer_norm")
    assert "16384x1024" in svg and "32768x16384" in svg


def test_no_two_implementations_of_an_operator_look_alike(results):
    for operator in rates.operators(results):
        names = rates.names([cell for cell in results["cells"] if cell["operator"] == operator])
        markers = [plots._style(name, names)[1] for name in names]
        assert len(set(markers)) == len(markers), operator
    unknown = ["gptkern", "a new peer", "another"]
    assert len({plots._style(name, unknown) for name in unknown}) == 3


def test_the_digest_changes_with_what_is_shown_and_with_nothing_else(results):
    before = plots.digest(results, "layer_norm")
    assert plots.embedded_digest(plots.draw(results, "layer_norm")) == before
    other = copy.deepcopy(results)
    other["costs"] = []
    _cell(other, "softmax", "forward", "8192x4096 is_causal")["implementations"][0]["device_s"]["median"] *= 2
    _cell(other, "layer_norm", "forward", "32768x1024")["implementations"][0]["wall_s"]["median"] *= 2
    assert plots.digest(other, "layer_norm") == before
    _cell(other, "layer_norm", "forward", "32768x1024")["implementations"][0]["device_s"]["high"] *= 1.01
    assert plots.digest(other, "layer_norm") != before
    other = copy.deepcopy(results)
    other["ceilings"]["copy"]["value"] *= 1.01
    assert plots.digest(other, "layer_norm") != before
    assert plots.embedded_digest("<svg></svg>") is None


def test_without_matplotlib_the_report_is_written_and_says_so(results, tmp_path, monkeypatch):
    def absent(results, operator):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr(plots, "draw", absent)
    _write(tmp_path, results)
    assert [path.name for path in report.write(tmp_path)] == ["report.md"]
    assert "matplotlib is not installed" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_without_cells_there_is_a_report(results, tmp_path):
    _write(tmp_path, results | {"cells": [], "costs": [], "ceilings": {}})
    assert [path.name for path in report.write(tmp_path)] == ["report.md"]
    assert "No cell has been measured" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 2}', '{"format": 1, "sample": false, "machine": {}}'])
def test_a_bad_file_is_named(tmp_path, content):
    path = tmp_path / files.NAME
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(files.ResultsError, match=re.escape(str(path))):
        report.write(tmp_path)


# --- The documentation ------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, results):
    """A copy of the pages, with the sample's layer_norm and softmax as the results of a device."""
    for page in (publish.PAGE, publish.README):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_bytes((ROOT / page).read_bytes())
    _write(tmp_path / publish.RESULTS / "sample-gpu", _only(results, "layer_norm", "softmax"))
    return tmp_path


def _outside(page: str) -> tuple[str, str]:
    return page.split(publish.BEGIN)[0], page.split(publish.END)[1]


def test_publish_fills_the_pages_and_leaves_the_rest_alone(tree):
    pages = [publish.PAGE, publish.README]
    before = [_outside((tree / page).read_text(encoding="utf-8")) for page in pages]
    pictures = [f"docs/figures/sample-gpu/{operator}.svg" for operator in ("layer_norm", "softmax")]
    assert publish.publish(tree) == [*(page.as_posix() for page in pages), *pictures]
    assert [_outside((tree / page).read_text(encoding="utf-8")) for page in pages] == before
    performance, readme = ((tree / page).read_text(encoding="utf-8") for page in pages)
    assert "](figures/sample-gpu/layer_norm.svg)" in performance
    assert '<a id="sample-gpu"></a>' in performance
    assert "(docs/performance.md#sample-gpu)" in readme
    assert "▼" in performance and "▼" in readme
    # A sample is no measurement of a GPU.
    assert publish.NO_GPU in performance and publish.NO_GPU in readme
    # A second time there is nothing to do.
    assert publish.stale(tree) == []
    assert publish.publish(tree) == []


def test_a_measured_gpu_ends_the_notice_and_a_cpu_does_not(tree, results):
    gpu = _only(results, "softmax") | {"sample": False}
    _write(tree / publish.RESULTS / "cpu", gpu | {"machine": results["machine"] | {"kind": "cpu", "device": "A CPU"}})
    measured = publish._measured(tree)
    assert list(measured) == ["cpu", "sample-gpu"]
    assert publish.NO_GPU + publish.ON_CPUS in publish._readme(measured)
    _write(tree / publish.RESULTS / "gpu", gpu)
    measured = publish._measured(tree)
    assert list(measured) == ["gpu", "cpu", "sample-gpu"]
    assert publish.NO_GPU not in publish._readme(measured) + publish._performance(measured)


@pytest.mark.parametrize("there", [True, False])
def test_without_results_the_pages_say_so(tree, there):
    (tree / publish.RESULTS / "sample-gpu" / files.NAME).unlink()
    (tree / publish.RESULTS / "sample-gpu").rmdir()
    if not there:
        (tree / publish.RESULTS).rmdir()
    publish.publish(tree)
    assert publish.stale(tree) == []
    for page in (publish.PAGE, publish.README):
        assert publish.NO_GPU + publish.NOTHING in (tree / page).read_text(encoding="utf-8")


def test_what_is_stale_is_named(tree, results, capsys, monkeypatch):
    publish.publish(tree)
    monkeypatch.setattr(publish, "ROOT", tree)
    assert publish.main(["--check"]) == 0

    # A number in the results.
    source = tree / publish.RESULTS / "sample-gpu"
    changed = _only(results, "layer_norm", "softmax")
    _cell(changed, "layer_norm", "forward", "32768x1024")["implementations"][0]["device_s"]["median"] = 3.9e-5
    _write(source, changed)
    picture = "docs/figures/sample-gpu/layer_norm.svg: shows other results"
    page = "docs/performance.md: its figures are not those of the results"
    assert publish.stale(tree) == [page, page.replace("docs/performance.md", "README.md"), picture]
    capsys.readouterr()
    assert publish.main(["--check"]) == 1
    assert picture in capsys.readouterr().out
    _write(source, _only(results, "layer_norm", "softmax"))
    assert publish.stale(tree) == []

    # The text between the marks.
    performance = tree / publish.PAGE
    text = performance.read_text(encoding="utf-8")
    performance.write_text(text.replace("2,684 GB/s", "3,684 GB/s"), encoding="utf-8")
    assert publish.stale(tree) == [page]
    performance.write_text(text, encoding="utf-8")

    # A picture that was edited: a number, what stands after it, its seal.
    picture = tree / publish.FIGURES / "sample-gpu" / "layer_norm.svg"
    svg = picture.read_text(encoding="utf-8")
    for edited in (
        svg.replace("32768", "65536"),
        svg.replace("</svg>", "<text>faster</text></svg>"),
        svg + "<!-- more -->\n",
        svg + svg.splitlines(keepends=True)[-1],
        svg.removesuffix(svg.splitlines(keepends=True)[-1]),
    ):
        assert edited != svg
        picture.write_text(edited, encoding="utf-8")
        assert publish.stale(tree) == ["docs/figures/sample-gpu/layer_norm.svg: was changed after it was drawn"]
    assert publish.publish(tree) == ["docs/figures/sample-gpu/layer_norm.svg"]
    assert picture.read_text(encoding="utf-8") == svg

    # A picture that is gone, and one that nothing is left of.
    (tree / publish.FIGURES / "sample-gpu" / "softmax.svg").unlink()
    assert publish.stale(tree) == ["docs/figures/sample-gpu/softmax.svg: is missing"]
    _write(source, _only(results, "layer_norm"))
    other = tree / publish.FIGURES / "other-gpu" / "layer_norm.svg"
    other.parent.mkdir()
    other.write_bytes((tree / publish.FIGURES / "sample-gpu" / "layer_norm.svg").read_bytes())
    assert "docs/figures/other-gpu/layer_norm.svg: no results have it" in publish.stale(tree)
    publish.publish(tree)
    assert not other.exists()
    assert publish.stale(tree) == []


def test_a_page_without_marks_and_a_broken_file_are_named(tree, capsys, monkeypatch):
    monkeypatch.setattr(publish, "ROOT", tree)
    page = tree / publish.PAGE
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace(publish.END, ""), encoding="utf-8")
    assert publish.main([]) == 2
    assert str(page) in capsys.readouterr().err
    page.write_text(text, encoding="utf-8")
    broken = tree / publish.RESULTS / "sample-gpu" / files.NAME
    broken.write_text("{", encoding="utf-8")
    assert publish.main(["--check"]) == 2
    assert str(broken) in capsys.readouterr().err


def test_the_committed_figures_are_those_of_the_committed_results():
    assert publish.stale(ROOT) == [], "run `make figures`"
