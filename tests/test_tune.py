"""`gptkern tune`: the fastest that is right wins, by more than the noise, and is kept at once.

Times are made up by the tests; the checks before them run the kernels, interpreted where there is no GPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gptkern
from gptkern import cli
from gptkern.backends import dispatch
from gptkern.backends.tables import backends, configurations, files, shape_classes, user
from gptkern.commands import tune as command
from gptkern.measuring import timing, tuning, tuning_tasks
from gptkern.measuring.tuning_tasks import BACKWARD, BFLOAT16, BOTH, FLOAT32, FORWARD, ClassTask, RowTask, Shape

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
H200 = user.Device("NVIDIA H200", 90)
CPU = torch.device("cpu")
KEY = ("forward", 16)


@pytest.fixture(autouse=True)
def the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTKERN_CACHE", str(tmp_path / "cache"))
    # The candidates here are Triton's and PyTorch's.
    monkeypatch.delenv("GPTKERN_EMULATE_CUDA", raising=False)
    dispatch.forget()
    with gptkern.backend(None):
        yield
    dispatch.forget()


@pytest.fixture
def where(device):
    return torch.device(device, 0) if device == "cuda" else CPU


@pytest.fixture
def table():
    return dispatch.load("triton", "layer_norm").TABLE


@pytest.fixture
def task(table):
    """The row of narrow layer_norms, with three candidates, at sizes for an interpreter."""
    present = table.defaults(80)[KEY].configuration
    others = (present._replace(block_rows=64), present._replace(num_warps=8), present._replace(num_warps=2))
    shape = Shape("layer_norm", (5, 9, False, True), BFLOAT16)
    return RowTask("layer_norm", KEY, FORWARD, shape, shape, "5x9 bfloat16", (), present=present, candidates=others)


class Clock:
    """A timer that makes times up: by candidate, in seconds, with a spread."""

    def __init__(self, seconds, spread=0.0, before=None):
        self.seconds, self.spread, self.before = seconds, spread, before
        self.timed = []

    def __call__(self, functions, inputs, rounds):
        if self.before is not None:
            self.before()
        self.timed.append([function.candidate for function in functions])
        medians = [self.seconds(function.candidate) for function in functions]
        return [[m - self.spread, m - self.spread, m, m + self.spread, m + self.spread] for m in medians]


class Kept:
    """Collects what is handed over to be kept."""

    def __init__(self):
        self.rows = []

    def __call__(self, part, operator, row, key):
        self.rows.append((part, operator, row, key))


def tuned(tasks, device, timer, **options):
    kept = Kept()
    return list(tuning.tune(tasks, device, kept, timer=timer, **options)), kept.rows


# --- Rows -----------------------------------------------------------------------------------------------------------


def test_the_fastest_candidate_is_chosen_and_kept(task, where):
    fastest = task.candidates[1]
    clock = Clock(lambda candidate: 1e-4 if candidate == fastest else 2e-4)
    (outcome,), kept = tuned([task], where, clock)
    assert outcome.chosen == fastest and outcome.gain == pytest.approx(2.0) and not outcome.dropped
    assert clock.timed == [[task.present, *task.candidates]]
    expected = dict(
        kernel="forward", width=16, block_rows=128, block_width=16, num_warps=8, gain=2.0, on="5x9 bfloat16"
    )
    assert kept == [("configurations", "layer_norm", expected, ("kernel", "width"))]


@pytest.mark.parametrize(
    "fastest, spread, wins",
    [(0.97, 0.0, True), (0.985, 0.0, False), (0.90, 0.02, True), (0.90, 0.06, False), (1.0, 0.0, False)],
    ids=["3 % faster", "1.5 % faster", "10 % faster, 4 % of noise", "10 % faster, 12 % of noise", "as fast"],
)
def test_a_gain_within_the_noise_changes_nothing(task, where, fastest, spread, wins):
    clock = Clock(lambda candidate: 1e-3 * (fastest if candidate == task.candidates[2] else 1.0), spread * 1e-3)
    (outcome,), kept = tuned([task], where, clock)
    assert outcome.chosen == (task.candidates[2] if wins else task.present)
    assert (outcome.gain > 1) == wins
    # That the present one is the best is a result as well.
    assert kept[0][2]["gain"] == pytest.approx(outcome.gain, abs=1e-3)


def test_a_wrong_candidate_gets_no_time(task, table, where, monkeypatch):
    kernels = dispatch.load("triton", "layer_norm")
    forward, planted = kernels.forward, task.candidates[0]

    def spoiled(input, *rest):
        output, *others = forward(input, *rest)
        if table.find(input.device, input.shape[-1], "forward") == planted:
            output[0, 0] += 0.5
        return output, *others

    monkeypatch.setattr(kernels, "forward", spoiled)
    clock = Clock(lambda candidate: 1e-6 if candidate == planted else 1e-3)
    (outcome,), _ = tuned([task], where, clock)
    assert outcome.chosen == task.present and planted not in clock.timed[0]
    assert [drop.candidate for drop in outcome.dropped] == [planted]
    assert "forward: worst error" in outcome.dropped[0].reason


def test_a_candidate_that_does_not_run_is_dropped_with_its_error(task, table, where, monkeypatch):
    kernels = dispatch.load("triton", "layer_norm")
    forward, planted = kernels.forward, task.candidates[0]

    def refusing(input, *rest):
        if table.find(input.device, input.shape[-1], "forward") == planted:
            raise RuntimeError("out of resource: shared memory\nand more")
        return forward(input, *rest)

    monkeypatch.setattr(kernels, "forward", refusing)
    (outcome,), _ = tuned([task], where, Clock(lambda candidate: 1e-3))
    ((candidate, reason),) = outcome.dropped
    assert candidate == planted and "out of resource" in reason and "\n" not in reason


def test_a_present_configuration_that_is_wrong_is_said_and_nothing_is_kept(task, where, monkeypatch):
    kernels = dispatch.load("triton", "layer_norm")
    forward = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *call: (forward(*call)[0] + 1, *forward(*call)[1:]))
    (outcome,), kept = tuned([task], where, Clock(lambda candidate: 1e-3))
    assert outcome.chosen is None and not kept
    assert "the present configuration: forward: worst error" in outcome.note


def test_a_timing_that_fails_is_said_and_the_next_task_goes_on(task, where):
    calls = []

    def first_fails():
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    outcomes, kept = tuned([task, task], where, Clock(lambda candidate: 1e-3, before=first_fails))
    assert [outcome.chosen for outcome in outcomes] == [None, task.present] and len(kept) == 1
    assert "stream is capturing" in outcomes[0].note


def test_the_time_is_respected(task, where, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tuning.time, "monotonic", lambda: now[0])

    def ten_seconds():
        now[0] += 10

    again = [dataclasses.replace(task, on=str(number)) for number in range(4)]
    clock = Clock(lambda candidate: 1e-3, before=ten_seconds)
    outcomes, kept = tuned(again, where, clock, seconds=15)
    assert [type(outcome).__name__ for outcome in outcomes] == ["Outcome", "Outcome", "Left", "Left"]
    assert [outcome.task.on for outcome in outcomes[2:]] == ["2", "3"] and len(kept) == 2


def test_what_was_found_is_kept_before_the_next_begins(task, where):
    calls = []

    def interrupted_second():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    keep = tuning.keep_for_user(H200)
    run = tuning.tune([task, task], where, keep, timer=Clock(lambda candidate: 1e-3, before=interrupted_second))
    next(run)
    with pytest.raises(KeyboardInterrupt):
        next(run)
    assert user.read(H200).content["configurations"]["layer_norm"][0]["on"] == "5x9 bfloat16"


def test_what_a_user_measured_is_in_force_on_that_device(task, table, where, monkeypatch):
    fastest = task.candidates[2]
    clock = Clock(lambda candidate: 1e-4 if candidate == fastest else 2e-4)
    list(tuning.tune([task], where, tuning.keep_for_user(H200), timer=clock))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    gpu = torch.device("cuda", 0)
    table._steps.clear()
    assert table.find(gpu, 16, "forward") == fastest
    row = table.in_force(gpu)[KEY]
    assert row.source == f"measured by you on {tuning.today()}" and row.measured["gain"] == 2.0
    # The next run begins with what is not measured yet, be it of another operator or a class.
    tasks = tuning.plan(("layer_norm", "softmax"), gpu)
    assert (tasks[-1].operator, tasks[-1].key, tasks[-1].present) == ("layer_norm", KEY, fastest)
    assert [task.known for task in tasks].count(True) == 1


# --- Every direction runs ---------------------------------------------------------------------------------------------

TINY = {
    "attention": (1, 2, 1, 5, 5, 16, True),
    "layer_norm": (3, 9, True, True),
    "rms_norm": (3, 9, True),
    "softmax": ((3, 9), -1, 0.5, None, False),
    "int8_linear": (3, 20, 16, "gelu", "w8a8"),
    "quantize_int8": (3, 9, -1),
}


@pytest.mark.parametrize(
    "operator, direction",
    [(operator, FORWARD) for operator in TINY]
    + [(operator, direction) for operator in TINY if operator != "quantize_int8" for direction in (BACKWARD, BOTH)],
)
def test_what_is_timed_is_the_operators_own_result(operator, direction, where):
    shape = Shape(operator, TINY[operator], FLOAT32)
    task = ClassTask(operator, (), direction, shape, shape, "tiny")
    variants = [tuning.Variant(task, name, lambda name=name: dispatch.backend(name)) for name in ("triton", "torch")]
    inputs = variants[0].inputs(torch.Generator(where).manual_seed(1))
    assert any(isinstance(value, torch.Tensor) for value in inputs), "timing sees by a tensor where it is"
    results = [tuning._tuple(variant(*inputs)) for variant in variants for _ in range(2)]
    if direction != FORWARD:
        assert len(results[0]) == len(shape.build(torch.Generator(where)).tensors), "a gradient of every argument"
    for others in results[1:]:
        for ours, theirs in zip(results[0], others, strict=True):
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("wrt, launched", [(("query",), {"query"}), (("key", "value"), {"key_value"})], ids=str)
def test_a_backward_runs_the_kernel_that_its_row_is_of(where, monkeypatch, wrt, launched):
    kernels = dispatch.load("triton", "attention")
    shape = Shape("attention", TINY["attention"], FLOAT32)
    task = RowTask("attention", (), BACKWARD, shape, shape, "tiny", wrt)
    variant = tuning.Variant(task, None, lambda: dispatch.backend("triton"))
    inputs = variant.inputs(torch.Generator(where).manual_seed(1))
    found, find = set(), kernels.TABLE.find

    def recorded(device, size, *key):
        found.add(key[0])
        return find(device, size, *key)

    monkeypatch.setattr(kernels.TABLE, "find", recorded)
    assert len(variant(*inputs)) == len(wrt)
    assert found == launched


def test_the_benchs_timer_takes_the_variants(task, where):
    (outcome,), kept = tuned([dataclasses.replace(task, candidates=())], where, timing.durations, rounds=3)
    assert outcome.chosen == task.present and outcome.seconds[task.present] > 0 and kept


# --- Classes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def class_task():
    shape = Shape("softmax", ((3, 9), -1, 1.0, None, False), BFLOAT16)
    return ClassTask("softmax", (16, 1024, True, False), BOTH, shape, shape, "3x9 bfloat16")


@pytest.mark.parametrize(
    "times, order, ratio",
    [
        (dict(triton=1.0, torch=1.5), ["triton", "torch"], 1.5),
        (dict(triton=1.5, torch=1.0), ["torch", "triton"], 1.5),
        (dict(triton=1.01, torch=1.0), ["triton", "torch"], 1.0),
    ],
    ids=["a kernel", "PyTorch", "within the margin"],
)
def test_the_order_of_the_backends(class_task, where, times, order, ratio):
    if dispatch.unavailable("cuda", where) is None:
        times = times | dict(cuda=9.0)
        order = [*order, "cuda"]
    (outcome,), kept = tuned([class_task], where, Clock(times.get))
    assert outcome.chosen == tuple(order)
    row = dict(bits=16, width=1024, last=True, fused=False, order=order, ratio=ratio, on="3x9 bfloat16")
    assert kept == [("backends", "softmax", row, ("bits", "width", "last", "fused"))]


def test_a_kernel_that_is_wrong_is_not_compared(class_task, where, monkeypatch):
    kernels = dispatch.load("triton", "softmax")
    forward = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *call: forward(*call) * 2)
    (outcome,), kept = tuned([class_task], where, Clock(lambda name: 1.0))
    assert outcome.chosen is None and not kept and outcome.dropped[0].candidate == "triton"


def test_dispatch_follows_what_was_measured(class_task, where, monkeypatch):
    clock = Clock(dict(triton=2.0, torch=1.0, cuda=3.0).get)
    list(tuning.tune([class_task], where, tuning.keep_for_user(H200), timer=clock))
    preference = backends.preferences("softmax", H200)[class_task.key]
    assert preference.order[0] == "torch"
    assert preference.reason == f"measured 2.00 x faster than triton on NVIDIA H200, {tuning.today()}"


# --- What is planned --------------------------------------------------------------------------------------------------

SIZE = {"attention": 5, "layer_norm": 1, "rms_norm": 1, "rotary": 3, "int8_linear": 0, "quantize_int8": 1}


@pytest.mark.parametrize("architecture", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("operator", tuning_tasks.OPERATORS)
def test_every_row_has_a_task_that_reaches_it(operator, architecture):
    table = tuning_tasks.tables((operator,))[operator]
    rows = table.defaults(architecture)
    tasks = tuning_tasks.row_tasks(operator, architecture, rows)
    assert [task.key for task in tasks] == list(rows)
    limit = tuning_tasks.SHARED_MEMORY.get(architecture, tuning_tasks.LEAST_SHARED_MEMORY)
    steps = configurations.stepped(rows)
    for task in tasks:
        assert task.present == rows[task.key].configuration
        # A tile of one row on one warp at its least has fewer neighbours.
        assert 2 <= len(task.candidates) <= tuning_tasks.MOST_CANDIDATES, task.name
        assert len({task.present, *task.candidates}) == len(task.candidates) + 1
        listed = [table.row(task.key, candidate, {}) for candidate in task.candidates]
        for row in listed:
            table._rows("candidates", [row], "")  # a file may hold it
        assert all(tuning_tasks.shared_memory(operator, task.key, each) <= limit for each in task.candidates)
        for shape in (task.checked, task.timed):
            if operator == "softmax":
                size = shape.sizes[0][shape.sizes[1]]
            else:
                size = shape.sizes[SIZE[operator]]
            bounds = [most for most, _ in steps.get(task.key[:-1], ())]
            found = min((most for most in bounds if size <= most), default=math.inf)
            assert found == (math.inf if task.key[-1] is None else task.key[-1]), f"{task.name}: {shape}"


def test_a_part_with_less_shared_memory_gets_smaller_candidates():
    table = tuning_tasks.tables(("attention",))["attention"]
    key = ("forward", 16, 128)
    large = table.defaults(90)[key].configuration._replace(block_n=128)
    on_hopper = tuning_tasks.candidates("attention", key, large, 90)
    on_workstation = tuning_tasks.candidates("attention", key, large, 120)
    assert set(on_workstation) < set(on_hopper)
    # (128 queries + 2 * 3 stages * 128 keys) * 128 * 2 bytes
    assert tuning_tasks.shared_memory("attention", key, large) == (128 + 2 * 3 * 128) * 128 * 2


@pytest.mark.parametrize("operator", tuning_tasks.OPERATORS)
def test_a_class_is_timed_by_a_call_of_that_class(operator, monkeypatch):
    """What dispatch is asked for is of the class that the result is kept for; the sizes are a GPU's, so it is faked."""
    found = []

    def chosen(name, *call):
        if name == operator:
            found.append(shape_classes.CLASSES[operator].of(*call))
        return dispatch.Choice("torch", "")

    monkeypatch.setattr(dispatch, "choose", chosen)
    monkeypatch.setattr(dispatch, "settled", lambda tensor: None)
    tasks = tuning_tasks.class_tasks(operator)
    assert len({task.key for task in tasks}) == len(tasks)
    for task in tasks:
        with FakeTensorMode(), torch.no_grad():
            problem = task.timed.build(torch.Generator())
            problem.twin(*problem.tensors.values())
        assert found.pop(0) == task.key, task.name
        found.clear()


def test_classes_that_were_measured_are_known():
    every = tuning_tasks.class_tasks("softmax")
    again = tuning_tasks.class_tasks("softmax", {every[1].key})
    assert [task.known for task in again] == [False, True] + [False] * (len(every) - 2)


def test_a_plan_measures_rows_before_classes(where):
    tasks = tuning.plan(("softmax", "layer_norm"), where)
    kinds = [type(task) for task in tasks]
    assert kinds == sorted(kinds, key=[RowTask, ClassTask].index) and set(kinds) == {RowTask, ClassTask}
    assert {task.operator for task in tasks} == {"softmax", "layer_norm"}


# --- What ships -------------------------------------------------------------------------------------------------------


@pytest.fixture
def a_copy(tmp_path, monkeypatch, table):
    """The files that ship, in a folder where they may be written."""
    folder = tmp_path / "tables"
    folder.mkdir()
    for path in files.FOLDER.glob("*.json"):
        shutil.copy(path, folder)
    monkeypatch.setattr(files, "FOLDER", folder)
    monkeypatch.setattr(table, "path", folder / "layer_norm.json")
    monkeypatch.setattr(table, "entries", table.entries)
    dispatch.forget()
    return folder


def test_shipped_adds_an_entry_of_the_device(task, class_task, table, where, a_copy, monkeypatch):
    fastest = task.candidates[0]
    clock = Clock(lambda candidate: 1e-4 if candidate in (fastest, "torch") else 2e-4)
    before = (a_copy / "layer_norm.json").read_text()
    list(tuning.tune([task, class_task], where, tuning.keep_shipped(H200), timer=clock))
    assert user.written() == []
    text = (a_copy / "layer_norm.json").read_text()
    content = json.loads(text)
    assert text == files.text(content) and text.startswith(before.rstrip("\n]} "))
    entry = content["entries"][-1]
    assert (entry["device"], entry["architecture"], entry["date"]) == ("NVIDIA H200", 90, tuning.today())
    assert entry["versions"] == user.versions() and len(entry["rows"]) == 1
    assert table.measured(H200)[0].rows[KEY].configuration == fastest
    assert backends.shipped().entries[H200]["softmax"][class_task.key].order[0] == "torch"
    # Again, with another result: the row is replaced. With other versions: the entry is.
    clock.seconds = lambda candidate: 1e-3
    list(tuning.tune([dataclasses.replace(task, present=task.present)], where, tuning.keep_shipped(H200), timer=clock))
    (entry,) = [e for e in json.loads((a_copy / "layer_norm.json").read_text())["entries"] if e.get("device")]
    assert len(entry["rows"]) == 1 and entry["rows"][0]["gain"] == 1.0
    monkeypatch.setattr(user, "versions", lambda: {"gptkern": "9", "torch": "9", "triton": "9"})
    other = dataclasses.replace(task, key=("forward", 32), present=table.defaults(80)["forward", 32].configuration)
    list(tuning.tune([dataclasses.replace(other, candidates=())], where, tuning.keep_shipped(H200), timer=clock))
    (entry,) = [e for e in json.loads((a_copy / "layer_norm.json").read_text())["entries"] if e.get("device")]
    assert [row["width"] for row in entry["rows"]] == [32] and entry["versions"]["torch"] == "9"


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def a_gpu(monkeypatch, where):
    """The command sees an H200, whose kernels run where the tests run."""
    monkeypatch.setattr(command, "_gpu", lambda name: where)
    monkeypatch.setattr(user, "identify", lambda device: H200)


def test_without_a_gpu_it_says_so_and_exits_with_2(no_gpu, capsys):
    assert cli.main(["tune"]) == 2
    assert cli.main(["tune", "--reset"]) == 2
    printed = capsys.readouterr()
    assert printed.out.count("there is nothing to choose") == 1 and "--reset removes the file of one GPU" in printed.err
    assert cli.main(["tune", "--dry-run", "--architecture", "42"]) == 2
    assert "--architecture 42: it needs 80 or more" in capsys.readouterr().err
    assert user.written() == []


def test_dry_run_lists_every_candidate_without_a_gpu(no_gpu, capsys, monkeypatch):
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: pytest.fail("a dry run measured"))
    assert cli.main(["tune", "--dry-run", "--op", "attention"]) == 0
    output = capsys.readouterr().out
    tasks = tuning_tasks.row_tasks("attention", 90, tuning_tasks.tables(("attention",))["attention"].defaults(90))
    assert all(task.name in output for task in tasks) and "softmax" not in output
    assert output.count("  against  ") == sum(len(task.candidates) for task in tasks) > 100
    assert "sm_90: " in output.splitlines()[-1]
    assert cli.main(["tune", "--dry-run", "--op", "attention", "--architecture", "80"]) == 0
    assert "sm_80: " in capsys.readouterr().out.splitlines()[-1]


def test_show_says_where_each_row_comes_from(no_gpu, capsys):
    assert cli.main(["tune", "--show"]) == 0
    output = capsys.readouterr().out
    for words in ("attention", "quantize_int8", "reasoned, compiled without spills", "cuda, triton, torch", "sm_90"):
        assert words in output


def test_tune_keeps_what_it_finds_and_show_and_reset_see_it(a_gpu, task, class_task, capsys, monkeypatch):
    monkeypatch.setattr(tuning, "plan", lambda operators, device: [task, class_task])
    fastest = task.candidates[0]
    clock = Clock(lambda candidate: 1e-4 if candidate in (fastest, "torch") else 2e-4)
    run = tuning.tune
    monkeypatch.setattr(tuning, "tune", lambda *given, **more: run(*given, **more, timer=clock))
    assert cli.main(["tune", "--seconds", "60"]) == 0
    output = capsys.readouterr().out
    path = user.path(H200)
    assert "NVIDIA H200, sm_90: 2 choices" in output and str(path) in output
    assert "chosen: block_rows 64 block_width 16 num_warps 4 (2.00 x faster)" in output
    assert "chosen: torch before triton" in output and "2 of 2 choices gain time" in output
    assert path.exists()
    assert cli.main(["tune", "--show", "--op", "layer_norm", "--op", "softmax"]) == 0
    output = capsys.readouterr().out
    assert f"your file: {path}" in output
    assert f"measured by you on {tuning.today()}, 2.00 x faster on 5x9 bfloat16" in output
    assert "measured 2.00 x faster than triton on NVIDIA H200" in output
    assert cli.main(["tune", "--reset"]) == 0
    assert f"removed {path}" in capsys.readouterr().out and not path.exists()
    assert cli.main(["tune", "--reset"]) == 0
    assert "nothing was measured here" in capsys.readouterr().out
    assert cli.main(["tune", "--show", "--op", "layer_norm"]) == 0
    assert "measured by you" not in capsys.readouterr().out


def test_time_that_is_up_says_what_was_left_out(a_gpu, task, capsys, monkeypatch):
    left = [tuning.Left(task), tuning.Left(task)]
    monkeypatch.setattr(tuning, "plan", lambda operators, device: [task, task])
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: iter(left))
    assert cli.main(["tune", "--seconds", "5"]) == 0
    assert "not measured, because 5 s were over: layer_norm 2" in capsys.readouterr().out


def test_show_says_why_a_file_is_ignored(a_gpu, capsys, monkeypatch):
    user.put(H200, "configurations", "layer_norm", {"kernel": "forward"}, ("kernel",), "2026-11-22")
    monkeypatch.setattr(user, "versions", lambda: {"gptkern": "9", "torch": "9", "triton": "9"})
    dispatch.forget()
    assert cli.main(["tune", "--show", "--op", "softmax"]) == 0
    assert "is ignored: it was made for gptkern" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:gptkern")
def test_a_folder_that_cannot_be_written_is_a_message(a_gpu, task, capsys, monkeypatch, tmp_path):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("GPTKERN_CACHE", str(tmp_path / "taken"))
    monkeypatch.setattr(tuning, "plan", lambda operators, device: [dataclasses.replace(task, candidates=())])
    run = tuning.tune
    monkeypatch.setattr(tuning, "tune", lambda *given, **more: run(*given, **more, timer=Clock(lambda candidate: 1e-3)))
    assert cli.main(["tune"]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--op", "polish"], "invalid choice: 'polish'"),
        (["--show", "--reset"], "not allowed with"),
        (["--device", "cpu"], "there is something to choose on a GPU alone"),
        (["--device", "warp:9"], "--device warp:9"),
    ],
)
def test_arguments_that_make_no_sense_exit_with_2(arguments, words, capsys):
    try:
        status = cli.main(["tune", *arguments])
    except SystemExit as exit:
        status = exit.code
    assert status == 2 and words in capsys.readouterr().err


def test_without_triton_it_is_a_message(no_gpu, capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "load", lambda *_: (_ for _ in ()).throw(ImportError("No module named 'triton'")))
    assert cli.main(["tune", "--show"]) == 2
    assert "there are no kernels to tune: No module named 'triton'" in capsys.readouterr().err
