"""The tables that measurements fill: their files, whose rows count on which device, and what dispatch makes of them."""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import os
import warnings
from typing import NamedTuple

import pytest
import torch
from simulated_gpus import H200, simulate, users_file

import gptkern
import gptkern.functional as G
from gptkern import operators
from gptkern.backends import dispatch
from gptkern.backends.tables import configurations, files, orders, user
from gptkern.backends.tables.configurations import Table
from gptkern.measuring import tuning_tasks

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CPU = torch.device("cpu")


class Tile(NamedTuple):
    block_m: int
    num_warps: int
    num_stages: int
    chunk: int | None


def a_row(kernel="forward", width=64, **changes):
    return dict(kernel=kernel, width=width, block_m=64, num_warps=4, num_stages=3, chunk=None) | changes


def an_entry(*rows, architecture=80, **more):
    return dict(architecture=architecture, source="reasoned") | more | dict(rows=list(rows))


def measured_on(device, *rows, architecture=90):
    more = dict(device=device, date="2026-11-22", versions={"triton": "3.7.1"})
    return an_entry(*rows, architecture=architecture, **more) | {"source": "measured by gptkern tune"}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """table(*entries) -> the Table of a file with these entries."""
    monkeypatch.setattr(configurations, "TABLES", {})

    def read(*entries, sizes=("width",), **options):
        path = tmp_path / "polish.json"
        listed = list(entries or [an_entry(a_row(), a_row(width=None, block_m=128))])
        files.write(path, dict(operator=options.pop("operator", "polish"), why=[], entries=listed))
        key = {"kernel": ("forward", "backward"), **dict.fromkeys(sizes)}
        return Table("polish", key, Tile, optional=("chunk",), path=path, **options)

    return read


@pytest.fixture(autouse=True)
def the_users_folder(tmp_path, monkeypatch):
    """Nobody's own cache is read or written, and no test sees what another one left in memory."""
    monkeypatch.setenv("GPTKERN_CACHE", str(tmp_path / "cache"))
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.fixture
def an_h200(monkeypatch):
    """As if cuda:0 were an H200, and cuda:1 a GPU that nobody measured."""
    return simulate(monkeypatch, ("NVIDIA H200", (9, 0)), ("NVIDIA H900", (10, 3)))


# --- What ships -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", operators.NAMES)
def test_shipped_files_are_laid_out_as_tune_writes_them_and_say_what_was_not_measured(operator):
    for path in files.shipped(operator, "backends").parent.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        assert text == files.text(content), f"{path} would change where nothing did"
        for entry in (*content["entries"], *content.get("defaults", ())):
            assert ("not measured" in entry["source"]) == ("device" not in entry), f"{path}: {entry['source']}"


@needs_triton
@pytest.mark.parametrize("operator", operators.NAMES)
def test_every_architecture_finds_a_row_for_every_size(operator):
    for table in tuning_tasks.tables((operator,)):
        for architecture in (80, 89, 90, 103, 120):
            rows = table.defaults(architecture)
            assert set(rows) == set(table.defaults(80))
            for key, steps in configurations.stepped(rows, table._sizes).items():
                # attention's head_dim ends at 256, which `unsupported` says
                assert operator == "attention" or math.inf in steps[-1][0], f"{table.path}: {key}"


# --- Files that are not right ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries, words",
    [
        ([an_entry(a_row(block_m=48))], "the default of sm_80: block_m is 48; it needs a power of two"),
        ([an_entry(a_row(), a_row(num_warps=8))], "a second row of forward, width 64"),
        ([an_entry(a_row()), measured_on("X", a_row(width=128))], "no default has a row of forward, width 128"),
    ],
)
def test_a_wrong_table_names_the_file_and_the_place(table, entries, words):
    with pytest.raises(files.TableError, match=rf"polish\.json.*{words}"):
        table(*entries)


def test_tiles_of_cuda_are_any_number(table):
    odd = an_entry(a_row(block_m=48, num_warps=6, chunk=33))
    for backend in ("cuda", "cuda:sm90"):
        assert table(odd, backend=backend).find(CPU, 3, "forward") == Tile(48, 6, 3, 33)
    with pytest.raises(files.TableError, match="block_m is 48; it needs a power of two"):
        table(odd, backend="triton:tma")


# --- Whose rows count -----------------------------------------------------------------------------------------------


def test_the_row_of_the_least_size_that_serves(table):
    read = table(an_entry(a_row(width=None, block_m=256), a_row(width=64), a_row(width=128, block_m=128)))
    found = [read.find(CPU, size, "forward").block_m for size in (1, 64, 65, 128, 129, math.inf)]
    assert found == [64, 64, 128, 128, 256, 256]


def test_rows_of_two_sizes(table):
    """A call takes the first row that serves both of its sizes, in the order of the first, then of the second."""
    rows = {(1, 512): 16, (1, None): 32, (64, 512): 64, (None, 64): 128, (None, None): 256}
    listed = [a_row(length_q=q, length_k=k, block_m=block) for (q, k), block in reversed(rows.items())]
    for row in listed:
        del row["width"]
    read = table(an_entry(*listed), sizes=("length_q", "length_k"))
    # The least first size decides, though a row of larger ones has a nearer second size.
    calls = {
        (1, 512): 16, (1, 513): 32, (1, math.inf): 32, (2, 512): 64, (64, 1): 64, (64, 513): 256, (65, 64): 128,
        (65, 65): 256,
    }  # fmt: skip
    assert {call: read.find(CPU, call, "forward").block_m for call in calls} == calls
    with configurations.override("polish", ("forward", 1, None), Tile(512, 1, 1, None)):
        assert read.find(CPU, (1, 513), "forward").block_m == 512
        assert read.find(CPU, (1, 512), "forward").block_m == 16
    with pytest.raises(ValueError):
        read.find(CPU, 65, "forward")
    with pytest.raises(files.TableError, match="there is no row of forward, any larger length_q, any larger length_k"):
        table(an_entry(*(row for row in listed if row["length_k"])), sizes=("length_q", "length_k"))


@pytest.mark.parametrize(
    "architecture, known, nearest",
    [(75, (80, 90), [80]), (86, (80, 90), [80]), (90, (80, 90, 100), [90, 80]), (103, (80, 90, 100), [100, 90, 80]),
     (120, (80, 90, 100), [80]), (121, (80, 90, 120), [80]), (120, (80, 90, 120), [120, 80])],
)  # fmt: skip
def test_the_nearest_architecture_below_serves(architecture, known, nearest):
    """The parts for workstations have the shared memory of sm_86: they take a table of their own, or sm_80's."""
    assert configurations.descent(architecture, known) == nearest


def test_the_users_rows_come_before_those_of_the_device_and_these_before_the_defaults(table, an_h200):
    read = table(
        an_entry(a_row(), a_row("backward"), a_row(width=None)),
        # An architecture holds only what differs from the one below.
        an_entry(a_row(width=None, block_m=256), architecture=90),
        measured_on("NVIDIA H200", a_row(block_m=128, gain=1.2, on="4x4"), a_row("backward", block_m=128)),
        measured_on("NVIDIA H200", a_row(block_m=16), architecture=100),
    )
    users_file(configurations={"polish, triton": [a_row(block_m=512)], "polish, cuda": [a_row(block_m=1024)]})
    rows = read.in_force(an_h200)
    found = {key: (row.configuration.block_m, row.source) for key, row in rows.items()}
    assert found == {
        ("forward", 64): (512, "measured by you on 2026-11-23"),
        ("backward", 64): (128, "measured by gptkern tune on NVIDIA H200, 2026-11-22"),
        ("forward", None): (256, "reasoned"),
    }
    # The same name with another architecture, and another name, are other devices.
    assert read.find(an_h200, 64, "forward").block_m == 512
    assert read.find(torch.device("cuda", 1), 64, "forward").block_m == 64


def test_override_is_for_the_block_and_the_backend_and_nests(table):
    read, other = table(), table(backend="cuda")
    first, second = Tile(16, 1, 1, None), Tile(32, 2, 2, None)
    with configurations.override("polish", ("forward", 64), first):
        assert other.find(CPU, 3, "forward").block_m == 64 and read.find(CPU, 65, "forward").block_m == 128
        with configurations.override("polish", ("forward", 64), second):
            assert read.find(CPU, 3, "forward") == second
        assert read.find(CPU, 3, "forward") == first
    assert read.find(CPU, 3, "forward").block_m == 64


@needs_triton
def test_the_configuration_that_is_found_is_the_one_that_is_launched(monkeypatch):
    """`override` reaches the kernel: another tile, other partial sums, the same result."""
    if torch.cuda.is_available():
        pytest.skip("launches are watched through the interpreter, and kernels are compiled here")
    kernels = dispatch.load("triton", "int8_linear")
    launched, kernel = [], kernels._w8a16_kernel

    class Watched:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append(options) or kernel[grid](*arguments, **options)

    monkeypatch.setattr(kernels, "_w8a16_kernel", Watched())
    x, weight, scale = torch.randn(5, 20), torch.randint(-128, 128, (8, 20), dtype=torch.int8), torch.rand(8)
    tile = kernels.Tile(32, 16, 32, 2, 1)
    with gptkern.backend("triton"), configurations.override("int8_linear", ("w8a32", 16), tile):
        y = G.int8_linear(x, weight, scale, mode="w8a16")
    assert [launched[0][name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps")] == [32, 16, 32, 2]
    torch.testing.assert_close(y, (x @ weight.float().T) * scale, rtol=1e-4, atol=1e-3)


# --- The user's file ------------------------------------------------------------------------------------------------


def test_processes_that_write_at_once_lose_no_row():
    """As two runs of `gptkern tune` at once."""
    processes = multiprocessing.get_context("fork")
    together = processes.Barrier(4)

    def add(mine):
        together.wait(60)
        for number in range(10):
            row = a_row(f"{mine}.{number}")
            user.put(H200, "configurations", "polish, triton", row, ("kernel", "width"), "2026-11-22")

    runs = [processes.Process(target=add, args=(mine,)) for mine in range(4)]
    for do in (lambda run: run.start(), lambda run: run.join(120)):
        list(map(do, runs))
    assert [run.exitcode for run in runs] == [0] * 4
    rows = user.read(H200).content["configurations"]["polish, triton"]
    assert {row["kernel"] for row in rows} == {f"{mine}.{number}" for mine in range(4) for number in range(10)}


@pytest.mark.parametrize(
    "change", [dict(versions=user.versions() | {"torch": "2.0.0"}), dict(device="NVIDIA H100"), dict(format=1)]
)
def test_a_file_of_other_versions_is_ignored_without_a_warning(table, an_h200, change):
    users_file(configurations={"polish, triton": [a_row(block_m=512)]}, **change)
    read = table(an_entry(a_row()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read.find(an_h200, 64, "forward").block_m == 64
    # Tuning again begins a new one.
    user.put(H200, "configurations", "polish, triton", a_row("backward"), ("kernel", "width"), "2026-11-25")
    assert user.read(H200).content["configurations"] == {"polish, triton": [a_row("backward")]}


def test_what_cannot_be_used_is_ignored_with_one_warning(table, an_h200):
    users_file(configurations={"polish, triton": [a_row(block_m=48)]})
    read = table(an_entry(a_row()))
    with pytest.warns(UserWarning, match="is ignored, and gptkern's own tables are used") as caught:
        for _ in range(2):
            assert read.find(an_h200, 64, "forward").block_m == 64
            read._steps.clear()
        assert dispatch._unmeasured_order("softmax", "cuda", 0) == orders.default("softmax", H200)
    assert len(caught) == 1 and "block_m is 48" in str(caught[0].message)


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.json"
    files.write(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write(path, {"a": object()})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        files.write(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["file.json"], "a part of a file was left behind"
