"""A rank that waits says who is behind it."""

import time

import torch.distributed as dist
from tests.parallel.ranks import run_ranks

from fulmen.parallel.watch import Watch


def waiting(late):
    """What each rank tells while some do not come to the barrier for a while."""
    lines = []
    watch = Watch(lines.append, axes={"cp": [2, 3], "ep": [0, 1, 2, 3]}, patience=0.5)
    watch.at("step 7, reading")
    if dist.get_rank() in late:
        time.sleep(2)
    watch.at("step 7, rows")
    dist.barrier()
    watch.at("step 8, reading")
    watch.close()
    return lines


def test_who_is_behind_is_named_by_the_first_that_waits():
    line = "waited 0.5 s in step 7, rows; behind it: rank 2 in step 7, reading (same cp, ep)"
    assert run_ranks(4, waiting, {2}) == [[f"rank 0 has {line}"], [], [], []]
    told = run_ranks(4, waiting, {0, 2})
    assert told[1][0].startswith("rank 1 has waited 0.5 s in step 7, rows; behind it: rank 0 in step 7, reading")
    assert not told[2] + told[3]
