"""Samples laid end to end into rows without padding (minimax-01.md section 6), as a function of a position.

Every document gives n inputs and n targets, each input's next id. A document longer than `sequence_length` becomes
several samples, and one that a row's end cuts goes on in the next row as a new sample, even in the middle of an image.
The target of a sample's last token lies beyond the cut, so each id of a document but the first is predicted exactly
once, unless the loss leaves it out.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from fulmen.data.encoding import Encoded
from fulmen.data.images import PlacedImage


@dataclass(frozen=True)
class Batch:
    """One row of samples, T tokens in all.

    tokens: [1, T] int64. targets: [1, T] int64, the token after each, or -100 where the loss leaves it out. cu_seqlens:
    [N + 1] int32, where the N samples begin, and T. images: which positions of which image lie where in the row.
    Example: the documents (7, 8, 9) and (7, 5) give tokens [[7, 8, 7]], targets [[8, 9, 5]], cu_seqlens [0, 2, 3].
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    images: tuple[PlacedImage, ...] = ()


@dataclass(frozen=True)
class Position:
    """A place in a stream of epochs of documents.

    following: the first document of this epoch that is not begun. open: (document, offset) of those begun and not
    finished, the next to go on first; the next input of each is its token `offset`.
    """

    epoch: int = 0
    following: int = 0
    open: tuple[tuple[int, int], ...] = ()


# (epoch, document) -> at least one input; None past the end of the epoch, and past the last epoch.
Stream = Callable[[int, int], Encoded | None]


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
        encoded = stream(epoch, document)
        stop = min(offset + min(sequence_length, room), len(encoded))
        samples.append(encoded.part(offset, stop))
        room -= stop - offset
        if stop < len(encoded):
            # A sample that the row's end cut goes on first in the next row; a whole one waits for its document's turn.
            resume = open_.append if stop - offset == sequence_length else open_.appendleft
            resume((document, stop))
    return (lay_end_to_end(samples) if samples else None), Position(epoch, following, tuple(open_))


def lay_end_to_end(samples: Sequence[Encoded]) -> Batch:
    """One row of these samples."""
    borders = list(accumulate(map(len, samples), initial=0))
    return Batch(
        tokens=torch.cat([sample.ids[:-1] for sample in samples])[None],
        targets=torch.cat([sample.labels[1:] for sample in samples])[None],
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        images=tuple(
            replace(placed, start=border + placed.start)
            for border, sample in zip(borders, samples, strict=False)
            for placed in sample.images
        ),
    )
