"""What the benchmarks of a GPU share: how it is timed, what it can do at most, and one way to print a row."""

import statistics
import time
from collections.abc import Callable

import torch
from triton.testing import do_bench, do_bench_cudagraph

from fulmen.config import UserError


def milliseconds(call: Callable, *, graph: bool = False) -> float:
    """Median time on the GPU, caches cold; with `graph`, of launches recorded in a CUDA graph, without the host's."""
    if not graph:
        return do_bench(call, warmup=20, rep=80, return_mode="median")
    with torch.cuda.stream(torch.cuda.Stream()):
        return do_bench_cudagraph(call, rep=30, return_mode="median")


def seconds(call: Callable, *, repeats: int = 5, warmup: int = 2) -> float:
    """Median time that a call takes, the host's work included."""
    times = []
    for turn in range(warmup + repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if turn >= warmup:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def copy_rate() -> float:
    """Bytes a second of a copy on the device, read and written."""
    x = torch.randn(2**28, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / (milliseconds(lambda: y.copy_(x)) * 1e-3)


def matrix_rate() -> float:
    """Operations a second of an 8192 x 8192 x 8192 product in bf16."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / (milliseconds(lambda: a @ b) * 1e-3)


def peak_bytes(call: Callable) -> int:
    """By how much a call raises the memory that is allocated."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def require(errors: dict[str, float], tolerance: float) -> None:
    """Stop unless all errors are within the tolerance: what is wrong is not timed."""
    print("relative errors", {name: f"{error:.1e}" for name, error in errors.items()}, flush=True)
    if not all(error <= tolerance for error in errors.values()):
        raise UserError(f"an error exceeds {tolerance:g}, so nothing is timed")


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


def show(line: dict) -> dict:
    """Print one row, name by name, and give it back."""
    parts = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in line.items())
    print("  " + " | ".join(parts), flush=True)
    return line
