"""The results file: nothing lost, nothing half-written, resumed where the sources are the same."""

from __future__ import annotations

import json

import pytest

from gptkern.measuring import results

MACHINE = {
    "device": "A device", "slug": "a-device", "kind": "cpu", "source": "0123", "gptkern": "0.1.0", "torch": "2.13.0",
    "triton": None, "threads": 2, "commit": "abcdef0123456789",
}  # fmt: skip


def timed(name, seconds, **more):
    spread = {"median": seconds, "low": seconds, "high": seconds, "n": 3}
    return {"name": name, "device_s": None, "wall_s": spread} | more


def cell(key="a cell", rounds=5, implementations=None):
    return {
        "key": key, "operator": "softmax", "direction": "forward", "sizes": {"width": 8}, "panel": "softmax",
        "rounds": rounds, "implementations": implementations or [timed("gptkern", 1.0), timed("eager", 2.0)],
    }  # fmt: skip


def test_what_is_recorded_is_loaded(tmp_path):
    recorder = results.Recorder(tmp_path / "new" / "folder", MACHINE)
    recorder.add_cell(cell())
    recorder.set_ceilings({"copy": {"value": 1e9, "unit": "B/s", "how": "x"}}, "full")
    recorder.add_cost({"key": "import"})
    found = results.load(tmp_path / "new" / "folder")
    assert [c["key"] for c in found["cells"]] == ["a cell"] and found["ceilings"]["copy"]["value"] == 1e9
    assert found["costs"] == [{"key": "import"}] and found["machine"] == MACHINE and found["sample"] is False
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["results.json"]


def test_a_run_goes_on_where_the_last_one_ended(tmp_path):
    results.Recorder(tmp_path, MACHINE).add_cell(cell(rounds=5))
    again = results.Recorder(tmp_path, MACHINE | {"date": "another day"})
    assert again.done("a cell", 5) and again.moved is None
    assert not again.done("a cell", 6), "fewer rounds than wanted"
    assert not again.done("another cell", 1)
    again.add_cell(cell(rounds=9))
    assert [c["rounds"] for c in results.load(tmp_path)["cells"]] == [9], "measured anew, in its place"


def test_fewer_peers_do_not_stand_for_more(tmp_path):
    recorder = results.Recorder(tmp_path, MACHINE)
    recorder.add_cell(cell() | {"peers_asked": ["compile", "eager"]})
    assert recorder.done("a cell", 1, ["eager"]) and recorder.done("a cell", 1, ["compile", "eager"])
    assert not recorder.done("a cell", 1, ["quack"]) and not recorder.done("a cell", 1), "all peers were not asked"
    recorder.add_cell(cell() | {"peers_asked": None})
    assert recorder.done("a cell", 1) and recorder.done("a cell", 1, ["quack"])


def test_a_smoke_run_does_not_stand_for_a_real_one(tmp_path):
    recorder = results.Recorder(tmp_path, MACHINE)
    assert not recorder.has_ceilings("smoke") and not recorder.has_cost("import", "smoke")
    for extent, reached in (("smoke", ["smoke"]), ("quick", ["smoke", "quick", "full"])):
        recorder.set_ceilings({"copy": {"value": 1e9, "unit": "B/s", "how": "x"}}, extent)
        assert [e for e in results.EXTENTS if recorder.has_ceilings(e)] == reached, "quick and full are the same"
    for extent, reached in (("smoke", 1), ("quick", 2), ("full", 3)):
        recorder.add_cost({"key": "import", "extent": extent})
        assert [e for e in results.EXTENTS if recorder.has_cost("import", e)] == list(results.EXTENTS[:reached])


@pytest.mark.skipif(results.fcntl is None, reason="this system has no flock")
def test_a_second_run_is_kept_out(tmp_path):
    with results.locked(tmp_path / "new"):
        second = results.locked(tmp_path / "new")
        with pytest.raises(results.ResultsError, match="another gptkern bench is writing there"):
            second.__enter__()
        with results.locked(tmp_path / "other"):
            pass
    with results.locked(tmp_path / "new"):
        assert list((tmp_path / "new").iterdir()) == [], "it leaves nothing behind"
    (tmp_path / "file").write_text("")
    with pytest.raises(results.ResultsError, match=r"file.* cannot be written"), results.locked(tmp_path / "file"):
        pass


def test_a_cell_where_gptkern_failed_is_measured_again(tmp_path):
    recorder = results.Recorder(tmp_path, MACHINE)
    recorder.add_cell(cell(implementations=[{"name": "gptkern", "skipped": "wrong"}, timed("eager", 1.0)]))
    assert not recorder.done("a cell", 1)


@pytest.mark.parametrize("name", results.SAME)
def test_results_of_other_sources_or_devices_are_moved_aside(tmp_path, name):
    results.Recorder(tmp_path, MACHINE).add_cell(cell())
    other = results.Recorder(tmp_path, MACHINE | {name: "other"})
    assert not other.done("a cell", 1)
    assert other.moved == tmp_path / "results-abcdef012345.json"
    assert results.load(other.moved)["cells"][0]["key"] == "a cell"
    other.add_cell(cell("new"))
    third = results.Recorder(tmp_path, MACHINE)
    assert third.moved == tmp_path / "results-abcdef012345-2.json", "what was moved before is kept"


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    recorder = results.Recorder(tmp_path, MACHINE)
    recorder.add_cell(cell())
    before = (tmp_path / "results.json").read_text()
    with pytest.raises(ValueError):
        recorder.add_cost({"key": "x", "gptkern": float("nan")})
    assert (tmp_path / "results.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("not json", "Expecting value"),
        ("[]", "format"),
        ('{"format": 2}', "format is 2"),
        ('{"format": 1, "sample": false, "machine": {}, "ceilings": {}, "cells": {}, "costs": []}', "cells is dict"),
        (
            json.dumps({"format": 1, "sample": False, "machine": {}, "ceilings": {}, "costs": [],
                        "cells": [{"key": "k"}]}),
            r"cell 0 \(k\) has no operator",
        ),
        (
            json.dumps({"format": 1, "sample": False, "machine": {}, "ceilings": {}, "costs": [],
                        "cells": [cell(implementations=[{"name": "x"}])]}),
            "neither a time nor a reason",
        ),
    ],
)  # fmt: skip
def test_what_is_no_results_file_is_named(tmp_path, content, says):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(results.ResultsError, match=says) as error:
        results.load(tmp_path)
    assert str(tmp_path / "results.json") in str(error.value)
    with pytest.raises(results.ResultsError):
        results.Recorder(tmp_path, MACHINE)
    assert (tmp_path / "results.json").read_text() == content


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(results.ResultsError, match=r"absent.*No such file"):
        results.load(tmp_path / "absent")


def test_the_best_peer_and_what_is_lost():
    mine, slow, fast = timed("gptkern", 1.0), timed("eager", 2.0), timed("compile", 0.8)
    record = cell(implementations=[mine, slow, {"name": "quack", "skipped": "absent"}, fast])
    assert results.best_peer(record)["name"] == "compile"
    assert results.ratio(record) == pytest.approx(1.25) and results.ratio(record, slow) == 0.5
    assert results.lost(record)
    assert not results.lost(cell(implementations=[timed("gptkern", 1.019), timed("eager", 1.0)])), "noise"
    assert not results.lost(cell(implementations=[timed("gptkern", 1.0)])), "nobody to lose to"
    # On a GPU the device's time counts, not the host's.
    device = {"median": 3.0, "low": 3.0, "high": 3.0, "n": 3}
    assert (
        results.ratio(
            cell(implementations=[timed("gptkern", 1.0, device_s=device), timed("eager", 9.0, device_s=device)])
        )
        == 1
    )
