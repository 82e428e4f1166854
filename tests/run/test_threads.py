import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fulmen.run.threads import release_openmp_threads

COUNT = """
import os, torch
from fulmen.run.threads import release_openmp_threads

torch.set_num_threads(3)
def threads():
    return len(os.listdir("/proc/self/task"))
def compute():
    return (torch.ones(1 << 20) + 1).sum().item()
before = threads()
first = compute()
at_work = threads()
was_released = release_openmp_threads()
print(was_released, at_work - before, threads() - before, compute() == first)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_workers_end_and_come_back():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(COUNT)], capture_output=True, text=True, check=True)
    was_released, at_work, left, is_same = done.stdout.split()
    assert is_same == "True"
    if was_released == "False":
        pytest.skip("this OpenMP ends no threads")
    assert (at_work, left) == ("2", "0"), os.linesep + done.stdout


def test_an_openmp_that_cannot_be_asked(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert release_openmp_threads() is False
