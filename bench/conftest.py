"""The cells of `gptkern bench` on pytest-benchmark: one test for each cell and each implementation in it.

    pytest bench                    the quick cells of all operators; --full all, --smoke tiny ones
    pytest bench -k softmax --benchmark-group-by=group --benchmark-json=softmax.json

All implementations of a cell are checked and timed in turn when its first test runs; each test hands its own samples to
pytest-benchmark.
"""

from __future__ import annotations

import pytest

from gptkern.measuring import machine, runner


class Clock:
    """A timer for pytest-benchmark that tells samples taken before: it cannot take turns between functions itself."""

    __name__ = "samples"

    def __init__(self):
        self.samples: list[float] = []
        self._now = 0.0
        self._running = False

    def __call__(self) -> float:
        if self._running and self.samples:
            self._now += self.samples.pop(0)
        self._running = not self._running
        return self._now

    def replay(self, benchmark, samples: list[float]) -> None:
        self.samples, self._running = list(samples), False
        benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)


clock = Clock()


def pytest_addoption(parser):
    group = parser.getgroup("gptkern").addoption
    group("--full", action="store_true", help="all cells, not the quick ones alone")
    group("--smoke", action="store_true", help="tiny cells, two samples each: to see that the benchmarks work")


def _extent(config) -> str:
    return "smoke" if config.getoption("--smoke") else "full" if config.getoption("--full") else "quick"


def pytest_generate_tests(metafunc):
    kind = machine.kind()
    cells = runner.cells(kind, _extent(metafunc.config))
    pairs = [(cell, name) for cell in cells for name in runner.module(cell.operator).implementations(cell, kind)]
    ids = [f"{c.operator}-{c.direction}-{c.label}-{c.dtype}-{name}".replace(" ", "_") for c, name in pairs]
    metafunc.parametrize(("cell", "implementation"), pairs, ids=ids)


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock))


@pytest.fixture(scope="session")
def _measured(request):
    # Device, versions and commit go into pytest-benchmark's own JSON.
    machine_info = getattr(getattr(request.config, "_benchmarksession", None), "machine_info", None)
    if isinstance(machine_info, dict):
        machine_info["gptkern"] = machine.identify()
    return {}


@pytest.fixture
def measured(request, benchmark, _measured):
    """Measures the test's cell, once for all its tests; hands one implementation's samples to pytest-benchmark."""

    def of(cell, implementation):
        if cell.key not in _measured:
            _measured[cell.key] = runner.measure(cell, machine.kind(), runner.ROUNDS[_extent(request.config)])
        record, samples = _measured[cell.key]
        mine = next(i for i in record["implementations"] if i["name"] == implementation)
        if "skipped" in mine:
            (pytest.fail if implementation == runner.GPTKERN else pytest.skip)(mine["skipped"])
        benchmark.group = cell.key
        benchmark.extra_info |= {name: record[name] for name in ("sizes", "bytes", "flops", "check", "clocks")} | mine
        clock.replay(benchmark, samples[implementation])

    return of
