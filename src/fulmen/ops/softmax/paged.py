"""Softmax attention of sequences laid end to end whose keys and values lie in pages of a pool.

Letters: T new tokens of N sequences, P pages of R tokens each, H heads, H_kv key heads, D their width.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fulmen.ops.softmax.attention import Packing, can_pack, packed_attention, softmax_attention

TOGETHER = 8192
"""Keys of several sequences that are copied side by side at a time; more are of one sequence alone."""


class Part(NamedTuple):
    """Some of the sequences, whose attention is one launch."""

    tokens: slice  # of the new ones
    key_rows: Tensor | None  # [S] int64, page * R + row in the page of all their keys; None: the new ones are all
    queries: Packing
    keys: Packing


@dataclass(frozen=True)
class Pages:
    """Where N sequences have their keys and values; one for all layers of a step.

    Two sequences with 3 and 0 tokens before, 1 and 2 new ones, in pages of 2 tokens: starts = [3, 0], lengths = [1, 2],
    tables = [[7, 4], [5]], and the new tokens go to rows = [4 * 2 + 1, 5 * 2 + 0, 5 * 2 + 1].
    """

    tables: Sequence[Sequence[int]]  # of each sequence the pages of its tokens, in order; a table may go on behind them
    starts: Sequence[int]  # tokens that its pages hold before
    lengths: Sequence[int]  # new ones, >= 1
    size: int  # tokens of a page, R
    device: torch.device | str  # of the pages

    @cached_property
    def ends(self) -> list[int]:
        return [start + length for start, length in zip(self.starts, self.lengths, strict=True)]

    @cached_property
    def rows(self) -> Tensor:
        """[T] int64, on the pages' device: page * R + row in the page, where each new token is written."""
        return self._sent(self._rows(*each) for each in zip(self._tables, self.starts, self.ends, strict=True))

    @cached_property
    def used(self) -> list[Tensor]:
        """Of each sequence the pages of its tokens, [n] int64, on the pages' device."""
        return list(self._sent(self._tables).split([len(pages) for pages in self._tables]))

    @cached_property
    def parts(self) -> list[Part]:
        """All sequences; of those whose keys must be gathered no more together than `TOGETHER` says."""
        if not any(self.starts):
            return [self._part(0, len(self.ends))]
        found, first = [], 0
        for last in range(1, len(self.ends) + 1):
            if last == len(self.ends) or sum(self.ends[first : last + 1]) > TOGETHER:
                found.append(self._part(first, last))
                first = last
        return found

    def _part(self, first: int, last: int) -> Part:
        lengths, ends, rows = self.lengths[first:last], self.ends[first:last], None
        if any(self.starts[first:last]):
            rows = self._sent(
                self._rows(table, 0, end) for table, end in zip(self._tables[first:last], ends, strict=True)
            )
        begin = sum(self.lengths[:first])
        borders = torch.tensor([[0, *itertools.accumulate(each)] for each in (lengths, ends)], dtype=torch.int32)
        queries, keys = borders.to(self.device, non_blocking=True)
        tokens = slice(begin, begin + sum(lengths))
        return Part(tokens, rows, Packing(queries, max(lengths)), Packing(keys, max(ends)))

    @cached_property
    def _tables(self) -> list[Tensor]:
        pairs = zip(self.tables, self.ends, strict=True)
        return [torch.tensor(table[: -(-end // self.size)], dtype=torch.int64, device="cpu") for table, end in pairs]

    def _rows(self, table: Tensor, start: int, end: int) -> Tensor:
        places = torch.arange(start, end, device="cpu")
        return table[places // self.size] * self.size + places % self.size

    def _sent(self, numbers) -> Tensor:
        return torch.cat(list(numbers)).to(self.device, non_blocking=True)


def paged_attention_(q: Tensor, k: Tensor, v: Tensor, key_pages: Tensor, value_pages: Tensor, pages: Pages) -> Tensor:
    """Causal attention of each sequence's new tokens over all of its own; writes k and v into the pages.

    Args:
        q: [T, H, D], each sequence's new tokens in order, one sequence after the other.
        k, v: [T, H_kv, D] of the same tokens.
        key_pages, value_pages: [P, R, H_kv, D], contiguous; only `pages.rows` of them change. Without gradients.

    Returns:
        [T, H, D], the dtype of q.
    """
    held = key_pages.flatten(0, 1), value_pages.flatten(0, 1)
    for old, new in zip(held, (k, v), strict=True):
        old.index_copy_(0, pages.rows, new.to(old.dtype))
    if can_pack(q):
        return _joined([_of_part(q, k, v, held, part) for part in pages.parts])
    borders = [0, *itertools.accumulate(pages.lengths)]
    if not any(pages.starts):
        cu_seqlens = torch.tensor(borders, dtype=torch.int32, device="cpu")
        return softmax_attention(q[None], k[None], v[None], cu_seqlens)[0]
    outputs = []
    for (begin, end), table, length in zip(itertools.pairwise(borders), pages.used, pages.ends, strict=True):
        own = k[begin:end], v[begin:end]
        if length > end - begin:
            own = (each[table].flatten(0, 1)[:length].to(q.dtype) for each in (key_pages, value_pages))
        outputs.append(softmax_attention(q[None, begin:end], *(x[None] for x in own))[0])
    return _joined(outputs)


def _of_part(q: Tensor, k: Tensor, v: Tensor, held: tuple[Tensor, Tensor], part: Part) -> Tensor:
    if part.key_rows is None:
        own = k[part.tokens], v[part.tokens]
    else:
        own = (each.index_select(0, part.key_rows).to(q.dtype) for each in held)
    return packed_attention(q[part.tokens], *own, part.queries, part.keys)


def _joined(outputs: list[Tensor]) -> Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
