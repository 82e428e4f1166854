"""The folder of one run: where each thing lies, and the lock that keeps a second run out."""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from fulmen.config import UserError
from fulmen.run.files import lock_file
from fulmen.run.snapshot import Snapshot, SnapshotStore


class RunDirectory:
    """The folder of one run, by the names of what lies in it.

    As a context manager it creates the folder and holds it for this process alone: a second run gets a `UserError` with
    the process id of the first. The operating system drops the lock when the process ends, however it ends. Without
    `with` it is only names, for those who read. Of the processes of a distributed run, the first alone enters it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.toml"
        self.metrics = self.path / "metrics.jsonl"
        self.snapshots = self.path / "snapshots"
        self.tensorboard = self.path / "tensorboard"
        self.plots = self.path / "plots"
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(self.path / "lock", wait=False)
            self._lock.truncate(0)
            self._lock.write(f"{os.getpid()}\n")
            self._lock.flush()
        except BlockingIOError:
            holder = (self.path / "lock").read_text().strip()
            who = f"process {holder}" if holder else "another process"
            raise UserError(f"{self.path} is in use by {who}: wait, stop it, or choose another folder") from None
        except OSError as error:
            raise UserError(f"cannot use {self.path} as the folder of a run: {error.strerror}") from None
        # A forked worker inherits the open file; unless it lets go, the lock outlives a killed run.
        os.register_at_fork(after_in_child=self._lock.close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.close()


@contextmanager
def only_if_begun(directory: RunDirectory) -> Iterator[None]:
    """If no run begins here, take away what entering the folder put there; other people's files stay."""
    try:
        yield
    except BaseException:
        if not directory.recipe.exists():
            with contextlib.suppress(OSError):
                (directory.path / "lock").unlink()
                directory.path.rmdir()
        raise


def choose_snapshot(
    directory: RunDirectory, store: SnapshotStore, *, resume: bool, check_same: Callable[[], None]
) -> Snapshot | None:
    """The snapshot that a run in this folder goes on from, or None to begin.

    `check_same` refuses to go on where the run's recipe and the new one differ in what decides its numbers.

    Raises:
        UserError: the folder holds a run and `resume` is false, or snapshots without their recipe; what `check_same`
            raises.
    """
    if not directory.recipe.exists():
        if store.steps():
            raise UserError(f"{store.folder} holds snapshots of a run without its recipe: choose another --dir")
        return None
    if not resume:
        raise UserError(f"{directory.path} already holds a run: add --resume to go on, or choose another --dir")
    check_same()
    return store.latest()
