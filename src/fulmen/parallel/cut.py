"""How a packed row of tokens is cut over ranks: which tokens each holds, and which parts of a sample lie where.

Plain numbers, the same on every rank, so that nothing about lengths or borders ever needs to be sent.
"""

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fulmen.config import UserError
from fulmen.data.images import PlacedImage


class Segment(NamedTuple):
    """A stretch of consecutive tokens that one rank holds, [start, end) in the row."""

    start: int
    end: int


@dataclass(frozen=True)
class Cut:
    """A row of T tokens, of samples with `borders` [N + 1] from 0 strictly up to T, over `ranks` ranks, evenly.

    Each rank holds one segment, which need not end where a sample does, and which is empty where there are more ranks
    than tokens. `balanced`: each holds two, the r-th from the left and from the right, so that with one long sample all
    have as much causal attention to compute.
    """

    borders: tuple[int, ...]
    ranks: int
    balanced: bool = False

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise UserError(f"a row is cut over at least 1 rank, not {self.ranks}")
        if len(self.borders) < 2 or self.borders[0] or any(a >= b for a, b in itertools.pairwise(self.borders)):
            raise UserError(f"borders must rise strictly from 0, got {list(self.borders)}")

    @classmethod
    def of(cls, cu_seqlens: Tensor, ranks: int, *, balanced: bool = False) -> "Cut":
        """Of the borders [N + 1] int32 of a packed row."""
        return cls(tuple(cu_seqlens.tolist()), ranks, balanced)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """All of them in the row's order; together they are the row."""
        count = self.ranks * (2 if self.balanced else 1)
        return tuple(
            Segment(*(number * self.borders[-1] // count for number in (place, place + 1))) for place in range(count)
        )

    def holder(self, segment: int) -> int:
        """The rank that holds it."""
        return segment if segment < self.ranks else len(self.segments) - 1 - segment

    def held(self, rank: int) -> list[int]:
        """The numbers of a rank's segments."""
        return [rank, len(self.segments) - 1 - rank] if self.balanced else [rank]

    def take(self, row: Tensor, rank: int, dim: int = 1) -> Tensor:
        """The tokens of a rank's segments out of a whole row."""
        parts = [row.narrow(dim, s.start, s.end - s.start) for s in map(self.segments.__getitem__, self.held(rank))]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def join(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The whole row of what every rank holds; the inverse of `take`."""
        pieces: dict[int, Tensor] = {}
        for rank, part in enumerate(parts):
            lengths = [self.segments[number].end - self.segments[number].start for number in self.held(rank)]
            pieces |= dict(zip(self.held(rank), part.split(lengths, dim), strict=True))
        return torch.cat([pieces[number] for number in range(len(self.segments))], dim)

    def length(self, rank: int) -> int:
        """Tokens that a rank holds."""
        return sum(self.segments[number].end - self.segments[number].start for number in self.held(rank))

    def positions(self, rank: int) -> Tensor:
        """[T_r] int64: each of a rank's tokens' place in its sample."""
        row = torch.arange(self.borders[-1])
        starts = torch.tensor(self.borders[:-1]).repeat_interleave(torch.tensor(self.borders).diff())
        return self.take(row - starts, rank, dim=0)

    def local_borders(self, rank: int) -> list[int]:
        """The borders of a rank's pieces: the parts of samples in its segments, laid end to end. [0] without tokens."""
        found = [0]
        for number in self.held(rank):
            start, end = self.segments[number]
            inner = self.borders[bisect_right(self.borders, start) : bisect_left(self.borders, end)]
            if start < end:
                found += [found[-1] - start + border for border in (*inner, end)]
        return found

    def head(self, segment: int) -> Segment | None:
        """The part of a segment, in the row, whose sample began before it; None if it is empty or begins with one."""
        start, end = self.segments[segment]
        if start == end or self.borders[self._sample(start)] == start:
            return None
        return Segment(start, min(end, self.borders[self._sample(start) + 1]))

    def tail(self, segment: int) -> Segment | None:
        """The part of a segment whose sample goes on behind it, in the row; None if it ends with one or is empty."""
        start, end = self.segments[segment]
        if start == end or self.borders[self._sample(end - 1) + 1] == end:
            return None
        return Segment(max(start, self.borders[self._sample(end - 1)]), end)

    def distances(self, *, later: Sequence[int]) -> Tensor:
        """[len(later), S] int64: tokens from each segment's end to the begin of each of `later`, if a sample reaches
        from one to the other; else -1."""
        starts, _, heads, _ = (column[list(later), None] for column in self._columns)
        _, ends, _, tails = self._columns
        return torch.where((heads == tails) & (starts >= ends), starts - ends, -1)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(end - start for start, end in itertools.pairwise(self.borders))

    @cached_property
    def is_crossed(self) -> bool:
        """Whether any sample lies in more than one segment."""
        return any(self.tail(number) is not None for number in range(len(self.segments)))

    def place(self, rank: int, part: Segment) -> slice:
        """Where a part of the row, within one of a rank's segments, lies among the tokens that it holds."""
        before = 0
        for number in self.held(rank):
            segment = self.segments[number]
            if segment.start <= part.start and part.end <= segment.end:
                return slice(before + part.start - segment.start, before + part.end - segment.start)
            before += segment.end - segment.start
        raise ValueError(f"rank {rank} does not hold {part}")

    def take_images(self, images: Sequence[PlacedImage], rank: int) -> tuple[PlacedImage, ...]:
        """Of images in the row the pieces that a rank holds, where they lie among its tokens."""
        found, before = [], 0
        for number in self.held(rank):
            begin, end = self.segments[number]
            for placed in images:
                first, last = max(begin, placed.start), min(end, placed.start + placed.count)
                if first < last:
                    skipped = placed.first + first - placed.start
                    found.append(PlacedImage(placed.image, before + first - begin, skipped, last - first))
            before += end - begin
        return tuple(found)

    @cached_property
    def _columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of all segments the starts, the ends, and the samples of heads and tails, [S] int64; -1 and -2 for none."""
        heads = [-1 if self.head(n) is None else self._sample(s.start) for n, s in enumerate(self.segments)]
        tails = [-2 if self.tail(n) is None else self._sample(s.end - 1) for n, s in enumerate(self.segments)]
        starts, ends = zip(*self.segments, strict=True)
        return tuple(map(torch.tensor, (starts, ends, heads, tails)))

    def _sample(self, token: int) -> int:
        """The number of the sample that a token of the row is in."""
        return bisect_right(self.borders, token) - 1
