"""Samples laid end to end into rows without padding (minimax-01.md section 6), as a function of a position.

Every document is a sequence of ids [n + 1] that gives n inputs ids[:-1] and n targets ids[1:]. A document longer than
`sequence_length` becomes several samples, and one that a row's end cuts goes on in the next row as a new sample. The
target of a sample's last token lies beyond the cut, so each id of a document but the first is predicted exactly once.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """One row of samples, T tokens in all.

    tokens: [1, T] int64. targets: [1, T] int64, the token after each; -100 would mark one that the loss leaves out, and
    packing makes none. cu_seqlens: [N + 1] int32, where the N samples begin, and T.
    Example: the documents (7, 8, 9) and (7, 5) give tokens [[7, 8, 7]], targets [[8, 9, 5]], cu_seqlens [0, 2, 3].
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor


@dataclass(frozen=True)
class Position:
    """A place in a stream of epochs of documents.

    following: the first document of this epoch that is not begun. open: (document, offset) of those begun and not
    finished, the next to go on first; the next input of each is its token `offset`.
    """

    epoch: int = 0
    following: int = 0
    open: tuple[tuple[int, int], ...] = ()


# (epoch, document) -> its ids, [n + 1] int64 with n >= 1; None past the end of the epoch, and past the last epoch.
Stream = Callable[[int, int], torch.Tensor | None]


def pack_row(
    stream: Stream, position: Position, *, batch_tokens: int, sequence_length: int, interleave: int = 1
) -> tuple[Batch | None, Position]:
    """The row that begins at a position, and the position after it.

    interleave: how many documents of an epoch are read side by side, a sample from each in turn, so that a row does not
    hold one long document only. The row holds exactly batch_tokens tokens, fewer only where the stream ends; it is None
    where nothing is left.
    """
    epoch, following, open_ = position.epoch, position.following, deque(position.open)
    samples = []
    room = batch_tokens
    while room > 0:
        while len(open_) < interleave and stream(epoch, following) is not None:
            open_.append((following, 0))
            following += 1
        if not open_:
            if stream(epoch + 1, 0) is None:
                break
            epoch, following = epoch + 1, 0
            continue
        document, offset = open_.popleft()
        ids = stream(epoch, document)
        stop = min(offset + min(sequence_length, room), len(ids) - 1)
        samples.append(ids[offset : stop + 1])
        room -= stop - offset
        if stop < len(ids) - 1:
            # A sample that the row's end cut goes on first in the next row; a whole one waits for its document's turn.
            resume = open_.append if stop - offset == sequence_length else open_.appendleft
            resume((document, stop))
    return (_lay_end_to_end(samples) if samples else None), Position(epoch, following, tuple(open_))


def _lay_end_to_end(samples: list[torch.Tensor]) -> Batch:
    lengths = torch.tensor([0, *(len(sample) - 1 for sample in samples)])
    return Batch(
        tokens=torch.cat([sample[:-1] for sample in samples])[None],
        targets=torch.cat([sample[1:] for sample in samples])[None],
        cu_seqlens=lengths.cumsum(0).to(torch.int32),
    )
