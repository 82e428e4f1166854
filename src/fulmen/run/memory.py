"""The machine's memory, and how the process' allocator treats the tensors of a training step."""

import ctypes
import os
import platform
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Let glibc's `malloc` keep what is freed for the whole process; False where there is another C library.

    Every step frees tensors of megabytes and asks for the same again. Given back to the system, each page of 4 KiB
    costs a fault, up to a few microseconds on a virtual machine, when it is next written.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # Unless both are set, an allocation of 32 MiB or more is returned to the system at once.
    return bool(libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) and libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1))


def available_memory() -> int:
    """Bytes that the process may still take without swapping, by the system's and its control group's word."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no control groups, or no limit ("max")
        return available
    return min(available, max(0, limit - used))
