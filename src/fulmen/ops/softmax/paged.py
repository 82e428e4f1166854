"""Softmax attention of sequences laid end to end whose keys and values lie in pages of a pool.

Letters: T new tokens of N sequences, P pages of R tokens each, H heads, H_kv key heads, D their width.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fulmen.ops.softmax.attention import softmax_attention


class Pages(NamedTuple):
    """Where N sequences have their keys and values; one for all layers of a step.

    Two sequences with 3 and 0 tokens before, 1 and 2 new ones, in pages of 2 tokens: starts = [3, 0], lengths = [1, 2],
    tables = [[7, 4], [5]], and the new tokens go to rows = [4 * 2 + 1, 5 * 2 + 0, 5 * 2 + 1].
    """

    tables: list[Tensor]  # of each sequence the pages of its tokens, in order, [n] int64 on the pages' device
    starts: Sequence[int]  # tokens that its pages hold before
    lengths: Sequence[int]  # new ones, >= 1
    rows: Tensor  # [T] int64, on the pages' device: page * R + row in the page, where each new token is written

    @classmethod
    def of(
        cls, tables: Sequence[Sequence[int]], starts: Sequence[int], lengths: Sequence[int], size: int, device
    ) -> "Pages":
        """From lists, for pages of `size` tokens. A table may go on behind the sequence's tokens."""
        rows, trimmed = [], []
        for table, start, length in zip(tables, starts, lengths, strict=True):
            end = start + length
            pages = torch.tensor(table[: -(-end // size)], dtype=torch.int64, device="cpu")
            places = torch.arange(start, end, device="cpu")
            rows.append(pages[places // size] * size + places % size)
            trimmed.append(pages)
        counts = [len(pages) for pages in trimmed]
        # One copy for all tables, one for all rows.
        together = torch.cat(trimmed).to(device, non_blocking=True)
        return cls(list(together.split(counts)), starts, lengths, torch.cat(rows).to(device, non_blocking=True))


def paged_attention_(q: Tensor, k: Tensor, v: Tensor, key_pages: Tensor, value_pages: Tensor, pages: Pages) -> Tensor:
    """Causal attention of each sequence's new tokens over all of its own; writes k and v into the pages.

    Args:
        q: [T, H, D], each sequence's new tokens in order, one sequence after the other.
        k, v: [T, H_kv, D] of the same tokens.
        key_pages, value_pages: [P, R, H_kv, D], contiguous; only `pages.rows` of them change. Without gradients.

    Returns:
        [T, H, D], the dtype of q.
    """
    for held, new in ((key_pages, k), (value_pages, v)):
        held.flatten(0, 1).index_copy_(0, pages.rows, new.to(held.dtype))
    borders = [0, *itertools.accumulate(pages.lengths)]
    if not any(pages.starts):
        cu_seqlens = torch.tensor(borders, dtype=torch.int32, device="cpu")
        return softmax_attention(q[None], k[None], v[None], cu_seqlens)[0]
    outputs = []
    for (begin, end), start, table in zip(itertools.pairwise(borders), pages.starts, pages.tables, strict=True):
        own = k[begin:end], v[begin:end]
        if start:
            length = start + end - begin
            own = (held[table].flatten(0, 1)[:length].to(q.dtype) for held in (key_pages, value_pages))
        outputs.append(softmax_attention(q[None, begin:end], *(x[None] for x in own))[0])
    return torch.cat(outputs)
