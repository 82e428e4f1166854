"""Freed memory stays with the process, so that a second tensor costs no page faults."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from fulmen.run.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[4:]))  # the heap may have to grow twice before the same place serves again
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_no_faults_for_memory_that_was_used_before():
    faults = {}
    for what in ("keep", "leave"):
        command = [sys.executable, "-c", FAULTS, what]
        faults[what] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults["leave"] > 1000
    assert faults["keep"] < 100
