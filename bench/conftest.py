"""Runs the benchmarks on harness.clock, and prints the table of ratios when they are done."""

from __future__ import annotations

import harness
import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=harness.clock))


def pytest_terminal_summary(terminalreporter):
    if not harness.ROWS:
        return
    terminalreporter.section("gptkern and its peers: medians, ratio = gptkern / peer")
    terminalreporter.line(", ".join(f"{name}: {value}" for name, value in harness.environment().items()))
    for line in harness.table():
        terminalreporter.line(line)
