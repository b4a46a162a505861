"""`gptkern tune`: the fastest that is right wins, by more than the noise, and is kept at once.

Times are made up by the tests; the checks before them run the kernels, interpreted where there is no GPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from simulated_gpus import H200, simulate
from torch._subclasses.fake_tensor import FakeTensorMode

import gptkern
from gptkern import cli, operators
from gptkern.backends import dispatch
from gptkern.backends.problem import BACKWARD, BFLOAT16, BOTH, FLOAT32, FORWARD, Tuned
from gptkern.backends.tables import files, orders, user
from gptkern.commands import tune as command
from gptkern.measuring import timing, tuning, tuning_tasks, workers
from gptkern.measuring.tuning_tasks import ClassTask, RowTask

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
# The row of few rows of w8a16 with float32 input.
KEY = ("w8a32", 16)


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
    return torch.device(device, 0) if device == "cuda" else torch.device("cpu")


@pytest.fixture
def table():
    return dispatch.load("triton", "int8_linear").TABLE


@pytest.fixture
def task(table):
    """A row with three candidates, at sizes for an interpreter."""
    present = table.defaults(80)[KEY].configuration
    others = (present._replace(BLOCK_N=32), present._replace(num_warps=8), present._replace(num_warps=2))
    sizes = operators.problem("int8_linear").checks()["small"]["w8a16, tails"].sizes
    tuned = Tuned(FORWARD, FLOAT32, sizes, sizes)
    return RowTask("int8_linear", KEY, tuned, present=present, candidates=others)


@pytest.fixture
def class_task():
    sizes = operators.problem("softmax").checks()["small"]["tail"].sizes
    return ClassTask("softmax", (16, 1024, True, False), Tuned(BOTH, BFLOAT16, sizes, sizes))


class Clock:
    """A timer that makes times up: by candidate, in seconds, with a spread."""

    def __init__(self, seconds, spread=0.0, before=lambda: None):
        self.seconds, self.spread, self.before, self.timed = seconds, spread, before, []

    def __call__(self, functions, inputs, rounds):
        self.before()
        self.timed.append([function.candidate for function in functions])
        medians = [self.seconds(function.candidate) for function in functions]
        return [[m - self.spread, m - self.spread, m, m + self.spread, m + self.spread] for m in medians]


def tuned(tasks, device, timer, **options):
    """(the outcomes, the rows that were kept)"""
    kept = []
    keep = lambda task, row, key: kept.append((row, key))  # noqa: E731
    return list(tuning.tune(tasks, device, keep, timer=timer, **options)), kept


@pytest.fixture
def forward_on(monkeypatch, table):
    """forward_on(candidate, change): the kernel's forward is changed while it runs with this tile."""

    def plant(candidate, change):
        kernels = dispatch.load("triton", "int8_linear")
        forward = kernels.forward

        def changed(call):
            with_candidate = table.find(call.input.device, 1, "w8a32") == candidate
            return change(forward, call) if with_candidate else forward(call)

        monkeypatch.setattr(kernels, "forward", changed)

    return plant


# --- One task -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fastest, spread, wins", [(0.97, 0.0, True), (0.985, 0.0, False), (0.90, 0.02, True), (0.90, 0.06, False)]
)
def test_the_fastest_wins_by_more_than_the_noise_and_is_kept(task, where, fastest, spread, wins):
    best = task.candidates[2]
    clock = Clock(lambda candidate: 1e-3 * (fastest if candidate == best else 1.0), spread * 1e-3)
    (outcome,), ((row, key),) = tuned([task], where, clock)
    assert outcome.chosen == (best if wins else task.present) and not outcome.dropped
    assert clock.timed == [[task.present, *task.candidates]]
    # That the present one is the best is a result as well.
    gain = round(1 / fastest, 3) if wins else 1.0
    assert row == task.table.row(KEY, outcome.chosen, {"gain": gain, "on": "5x70->37 float32"})
    assert key == ("kernel", "rows")


def test_what_is_wrong_or_does_not_run_gets_no_time(task, where, forward_on):
    def refuses(forward, call):
        raise RuntimeError("out of resource: shared memory\nand more")

    forward_on(task.candidates[0], lambda forward, call: forward(call) + 0.5)
    forward_on(task.candidates[1], refuses)
    clock = Clock(lambda candidate: 1e-6 if candidate in task.candidates[:2] else 1e-3)
    (outcome,), _ = tuned([task], where, clock)
    assert outcome.chosen == task.present and clock.timed == [[task.present, task.candidates[2]]]
    assert [drop.candidate for drop in outcome.dropped] == list(task.candidates[:2])
    assert "forward: worst error" in outcome.dropped[0].reason
    assert outcome.dropped[1].reason.endswith("out of resource: shared memory")
    # Where the present one is wrong there is nothing to compare with.
    forward_on(task.present, lambda forward, call: forward(call) + 1)
    (outcome,), kept = tuned([task], where, clock)
    assert outcome.chosen is None and not kept and "forward: worst error" in outcome.note


@pytest.mark.parametrize(
    "times, order, ratio",
    [
        (dict(triton=1.0, torch=1.5), ["triton", "torch"], 1.5),
        (dict(triton=1.5, torch=1.0), ["torch", "triton"], 1.5),
        (dict(triton=1.01, torch=1.0), ["triton", "torch"], 1.0),
    ],
)
def test_the_order_of_the_backends_and_dispatch_follows_it(class_task, where, times, order, ratio):
    if dispatch.unavailable("cuda", where) is None:
        times, order = times | dict(cuda=9.0), [*order, "cuda"]
    (outcome,) = tuning.tune([class_task], where, tuning.keep_for_user(H200), timer=Clock(times.get))
    assert outcome.chosen == tuple(order)
    row = dict(bits=16, width=1024, last=True, fused=False, order=order, ratio=ratio, on="7x33 bfloat16")
    assert user.read(H200).content["backends"] == {"softmax": [row]}
    assert orders.preferences("softmax", H200)[class_task.key].order[: len(order)] == tuple(order)


def test_a_kernel_that_is_wrong_is_not_compared(class_task, where, monkeypatch):
    forward = dispatch.load("triton", "softmax").forward
    monkeypatch.setattr(dispatch.load("triton", "softmax"), "forward", lambda call: forward(call) * 2)
    (outcome,), kept = tuned([class_task], where, Clock(lambda name: 1.0))
    assert outcome.chosen is None and not kept and outcome.dropped[0].candidate == "triton"


# --- A run ----------------------------------------------------------------------------------------------------------


def test_the_time_is_respected_and_a_timing_that_fails_does_not_end_the_run(task, where, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tuning.time, "monotonic", lambda: now[0])

    def ten_seconds():
        now[0] += 10
        if now[0] == 10:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    again = [dataclasses.replace(task) for _ in range(4)]
    outcomes, kept = tuned(again, where, Clock(lambda candidate: 1e-3, before=ten_seconds), seconds=15)
    assert [type(outcome).__name__ for outcome in outcomes] == ["Outcome", "Outcome", "Left", "Left"]
    assert outcomes[0].chosen is None and "stream is capturing" in outcomes[0].note
    assert outcomes[1].chosen == task.present and len(kept) == 1
    assert outcomes[2].task is again[2] and outcomes[3].task is again[3]


def test_what_was_found_is_in_force_at_once_and_known_to_the_next_run(task, table, where, monkeypatch):
    fastest, calls = task.candidates[2], []

    def interrupted_second():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    clock = Clock(lambda candidate: 1e-4 if candidate == fastest else 2e-4, before=interrupted_second)
    run = tuning.tune([task, task], where, tuning.keep_for_user(H200), timer=clock)
    next(run)
    with pytest.raises(KeyboardInterrupt):
        next(run)
    gpu = simulate(monkeypatch, ("NVIDIA H200", (9, 0)))
    assert table.find(gpu, 16, "w8a32") == fastest
    # The next run begins with what is not measured yet.
    tasks = tuning.plan(("int8_linear", "softmax"), gpu)
    assert (tasks[-1].operator, tasks[-1].key, tasks[-1].present) == ("int8_linear", KEY, fastest)
    assert [task.known for task in tasks].count(True) == 1


@pytest.mark.parametrize("operator", operators.NAMES)
def test_every_operators_backends_pass_the_check_in_every_direction(operator, where):
    sizes = next(iter(operators.problem(operator).checks()["small"].values())).sizes
    if operator == "attention":  # 150 long: too much for an interpreter four times
        sizes = sizes._replace(heads=1, kv_heads=1, length_q=9, length_k=9, head_dim=16)
    for direction in (FORWARD, BACKWARD, BOTH)[: 1 if operator in ("quantize_int8", "adamw") else 3]:
        task = ClassTask(operator, (), Tuned(direction, FLOAT32, sizes, sizes))
        (outcome,), _ = tuned([task], where, clock := Clock(lambda name: 1.0))
        assert not outcome.dropped and {"triton", "torch"} <= set(*clock.timed)


# --- Climbing -------------------------------------------------------------------------------------------------------


@pytest.fixture
def climbing(task, table):
    """The row with all of its neighbours, which have neighbours of their own."""
    around = tuning_tasks.candidates(table, KEY, task.present, 80)
    return dataclasses.replace(task, candidates=around, architecture=80)


def test_it_climbs_until_no_neighbour_wins(climbing, where, monkeypatch):
    """The best has four times the present one's BLOCK_N and a stage more: three steps away, each by one move."""
    present = climbing.present
    best = present._replace(BLOCK_N=present.BLOCK_N * 4, num_stages=present.num_stages + 1)
    assert best not in climbing.candidates
    checked, wrong = [], tuning.wrong
    monkeypatch.setattr(tuning, "wrong", lambda variant, device: checked.append(variant.candidate) and None)

    def seconds(candidate):
        apart = [abs(math.log2(value / wanted)) for value, wanted in zip(candidate, best)]
        return 1e-3 * 1.1 ** sum(apart)

    clock = Clock(seconds)
    (outcome,), ((row, _),) = tuned([climbing], where, clock)
    assert outcome.chosen == best and not outcome.note and row["block_n"] == best.BLOCK_N
    assert outcome.gain == pytest.approx(seconds(present) / 1e-3), "of all steps together"
    centres = [timed[0] for timed in clock.timed]
    assert centres[0] == present and centres[-1] == best and len(centres) >= 3
    others = [candidate for timed in clock.timed for candidate in timed[1:]]
    assert len(set(others)) == len(others) and not set(others) & {present}, "nothing is tried twice but the best so far"
    assert set(checked) == {present, *others} and wrong(tuning.Variant(climbing, best), where) is None
    # Where nothing wins there is one step.
    flat = Clock(lambda candidate: 1e-3)
    assert tuned([climbing], where, flat)[0][0].chosen == present and len(flat.timed) == 1


def test_climbing_ends_with_the_time_and_keeps_what_it_has(climbing, where, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tuning.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tuning, "wrong", lambda variant, device: None)
    fastest = climbing.candidates[1]

    def ten_seconds():
        now[0] += 10

    clock = Clock(lambda candidate: 1e-4 if candidate == fastest else 2e-4, before=ten_seconds)
    (outcome,), kept = tuned([climbing], where, clock, seconds=5)
    assert outcome.chosen == fastest and outcome.gain == 2 and len(kept) == len(clock.timed) == 1
    assert outcome.note == "the time was up before its own neighbours were tried"


def test_compiled_instances_are_tried_a_dozen_at_a_time():
    table = SimpleNamespace(instances=lambda *key: range(30))
    first = tuning_tasks.candidates(table, (), 0, 80)
    second = tuning_tasks.candidates(table, (), 5, 80, tried={0, *first})
    assert (first, second) == (tuple(range(1, 13)), tuple(range(13, 25)))


# --- In processes of their own --------------------------------------------------------------------------------------


@pytest.mark.deep
def test_candidates_are_tried_in_other_processes(task, class_task, where, monkeypatch):
    """The real kernels; a tile that is no power of two does not compile, and is named."""
    impossible = task.present._replace(BLOCK_N=3)
    two = dataclasses.replace(task, candidates=(task.candidates[0], impossible))
    monkeypatch.setattr(tuning, "wrong", lambda *_: pytest.fail("it was tried in this process"))
    clock = Clock(lambda candidate: 1e-3)
    with tuning.Trials(2) as trials:
        assert trials.refused(where) is None
        outcomes, kept = tuned([two, class_task], where, clock, trials=trials)
    assert clock.timed[0] == [task.present, task.candidates[0]] and set(clock.timed[1]) >= {"triton", "torch"}
    (drop,) = outcomes[0].dropped
    assert drop.candidate == impossible and not drop.lost and "power of 2" in drop.reason and len(kept) == 2


def test_what_costs_its_process_the_gpu_is_named_and_the_rest_goes_on(task, where, capsys, monkeypatch):
    """The reply of a process that died, without the process: what one says is above."""
    killer, fastest = task.candidates[:2]

    class Trials(tuning.Trials):
        def run(self, calls):
            died = workers.Died("the GPU answers no more: CUDA error: an illegal memory access was encountered")
            yield from ((place, died if call[1] == killer else None) for place, call in enumerate(calls))

    monkeypatch.setattr(tuning, "Trials", Trials)
    monkeypatch.setattr(command, "_gpu", lambda name: where)
    monkeypatch.setattr(user, "identify", lambda device: H200)
    monkeypatch.setattr(tuning, "plan", lambda operators, device: [task, task])
    run = tuning.tune
    clock = Clock(lambda candidate: {killer: 1e-9, fastest: 1e-4}.get(candidate, 2e-4))
    monkeypatch.setattr(tuning, "tune", lambda *given, **more: run(*given, **more, timer=clock))
    assert cli.main(["tune", "--jobs", "2"]) == 1
    printed = capsys.readouterr()
    name = command._text(killer)
    assert printed.out.count(f"  LOST {name}: the GPU answers no more: CUDA error") == 2
    assert printed.err.count(f"{task.name}, {name}: the GPU answers no more") == 2
    assert all(killer not in timed for timed in clock.timed) and "(2.00 x faster)" in printed.out
    assert user.read(H200).content["configurations"], "what was measured is kept"


def test_a_gpu_that_this_process_loses_ends_the_run_with_what_ran(task, where, capsys, monkeypatch):
    now = [0]

    def alive(device):
        now[0] += 1
        if now[0] == lost_at:
            raise timing.DeviceLost("the GPU answers no more: an illegal memory access")

    monkeypatch.setattr(timing, "alive", alive)
    checked, wrong = [], tuning.wrong
    monkeypatch.setattr(tuning, "wrong", lambda variant, on: checked.append(variant.candidate) or wrong(variant, on))
    clock = Clock(lambda candidate: 1e-3)
    lost_at = 2
    with pytest.raises(
        timing.DeviceLost, match=r"int8_linear on triton, .* after .*: the GPU answers no more"
    ) as error:
        tuned([task], where, clock)
    assert str(task.candidates[0]) in str(error.value)
    assert checked == [task.present, task.candidates[0]], "nothing runs on it any more"
    # In a process of its own the same is what it says of itself.
    lost_at = now[0] + 1
    with pytest.raises(workers.Fatal, match="the GPU answers no more"):
        tuning.trial(task, task.candidates[0], str(where))
    monkeypatch.setattr(command, "_gpu", lambda name: where)
    monkeypatch.setattr(user, "identify", lambda device: H200)
    monkeypatch.setattr(tuning, "plan", lambda operators, device: [task])
    monkeypatch.setattr(tuning.Trials, "refused", lambda self, device: "the GPU is for one process alone")
    lost_at = now[0] + 4
    assert cli.main(["tune"]) == 1
    printed = capsys.readouterr()
    assert "one after another, since another cannot start: the GPU is for one process alone" in printed.out
    assert printed.err.startswith("gptkern tune: int8_linear on triton, ") and printed.err.count("\n") == 1
    assert printed.err.endswith("; what was found before is kept\n")


# --- What is planned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [80, 90, 120])
@pytest.mark.parametrize("operator", operators.NAMES)
def test_every_row_has_a_task_that_reaches_it(operator, architecture):
    """With candidates that a file may hold and that the part has memory for."""
    problem = operators.problem(operator)
    limit = tuning_tasks.SHARED_MEMORY.get(architecture, tuning_tasks.LEAST_SHARED_MEMORY)
    for table in tuning_tasks.tables((operator,)):
        rows = table.defaults(architecture)
        tasks = list(tuning_tasks.row_tasks(table, architecture, rows))
        assert [(task.key, task.present) for task in tasks] == [(key, row.configuration) for key, row in rows.items()]
        for task in tasks:
            # A tile of one row on one warp at its least has fewer neighbours; a compiled kernel may have no other tile.
            least = 2 if table.instances is None else 0
            assert least <= len(task.candidates) <= tuning_tasks.MOST_CANDIDATES, task.name
            assert len({task.present, *task.candidates}) == len(task.candidates) + 1
            for candidate in task.candidates:
                table._rows("candidates", [table.row(task.key, candidate, {})], "")
                assert problem.sensible(task.key, candidate)
                assert table.instances or problem.shared_memory(table.backend, task.key, candidate) <= limit
            # The calls' sizes are served by this row and not by the one before.
            named = [place for place, values in enumerate(table.key.values()) if values is not None]
            alike = [key for key in rows if all(key[place] == task.key[place] for place in named)]
            for place, name in enumerate(table.key):
                if place not in named and hasattr(task.tuned.timed, name):
                    most = task.key[place] or math.inf
                    below = max((key[place] for key in alike if (key[place] or math.inf) < most), default=0)
                    sizes = (getattr(each, name) for each in (task.tuned.checked, task.tuned.timed))
                    assert all(below < size <= most for size in sizes), f"{task.name}: {name}"


@pytest.mark.parametrize("wrt, launched", [(("query",), {"query"}), (("key", "value"), {"key_value"})], ids=str)
def test_a_backward_runs_the_kernel_that_its_row_is_of(where, monkeypatch, wrt, launched):
    table = dispatch.load("triton", "attention").TABLE
    sizes = operators.problem("attention").checks()["small"]["causal"].sizes._replace(length_q=5, length_k=5)
    task = RowTask("attention", (), Tuned(BACKWARD, FLOAT32, sizes, sizes, wrt))
    variant = tuning.Variant(task, None)
    inputs = variant.inputs(torch.Generator(where).manual_seed(1))
    found, find = set(), table.find
    monkeypatch.setattr(table, "find", lambda device, size, *key: found.add(key[0]) or find(device, size, *key))
    assert len(variant(*inputs)) == len(wrt) and found == launched


def test_the_candidates_of_compiled_kernels_are_their_instances():
    listed = {("forward", None): (16, 48, 80)}
    table = SimpleNamespace(instances=lambda *key: listed[key])
    assert tuning_tasks.candidates(table, ("forward", None), 48, 80) == (16, 80)


@pytest.mark.parametrize("operator", operators.NAMES)
def test_a_class_is_timed_by_a_call_of_that_class(operator, monkeypatch):
    """What dispatch is asked for is of the class that the result is kept for; the sizes are a GPU's, so it is faked."""
    problem, found = operators.problem(operator), []

    def chosen(name, call):
        found.append((name, problem.classes.of(call) if name == operator else None))
        return dispatch.Choice("torch", ""), None

    monkeypatch.setattr(dispatch, "chosen", chosen)
    monkeypatch.setattr(dispatch, "settled", lambda tensor: None)
    tasks = list(tuning_tasks.class_tasks(operator))
    assert len(tasks) >= 3
    for task in tasks:
        with FakeTensorMode(), torch.no_grad():
            made = problem.inputs(task.tuned.timed, task.tuned.dtype, torch.Generator())
            operators.contract(operator).TWIN(**dict(zip(made.names, made.arguments)), **made.options)
        assert found[0] == (operator, task.key), task.name
        found.clear()


# --- What ships -----------------------------------------------------------------------------------------------------


def test_shipped_adds_an_entry_of_the_device(task, table, where, tmp_path, monkeypatch):
    shipped = files.shipped("int8_linear", "triton")
    path = tmp_path / shipped.relative_to(files.PACKAGE)
    path.parent.mkdir(parents=True)
    before = json.loads(shutil.copy(shipped, path).read_text())["entries"]
    for of, name, value in ((files, "PACKAGE", tmp_path), (table, "path", path), (table, "entries", table.entries)):
        monkeypatch.setattr(of, name, value)
    fastest = task.candidates[0]
    for seconds in (lambda candidate: 1e-3, lambda candidate: 1e-4 if candidate == fastest else 2e-4):
        list(tuning.tune([task], where, tuning.keep_shipped(H200), timer=Clock(seconds)))
    *others, entry = json.loads(path.read_text())["entries"]
    assert others == before and [row["gain"] for row in entry["rows"]] == [2.0], "the row is replaced"
    assert (entry["device"], entry["architecture"], entry["date"]) == (*H200, tuning.today())
    assert entry["versions"] == user.versions() and user.written() == []
    assert table.measured(H200)[0].rows[KEY].configuration == fastest


# --- The command ----------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_lists_what_it_would_do_and_measures_nothing(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: pytest.fail("it measured"))
    assert cli.main(["tune"]) == cli.main(["tune", "--reset"]) == 2
    assert cli.main(["tune", "--dry-run", "--op", "attention"]) == 0
    output = capsys.readouterr().out
    table = dispatch.load("triton", "attention").TABLE
    tasks = list(tuning_tasks.row_tasks(table, 90, table.defaults(90)))
    assert all(task.name in output for task in tasks) and "softmax" not in output
    assert output.count("  against  ") == sum(len(task.candidates) for task in tasks) > 100
    assert user.written() == []


def test_tune_keeps_what_it_finds_and_show_and_reset_see_it(where, task, class_task, capsys, monkeypatch):
    # The command sees an H200, whose kernels run where the tests run.
    monkeypatch.setattr(command, "_gpu", lambda name: where)
    monkeypatch.setattr(user, "identify", lambda device: H200)
    monkeypatch.setattr(tuning, "plan", lambda operators, device: [task, class_task])
    clock = Clock(lambda candidate: 1e-4 if candidate in (task.candidates[0], "torch") else 2e-4)
    monkeypatch.setattr(tuning.Trials, "refused", lambda self, device: "the processes are tried above")
    run, path = tuning.tune, user.path(H200)
    monkeypatch.setattr(tuning, "tune", lambda *given, **more: run(*given, **more, timer=clock))

    def told(*arguments):
        assert cli.main(["tune", *arguments]) == 0
        return capsys.readouterr().out

    assert "(2.00 x faster)" in told("--seconds", "60") and path.exists()
    output = told("--show", "--op", "int8_linear", "--op", "softmax")
    assert f"measured by you on {tuning.today()}, 2.00 x faster on 5x70->37 float32" in output
    assert "measured 2.00 x faster than triton on NVIDIA H200" in output
    assert str(path) in told("--reset") and not path.exists()
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: iter([tuning.Left(task), tuning.Left(task)]))
    assert "int8_linear 2" in told("--seconds", "5"), "what the time did not reach is said"
