"""TensorBoard's event files, written by its own records in the caller's thread.

`SummaryWriter` writes from a thread of its own: a disk that fills up then shows as a traceback that nobody can catch,
and what is on the disk at a given step is a matter of luck.
"""

import time
from collections.abc import Iterable
from pathlib import Path

from fulmen.run.files import sync


class EventFile:
    """A new event file in `folder`; of earlier files there, TensorBoard drops what is of `first_step` or later."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        # The import takes a while, and whoever only reads metrics does without it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        self._file = open(folder / f"events.out.tfevents.{time.time():017.6f}", "xb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._write(first_step, file_version="brain.Event:2")
        self._write(first_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, scalars: Iterable[tuple[str, float]]) -> None:
        """Append the values of one step by name; a TensorBoard that watches sees them at once."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars]
        self._write(step, summary=self._summary(value=values))
        self._file.flush()

    def flush(self) -> None:
        """Return once all events are on the disk."""
        sync(self._file)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, step: int, **content) -> None:
        self._records.write(self._event(wall_time=time.time(), step=step, **content).SerializeToString())
