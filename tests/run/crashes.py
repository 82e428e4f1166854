"""Scenes for test_snapshot.py, each in a process of its own: `python crashes.py SCENE FOLDER` fails with a traceback.

A scene forks children that save until they are killed, because importing torch anew for each would take minutes.
"""

import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from fulmen.run.snapshot import SnapshotError, SnapshotStore


def content(step):
    return {"a": torch.arange(step, step + 5_000), "b": torch.full((7,), step, dtype=torch.bfloat16)}


def save(store, step):
    store.save(step, content(step), {"step": step})


def check(folder):
    """Open the store as a resuming run would and return its latest step, found to hold what was saved at that step."""
    store = SnapshotStore(folder)
    snapshot = store.latest()
    assert store.warnings == [], store.warnings
    assert not list(folder.glob(".*-*")), "leftovers"
    if snapshot is None:
        return 0
    assert snapshot.state == {"step": snapshot.step}
    tensors = snapshot.tensors()
    for name, expected in content(snapshot.step).items():
        assert tensors[name].dtype == expected.dtype
        assert torch.equal(tensors[name], expected)
    return snapshot.step


def fork(child):
    """Run `child` in a forked process and return its process id."""
    if pid := os.fork():
        return pid
    try:
        child()
    finally:
        os._exit(0)


def kill_at_random_moments(folder):
    def save_forever():
        store = SnapshotStore(folder)
        step = latest
        while True:
            step += 1
            save(store, step)

    latest, kills, generator = 0, 0, random.Random(0)
    # On a busy machine a process dies before its first snapshot more often than not.
    while latest <= 40 or kills < 40:
        pid = fork(save_forever)
        time.sleep(generator.uniform(0.0, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        reached = check(folder)
        assert reached >= latest, "a saved snapshot was lost"
        latest, kills = reached, kills + 1


def kill_at_every_call(folder):
    """Die before each change of the file system in turn, while a snapshot is replaced and another one pruned."""
    names = ("mkdir", "open", "fsync", "rename", "rmdir", "unlink")
    real = {name: getattr(os, name) for name in names}
    left = 0

    def die_in_time(name):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real[name](*arguments, **options)

        return call

    def save_again():
        for name in names:
            setattr(os, name, die_in_time(name))
        save(SnapshotStore(folder, keep=1), 6)
        os._exit(7)

    for calls in range(100):
        for keep, step in ((2, 5), (2, 6)):
            save(SnapshotStore(folder, keep=keep), step)
        left = calls
        _, status = os.waitpid(fork(save_again), 0)
        assert check(folder) == 6
        if os.waitstatus_to_exitcode(status) == 7:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert 10 < calls < 99, calls


def full_disk(folder):
    """A limit on the size of files makes writing fail in the midst, as a full disk would."""
    store = SnapshotStore(folder)
    save(store, 1)
    save(store, 2)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for limit in (0, 100, 20_000, 39_999):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            save(store, 3)
        except SnapshotError as error:
            message = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert "cannot save the snapshot of step 3" in message, message
        assert "File too large (40," in message, message
        assert f"{folder / 'step-00000002'} is intact" in message, message
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        message = ""
    save(store, 3)
    assert check(folder) == 3


if __name__ == "__main__":
    torch.set_num_threads(1)
    {scene.__name__: scene for scene in (full_disk, kill_at_every_call, kill_at_random_moments)}[sys.argv[1]](
        Path(sys.argv[2])
    )
