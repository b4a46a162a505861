"""Whole models, stock and swapped: a training step and generation, the cells of gptkern.measuring.operators.model."""

OPERATOR = "model"


def test_model(cell, implementation, measured):
    measured(cell, implementation)
