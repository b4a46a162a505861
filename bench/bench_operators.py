"""Every operator, and whole models, against every peer: the cells of `gptkern bench`."""


def test_cell(cell, implementation, measured):
    measured(cell, implementation)
