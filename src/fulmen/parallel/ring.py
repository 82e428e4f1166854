"""Varlen ring attention: softmax attention of a packed row that is cut over ranks (minimax-01.md, section 8).

The row is cut as a whole, wherever samples begin and end. Keys of other ranks are what the heads of segments need,
parts of samples that began in an earlier segment; everything else is attention within a rank. In step s each rank gives
the keys of its tails to the one s ranks further round the ring, if that needs them, and takes those of the one s ranks
before; steps in which nobody needs any are left out. The keys of later steps travel while those at hand are computed.
Backward keys go the same way, and each rank sends its part of their gradients home, in the dtype of the keys.

Ranks meet to exchange something, and one that has much to compute in a step comes late: samples of any lengths give all
ranks as much altogether (`Cut`), but not in each step. So keys come straight from their owner instead of being handed
on, and long before they are needed, and gradients may arrive long after: as many steps as memory allows (`AHEAD`).
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops.softmax import softmax_attention
from fulmen.ops.softmax.blocks import Attended, attend_block, attend_block_backward, merge, row_dots
from fulmen.parallel.cut import Cut, Segment

AHEAD = 2**32
"""Bytes that may be under way to and from a rank; one step always may."""

BACKWARD_TENSORS = 3
"""Of a step under way in the backward pass, each as large as its keys: these, their gradients on the way to their
owner, and gradients of this rank's keys on the way here."""

Arriving = tuple[Tensor | None, list[dist.Work]]
"""What is there once the works are done; None if nothing comes."""


def steps_ahead(step_bytes: float) -> int:
    """How many steps' keys and gradients may be under way."""
    return max(1, int(AHEAD // max(1, step_bytes)))


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, cut: Cut, group: dist.ProcessGroup, *, overlap: bool = True
) -> Tensor:
    """`softmax_attention` of the whole packed row, for this rank's tokens: [1, T_r, H, D], the dtype of q.

    q: [1, T_r, H, D], k, v: [1, T_r, H_kv, D] of the tokens that this rank of `group` holds of the row `cut`, in their
    positions. All ranks call it at the same time, forward and backward; what nobody needs is not sent. overlap: False
    waits for the next keys before it computes with those at hand, to be measured beside it.
    """
    ring = _Ring(cut, dist.get_rank(group), group, overlap)
    others = _attend_others(q, k, v, ring.route.others)
    return _RingAttention.apply(others, q, k, v, ring)


def _attend_others(q: Tensor, k: Tensor, v: Tensor, pieces: list[slice]) -> Tensor:
    """Attention of the pieces that need no other rank, laid end to end: [1, their tokens, H, D]."""
    if not pieces:
        return q[:, :0]
    if sum(piece.stop - piece.start for piece in pieces) < q.shape[1]:
        q, k, v = (torch.cat([x[:, piece] for piece in pieces], dim=1) for x in (q, k, v))
    borders = list(itertools.accumulate((piece.stop - piece.start for piece in pieces), initial=0))
    return softmax_attention(q, k, v, torch.tensor(borders, dtype=torch.int32))


class _Block(NamedTuple):
    """What a rank computes with some keys."""

    head: int  # which of its heads
    keys: slice  # among all that their owner gives


class _Route(NamedTuple):
    """Who needs whose keys in a row's cut, as one rank sees it: the same for all layers.

    What a rank gives are the tails of its segments, laid end to end.
    """

    heads: list[slice]  # of its tokens those that need keys of another segment
    tails: list[slice]  # those whose keys another segment may need
    others: list[slice]  # pieces that need no keys but their own
    needed: list[set[int]]  # in which steps the keys of each rank go to another
    steps: list[int]  # in which any do
    num_keys: list[int]  # that each rank gives
    blocks: list[list[_Block]]  # what this one computes with those of each rank

    @staticmethod
    @functools.lru_cache(maxsize=4)
    def of(cut: Cut, rank: int) -> "_Route":
        with_head = [number for number in cut.held(rank) if cut.head(number) is not None]
        heads = [cut.place(rank, cut.head(number)) for number in with_head]
        pieces = (slice(*ends) for ends in itertools.pairwise(cut.local_borders(rank)))
        needed, tails = _steps_needed(cut), [_tails_of(cut, owner) for owner in range(cut.ranks)]
        return _Route(
            heads=heads,
            tails=[cut.place(rank, tail) for tail in tails[rank].values()],
            others=[piece for piece in pieces if piece not in heads],
            needed=needed,
            steps=sorted(set().union(*needed)),
            num_keys=[sum(tail.end - tail.start for tail in each.values()) for each in tails],
            blocks=[_blocks(each, cut.distances(later=with_head)) for each in tails],
        )


def _tails_of(cut: Cut, rank: int) -> dict[int, Segment]:
    """Of a rank's segments, by their numbers."""
    found = {number: cut.tail(number) for number in cut.held(rank)}
    return {number: tail for number, tail in found.items() if tail is not None}


def _blocks(tails: dict[int, Segment], distances: Tensor) -> list[_Block]:
    """What some heads compute with an owner's tails; distances: `Cut.distances` to the heads' segments."""
    start, found = 0, []
    for number, tail in tails.items():
        keys = slice(start, start := start + tail.end - tail.start)
        found += [_Block(head, keys) for head in torch.nonzero(distances[:, number] >= 0).flatten().tolist()]
    return found


def _steps_needed(cut: Cut) -> list[set[int]]:
    """In which steps the keys of each rank go to those that need them, its own needs left out."""
    needed = [set() for _ in range(cut.ranks)]
    for later, earlier in torch.nonzero(cut.distances(later=range(len(cut.segments))) >= 0).tolist():
        owner = cut.holder(earlier)
        needed[owner].add((cut.holder(later) - owner) % cut.ranks)
    return [steps - {0} for steps in needed]


class _Ring:
    """How keys go round, and their gradients come home."""

    def __init__(self, cut: Cut, rank: int, group: dist.ProcessGroup, overlap: bool):
        self.route = _Route.of(cut, rank)
        self._rank, self._ranks, self._group, self._overlap = rank, cut.ranks, group, overlap

    def owner(self, step: int) -> int:
        """Whose keys come in a step."""
        return (self._rank - step) % self._ranks

    def blocks(self, step: int) -> list[_Block]:
        """What this rank computes with the keys that come in a step."""
        return self.route.blocks[self.owner(step)]

    def ahead(self, mine: Tensor, tensors: int = 1) -> int:
        """How many steps may be under way at a time, each with so many tensors of keys' size; the same on all ranks.

        mine: as in `walk`.
        """
        pairs, _, heads, width = mine.shape
        most = max(self.route.num_keys) * pairs * heads * width * mine.element_size()
        return steps_ahead(tensors * most) if self._overlap else 1

    def walk(self, mine: Tensor, visit: Callable[[int, Tensor | None], None], ahead: int) -> None:
        """`visit(step, keys)` of this rank's own [2, n, H_kv, D] at step 0, and of those that come at each later one,
        None if there are none. Keys of so many steps ahead are under way meanwhile."""
        following = iter(self.route.steps)
        under_way: deque[Arriving] = deque([(mine, [])])
        for step in [0, *self.route.steps]:
            keys, works = under_way.popleft()
            _wait(works)
            for later in itertools.islice(following, ahead - len(under_way)):
                under_way.append(self._launch(later, mine))
            visit(step, keys)

    def send_home(self, step: int, gradients: Tensor | None, mine: Tensor) -> Arriving:
        """Send gradients of the keys that are here to their owner; of this rank's keys, `mine`, some come likewise."""
        sends = [(gradients, self.owner(step))] if step in self.route.needed[self.owner(step)] else []
        coming = torch.empty_like(mine) if step in self.route.needed[self._rank] else None
        return coming, self._exchange(sends, [] if coming is None else [(coming, self._rank + step)])

    def _launch(self, step: int, mine: Tensor) -> Arriving:
        """Give this rank's keys to the one that takes them in this step, and take another's."""
        owner, coming = self.owner(step), None
        sends = [(mine, self._rank + step)] if step in self.route.needed[self._rank] else []
        if step in self.route.needed[owner]:
            coming = mine.new_empty(2, self.route.num_keys[owner], *mine.shape[2:])
        works = self._exchange(sends, [] if coming is None else [(coming, owner)])
        if not self._overlap:
            _wait(works)
            works = []
        return coming, works

    def _exchange(self, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]]) -> list[dist.Work]:
        operations = [
            dist.P2POp(operation, tensor, dist.get_global_rank(self._group, rank % self._ranks), self._group)
            for operation, pairs in ((dist.isend, sends), (dist.irecv, receives))
            for tensor, rank in pairs
        ]
        return dist.batch_isend_irecv(operations) if operations else []


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


class _RingAttention(torch.autograd.Function):
    """Puts the heads' attention, over all keys they see, between that of the other pieces, which comes computed."""

    @staticmethod
    def forward(ctx, others: Tensor, q: Tensor, k: Tensor, v: Tensor, ring: _Ring):
        seen: list[Attended] = []

        def visit(step: int, keys: Tensor | None) -> None:
            if step == 0:
                seen.extend(attend_block(q[0, head], k[0, head], v[0, head], causal=True) for head in ring.route.heads)
            for head, part in ring.blocks(step):
                block = attend_block(q[0, ring.route.heads[head]], *keys[:, part], causal=False)
                seen[head] = merge(seen[head], block)

        keys = _tails(k, v, ring.route.tails)
        ring.walk(keys, visit, ring.ahead(keys))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for piece, part in _places(ring.route.others):
            out[:, piece] = others[:, part]
        for head, attended in zip(ring.route.heads, seen, strict=True):
            out[0, head] = attended.out.to(out.dtype)
        ctx.ring = ring
        ctx.save_for_backward(q, k, v, *itertools.chain.from_iterable(seen))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        ring: _Ring = ctx.ring
        q, k, v, *rest = ctx.saved_tensors
        seen = [Attended(*pair) for pair in zip(rest[::2], rest[1::2], strict=True)]
        keys = _tails(k, v, ring.route.tails)
        grads = _Gradients(ring, d_out[0], (q[0], k[0], v[0]), keys, seen)
        ring.walk(keys, grads.visit, grads.ahead)
        d_q, d_k, d_v = grads.finish()
        d_others = [d_out[:, piece] for piece in ring.route.others]
        d_others = torch.cat(d_others, dim=1) if d_others else d_out[:, :0]
        return d_others, d_q.to(q.dtype)[None], d_k.to(k.dtype)[None], d_v.to(v.dtype)[None], None


class _Gradients:
    """Those of a rank's q, k and v [T_r, heads, D], summed in fp32 while the keys go round once more."""

    def __init__(
        self, ring: _Ring, d_out: Tensor, inputs: tuple[Tensor, Tensor, Tensor], mine: Tensor, seen: list[Attended]
    ):
        self._ring, self._d_out, self._inputs, self._mine, self._seen = ring, d_out, inputs, mine, seen
        self.ahead = ring.ahead(mine, BACKWARD_TENSORS)
        self._dots = [row_dots(each.out, d_out[head]) for head, each in zip(ring.route.heads, seen, strict=True)]
        self._sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in inputs]
        # Of this rank's keys, by all who saw them.
        self._own = _tails(*(x[None] for x in self._sums[1:]), ring.route.tails)
        self._arriving: deque[Arriving] = deque()

    def visit(self, step: int, keys: Tensor | None) -> None:
        """Add this rank's part in the gradients of the keys that are here, and of what it asks of them."""
        if step == 0:
            self._add_within_heads()
        d_keys = self._of_blocks(self._ring.blocks(step), keys)
        if step > 0:
            self._take_arrived(leave=self.ahead - 1)
            home = None if d_keys is None else d_keys.to(self._mine.dtype)
            self._arriving.append(self._ring.send_home(step, home, self._mine))
        elif d_keys is not None:
            self._own += d_keys

    def _of_blocks(self, blocks: list[_Block], keys: Tensor | None) -> Tensor | None:
        """fp32 gradients of an owner's keys, if any block has some; those of the blocks' queries are added."""
        if not blocks:
            return None
        d_keys = torch.zeros_like(keys, dtype=self._own.dtype)
        for head, part in blocks:
            d_q, d_k, d_v = self._of_block(head, *keys[:, part], False)
            self._sums[0][self._ring.route.heads[head]] += d_q
            d_keys[0, part] += d_k
            d_keys[1, part] += d_v
        return d_keys

    def _add_within_heads(self) -> None:
        for head, place in enumerate(self._ring.route.heads):
            grads = self._of_block(head, *(x[place] for x in self._inputs[1:]), True)
            for total, grad in zip(self._sums, grads, strict=True):
                total[place] += grad

    def finish(self) -> list[Tensor]:
        """The sums, when all have sent what they have."""
        self._take_arrived(leave=0)
        for piece, part in _places(self._ring.route.tails):
            for total, own in zip(self._sums[1:], self._own, strict=True):
                total[piece] += own[part]
        return self._sums

    def _of_block(self, head: int, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        place, rest = self._ring.route.heads[head], (self._seen[head], self._dots[head])
        return attend_block_backward(self._d_out[place], self._inputs[0][place], k, v, *rest, causal=causal)

    def _take_arrived(self, *, leave: int) -> None:
        """Add what others sent, the oldest first, but for so many."""
        while len(self._arriving) > leave:
            arrived, works = self._arriving.popleft()
            _wait(works)
            if arrived is not None:
                self._own += arrived


def _tails(k: Tensor, v: Tensor, tails: list[slice]) -> Tensor:
    """Keys and values of some pieces of [1, T_r, H_kv, D], end to end: [2, n, H_kv, D]."""
    both = torch.stack([k[0], v[0]])
    return torch.cat([both[:, tail] for tail in tails] or [both[:, :0]], dim=1)


def _places(pieces: list[slice]) -> list[tuple[slice, slice]]:
    """Each piece, and where it lies when they are laid end to end."""
    ends = list(itertools.accumulate(piece.stop - piece.start for piece in pieces))
    return [(piece, slice(end - piece.stop + piece.start, end)) for piece, end in zip(pieces, ends, strict=True)]
