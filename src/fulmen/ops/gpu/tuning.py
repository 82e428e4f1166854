"""Which of a few named candidates is fastest on this GPU: timed once, remembered in a file of the user's cache folder.

The file holds {question: name of the candidate}. Its own name stands for all that makes an answer stale, so it is never
cleared: another GPU, another version of torch or Triton, or a changed kernel begins a new one.
"""

import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import triton

T = TypeVar("T")

RUNS = 5
"""Timed runs of a candidate; the fastest counts, as all that disturbs a run makes it longer."""


def choose(question: str, candidates: Mapping[str, T], seconds: Callable[[T], float] | None, *, book: str) -> T:
    """The candidate that takes the fewest seconds; a question that was answered once keeps its answer in this process.

    Args:
        question: all that the answer depends on, but for what `book` stands for.
        candidates: by name. The first is taken, by this process alone, where nothing can be timed.
        seconds: times a candidate; infinity for one that cannot run. None: nothing may be timed now.
        book: the file's name, from `book_name`.
    """
    taken = _taken(book)
    if question not in taken:
        name = _read(book).get(question)
        if name not in candidates:
            name = _fastest(candidates, seconds)
            if name is not None:
                _keep(book, question, name)
        # Another thread may have answered meanwhile; whoever came first is right.
        taken.setdefault(question, name or next(iter(candidates)))
    return candidates[taken[question]]


def book_name(gpu: str, source: Path) -> str:
    """The name of the file with answers for this GPU, these versions and the kernels in this source file."""
    parts = (gpu, torch.__version__, triton.__version__, hashlib.sha256(source.read_bytes()).hexdigest())
    return f"choices-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.json"


def gpu_seconds(call: Callable[[], object]) -> float:
    """Of the fastest of a few calls, on the GPU's own clock, after one that compiles and warms up."""
    call()
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return min(times)


@functools.cache
def _taken(book: str) -> dict[str, str]:
    """What this process has taken so far: {question: name}."""
    return {}


def _fastest(candidates: Mapping[str, T], seconds: Callable[[T], float] | None) -> str | None:
    """None if nobody may time, no candidate runs, or there is no memory for a trial, which must not stop its caller."""
    if seconds is None:
        return None
    try:
        times = {name: seconds(candidate) for name, candidate in candidates.items()}
    except torch.OutOfMemoryError:
        return None
    best = min(times, key=times.__getitem__)
    return best if times[best] < math.inf else None


def _path(book: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fulmen" / book


def _read(book: str) -> dict[str, str]:
    """The answers in the file; none where it cannot be read or holds something else."""
    try:
        content = json.loads(_path(book).read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # not there, no JSON, no home folder
        return {}
    if not isinstance(content, dict):
        return {}
    return {question: name for question, name in content.items() if isinstance(name, str)}


def _keep(book: str, question: str, name: str) -> None:
    """Add an answer to those that the file holds now. Where nothing can be written it is lost: only time is at stake.

    Written aside and moved into place, so nobody reads half a file. Of two processes that do so in the same moment one
    may lose its answer, which the next one who asks will find again.
    """
    try:
        path = _path(book)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fresh = Path(folder, book)
            fresh.write_text(json.dumps(_read(book) | {question: name}, indent=1, sort_keys=True), encoding="utf-8")
            os.replace(fresh, path)
    except (OSError, RuntimeError):
        return
