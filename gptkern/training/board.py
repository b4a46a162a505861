"""A run's curves as TensorBoard's files, where that is installed: beside metrics.jsonl, which has all of them.

Written with TensorBoard's own records and not through torch.utils.tensorboard: its writer is a thread, of which a full
disk ends in a traceback, and it takes no folder whose name is no text.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gptkern.training.errors import UserError, reason

# Of a line of metrics.jsonl what is no curve.
_NO_CURVES = ("step", "tokens", "seconds")
_VERSION = "brain.Event:2"  # of the format


def wanted(choice: str) -> bool:
    """Whether files are to be written; `choice` is "on", "off" or "auto": where TensorBoard is installed.

    Raises:
        UserError: they shall be and it is not.
    """
    there = importlib.util.find_spec("tensorboard") is not None
    if choice == "on" and not there:
        raise UserError("--tensorboard on: TensorBoard is not installed; the extra tensorboard brings it")
    return choice != "off" and there


class Board:
    """A file of TensorBoard's for one part of a run. What cannot be written is said once, and ends no run.

    Args:
        step: what an earlier part of the run wrote of later ones is not shown.
    """

    def __init__(self, folder: Path, step: int, say: Callable[[str], None]):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._say, self._event, self._summary = say, event_pb2, summary_pb2
        self._writer: RecordWriter | None = None
        with self._told():
            folder.mkdir(exist_ok=True)
            # TensorBoard reads the files in the order of their names.
            seconds, rest = divmod(time.time_ns(), 10**9)
            name = f"events.out.tfevents.{seconds}.{rest:09}.gptkern.{os.getpid()}"
            self._writer = RecordWriter(open(folder / name, "xb", buffering=0))  # noqa: SIM115
            self._write(file_version=_VERSION)
            if step:
                started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                self._write(step=step + 1, session_log=started)

    def add(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        value = self._summary.Summary.Value
        numbers = {name: each for name, each in line.items() if isinstance(each, (int, float))}
        values = [value(tag=name, simple_value=each) for name, each in numbers.items() if name not in _NO_CURVES]
        with self._told():
            self._write(step=line["step"], summary=self._summary.Summary(value=values))

    def close(self) -> None:
        with self._told():
            if self._writer is not None:
                self._writer.close()

    def _write(self, **what: Any) -> None:
        if self._writer is not None:
            self._writer.write(self._event.Event(wall_time=time.time(), **what).SerializeToString())

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            self._say(f"TensorBoard's files are not written on: {reason(error)}")
