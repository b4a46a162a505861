"""The results file: nothing lost, nothing half-written, resumed where the sources are the same."""

from __future__ import annotations

import json

import pytest

from gptkern.measuring import results

MACHINE = {
    "device": "A device", "slug": "a-device", "kind": "cpu", "source": "0123", "gptkern": "0.1.0", "torch": "2.13.0",
    "triton": None, "threads": 2, "commit": "abcdef0123456789",
}  # fmt: skip
CEILINGS = {"copy": {"value": 1e9, "unit": "B/s", "how": "x"}}


def cell(key="a cell", rounds=5, **changes):
    time = {"name": "gptkern", "wall_s": {"median": 1.0, "low": 1.0, "high": 1.0, "n": 3}}
    return {"key": key, "rounds": rounds, "implementations": [time]} | changes


def recorded(folder, *cells, **machine):
    recorder = results.Recorder(folder, MACHINE | machine)
    for record in cells:
        recorder.add("cells", record)
    return recorder


def test_what_is_recorded_is_loaded(tmp_path):
    folder = tmp_path / "new" / "folder"
    recorder = recorded(folder, cell())
    recorder.set_ceilings(CEILINGS, "full")
    recorder.add("costs", {"key": "import"})
    found = results.load(folder)
    assert [c["key"] for c in found["cells"]] == ["a cell"] and found["ceilings"]["copy"]["value"] == 1e9
    assert found["costs"] == [{"key": "import"}] and found["machine"] == MACHINE
    assert [path.name for path in folder.iterdir()] == ["results.json"]


def test_a_run_goes_on_where_the_last_one_ended(tmp_path):
    recorded(tmp_path, cell(rounds=5), cell("other"), cell("wrong", implementations=[{"name": "gptkern"}]))
    again = recorded(tmp_path, date="another day")
    assert again.done("a cell", 5) and again.moved is None
    assert not again.done("a cell", 6), "fewer rounds than wanted"
    assert not again.done("wrong", 1) and not again.done("another cell", 1)
    again.add("cells", cell(rounds=9))
    found = [(c["key"], c["rounds"]) for c in results.load(tmp_path)["cells"]]
    assert found == [("a cell", 9), ("other", 5), ("wrong", 5)], "measured anew, in its place"


def test_less_does_not_stand_for_more(tmp_path):
    recorder = recorded(tmp_path, cell(peers_asked=["compile", "eager"]))
    assert recorder.done("a cell", 1, ["eager"]) and recorder.done("a cell", 1, ["compile", "eager"])
    assert not recorder.done("a cell", 1, ["quack"]) and not recorder.done("a cell", 1), "all peers were not asked"
    recorder.add("cells", cell(peers_asked=None))
    assert recorder.done("a cell", 1) and recorder.done("a cell", 1, ["quack"])
    assert not recorder.has_ceilings("smoke") and not recorder.has_cost("import", "smoke")
    for extent, reached in (("smoke", ["smoke"]), ("quick", ["smoke", "quick", "full"])):
        recorder.set_ceilings(CEILINGS, extent)
        assert [e for e in results.EXTENTS if recorder.has_ceilings(e)] == reached, "quick and full are the same"
    recorder.add("costs", {"key": "import", "extent": "quick"})
    assert [e for e in results.EXTENTS if recorder.has_cost("import", e)] == ["smoke", "quick"]


@pytest.mark.skipif(results.files.fcntl is None, reason="this system has no flock")
def test_a_second_run_is_kept_out(tmp_path):
    with results.locked(tmp_path / "new"):
        with pytest.raises(results.ResultsError, match="another gptkern bench is writing there"):
            results.locked(tmp_path / "new").__enter__()
        with results.locked(tmp_path / "other"):
            pass


@pytest.mark.parametrize("name", results.SAME)
def test_results_of_other_sources_or_devices_are_moved_aside(tmp_path, name):
    recorded(tmp_path, cell())
    other = recorded(tmp_path, **{name: "other"})
    assert not other.done("a cell", 1)
    assert other.moved == tmp_path / "results-abcdef012345.json"
    assert results.load(other.moved)["cells"][0]["key"] == "a cell"
    other.add("cells", cell("new"))
    assert recorded(tmp_path).moved == tmp_path / "results-abcdef012345-2.json", "what was moved before is kept"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("not json", "Expecting value"),
        ('{"format": 2}', "its format is 2; it needs 1"),
        (json.dumps({"format": 1, "machine": {}}), "its format is 1; it needs 1, with machine, ceilings, cells, costs"),
    ],
)
def test_what_is_no_results_file_is_named_and_left_alone(tmp_path, content, says):
    path = tmp_path / "results.json"
    path.write_text(content)
    for read in (lambda: results.load(tmp_path), lambda: recorded(tmp_path)):
        with pytest.raises(results.ResultsError, match=says) as error:
            read()
        assert str(path) in str(error.value)
    assert path.read_text() == content
