"""What collectives take and how much of it is hidden under computation: a timeline of one rank.

with Timeline() as timeline: step()          # or Trace() on a GPU
timeline.travelling, timeline.waiting        # seconds in which something travelled; in which this rank only waited
"""

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity

from fulmen.parallel import lasp


class Timeline:
    """Of gloo's collectives that `fulmen.parallel` launches, from each one's launch to its end; and of the waiting."""

    def __enter__(self) -> "Timeline":
        self._spans: list[list[float]] = []
        self.waits: list[tuple[float, float]] = []
        self._patches = ExitStack()
        for owner, name in ((lasp, "ALL_GATHER"), (dist, "all_to_all_single"), (dist, "batch_isend_irecv")):
            self._patches.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name))))
        return self

    def __exit__(self, *error: object) -> None:
        self._patches.close()

    @property
    def travelling(self) -> float:
        """Seconds in which at least one collective was under way."""
        return _union([(start, end) for start, end in self._spans])

    @property
    def waiting(self) -> float:
        """Seconds of these in which this rank did nothing else."""
        return _union(self.waits)

    def _timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            works = collective(*arguments, **options)
            if works is None:  # it has waited itself
                self._spans.append([started, time.perf_counter()])
                self.waits.append((started, time.perf_counter()))
                return None
            if isinstance(works, list):
                return [_Timed(work, started, self) for work in works]
            return _Timed(works, started, self)

        return launch

    def begin(self, started: float) -> list[float]:
        """A span that ends when whoever calls this says so."""
        self._spans.append([started, started])
        return self._spans[-1]


class Trace:
    """The same of NCCL's, from the profiler's trace: a rank waits where its kernels alone run."""

    def __enter__(self) -> "Trace":
        self._profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA]).__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._profiler.__exit__(*error)
        travelling, computing = [], []
        for event in self._profiler.events():
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("nccl:"):
                spans = travelling if "nccl" in event.name else computing
                spans.append((event.time_range.start / 1e6, event.time_range.end / 1e6))
        self.travelling = _union(travelling)
        # What either does, less what computes.
        self.waiting = _union(travelling + computing) - _union(computing)


class _Timed:
    """A work whose end and whose waiting are noted."""

    def __init__(self, work: Any, started: float, timeline: Timeline):
        self._work, self._timeline = work, timeline
        self._span = timeline.begin(started)
        # Of point-to-point works gloo does not tell the end; then it is that of the waiting.
        with suppress(RuntimeError):
            work.get_future().add_done_callback(self._done)

    def wait(self) -> None:
        started = time.perf_counter()
        self._work.wait()
        self._timeline.waits.append((started, time.perf_counter()))
        self._done()

    def _done(self, *_: Any) -> None:
        if self._span[1] == self._span[0]:
            self._span[1] = time.perf_counter()


def _union(spans: list[tuple[float, float]]) -> float:
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
