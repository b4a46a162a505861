"""Which cases of a parametrised test `make test` runs: the sharp ones; `make test-deep` has the rest."""

from __future__ import annotations

import pytest


def deep(*values):
    """Values of one argument that are left to `make test-deep`."""
    return [pytest.param(value, marks=pytest.mark.deep) for value in values]


def sharp(names, *of_them):
    """All `names`, of which those not among `of_them` are left to `make test-deep`."""
    assert set(of_them) <= set(names), f"{set(of_them) - set(names)} are not among {list(names)}"
    return [name if name in of_them else pytest.param(name, marks=pytest.mark.deep) for name in names]
