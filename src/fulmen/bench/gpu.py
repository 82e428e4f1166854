"""What the benchmarks of a GPU share: how it is timed, what it can do at most, and one way to print a row."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from fulmen.config import UserError

LONG = 2.0
"""Milliseconds from which the host's part of a call no longer shows."""

OUT_OF_MEMORY = "out of memory"


def milliseconds(call: Callable, *, graph: bool = False) -> float:
    """Median time on the GPU, caches cold; with `graph`, of launches recorded in a CUDA graph, without the host's."""
    from triton.testing import do_bench, do_bench_cudagraph

    if not graph:
        return do_bench(call, warmup=20, rep=80, return_mode="median")
    with torch.cuda.stream(torch.cuda.Stream()):
        return do_bench_cudagraph(call, rep=30, return_mode="median")


def milliseconds_alone(call: Callable) -> float:
    """The GPU's time without the host's: in a graph where launching could matter, which costs memory, else launched."""
    time = milliseconds(call)
    return time if time > LONG else milliseconds(call, graph=True)


def milliseconds_in_turns(calls: Mapping[str, Callable], *, turns: int = 9) -> dict[str, float]:
    """Median times of calls that take turns, as the GPU's clock drifts; each in a CUDA graph that repeats it."""
    records = {name: _record_or_launch(name, call) for name, call in calls.items()}
    times = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, (run, repeats) in records.items():
            time = _elapsed(run) / repeats
            if turn:  # the first one warms up
                times[name].append(time)
    return {name: statistics.median(each) for name, each in times.items()}


def _record_or_launch(name: str, call: Callable) -> tuple[Callable, int]:
    """What is to be timed, and how many calls it makes."""
    record = attempt(lambda: _record(call))
    if isinstance(record, str):
        print(f"  {name}: launched, as no graph could be recorded ({record})", flush=True)
        return call, 1
    graph, repeats = record
    return graph.replay, repeats


def _record(call: Callable) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of a few milliseconds, and how many calls it holds."""
    # Not on the default stream, as graphs ask; the first calls compile, and prepare what must not be recorded.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
        repeats = max(1, round(LONG / _elapsed(call)))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph, repeats


def _elapsed(call: Callable) -> float:
    """Milliseconds of one call between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


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


def attempt(measure: Callable):
    """What `measure` gives back, or one line of text that says why it failed: a peer's fault ends no table."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        failure = OUT_OF_MEMORY
    except Exception as error:
        failure = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
    # Here, where the error is gone and with it all that its frames held.
    free_memory()
    return failure


def free_memory() -> None:
    """Give what nobody holds any more back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


def quotient(a: float | str | None, b: float | str | None) -> float | None:
    """a / b, or None where one of them was not measured."""
    return a / b if isinstance(a, float | int) and isinstance(b, float | int) else None


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
