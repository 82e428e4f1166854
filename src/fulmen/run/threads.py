"""The threads that share a CPU's operations."""

import ctypes

SOFT = 1  # omp.h: settings stay as they are


def release_openmp_threads() -> bool:
    """End the calling thread's OpenMP workers, which would wait for more work; False where OpenMP cannot be asked to.

    Each thread that computes has workers of its own. Once all of them together are more than the processors, GNU's
    OpenMP lets every worker sleep between two operations instead of spinning: a decoding step of a small model, which
    is a hundred short operations, took 2.3 times as long. So a thread that hands the work to another calls this; what
    it computes itself from then on starts workers anew.
    """
    try:
        return ctypes.CDLL(None).omp_pause_resource_all(SOFT) == 0
    except (OSError, TypeError, AttributeError):  # not one library for the process, or an older OpenMP
        return False
