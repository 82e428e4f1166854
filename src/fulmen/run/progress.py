"""How far a run is and how long it will take: a bar on a terminal, a plain line now and then anywhere else."""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

_RATE_SECONDS = 120


class Progress:
    """Shows `description`, done of `total` (None: unknown), elapsed and remaining time, and free-form fields.

        with Progress("train", 1000, done=200) as progress:
            progress.advance(loss=2.31, **{"tokens/s": 12_345})

    `done` steps came from an earlier run: they fill the bar, but count neither in the rate nor in the elapsed time. The
    remaining time follows the rate of the last two minutes. Where `file` (default: stdout) is no terminal, a plain line
    is written every `interval` seconds and at the end, without control characters.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        *,
        done: int = 0,
        file: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = sys.stdout if file is None else file
        self._console = Console(file=self._file)
        self._live = self._file.isatty() and not self._console.is_dumb_terminal
        self._interval = interval
        self._clock = clock
        self._written_at, self._written = clock(), ""
        self._fields: dict[str, Any] = {}
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False, style="bold"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(elapsed_when_finished=False),
            # On a narrow terminal the fields are cut, and nothing else.
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            console=self._console,
            expand=True,
            speed_estimate_period=_RATE_SECONDS,
            get_time=clock,
        )
        self._task_id = self._bar.add_task(description, total=total, completed=done, text="")

    def advance(self, steps: int = 1, **fields: Any) -> None:
        """Count `steps` more as done; `fields` are added to those shown: floats to 4 digits, the rest as it is."""
        self._fields.update(fields)
        text = "  ".join(f"{name} {_format(value)}" for name, value in self._fields.items())
        self._bar.update(self._task_id, advance=steps, text=text)
        if not self._live and self._clock() - self._written_at >= self._interval:
            self._write_line()

    def print(self, text: str) -> None:
        """Write a line of its own, above the bar where there is one."""
        if self._live:
            self._console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._file, flush=True)

    def __enter__(self) -> Self:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()
        elif self._line() != self._written:
            self._write_line()

    def _write_line(self) -> None:
        self._written_at, self._written = self._clock(), self._line()
        self.print(self._written)

    def _line(self) -> str:
        task = self._bar.tasks[0]
        parts = [task.description, f"{task.completed:.0f}"]
        if task.total is not None:
            parts[-1] += f"/{task.total:.0f} ({task.percentage:.0f}%)"
        parts.append(f"elapsed {_seconds(task.elapsed)}")
        if task.time_remaining is not None and not task.finished:
            parts.append(f"remaining {_seconds(task.time_remaining)}")
        return "  ".join([*parts, task.fields["text"]]).rstrip()


def _seconds(seconds: float | None) -> str:
    return str(timedelta(seconds=int(seconds or 0)))


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
