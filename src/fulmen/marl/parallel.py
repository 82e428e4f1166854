"""Runs in processes of their own, several at a time: what is done stays done, what breaks breaks alone."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TextIO

import torch

from fulmen.config import UserError, dump_recipe, load_recipe
from fulmen.run import Progress, RunDirectory, StopRequest, write_atomic

FINISHED = "finished.toml"
"""In a run's folder: the recipe that was trained to its end."""

Train = Callable[..., Any]
"""`train(recipe, path, resume=True)`, as `fulmen.marl.run.train`; it must be importable by name in a new process."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: what to train, in which folder. Its recipe has run.frames, and may have run.threads."""

    method: str
    seed: int
    recipe: Any
    path: Path

    @property
    def log(self) -> Path:
        """All that the run writes to its terminal."""
        return self.path.with_name(f"{self.path.name}.log")

    @property
    def threads(self) -> int:
        """Of PyTorch, in its process."""
        return getattr(self.recipe.run, "threads", 1)

    def finished(self) -> bool:
        """Whether it was trained to its end. UserError if that was by another recipe."""
        mark = self.path / FINISHED
        if not mark.exists():
            return False
        # Read by today's schema, in which a key that the recipe did not have yet is at its default.
        with contextlib.suppress(UserError):
            if load_recipe(mark, type(self.recipe)) == self.recipe:
                return True
        raise UserError(f"{self.path} is a finished run of another recipe: delete it, or choose another folder")

    def frames(self) -> int:
        """How far the run is, from its last line of metrics."""
        try:
            with open(RunDirectory(self.path).metrics, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 2**17))
                # What follows the last line break is a line that is still being written.
                line = json.loads(file.read().split(b"\n")[-2])
        except (OSError, ValueError, IndexError):
            return 0
        return min(int(line.get("frames", line["step"])), self.recipe.run.frames)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that did not come to its end, and why. `log` is all that it wrote."""

    method: str
    seed: int
    error: str
    log: Path


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the runs ended. `stopped_by` is the signal that asked to stop before all were done."""

    failures: tuple[Failure, ...]
    stopped_by: int | None


def run_jobs(jobs: Sequence[Job], train: Train, *, workers: int | None = None, file: TextIO | None = None) -> Outcome:
    """Train every job that is not finished in a process of its own, `workers` at a time.

    A process has `run.threads` threads of PyTorch, without that key one; by default there are as many processes as the
    cores can feed, at least one. A process writes what it says to the job's log. What was interrupted goes on; a run
    that fails, or is killed, is reported and leaves the others alone. Ctrl-C lets the running ones save a snapshot and
    end, a second one ends them at once. Progress goes to `file` (default: stdout).

    Raises `UserError` for a job that was finished by another recipe, a folder that cannot be made, or no worker.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    pool = _Pool(train, workers or _count_workers(jobs), [job for job in jobs if not job.finished()])

    def frames() -> int:
        return sum(job.frames() if job in pool.unfinished else job.recipe.run.frames for job in jobs)

    before, total, more = frames(), sum(job.recipe.run.frames for job in jobs), True
    with StopRequest() as stop, Progress("compare", total, done=before, file=file) as progress, pool:
        while more:
            more = pool.step(stopping=stop.requested is not None, report=progress.print)
            now = frames()
            progress.advance(now - before, runs=f"{len(jobs) - len(pool.unfinished)}/{len(jobs)}", **pool.fields())
            before = now
    return Outcome(failures=tuple(pool.failures), stopped_by=stop.requested)


class _Pool:
    """Processes of one run each: one that is killed, or that breaks, takes no other along."""

    def __init__(self, train: Train, workers: int, jobs: Sequence[Job]):
        self.unfinished = list(jobs)
        self.failures: list[Failure] = []
        self._train, self._workers = train, workers
        self._waiting, self._stopped = deque(jobs), False
        self._running: list[tuple[Job, multiprocessing.Process]] = []
        # As clean as spawned ones: forked from a server that has done nothing but import what takes seconds.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *error: object) -> None:
        for _, process in self._running:
            process.kill()
            process.join()

    def step(self, *, stopping: bool, report: Callable[[str], None]) -> bool:
        """Start what there is room for, wait a moment, take note of what ended; whether there is more to come."""
        if stopping and not self._stopped:
            self._stopped = True
            self._waiting.clear()
            for _, process in self._running:
                process.terminate()
        while self._waiting and len(self._running) < self._workers:
            self._start(self._waiting.popleft())
        if self._running:
            wait([process.sentinel for _, process in self._running], timeout=1.0)
        for job, process in list(self._running):
            if not process.is_alive():
                self._running.remove((job, process))
                self._note(job, process.exitcode, stopping, report)
        return bool(self._running or self._waiting)

    def fields(self) -> dict[str, Any]:
        """What the progress shows beside the frames."""
        failed = {"failed": len(self.failures)} if self.failures else {}
        return failed | {"running": " ".join(f"{job.method}/{job.seed}" for job, _ in self._running)}

    def _start(self, job: Job) -> None:
        try:
            job.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {job.path.parent}: {error.strerror}") from None
        process = self._context.Process(target=_work, args=(self._train, job), daemon=True)
        process.start()
        self._running.append((job, process))

    def _note(self, job: Job, code: int, stopping: bool, report: Callable[[str], None]) -> None:
        if job.finished():
            self.unfinished.remove(job)
        elif not stopping:
            failure = Failure(method=job.method, seed=job.seed, error=_reason(job, code), log=job.log)
            self.failures.append(failure)
            report(f"{job.method}, seed {job.seed} failed: {failure.error} (all it wrote: {job.log})")


def _work(train: Train, job: Job) -> None:
    """The life of a process: one run."""
    torch.set_num_threads(job.threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(job.log, "wb") as log:
        for terminal in (1, 2):
            os.dup2(log.fileno(), terminal)
    try:
        result = train(job.recipe, job.path, resume=True)
    except UserError as error:
        sys.exit(_one_line(error))
    except Exception as error:
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {_one_line(error)}")
    if getattr(result, "stopped_by", None) is None:
        write_atomic(job.path / FINISHED, dump_recipe(job.recipe))


def _end_with_parent() -> None:
    """Ask this process to end once its parent is no more, so that a killed comparison leaves nothing behind."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def _reason(job: Job, code: int) -> str:
    """Why a process ended: the signal that killed it, or the last line that it wrote."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if code == 0:
        return "stopped before its end; compare again to go on"
    lines = job.log.read_text(errors="replace").split("\n") if job.log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), f"exit code {code}")


def _count_workers(jobs: Sequence[Job]) -> int:
    """So many that their threads have a core each."""
    return max(1, _count_cores() // max((job.threads for job in jobs), default=1))


def _count_cores() -> int:
    # Where the system says so, the cores that this process may use are fewer than those there are.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
