"""Which document comes when: an order of each epoch, with other text mixed in at a fixed rate."""

from collections.abc import Sequence

import numpy as np

from fulmen.data.documents import Document


class Order:
    """The numbers 0 .. count - 1, shuffled anew for each epoch as (seeds, epoch) alone decide."""

    def __init__(self, count: int, *seeds: int):
        self._count, self._seeds = count, seeds
        self._drawn: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._count

    def pick(self, epoch: int, turn: int) -> int:
        """Which of them has its turn."""
        if self._drawn is None or self._drawn[0] != epoch:
            # Sorted by raw bits, because numpy promises these to stay the same in all versions, and its shuffle not.
            bits = np.random.PCG64([*self._seeds, epoch]).random_raw(self._count)
            self._drawn = epoch, np.argsort(bits, kind="stable")
        return int(self._drawn[1][turn])


class Turns:
    """The documents in their turns, epoch by epoch; an epoch takes each once.

    Where there are `texts`, sources of them, one text comes before every `text_every` documents. The sources take
    turns, whatever their sizes, and have epochs of their own.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        seed: int,
        texts: Sequence[Sequence[Document]] = (),
        text_every: int = 20,
    ):
        self._documents, self._order = documents, Order(len(documents), seed)
        self._texts = [(source, Order(len(source), seed, 1 + number)) for number, source in enumerate(texts)]
        self._group = text_every + 1 if self._texts else 1

    def __len__(self) -> int:
        """Turns of an epoch."""
        return len(self._documents) + self._num_texts

    def document(self, epoch: int, turn: int) -> tuple[Document, int | None]:
        """The document of a turn; of a text also how many of its source came before, in all epochs, else None."""
        if not self._num_texts:
            return self._documents[self._order.pick(epoch, turn)], None
        group, place = divmod(turn, self._group)
        if place > 0:
            return self._documents[self._order.pick(epoch, turn - group - 1)], None
        number, source = divmod(epoch * self._num_texts + group, len(self._texts))
        texts, order = self._texts[source]
        return texts[order.pick(*divmod(number, len(texts)))], number

    @property
    def _num_texts(self) -> int:
        """In an epoch."""
        return -(-len(self._documents) // (self._group - 1)) if self._group > 1 else 0
