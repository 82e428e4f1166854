"""Documents and the sequences that hold them: in memory or lazily over tables, addressed by number, split by file."""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from fulmen.config import UserError
from fulmen.data.chat import render_chat


@dataclass(frozen=True)
class Document:
    """One text. `origin` is its stable name: a file's path below its root, followed by `#row` where a file holds many.

    A conversation also carries its `messages`; `text` is then their rendering, for people and for counting bytes.
    Training encodes `messages`, so that a turn's marks become special tokens and its contents never can.
    """

    text: str
    origin: str
    messages: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True)
class PreferencePair:
    """A conversation that ends where the assistant is to answer, a better and a worse answer, and its stable name."""

    messages: tuple[Mapping[str, Any], ...]
    chosen: str
    rejected: str
    origin: str = ""

    @property
    def text(self) -> str:
        """All of it as text, for people and for fingerprints."""
        return render_chat(self.messages) + f"{self.chosen}\n{self.rejected}"


class Shelf(Protocol):
    """What a `Corpus` is made of: the documents of one file, or some documents at hand."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Document: ...

    def origin(self, row: int) -> str:
        """The origin of a document, without reading its text."""


class Texts:
    """A shelf of documents held in memory."""

    def __init__(self, documents: Sequence[Document]):
        self._documents = tuple(documents)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, row: int) -> Document:
        return self._documents[row]

    def origin(self, row: int) -> str:
        return self._documents[row].origin


class Corpus(Sequence[Document]):
    """Documents of several shelves under one numbering; a selection of them is again a corpus and copies no text."""

    def __init__(self, shelves: Sequence[Shelf], rows: np.ndarray | None = None):
        self._shelves = list(shelves)
        self._ends = list(accumulate(len(shelf) for shelf in self._shelves))
        total = self._ends[-1] if self._ends else 0
        self._rows = np.arange(total) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Document:
        shelf, row = self._locate(index)
        return shelf[row]

    def origin(self, index: int) -> str:
        """The origin of document `index`, without reading its text."""
        shelf, row = self._locate(index)
        return shelf.origin(row)

    def select(self, indices: np.ndarray) -> "Corpus":
        """The documents of these numbers, in this order. indices: [n] int64."""
        return Corpus(self._shelves, self._rows[indices])

    def _locate(self, index: int) -> tuple[Shelf, int]:
        row = int(self._rows[index])
        number = bisect_right(self._ends, row)
        return self._shelves[number], row - (self._ends[number - 1] if number else 0)


def as_corpus(documents: Sequence[Document]) -> Corpus:
    """The same documents as a `Corpus`."""
    return documents if isinstance(documents, Corpus) else Corpus([Texts(documents)])


def file_of(origin: str) -> str:
    """The file that a document came from: its origin without `#row`."""
    file, mark, row = origin.rpartition("#")
    return file if mark and row.isdigit() else origin


def choose_held_out(names: set[str], held_out: float) -> set[str]:
    """The names whose hash falls below the share, at least one and not all; none of a share of 0.

    Raises UserError unless 0 <= held_out < 1.
    """
    check_share(held_out)
    if held_out == 0:
        return set()
    ranked = sorted(names, key=hash_fraction)
    count = sum(hash_fraction(name) < held_out for name in ranked)
    return set(ranked[: min(max(count, 1), len(ranked) - 1)])


def check_share(held_out: float) -> None:
    if not 0 <= held_out < 1:
        raise UserError(f"held_out = {held_out} is not a share of the documents: 0 <= held_out < 1")


def hash_fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


def spread(count: int) -> np.ndarray:
    """All of 0..count-1, [count] int64, in a fixed order in which every beginning is spread evenly over the whole.

    The golden ratio's multiples modulo 1 fall into the largest gap each time (the additive low-discrepancy sequence).
    """
    golden = (5**0.5 - 1) / 2
    return np.argsort(np.arange(count) * golden % 1.0, kind="stable")
