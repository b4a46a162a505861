"""Triton kernels that are started directly get what Triton itself would have handed to them, or Triton's own way."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

PROGRAM = Path(__file__).with_name("direct_launches.py")
sys.path.insert(0, str(PROGRAM.parents[1] / "bench"))


def ran(calls: int) -> dict:
    import stub_driver

    if (reason := stub_driver.missing()) is not None:
        pytest.skip(reason)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), f"--calls={calls}"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def few():
    return ran(30)


def test_every_kernel_gets_what_triton_would_hand_to_it(few):
    assert few["indirect"] is None
    assert few["different"] == []
    # All of them, the second time that they were called alike.
    assert len(few["kernels"]) >= 20
    assert [name for name, (calls, directly) in few["kernels"].items() if directly < calls] == []


def test_a_key_that_is_blind_to_something_is_found(few):
    assert [name for name, seen in few["sees"].items() if not seen] == []


def test_launch_hooks_see_what_was_started_directly_before(few):
    assert few["hooks"] == {"seen": True, "by name": True}


def test_what_was_compiled_under_debug_is_not_kept(few):
    assert few["first"] == {"debug": False, "plain": True}


def test_other_rows_and_lengths_compile_nothing(few):
    assert few["anew"] == {"layer_norm": 0, "rms_norm": 0, "attention": 0}


def test_what_a_launcher_keeps_is_what_it_launches_without(few):
    assert few["plans"]["different"] == {"attention": [], "layer_norm": []}
    assert few["plans"]["kept"] == {"attention": True, "layer_norm": True}
    assert [name for name, seen in few["plans"]["sees"].items() if not seen] == []


def test_a_kept_launch_gives_way_where_something_changed(few):
    gave_way = few["plans"]["gives way"]
    assert not gave_way.pop("")
    assert [what for what, gave in gave_way.items() if not gave] == []


@pytest.mark.deep
def test_the_same_of_many_calls():
    found = ran(1500)
    assert found["different"] == []
