"""Who is waited for: each rank writes down where it is, and one that has not moved for long says who is behind it."""

import threading
import time
from collections.abc import Callable

import torch.distributed as dist

PATIENCE = 60.0
"""Seconds without moving after which a rank looks what the others do."""


class Watch:
    """Of one rank among all of the default process group; `at` is to be called wherever it might come to wait.

    A thread of its own compares the ranks through the group's store, so it goes on while a collective hangs.
    """

    def __init__(self, tell: Callable[[str], None], *, axes: dict[str, list[int]], patience: float = PATIENCE):
        """tell: is given a line. axes: the ranks of this rank's group along each axis of the mesh."""
        self._tell, self._axes, self._patience = tell, axes, patience
        self._rank, self._count, self._where = dist.get_rank(), 0, "the beginning"
        self._since = time.monotonic()
        self._store = dist.PrefixStore("watch", dist.distributed_c10d._get_default_store())
        self._store.set(str(self._rank), self._written())
        dist.barrier()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def at(self, where: str) -> None:
        """This rank has come there."""
        self._count, self._where, self._since = self._count + 1, where, time.monotonic()

    def close(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()

    def _written(self) -> str:
        return f"{self._count} {self._where}"

    def _look(self) -> None:
        written = told = 0
        while not self._ended.wait(self._patience / 10):
            if written != self._count:
                written = self._count
                self._store.set(str(self._rank), self._written())
            elif told != self._count and time.monotonic() - self._since > self._patience:
                told = self._count
                if (line := self._report()) is not None:
                    self._tell(line)

    def _report(self) -> str | None:
        """A line, of the first of those that wait; of the others none."""
        ranks = range(dist.get_world_size())
        counts = {}
        for rank in ranks:
            count, where = self._store.get(str(rank)).decode().split(" ", 1)
            counts[rank] = int(count), where
        behind = [rank for rank in ranks if counts[rank][0] < self._count]
        if any(rank not in behind for rank in range(self._rank)):
            return None
        mine = f"rank {self._rank} has waited {self._patience:g} s in {self._where}"
        if not behind:
            return f"{mine}, as have all others"
        names = ", ".join(f"rank {rank} in {counts[rank][1]}{self._shared(rank)}" for rank in behind)
        return f"{mine}; behind it: {names}"

    def _shared(self, rank: int) -> str:
        """The axes along which they are in one group."""
        axes = [axis for axis, members in self._axes.items() if rank in members]
        return f" (same {', '.join(axes)})" if axes else ""
