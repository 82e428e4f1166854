"""How a step of several ranks is timed, and what of its communication is hidden."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ranks.timeline import Timeline, Trace


def timed(
    step: Callable[[], object], device: torch.device, group: dist.ProcessGroup | None = None, repeats: int = 5
) -> dict:
    """Of several steps: the median in ms on the slowest rank, and of what travels the mean rank's ms and share hidden.

    On a CPU both come from the same steps (`Timeline`), on a GPU what travels from one more, under the profiler.
    """
    for _ in range(1 if device.type == "cpu" else 3):
        step()
    found, watch = [], Timeline() if device.type == "cpu" else None
    for _ in range(repeats):
        seconds, timeline = _timed_once(step, device, group, watch)
        found.append((seconds, *timeline))
    seconds, travelling, waiting = (statistics.median(each) for each in zip(*found, strict=True))
    if device.type == "cuda":
        _, (travelling, waiting) = _timed_once(step, device, group, Trace())
    slowest, sums = torch.tensor(seconds), torch.tensor([travelling, waiting])
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group)
    dist.all_reduce(sums, group=group)
    hidden = 1 - (sums[1] / sums[0]).item() if sums[0] > 0 else None
    return {"ms": 1e3 * slowest.item(), "travelling, ms": 1e3 * travelling, "hidden": hidden}


def _timed_once(step, device, group, watch) -> tuple[float, tuple[float, float]]:
    """Seconds; and of these in which something travelled, and in which nothing else was done meanwhile."""
    dist.barrier(group)
    finish(device)
    started = time.perf_counter()
    if watch is None:
        step()
        finish(device)
        return time.perf_counter() - started, (0.0, 0.0)
    with watch:
        step()
        finish(device)
    return time.perf_counter() - started, (watch.travelling, watch.waiting)


def finish(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def both(out: Tensor) -> None:
    """The backward pass, too."""
    out.backward(torch.ones_like(out))


def random(device: torch.device, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Of standard deviation so that products stay moderate; bf16 on a GPU unless said otherwise."""
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    return (torch.randn(shape, device=device, dtype=dtype) / shape[-1] ** 0.25).requires_grad_()


def powers(most: int) -> list[int]:
    """1, 2, 4, ... up to as many ranks."""
    return [ranks for ranks in (1, 2, 4, 8) if ranks <= most]
