"""Writing so that a reader, even after a crash, sees the old content or the new and nothing between; and file locks."""

import fcntl
import os
from pathlib import Path
from typing import IO

from fulmen.config import UserError


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Replace the content of `path` in one step, durably; text becomes UTF-8, missing folders are made.

    The new content is written beside `path` under one fixed hidden name, so that a killed write leaves at most one such
    file, which the next write takes over. Two processes must not write one path at once; `RunDirectory` sees to it.
    Raises `UserError` if the disk refuses; `path` is then as it was.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.draft")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(draft, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                sync(file)
            os.replace(draft, path)
            sync_folder(path.parent)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def sync(file: IO[bytes]) -> None:
    """Return once the content of an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Return once the names in a folder are on the disk: what makes a rename in it survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_file(path: Path, *, wait: bool) -> IO[str]:
    """Open `path`, created if absent, under an exclusive lock that lasts until the file is closed or the process dies.

    The content is kept: what the holder wrote can be read by whoever does not get the lock.
    Raises `BlockingIOError` if another holds the lock and `wait` is false, another `OSError` where locks do not work.
    """
    file = open(path, "a+")  # noqa: SIM115 - the caller closes it, and the lock with it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        file.close()
        raise
    return file
