"""Rows sent between ranks while something else is computed, forward and backward.

`launch` begins an exchange, `Exchange.wait` gives its rows. Autograd sees two functions, one for each: the backward
pass of the waiting sends the rows' gradient back, that of the launch waits for it. As autograd goes backward in the
reverse order of the forward pass, what was computed while the rows travelled is what it computes while their gradient
does.

Every rank of a group must launch the same exchanges in the same order and go backward through all of them, one without
a row of its own too.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# The older names, which newer versions of torch warn of.
ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Waits:
    """The time in which a rank does nothing but wait for others, forward and backward; to be taken every few steps.

    On a GPU it is the time for which its stream stands still; the host is not held up.
    """

    def __init__(self):
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def take(self) -> float:
        """Seconds since it was last asked; waits for the GPU."""
        seconds, self._seconds = self._seconds, 0.0
        events, self._events = self._events, []
        for start, end in events:
            end.synchronize()
            seconds += start.elapsed_time(end) / 1e3
        return seconds

    @contextmanager
    def counted(self, device: torch.device) -> Iterator[None]:
        """Count what happens within."""
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start


class Exchange:
    """Rows on their way between the ranks of a group."""

    def __init__(self, group: dist.ProcessGroup, waits: Waits):
        self._group, self._waits = group, waits

    def wait(self) -> Tensor:
        """The rows [sum of `receive`, ...] that arrived, by the rank that they come from; to be called once."""
        return _Finish.apply(self._ticket, self)

    def _begin(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> None:
        self._rows = rows.new_empty(sum(receive), *rows.shape[1:])
        self._work = dist.all_to_all_single(
            self._rows, rows.contiguous(), list(receive), list(send), group=self._group, async_op=True
        )

    def _end(self) -> Tensor:
        rows, work = self._rows, self._work
        del self._rows, self._work
        with self._waits.counted(rows.device):
            work.wait()
        return rows


class Arrived(NamedTuple):
    """Rows that had nowhere to go."""

    rows: Tensor

    def wait(self) -> Tensor:
        return self.rows


Travelling = Exchange | Arrived


def launch(
    rows: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup, waits: Waits
) -> Travelling:
    """Send its part of `rows` to each rank of a group, the parts laid end to end, and receive such parts from all.

    Args:
        rows: [sum of `send`, ...]; not to be written to before the exchange is over.
        send, receive: how many rows go to each rank of the group, and come from each.
        waits: counts the time that is lost.
    """
    if group.size() == 1:
        return Arrived(rows)
    exchange = Exchange(group, waits)
    # What autograd's graph has in place of the rows while these are nowhere.
    exchange._ticket = _Start.apply(rows, exchange, send, receive)
    return exchange


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, exchange: Exchange, send: Sequence[int], receive: Sequence[int]):
        ctx.exchange = exchange
        exchange._back = (receive, send)
        exchange._begin(rows, send, receive)
        return rows.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        return ctx.exchange._end(), None, None, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket: Tensor, exchange: Exchange):
        ctx.exchange = exchange
        del exchange._ticket  # or the graph would hold on to itself
        return exchange._end()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rows: Tensor):
        ctx.exchange._begin(d_rows, *ctx.exchange._back)
        return d_rows.new_empty(0), None


def gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Of a tensor of one shape [...] those of all ranks [ranks, ...], in their order; without gradient."""
    if group.size() == 1:
        return tensor[None]
    gathered = tensor.new_empty(group.size(), *tensor.shape)
    dist.all_gather(list(gathered.unbind()), tensor.contiguous(), group=group)
    return gathered
