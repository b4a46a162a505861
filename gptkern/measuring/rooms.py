"""The cells of an operator, from what its room knows of it: inputs, implementations and reference.

The runner asks the same of whatever it measures (`Room` of an operator, the module `model` of the whole model):

    cells(kind, extent)             what is timed, the most important first
    inputs(cell, device)            the tensors of one call, new and random
    differentiable(cell)            places of those that gradients are taken of
    implementations(cell, kind)     name -> Implementation, or Missing with the reason; gptkern's own is "gptkern"
    check_cell(cell)                a cell that float64 has room for, as hard as this
    checked(cell)                   (what, worst error, bound) of gptkern's results on such a cell, against float64
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from gptkern import operators
from gptkern.backends.problem import FORWARD, Inputs, Timed
from gptkern.measuring import checking, peers
from gptkern.measuring.cells import Cell, Implementation, Missing

GPTKERN = "gptkern"


class Room:
    """An operator as the runner sees it."""

    def __init__(self, operator: str):
        self.operator, self.problem = operator, operators.problem(operator)
        # Of a cell's key: how its arguments are named, the options and the reference of the call.
        self._made: dict[str, Inputs] = {}

    def cells(self, kind: str, extent: str) -> list[Cell]:
        return [self._cell(timed) for timed in self.problem.cells(kind, extent)]

    def _cell(self, timed: Timed) -> Cell:
        problem, (direction, dtype, sizes, limits) = self.problem, timed
        return Cell(
            operator=self.operator,
            direction=direction,
            dtype=dtype,
            sizes=problem.shown(sizes),
            panel=problem.panel(sizes, dtype),
            x=problem.x(sizes),
            bytes=problem.bytes(sizes, getattr(torch, dtype).itemsize, direction),
            flops=problem.flops(sizes, direction),
            ceiling=problem.ceiling(sizes, dtype),
            limits=limits,
            of=sizes,
        )

    def inputs(self, cell: Cell, device: Any) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))
        made = self.problem.inputs(cell.of, getattr(torch, cell.dtype), generator)
        # Tensors of the last call only: what is kept is small.
        self._made[cell.key] = made._replace(
            tensors=dict.fromkeys(made.tensors), constants=dict.fromkeys(made.constants)
        )
        return made.arguments

    def differentiable(self, cell: Cell) -> tuple[int, ...]:
        return tuple(range(len(self._made[cell.key].tensors)))

    def implementations(self, cell: Cell, kind: str) -> dict[str, Implementation | Missing]:
        twin = operators.contract(self.operator).TWIN

        def call(*arguments):
            made = self._made[cell.key]
            return twin(**dict(zip(made.names, arguments)), **made.options)

        plain, written_out = self.problem.plain(cell.of), self.problem.written_out(cell.of)
        compiling = cell not in self.cells(kind, "smoke")
        return {GPTKERN: Implementation(call)} | peers.of_operator(plain, written_out, cell, kind, compiling)

    def check_cell(self, cell: Cell) -> Cell:
        return self._cell(Timed(cell.direction, cell.dtype, self.problem.for_float64(cell.of)))

    def checked(self, cell: Cell) -> Iterator[tuple[str, float, float]]:
        case = checking.Case(self.operator, "bench", getattr(torch, cell.dtype), cell.of)
        device = torch.device(checking.default_device())
        return checking.compared(case, device, backward=cell.direction != FORWARD)
