"""Runs a function on several ranks: processes joined by gloo, forked from one that has imported what they need."""

import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

LIMIT = 120
"""Seconds that all ranks together may take; then a test of theirs fails instead of hanging."""


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on each of `world` ranks, at module level, and what it gives back by rank.

    Fails the test with the traceback of the first rank that fails, or if they take longer than LIMIT.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "fulmen.model", "fulmen.parallel", "fulmen.train"])
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        processes = [
            context.Process(
                target=_rank, args=(rank, world, os.path.join(folder, "store"), results, function, arguments)
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(processes, results)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(processes: list, results: Any) -> list[Any]:
    found: dict[int, Any] = {}
    deadline = time.monotonic() + LIMIT
    while len(found) < len(processes):
        if results.empty():
            if time.monotonic() > deadline:
                pytest.fail(f"ranks {sorted(set(range(len(processes))) - set(found))} hang")
            dead = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in found]
            if dead and results.empty():
                pytest.fail(f"rank {dead[0]} ended with exit code {processes[dead[0]].exitcode}")
            time.sleep(0.01)
            continue
        rank, value, error = results.get()
        if error is not None:
            pytest.fail(f"rank {rank}:\n{error}")
        found[rank] = torch.load(io.BytesIO(value), weights_only=False)
    return [found[rank] for rank in range(len(processes))]


def _rank(rank: int, world: int, store: str, results: Any, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=LIMIT)
        )
        value = function(*arguments)
        dist.barrier()
        dist.destroy_process_group()
        # As bytes: tensors would be handed over by descriptors, which end with this process.
        packed = io.BytesIO()
        torch.save(value, packed)
        results.put((rank, packed.getvalue(), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
