"""Rows sent while something else is computed: what arrives, what goes back, in which order, and how long one waits."""

import time

import pytest
import torch
import torch.distributed as dist
from tests.parallel.ranks import run_ranks
from torch.utils.checkpoint import checkpoint

from fulmen.parallel.collectives import Arrived, Exchange, Waits, gather, launch

SENT = ([3, 0, 2], [0, 0, 0], [1, 4, 5])
"""Rows from each of three ranks to each; the second sends none."""


def rows_of(rank, dtype=torch.float64):
    return (torch.arange(2 * sum(SENT[rank])).view(-1, 2) + 100 * rank).to(dtype)


def sizes():
    rank = dist.get_rank()
    return SENT[rank], [sent[rank] for sent in SENT]


def expected(rank):
    return torch.cat([rows_of(other).split(SENT[other])[rank] for other in range(len(SENT))])


def exchange(rows, waits=None):
    return launch(rows, *sizes(), dist.group.WORLD, waits or Waits())


def there_and_back():
    rank, found = dist.get_rank(), {}
    for dtype in (torch.float32, torch.bfloat16):
        found[str(dtype)] = exchange(rows_of(rank, dtype)).wait()
    rows = rows_of(rank).requires_grad_()
    arrived = exchange(rows).wait()
    # What arrived is multiplied by the rank that it came to, so that a gradient says who sent it.
    (d_rows,) = torch.autograd.grad(((1 + rank) * arrived).sum(), rows)
    with torch.no_grad():
        found["without gradient"] = exchange(rows).wait()
    kept = checkpoint(lambda rows: exchange(rows.square()).wait().square(), rows, use_reentrant=False)
    (d_twice,) = torch.autograd.grad(kept.sum(), rows)
    return found | {"rows": arrived.detach(), "d_rows": d_rows, "d_twice": d_twice}


def test_each_rank_gets_its_rows_and_their_gradients_go_home():
    for rank, found in enumerate(run_ranks(3, there_and_back)):
        assert torch.equal(found["rows"], expected(rank))
        assert torch.equal(found["without gradient"], expected(rank))
        assert torch.equal(found["torch.float32"], expected(rank).float())
        assert torch.equal(found["torch.bfloat16"], expected(rank).bfloat16())
        receiver = torch.arange(1.0, 4).repeat_interleave(torch.tensor(SENT[rank])).double()
        assert torch.equal(found["d_rows"], receiver[:, None].expand(-1, 2))
        assert torch.equal(found["d_twice"], 4 * rows_of(rank) ** 3)


class Step(torch.autograd.Function):
    """Writes its name into a log, forward and backward."""

    @staticmethod
    def forward(ctx, x, log, name):
        ctx.log, ctx.name = log, name
        log.append(name)
        return x.clone()

    @staticmethod
    def backward(ctx, d_x):
        ctx.log.append(ctx.name)
        return d_x, None, None


def logged(log):
    """Let exchanges write into the log when they begin and end, by number."""
    numbers, begin, end = {}, Exchange._begin, Exchange._end

    def begin_logged(self, *arguments):
        log.append(f"begin {numbers.setdefault(self, len(numbers))}")
        return begin(self, *arguments)

    def end_logged(self):
        log.append(f"end {numbers[self]}")
        return end(self)

    Exchange._begin, Exchange._end = begin_logged, end_logged


def what_runs_between():
    log = []
    logged(log)
    first, second = (rows_of(dist.get_rank()).requires_grad_() for _ in range(2))
    travelling = exchange(first)
    other = Step.apply(second, log, "between")
    (travelling.wait().sum() + other.sum()).backward()
    return log


def test_what_ran_while_rows_travelled_runs_while_their_gradient_does():
    for log in run_ranks(3, what_runs_between):
        assert log == ["begin 0", "between", "end 0", "begin 0", "between", "end 0"]


def waited():
    rank, waits = dist.get_rank(), Waits()
    rows = rows_of(rank).requires_grad_()
    dist.barrier()
    if rank == 1:
        time.sleep(1)
    arrived = exchange(rows, waits).wait()
    forward = waits.take()
    dist.barrier()
    if rank == 1:
        time.sleep(1)
    arrived.sum().backward()
    return forward, waits.take(), waits.take()


def test_the_time_lost_is_counted_forward_and_backward():
    for rank, (forward, backward, rest) in enumerate(run_ranks(3, waited)):
        for seconds in (forward, backward):
            assert seconds < 0.5 if rank == 1 else seconds > 0.5
        assert rest == 0


def alone():
    rows = rows_of(0).requires_grad_()
    there = launch(rows, [5], [5], dist.group.WORLD, Waits())
    return isinstance(there, Arrived), there.wait() is rows, gather(rows, dist.group.WORLD).shape


def test_a_group_of_one_sends_nothing():
    assert run_ranks(1, alone) == [(True, True, (1, 5, 2))]


def gathered():
    return gather(torch.full((2, 3), dist.get_rank()), dist.group.WORLD)


@pytest.mark.parametrize("world", [2, 3])
def test_gathered_tensors_are_in_the_order_of_the_ranks(world):
    for found in run_ranks(world, gathered):
        assert torch.equal(found, torch.arange(world)[:, None, None].expand(world, 2, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a CPU's waits are measured above")
def test_on_a_gpu_its_own_time_is_counted():
    waits = Waits()
    with waits.counted(torch.device("cuda")):
        torch.cuda._sleep(10**8)
    assert 0.01 < waits.take() < 1
    assert waits.take() == 0
