"""Packed batches of a corpus: shuffled and resumable for training, one fixed pass for evaluation."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from fulmen.config import UserError
from fulmen.data.chat import encode_chat
from fulmen.data.documents import Document, spread
from fulmen.data.packing import Batch, Position, pack_row
from fulmen.data.tokenizer import BOS, EOS, Tokenizer

# The fingerprint reads at most this many documents, spread evenly, so that it stays cheap on a large corpus.
FINGERPRINT_DOCUMENTS = 4096


class PackedLoader:
    """An endless stream of packed training batches, or one of `epochs` passes over the documents.

    Every epoch takes all documents once, in an order that (seed, epoch) alone decides, some side by side; rows run on
    from one epoch into the next. Documents are tokenised when their turn comes. `state_dict` is a place between two
    batches: another process with the same arguments goes on from there with the very tokens that would have come,
    whatever batch_tokens it asks for.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: Tokenizer,
        *,
        batch_tokens: int,
        sequence_length: int,
        seed: int,
        epochs: int | None = None,
        interleave: int = 16,
    ):
        """batch_tokens: tokens of a batch unless `next_batch` is told otherwise. epochs: None is endless.

        interleave: how many documents are read side by side (see `pack_row`).
        Raises UserError for sizes below 1, no documents, or a tokenizer without bos and eos.
        """
        _check_at_least_one(batch_tokens=batch_tokens, sequence_length=sequence_length, interleave=interleave)
        if epochs is not None:
            _check_at_least_one(epochs=epochs)
        if seed < 0:
            raise UserError(f"seed = {seed} is negative: take 0 or more")
        _check_material(documents, tokenizer)
        self._documents = documents
        self._tokenizer = tokenizer
        self._batch_tokens = batch_tokens
        self._seed = seed
        self._epochs = epochs
        self._layout = {"sequence_length": sequence_length, "interleave": interleave}
        self._position = Position()
        self._order: tuple[int, np.ndarray] | None = None
        self._open_ids: dict[tuple[int, int], torch.Tensor] = {}
        self._identity = {
            "documents": len(documents),
            "corpus": corpus_fingerprint(documents),
            "tokenizer": tokenizer.fingerprint,
            "seed": seed,
            **self._layout,
        }

    @property
    def epoch(self) -> int:
        """The epoch, from 0, that the last batch ended in."""
        return self._position.epoch

    def next_batch(self, batch_tokens: int | None = None) -> Batch | None:
        """The next row of exactly `batch_tokens` tokens.

        After the last of `epochs` it is None, and the row before that may be short.
        """
        size = self._batch_tokens if batch_tokens is None else batch_tokens
        _check_at_least_one(batch_tokens=size)
        batch, self._position = pack_row(self._document_ids, self._position, batch_tokens=size, **self._layout)
        still_open = {(self._position.epoch, document) for document, _ in self._position.open}
        self._open_ids = {place: ids for place, ids in self._open_ids.items() if place in still_open}
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands and what it is a stream of, as plain JSON.

        open: [document, offset] pairs. Documents are numbered by their turn in the epoch.
        Example: {"epoch": 1, "following": 18, "open": [[3, 512], [17, 0]], "identity": {"documents": 571, ...}}
        """
        position = self._position
        return {
            "epoch": position.epoch,
            "following": position.following,
            "open": [list(place) for place in position.open],
            "identity": dict(self._identity),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`. Raises UserError if it was taken with other documents, settings or tokenizer."""
        try:
            open_ = tuple((int(document), int(offset)) for document, offset in state["open"])
            position = Position(int(state["epoch"]), int(state["following"]), open_)
            identity = dict(state["identity"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"this is not the state of a data loader ({error!r}): start a new run") from None
        for key, value in self._identity.items():
            if identity.get(key) != value:
                raise UserError(
                    f"the data is not that of the snapshot: {key} was {identity.get(key)!r} and is {value!r}; "
                    "restore it, or start a new run"
                )
        self._position = position

    def _document_ids(self, epoch: int, turn: int) -> torch.Tensor | None:
        """The ids of the document whose turn it is; None past the end of an epoch, or of the last one."""
        if turn >= len(self._documents) or (self._epochs is not None and epoch >= self._epochs):
            return None
        if (epoch, turn) not in self._open_ids:
            document = self._documents[int(self._epoch_order(epoch)[turn])]
            self._open_ids[epoch, turn] = _tensor(encode_document(self._tokenizer, document))
        return self._open_ids[epoch, turn]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """The documents' numbers in the order of their turns, [len(documents)] int64."""
        if self._order is None or self._order[0] != epoch:
            # Sorted by raw bits, because numpy promises these to stay the same in all versions, and its shuffle not.
            bits = np.random.PCG64([self._seed, epoch]).random_raw(len(self._documents))
            self._order = epoch, np.argsort(bits, kind="stable")
        return self._order[1]


def held_out_batches(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    batch_tokens: int,
    sequence_length: int,
    max_tokens: int,
) -> list[Batch]:
    """One fixed pass over the documents, or over a part of max_tokens tokens that is spread over them and within them.

    The last row may be short. Raises UserError for sizes below 1, no documents, or a tokenizer without bos and eos.
    """
    _check_at_least_one(batch_tokens=batch_tokens, sequence_length=sequence_length, max_tokens=max_tokens)
    _check_material(documents, tokenizer)
    pieces = list(_take(_pieces_in_turn(documents, tokenizer, sequence_length), max_tokens))

    def stream(epoch: int, number: int) -> torch.Tensor | None:
        return pieces[number] if epoch == 0 and number < len(pieces) else None

    batches = []
    batch, position = pack_row(stream, Position(), batch_tokens=batch_tokens, sequence_length=sequence_length)
    while batch is not None:
        batches.append(batch)
        batch, position = pack_row(stream, position, batch_tokens=batch_tokens, sequence_length=sequence_length)
    return batches


def encode_document(tokenizer: Tokenizer, document: Document) -> list[int]:
    """bos, the text, eos; of a conversation its turns, from the first one's bos to the last one's eos."""
    if document.messages is None:
        return [tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id]
    ids = encode_chat(tokenizer, document.messages, generate=False)
    last_eos = len(ids) - ids[::-1].index(tokenizer.eos_id)
    return ids[:last_eos]


def corpus_fingerprint(documents: Sequence[Document]) -> str:
    """A hash over origins and texts of the documents, or of some thousands of them spread over a larger corpus."""
    digest = hashlib.blake2b(digest_size=16)
    count = min(len(documents), FINGERPRINT_DOCUMENTS)
    for number in range(count):
        document = documents[number * len(documents) // count]
        for part in (document.origin, document.text):
            digest.update(hashlib.blake2b(part.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()


def _pieces_in_turn(
    documents: Sequence[Document], tokenizer: Tokenizer, sequence_length: int
) -> Iterator[torch.Tensor]:
    """All documents cut into pieces of at most sequence_length + 1 ids: one piece of each, then another of each, ..."""
    begun = []
    for turn, number in enumerate(spread(len(documents))):
        ids = _tensor(encode_document(tokenizer, documents[int(number)]))
        cuts = range(0, len(ids) - 1, sequence_length)
        # Each document begins with another of its pieces, or a short pass would see only how files begin.
        order = spread(len(cuts))
        order = (order + order[turn % len(cuts)]) % len(cuts)
        pieces = iter([ids[cuts[place] : cuts[place] + sequence_length + 1] for place in order])
        yield next(pieces)
        begun.append(pieces)
    for one_of_each in zip_longest(*begun):
        yield from (piece for piece in one_of_each if piece is not None)


def _take(pieces: Iterator[torch.Tensor], max_tokens: int) -> Iterator[torch.Tensor]:
    """The first pieces, with max_tokens targets in all, the last one cut to fit."""
    room = max_tokens
    while room > 0 and (piece := next(pieces, None)) is not None:
        yield piece[: room + 1]
        room -= len(piece) - 1


def _tensor(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def _check_at_least_one(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{name} = {value} is too small: take 1 or more")


def _check_material(documents: Sequence[Document], tokenizer: Tokenizer) -> None:
    if not len(documents):
        raise UserError("there are no documents to make batches of: add sources, or hold fewer out")
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise UserError(f"the tokenizer lacks {BOS} or {EOS}, which mark documents: train one with fulmen")
