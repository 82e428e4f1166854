"""What a run measured, step by step: one JSON object a line, and the same curves for TensorBoard."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fulmen.config import UserError
from fulmen.run.directory import RunDirectory
from fulmen.run.events import EventFile
from fulmen.run.files import sync, write_atomic


class MetricsLog:
    """Appends to `metrics.jsonl` and the TensorBoard folder of a run, for example

        {"step": 200, "loss": 2.31, "expert_load": [0.26, 0.24, 0.27, 0.23]}

    `resume_step` is the step of the snapshot that the run resumes from: what an interrupted run logged after it is
    dropped, so that the file reads as one uninterrupted run. With None the run begins, and anything logged is dropped.
    A step may have several lines; all should be logged before the snapshot of that step is saved, and `flush` called.
    """

    def __init__(self, directory: RunDirectory, *, resume_step: int | None) -> None:
        self._path = directory.metrics
        write_atomic(self._path, "".join(_lines_until(self._path, resume_step)))
        first_step = 0 if resume_step is None else resume_step + 1
        try:
            self._file = open(self._path, "ab")  # noqa: SIM115 - closed by `close`
            self._events = EventFile(directory.tensorboard, first_step=first_step)
        except OSError as error:
            raise self._write_error(error) from error

    def log(self, step: int, **values: Any) -> None:
        """Append one line: each value is a number, a list of numbers, a tensor or a list of tensors.

        TensorBoard shows the elements of a list as name/0, name/1 and so on.
        JSON has no nan or inf: they are written as null, and `read_metrics` gives nan. Raises `UserError` if the disk
        refuses.
        """
        values = {name: _as_numbers(value) for name, value in values.items()}
        line = json.dumps({"step": step} | {name: _as_json(value) for name, value in values.items()}, allow_nan=False)
        try:
            self._file.write(f"{line}\n".encode())
            self._file.flush()
            self._events.write(step, _scalars(values))
        except OSError as error:
            raise self._write_error(error) from error

    def flush(self) -> None:
        """Return once all lines, and TensorBoard's events, are on the disk."""
        try:
            sync(self._file)
            self._events.flush()
        except OSError as error:
            raise self._write_error(error) from error

    def close(self) -> None:
        """Flush and close both."""
        try:
            self.flush()
        finally:
            # After a flush that failed, closing fails for the same reason.
            for stream in (self._file, self._events):
                with contextlib.suppress(OSError):
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write_error(self, error: OSError) -> UserError:
        return UserError(f"cannot write metrics to {self._path.parent}: {error.strerror or error}")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file, null as nan; a last line that is still being written is left out.

    Raises `UserError` for a missing file and for a line that is not a JSON object with a step.
    """
    return [_from_json(record) for _, record in _records(Path(path))]


def _lines_until(path: Path, step: int | None) -> Iterator[str]:
    if step is not None and path.exists():
        for line, record in _records(path):
            if record["step"] <= step:
                yield line


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each complete line of a metrics file as text and as an object."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"cannot read metrics {path}: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
            record["step"] + 0
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: not a JSON object with a step; delete the line") from None
        yield line.decode(), record


def _as_numbers(value: Any) -> Any:
    """Return tensors and arrays, also within lists, as Python's numbers and lists of them."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [_as_numbers(item) for item in value] if isinstance(value, list | tuple) else value


def _as_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _from_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return math.nan if value is None else value


def _scalars(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, list):
            yield from _scalars({f"{name}/{index}": item for index, item in enumerate(value)})
        else:
            yield name, value
