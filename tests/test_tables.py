"""The tables that measurements fill: their files, whose rows count on which device, and what dispatch makes of them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import gptkern
import gptkern.functional as G
from gptkern.backends import dispatch
from gptkern.backends.tables import backends, configurations, files, shape_classes, user
from gptkern.backends.tables.configurations import Table

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SHIPPED = sorted(files.FOLDER.glob("*.json"))
H200 = user.Device("NVIDIA H200", 90)


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


def write(folder, *entries, operator="polish"):
    path = folder / "polish.json"
    files.write(path, dict(operator=operator, why=[], entries=list(entries)))
    return path


@pytest.fixture
def table(tmp_path, monkeypatch):
    """table(*entries) -> the Table of a file with these entries."""
    monkeypatch.setattr(configurations, "TABLES", {})

    def read(*entries, **options):
        path = write(tmp_path, *(entries or [an_entry(a_row(), a_row(width=None, block_m=128))]), **options)
        key = {"kernel": ("forward", "backward"), "width": None}
        return Table("polish", key, Tile, optional=("chunk",), path=path)

    return read


@pytest.fixture(autouse=True)
def the_users_folder(tmp_path, monkeypatch):
    """Nobody's own cache is read or written, and no test sees what another one left in memory."""
    monkeypatch.setenv("GPTKERN_CACHE", str(tmp_path / "cache"))
    dispatch.forget()
    yield tmp_path / "cache"
    dispatch.forget()


@pytest.fixture
def an_h200(monkeypatch):
    """As if cuda:0 were an H200, cuda:1 a GPU that nobody measured, and cuda:2 older than that."""
    names = {0: ("NVIDIA H200", (9, 0)), 1: ("NVIDIA H900", (10, 3)), 2: ("NVIDIA A100", (8, 0))}

    def of(device):
        return names[torch.device(device).index]

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: of(device)[1])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: of(device)[0])
    return torch.device("cuda", 0)


def users_file(**changes):
    content = dict(format=1, **H200._asdict(), versions=user.versions(), date="2026-11-23")
    content = content | dict(device=content.pop("name"), configurations={}, backends={}) | changes
    files.write(user.path(H200), content)
    dispatch.forget()
    return user.path(H200)


# --- What ships -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_laid_out_as_tune_writes_them(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert path.read_text(encoding="utf-8") == files.text(content), f"{path.name} would change where nothing did"
    assert all(isinstance(sentence, str) for sentence in content["why"])


def test_a_row_is_a_line():
    text = files.text(dict(why=["x" * 100, "y" * 100], entries=[an_entry(a_row(), a_row(width=None))]))
    rows = [line for line in text.splitlines() if '"kernel"' in line]
    assert len(rows) == 2 and all(json.loads(line.strip().rstrip(",")) for line in rows)


@needs_triton
@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100, 103, 120])
def test_every_operator_has_a_table_for_every_architecture(architecture):
    for operator in (*dispatch.OPERATORS, "quantize_int8"):
        table = dispatch.load("triton", operator).TABLE
        rows = table.defaults(architecture)
        assert set(rows) == set(table.defaults(80))
        # Every size finds a row, up to infinity.
        for key, steps in configurations.stepped(rows).items():
            limited = operator == "attention" or (operator == "layer_norm" and key == ())
            assert limited or steps[-1][0] == math.inf, f"{operator} {key}"


@needs_triton
def test_what_ships_is_said_not_to_be_measured_where_it_is_not():
    for operator in (*dispatch.OPERATORS, "quantize_int8"):
        for entry in dispatch.load("triton", operator).TABLE.entries:
            assert ("not measured" in entry.source) == (entry.device is None), f"{operator}: {entry.source}"


@needs_triton
def test_workstations_take_the_tables_that_fit_their_shared_memory():
    table = dispatch.load("triton", "attention").TABLE
    key = ("forward", 16, 128)
    small, hopper, blackwell = (table.defaults(architecture)[key] for architecture in (80, 90, 100))
    assert small.configuration != hopper.configuration
    for architecture, expected in (
        (86, small),
        (89, small),
        (95, hopper),
        (103, blackwell),
        (120, small),
        (130, small),
    ):
        assert table.defaults(architecture)[key] == expected, architecture


def test_importing_gptkern_reads_no_table():
    program = """
import builtins, io, os, sys
import torch
opened = []
plain, plain_io = builtins.open, io.open
def watched(file, *rest, **more):
    opened.append(str(file))
    return plain_io(file, *rest, **more)
builtins.open = io.open = watched
import gptkern
gptkern.functional.softmax(torch.ones(2, 3), -1)
print([name for name in opened if name.endswith(".json")])
import gptkern.backends.tables.backends
gptkern.backends.tables.backends.shipped()
print([os.path.basename(name) for name in opened if name.endswith(".json")])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "['backends.json']"], done.stderr


# --- Files that are not right ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries, words",
    [
        ([an_entry(a_row(block_m=48))], r"rows\[0\]: block_m is 48; it needs a power of two"),
        ([an_entry(a_row(), a_row(width=128, block_m="64"))], r"rows\[1\]: block_m is '64'; it needs a power of two"),
        ([an_entry(a_row(num_warps=True))], "num_warps is True; it needs a power of two"),
        ([an_entry(a_row(num_stages=0))], "num_stages is 0; it needs a number from 1 up"),
        ([an_entry(a_row(num_warps=None))], "num_warps is None"),
        ([an_entry(a_row("sideways"))], "kernel is 'sideways'; it needs one of 'forward', 'backward'"),
        ([an_entry(a_row(width="wide"))], "width is 'wide'; it needs a number, or null for any"),
        ([an_entry({"kernel": "forward"})], "width is missing; it needs kernel, width, block_m"),
        ([an_entry(a_row(), a_row(num_warps=8))], r"rows\[1\]: a second row of forward, width 64"),
        ([an_entry(a_row()), an_entry(a_row())], "a second entry for the default of sm_80"),
        ([an_entry(a_row(), architecture="90")], "architecture is '90'; it needs a number"),
        ([{"architecture": 80, "rows": []}], "source is None; it needs a sentence"),
        ([measured_on("NVIDIA H200", a_row())], "entries has no default"),
        ([an_entry(a_row()), an_entry(a_row(), device="NVIDIA H200")], "date is None; it needs the day"),
        ([an_entry(a_row()), measured_on("X", a_row(width=128))], "a row of forward, width 128, which no default has"),
        ([7], "the entry is 7; it needs an object"),
    ],
)
def test_a_wrong_table_names_the_file_and_the_place(table, entries, words):
    with pytest.raises(files.TableError, match=words) as raised:
        table(*entries)
    assert "polish.json" in str(raised.value)


def test_a_table_of_another_operator(table):
    with pytest.raises(files.TableError, match="operator is 'softmax'; it needs 'polish'"):
        table(operator="softmax")


def test_a_file_that_is_no_json(table, tmp_path):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(files.TableError, match=r"bad\.json"):
        files.read(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(files.TableError, match="it holds a list"):
        files.read(tmp_path / "bad.json")


def test_optional_and_counted_fields(table):
    read = table(an_entry(a_row(chunk=32, num_stages=3), a_row(width=None)))
    rows = read.defaults(80)
    assert rows["forward", 64].configuration == Tile(64, 4, 3, 32)
    assert rows["forward", None].configuration.chunk is None
    with pytest.raises(files.TableError, match="chunk is 33"):
        table(an_entry(a_row(chunk=33)))


# --- Whose rows count -----------------------------------------------------------------------------------------------


def test_the_row_of_the_least_size_that_serves(table):
    read = table(an_entry(a_row(width=None, block_m=256), a_row(width=64), a_row(width=128, block_m=128)))
    cpu = torch.device("cpu")
    found = [read.find(cpu, size, "forward").block_m for size in (1, 64, 65, 128, 129, math.inf)]
    assert found == [64, 64, 128, 128, 256, 256]


def test_no_row_serves_is_an_error_that_says_so(table):
    with pytest.raises(LookupError, match=r"polish\.json has no row of \('forward',\) for 65"):
        table(an_entry(a_row())).find(torch.device("cpu"), 65, "forward")


@pytest.mark.parametrize(
    "architecture, nearest",
    [(75, [80]), (80, [80]), (86, [80]), (90, [90, 80]), (95, [90, 80]), (100, [100, 90, 80]), (103, [100, 90, 80]),
     (120, [80]), (121, [80])],
)  # fmt: skip
def test_the_nearest_architecture_below_serves(architecture, nearest):
    assert configurations.descent(architecture, (80, 90, 100)) == nearest


def test_a_table_for_a_workstation_part_serves_that_part():
    assert configurations.descent(120, (80, 90, 120)) == [120, 80]


def test_an_architecture_holds_only_what_differs(table):
    read = table(an_entry(a_row(), a_row("backward")), an_entry(a_row(block_m=256), architecture=90))
    assert read.defaults(90)["forward", 64].configuration.block_m == 256
    assert read.defaults(90)["backward", 64].configuration.block_m == 64
    assert read.defaults(80)["forward", 64].configuration.block_m == 64


def test_a_measured_entry_is_for_its_own_device(table, an_h200):
    read = table(
        an_entry(a_row(), a_row("backward")), measured_on("NVIDIA H200", a_row(block_m=128, gain=1.2, on="4x4"))
    )
    row = read.in_force(an_h200)["forward", 64]
    assert row.configuration.block_m == 128
    assert row.source == "measured by gptkern tune on NVIDIA H200, 2026-11-22"
    assert row.measured == {"gain": 1.2, "on": "4x4"}
    assert read.in_force(an_h200)["backward", 64].source == "reasoned"
    assert read.find(an_h200, 64, "forward").block_m == 128
    # The same name with another architecture, and another name, are other devices.
    assert read.find(torch.device("cuda", 1), 64, "forward").block_m == 64
    other = table(an_entry(a_row()), measured_on("NVIDIA H200", a_row(block_m=128), architecture=100))
    assert other.find(an_h200, 64, "forward").block_m == 64


def test_the_users_rows_come_first(table, an_h200):
    read = table(an_entry(a_row(), a_row("backward")), measured_on("NVIDIA H200", a_row(block_m=128)))
    users_file(configurations={"polish": [a_row(block_m=512, gain=1.1)]})
    assert read.find(an_h200, 64, "forward").block_m == 512
    assert read.in_force(an_h200)["forward", 64].source == "measured by you on 2026-11-23"
    assert read.find(an_h200, 64, "backward").block_m == 64
    assert read.find(torch.device("cuda", 1), 64, "forward").block_m == 64


def test_override_is_for_the_block_and_nests(table):
    read, cpu = table(), torch.device("cpu")
    first, second = Tile(16, 1, 1, None), Tile(32, 2, 2, None)
    with configurations.override("polish", ("forward", 64), first):
        assert read.find(cpu, 3, "forward") == first
        with configurations.override("polish", ("forward", 64), second):
            assert read.find(cpu, 3, "forward") == second
        assert read.find(cpu, 3, "forward") == first
        assert read.find(cpu, 65, "forward").block_m == 128
    assert read.find(cpu, 3, "forward").block_m == 64
    with pytest.raises(ZeroDivisionError), configurations.override("polish", ("forward", 64), first):
        raise ZeroDivisionError
    assert read.find(cpu, 3, "forward").block_m == 64
    with pytest.raises(LookupError, match="no row of forward, width 65"):
        configurations.override("polish", ("forward", 65), first).__enter__()


@needs_triton
def test_the_configuration_that_is_found_is_the_one_that_is_launched(monkeypatch):
    """`override` reaches the kernel: another tile, other partial sums, the same result."""
    if torch.cuda.is_available():
        pytest.skip("launches are watched through the interpreter, and kernels are compiled here")
    kernels = dispatch.load("triton", "layer_norm")
    launched = []
    kernel = kernels._forward_kernel

    class Watched:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append(options) or kernel[grid](*arguments, **options)

    monkeypatch.setattr(kernels, "_forward_kernel", Watched())
    x = torch.randn(5, 20)
    with gptkern.backend("triton"), configurations.override("layer_norm", ("forward", 32), kernels.Tile(2, 32, 1)):
        y = G.layer_norm(x, (20,))
    assert (launched[0]["BLOCK_ROWS"], launched[0]["BLOCK_WIDTH"], launched[0]["num_warps"]) == (2, 32, 1)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (20,)))


@needs_triton
def test_compile_cases_list_what_was_measured_too(monkeypatch):
    """What `tune --shipped` adds is compiled by the tests as what was there before."""
    kernels = dispatch.load("triton", "attention")
    before = {case.name for case in kernels.compile_cases(90)}
    default = kernels.TABLE.defaults(90)
    same, other = default["query", 16, 64], default["forward", 16, 128]
    rows = {
        ("query", 16, 64): same,
        ("forward", 16, 128): other._replace(configuration=other.configuration._replace(num_warps=4)),
    }
    entry = configurations.Entry(90, "NVIDIA H200", "measured", rows)
    monkeypatch.setattr(kernels.TABLE, "entries", [*kernels.TABLE.entries, entry])
    added = {case.name: case for case in kernels.compile_cases(90) if case.name not in before}
    assert set(added) == {f"forward hd{head_dim} causal bf16 (NVIDIA H200)" for head_dim in (80, 128)}
    assert {case.num_warps for case in added.values()} == {4}
    assert {case.name for case in kernels.compile_cases(100)} == {case.name for case in kernels.compile_cases(100)}
    assert not [case.name for case in kernels.compile_cases(80) if "H200" in case.name]


# --- The user's file ------------------------------------------------------------------------------------------------


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("GPTKERN_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert user.folder() == tmp_path / "a"
    monkeypatch.delenv("GPTKERN_CACHE")
    assert user.folder() == tmp_path / "b" / "gptkern"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(user.Path, "home", lambda: tmp_path / "home")
    for platform, expected in (
        ("linux", tmp_path / "home" / ".cache" / "gptkern"),
        ("darwin", tmp_path / "home" / "Library" / "Caches" / "gptkern"),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        assert user.folder() == expected
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert user.folder() == tmp_path / "local" / "gptkern" / "cache"
    monkeypatch.setattr(sys, "platform", "linux")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(user.Path, "home", homeless)
    assert user.folder() is None and user.path(H200) is None and user.written() == []
    assert user.read(H200) == (None, None, None)


def test_put_adds_and_replaces_rows():
    key = ("kernel", "width")
    user.put(H200, "configurations", "polish", a_row(block_m=128), key, "2026-11-22")
    user.put(H200, "configurations", "polish", a_row("backward"), key, "2026-11-22")
    user.put(H200, "configurations", "polish", a_row(block_m=256), key, "2026-11-24")
    content = user.read(H200).content
    assert content["configurations"]["polish"] == [a_row(block_m=256), a_row("backward")]
    assert (content["device"], content["architecture"], content["date"]) == ("NVIDIA H200", 90, "2026-11-24")
    assert content["versions"] == user.versions()
    assert user.path(H200).name == "nvidia-h200-sm_90.json" and user.written() == [user.path(H200)]


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(versions=user.versions() | {"torch": "2.0.0"}), "torch 2.0.0 (here: "),
        (dict(versions=user.versions() | {"triton": None}), "triton None (here: "),
        (dict(versions=user.versions() | {"gptkern": "0.0.1"}), "gptkern 0.0.1 (here: "),
        (dict(architecture=100), "architecture 100 (here: 90)"),
        (dict(device="NVIDIA H100"), "device NVIDIA H100 (here: NVIDIA H200)"),
        (dict(format=2), "format 2 (here: 1)"),
        (dict(versions="all"), "it was made for "),
    ],
    ids=["torch", "triton", "gptkern", "architecture", "device", "format", "no versions"],
)
def test_a_file_of_other_versions_is_ignored_without_a_warning(table, an_h200, change, words):
    if change.get("versions") == user.versions():
        pytest.skip("triton is not installed, so that its version cannot differ")
    users_file(configurations={"polish": [a_row(block_m=512)]}, **change)
    read = table(an_entry(a_row()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read.find(an_h200, 64, "forward").block_m == 64
    assert words in user.read(H200).ignored
    # Tuning again begins a new one.
    user.put(H200, "configurations", "polish", a_row("backward"), ("kernel", "width"), "2026-11-25")
    assert user.read(H200).content["configurations"]["polish"] == [a_row("backward")]


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", "\x00\x01", '{"format": 1}'], ids=["empty", "cut", "a list", "bytes", "of nothing"]
)
def test_a_file_that_cannot_be_read_is_ignored_with_one_warning_at_most(table, an_h200, text):
    path = user.path(H200)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    read, other = table(an_entry(a_row())), table(an_entry(a_row()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert read.find(an_h200, 64, "forward").block_m == 64
        assert other.find(an_h200, 64, "forward").block_m == 64
        configurations.TABLES.clear()
        assert dispatch._unmeasured_order("softmax", "cuda", 0) == backends.NAMES
    ours = [str(warning.message) for warning in caught if "gptkern" in str(warning.message)]
    assert len(ours) == (0 if text == '{"format": 1}' else 1)
    assert all(str(path) in message and "is ignored" in message for message in ours)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(configurations={"polish": [a_row(block_m=48)]}), "block_m is 48"),
        (dict(configurations={"polish": [a_row(width=65)]}), "width 65, which no default has"),
        (dict(configurations={"polish": {}}), "it needs a list of rows"),
        (dict(configurations=[]), "configurations is"),
    ],
    ids=["a number", "a key", "no list", "no object"],
)
def test_rows_that_are_wrong_are_ignored_with_one_warning(table, an_h200, changes, words):
    path = users_file(**changes)
    read = table(an_entry(a_row()))
    with pytest.warns(UserWarning, match="is ignored, and gptkern's own tables are used") as caught:
        assert read.find(an_h200, 64, "forward").block_m == 64
        read._steps.clear()
        assert read.find(an_h200, 64, "forward").block_m == 64
    assert len(caught) == 1 and words in str(caught[0].message) and str(path) in str(caught[0].message)


def test_a_folder_in_the_files_place_is_ignored(table, an_h200):
    user.path(H200).mkdir(parents=True)
    with pytest.warns(UserWarning, match="is ignored"):
        assert table(an_entry(a_row())).find(an_h200, 64, "forward").block_m == 64


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.json"
    files.write(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        files.write(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["file.json"], "a part of a file was left behind"


def test_info_says_whose_tables_are_in_force(an_h200):
    from gptkern.commands import info

    assert info._tables(an_h200) == "gptkern's own"
    path = users_file()
    assert info._tables(an_h200) == f"measured by you on 2026-11-23, {path}"
    users_file(versions=user.versions() | {"torch": "2.0.0"})
    assert f"{path} is ignored: it was made for torch 2.0.0 (here: " in info._tables(an_h200)


# --- Classes of calls -----------------------------------------------------------------------------------------------


def tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    "operator, call, expected",
    [
        ("attention", (tensor(1, 2, 16, 64), tensor(1, 2, 99, 64), tensor(1, 2, 99, 64), True, 1.0, None, 0.0),
         (16, 64, 16, True)),
        ("attention", (tensor(1, 2, 9000, 80), None, None, False, 1.0), (16, 128, None, False)),
        ("attention", (tensor(1, 2, 17, 257, dtype=torch.float32), None, None, False, 1.0), (32, None, 512, False)),
        ("layer_norm", (tensor(3, 1024), None, None, None, 1e-5), (16, 1024, False)),
        ("layer_norm", (tensor(3, 1025), tensor(3, 1025), None, None, 1e-5), (16, 4096, True)),
        ("rms_norm", (tensor(3, 1025), None, 1e-5), (16, 4096)),
        ("rotary", (tensor(1, 2, 9, 80), tensor(9, 40), tensor(9, 40), 80, True), (16, 128, True)),
        ("softmax", (tensor(4, 20000), -1, None, 1.0, None, False), (16, None, True, False)),
        ("softmax", (tensor(4, 20000), 0, None, 1.0, None, False), (16, 1024, False, False)),
        ("softmax", (tensor(4, 5), 1, None, 0.5, None, False), (16, 1024, True, True)),
        ("softmax", (tensor(4, 5), 1, None, 1.0, tensor(5), False), (16, 1024, True, True)),
        ("softmax", (tensor(), 0, None, 1.0, None, False), (16, 1024, True, False)),
        ("int8_linear", (tensor(1, 8), None, None, None, None, "w8a16"), (16, "w8a16", 1)),
        ("int8_linear", (tensor(4, 5, 8), None, None, None, None, "w8a8"), (16, "w8a8", 64)),
        ("quantize_int8", (tensor(4, 5000, dtype=torch.float64), 1), (64, 16384)),
    ],
)  # fmt: skip
def test_the_class_of_a_call(operator, call, expected):
    classes = shape_classes.CLASSES[operator]
    found = classes.of(*call)
    assert found == expected and [type(value) for value in found] == [type(value) for value in expected]
    assert all(value in values for value, values in zip(found, classes.parts.values()))


def test_every_operator_has_classes():
    assert set(shape_classes.CLASSES) == {*dispatch.OPERATORS, "quantize_int8"}


def test_a_class_in_words():
    assert shape_classes.described("attention", (16, 128, None, True)) == (
        "16 bits, head_dim up to 128, length above 8192, causal"
    )
    assert shape_classes.described("int8_linear", (16, "w8a8", 64)) == "16 bits, w8a8, rows up to 64"


# --- backends.json --------------------------------------------------------------------------------------------------

NARROW = dict(bits=16, width=1024, last=True, fused=False)


def a_preference(*order, **changes):
    return NARROW | dict(order=list(order), ratio=1.3, on="4x512") | changes


def backends_file(folder, *entries, **changes):
    path = folder / "backends.json"
    default = dict(source="reasoned", order=list(backends.NAMES))
    files.write(path, dict(default=default, entries=list(entries)) | changes)
    return path


def on_h200(**rows):
    versions = {"triton": "3.7.1"}
    return dict(device="NVIDIA H200", architecture=90, date="2026-11-22", versions=versions, rows=rows)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(default=dict(source="reasoned", order=["cuda", "torch"])), "it needs each of cuda, triton, torch"),
        (dict(default=dict(source="reasoned", order=["cuda", "triton", "metal"])), "default: order is"),
        (dict(default=dict(order=list(backends.NAMES))), "source is None"),
        (dict(entries={}), "entries is {}; it needs a list"),
        (dict(entries=[on_h200(polish=[])]), "polish: no such operator"),
        (dict(entries=[on_h200(softmax=[a_preference("triton")])]), "it needs two backends at least"),
        (dict(entries=[on_h200(softmax=[a_preference("triton", "triton")])]), "each once"),
        (dict(entries=[on_h200(softmax=[a_preference("triton", "torch", width=1000)])]), "width is 1000"),
        (dict(entries=[on_h200(softmax=[a_preference("triton", "torch", last=1)])]), "last is 1; it needs one of"),
        (dict(entries=[on_h200(softmax=[a_preference("triton", "torch", ratio="2")])]), "ratio is '2'"),
        (dict(entries=[on_h200(softmax=[a_preference("triton", "torch")] * 2)]), "a second row"),
        (dict(entries=[on_h200(), on_h200()]), "a second entry for NVIDIA H200"),
        (dict(entries=[on_h200() | {"date": None}]), "date is None"),
    ],
)
def test_a_wrong_backends_file_names_the_place(tmp_path, changes, words):
    path = backends_file(tmp_path, **changes)
    with pytest.raises(files.TableError, match=words.replace("[", r"\[")) as raised:
        backends.shipped(path)
    assert "backends.json" in str(raised.value)


def test_what_was_not_measured_comes_last(tmp_path):
    path = backends_file(tmp_path, on_h200(softmax=[a_preference("torch", "triton")]))
    row = backends.shipped(path).entries[H200]["softmax"][16, 1024, True, False]
    assert row.order == ("torch", "triton", "cuda")
    assert row.reason == "measured 1.30 x faster than triton on NVIDIA H200, 2026-11-22"


# --- Dispatch -------------------------------------------------------------------------------------------------------


class Gpus:
    """Stands in for a GPU's tensor: what dispatch and the classes read of one."""

    def __init__(self, *shape, index=0, dtype=torch.bfloat16):
        self.shape, self.dtype, self.device = shape, dtype, torch.device("cuda", index)

    def dim(self):
        return len(self.shape)


def a_call(*shape, index=0):
    return Gpus(*shape, index=index), -1, None, 1.0, None, False


@pytest.fixture
def kernels(monkeypatch, an_h200):
    """kernels("triton", …): these backends cover every softmax."""
    monkeypatch.setattr(dispatch, "unavailable", lambda name, device: None)

    def covering(*names):
        def module(name):
            return SimpleNamespace(unsupported=lambda *call: None if name in names else f"{name} leaves this out")

        monkeypatch.setattr(dispatch, "_modules", {(name, "softmax"): module(name) for name in ("cuda", "triton")})

    covering("cuda", "triton")
    with gptkern.backend(None):
        yield covering


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """measured(*rows): as if these had shipped for softmax on an H200."""

    def ship(*rows):
        backends_file(tmp_path, on_h200(softmax=list(rows)))
        monkeypatch.setattr(files, "FOLDER", tmp_path)
        dispatch.forget()

    return ship


def test_nothing_measured_is_the_default_and_its_class_is_not_asked_for(kernels, measured, monkeypatch):
    def never(*call):
        raise AssertionError("the class of a call was found out where nothing is measured")

    monkeypatch.setitem(shape_classes.CLASSES, "softmax", shape_classes.CLASSES["softmax"]._replace(of=never))
    assert dispatch.choose("softmax", *a_call(4, 512)) == ("cuda", "the input is on cuda")
    # Measured on the H200 and called on another GPU: nothing is measured there.
    measured(a_preference("triton", "cuda"))
    assert dispatch.choose("softmax", *a_call(4, 512, index=1)) == ("cuda", "the input is on cuda")
    with pytest.raises(AssertionError, match="was found out"):
        dispatch.choose("softmax", *a_call(4, 512))


def test_the_measured_order_decides_its_own_class(kernels, measured):
    measured(a_preference("triton", "cuda", "torch"))
    reason = "measured 1.30 x faster than cuda on NVIDIA H200, 2026-11-22"
    assert dispatch.choose("softmax", *a_call(4, 1024)) == ("triton", reason)
    assert dispatch.choose("softmax", *a_call(4, 1025)) == ("cuda", "the input is on cuda")


def test_the_fastest_that_cannot_run_is_passed_over_with_the_reason(kernels, measured):
    measured(a_preference("triton", "cuda", "torch"))
    kernels("cuda")
    reason = "the input is on cuda; not triton: triton leaves this out"
    assert dispatch.choose("softmax", *a_call(4, 512)) == ("cuda", reason)


def test_pytorch_that_is_faster_runs_without_a_warning(kernels, measured):
    measured(a_preference("torch", "triton", ratio=1.126))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = dispatch.choose("softmax", *a_call(4, 512))
    assert choice == ("torch", "measured 1.13 x faster than triton on NVIDIA H200, 2026-11-22")


def test_no_kernel_in_front_of_pytorch_can_run_warns(kernels, measured):
    measured(a_preference("triton", "torch"))
    kernels()
    with pytest.warns(UserWarning, match="triton leaves this out"):
        assert dispatch.choose("softmax", *a_call(4, 512)).backend == "torch"
    # Nor does one take PyTorch's place that nobody measured against it.
    kernels("cuda")
    dispatch._warned.clear()
    with pytest.warns(UserWarning, match="triton leaves this out"):
        assert dispatch.choose("softmax", *a_call(4, 512)).backend == "torch"
    dispatch._warned.clear()


def test_a_forced_backend_ignores_the_table(kernels, measured):
    measured(a_preference("torch", "triton"))
    for name in ("cuda", "triton", "torch"):
        with gptkern.backend(name):
            assert dispatch.choose("softmax", *a_call(4, 512)) == (name, "asked for by name")


def test_the_users_measurement_comes_first(kernels, measured):
    measured(a_preference("triton", "cuda"), a_preference("triton", "cuda", width=4096))
    users_file(backends={"softmax": [a_preference("torch", "cuda", ratio=2)]})
    choice = dispatch.choose("softmax", *a_call(4, 512))
    assert choice == ("torch", "measured 2.00 x faster than cuda on NVIDIA H200, 2026-11-23")
    assert dispatch.choose("softmax", *a_call(4, 4096)).backend == "triton"


def test_a_users_wrong_preference_is_ignored_with_a_warning(kernels):
    users_file(backends={"softmax": [a_preference("torch", "metal")]})
    with pytest.warns(UserWarning, match="is ignored") as caught:
        for _ in range(2):
            assert dispatch.choose("softmax", *a_call(4, 512)) == ("cuda", "the input is on cuda")
    assert len(caught) == 1


def test_explain_says_what_was_measured(kernels, measured, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dispatch, "_uncovered", lambda name, operator, call: None)
    measured(a_preference("triton", "cuda", bits=32))
    with FakeTensorMode():
        choice = gptkern.explain(torch.softmax, torch.randn(3, 8, device="cuda"), -1)
    assert choice == ("triton", "measured 1.30 x faster than cuda on NVIDIA H200, 2026-11-22")


def test_a_simulated_gpu_that_torch_knows_nothing_of_has_the_defaults(monkeypatch, kernels, measured):
    def unknown(device=None):
        raise AssertionError("Torch not compiled with CUDA enabled")

    measured(a_preference("torch", "triton"))
    monkeypatch.setattr(torch.cuda, "get_device_name", unknown)
    assert dispatch.choose("softmax", *a_call(4, 512)).backend == "cuda"


def test_choices_are_traced(kernels, measured, monkeypatch):
    """torch.compile sees one graph, follows the table, and does not read files while it traces."""
    # A meta tensor stands in for the GPU's: it is the one that compiles here.
    monkeypatch.setattr(user, "identify", lambda device: H200)

    def chosen(x):
        choice = dispatch.choose("softmax", x, -1, None, 1.0, None, False)
        return x.new_empty({"cuda": 1, "triton": 2, "torch": 3}[choice.backend])

    def sizes(*widths):
        torch._dynamo.reset()
        compiled = torch.compile(chosen, fullgraph=True, backend="eager")
        return [compiled(tensor(4, width)).shape[0] for width in widths]

    assert sizes(512, 2000) == [1, 1]
    measured(a_preference("triton", "cuda"), a_preference("torch", "cuda", width=4096))
    assert sizes(512, 800, 2000, 3000, 5000) == [2, 2, 3, 3, 1]
