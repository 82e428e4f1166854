"""One run, one folder: a second run is kept out until the first one is gone, however it went."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fulmen.config import UserError
from fulmen.run.directory import RunDirectory

# Holds the folder, forks a worker that outlives it, prints the worker's process id, and waits to be killed.
HOLDER = """
import os, sys, time
from fulmen.run.directory import RunDirectory
with RunDirectory(sys.argv[1]):
    if (worker := os.fork()) == 0:
        time.sleep(60)
    else:
        print(worker, flush=True)
        time.sleep(60)
"""


def test_paths(tmp_path):
    run = RunDirectory(tmp_path / "run")
    assert not run.path.exists(), "names alone create nothing"
    names = ["recipe.toml", "metrics.jsonl", "snapshots", "tensorboard", "plots"]
    assert [run.recipe, run.metrics, run.snapshots, run.tensorboard, run.plots] == [run.path / name for name in names]


def test_second_run_is_told_who_holds_the_folder(tmp_path):
    path = tmp_path / "runs" / "a"
    with RunDirectory(path):
        with pytest.raises(UserError) as error, RunDirectory(path):
            pass
        assert str(error.value).startswith(f"{path} is in use by process {os.getpid()}: ")
        with RunDirectory(tmp_path / "runs" / "b"):
            pass
    with RunDirectory(path):
        pass


def test_folder_is_free_after_an_exception(tmp_path):
    with pytest.raises(RuntimeError), RunDirectory(tmp_path):
        raise RuntimeError
    with RunDirectory(tmp_path):
        pass


def test_folder_is_free_after_kill_9_even_if_a_forked_worker_lives_on(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    try:
        # The worker lets go as soon as it runs, which may be after its parent printed.
        time.sleep(0.2)
        with pytest.raises(UserError, match=f"in use by process {holder.pid}:"), RunDirectory(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with RunDirectory(tmp_path):
            os.kill(worker, 0)
    finally:
        holder.kill()
        os.kill(worker, signal.SIGKILL)
        holder.communicate()


def test_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot use .*file as the folder of a run: File exists"):
        RunDirectory(tmp_path / "file").__enter__()
    with pytest.raises(UserError, match="as the folder of a run: Not a directory"):
        RunDirectory(tmp_path / "file" / "run").__enter__()
