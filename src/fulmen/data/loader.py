"""Packed batches of a corpus, with its images: shuffled and resumable for training, one fixed pass for evaluation."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from fulmen.config import UserError
from fulmen.data.ahead import ahead
from fulmen.data.documents import Document, spread
from fulmen.data.encoding import Counted, Encoded, encode_document
from fulmen.data.images import ImageProcessor
from fulmen.data.packing import Batch, Position, pack_row
from fulmen.data.tokenizer import BOS, EOS, Tokenizer
from fulmen.data.turns import Turns

# The fingerprint reads at most this many documents, spread evenly, so that it stays cheap on a large corpus.
FINGERPRINT_DOCUMENTS = 4096


class PackedLoader:
    """An endless stream of packed training batches, or one of `epochs` passes over the documents.

    Every epoch takes all documents once, in an order that (seed, epoch) alone decides, some side by side; rows run on
    from one epoch into the next. Documents are tokenised, and their images processed, when their turn comes.
    `state_dict` is a place between two batches: another process with the same arguments goes on from there with the
    very tokens that would have come, whatever batch_tokens it asks for.
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
        images: ImageProcessor | None = None,
        counted: Counted = "all",
        texts: Sequence[Sequence[Document]] = (),
        text_every: int = 20,
        workers: int = 0,
    ):
        """batch_tokens: tokens of a batch unless `next_batch` is told otherwise. epochs: None is endless.

        interleave: how many documents are read side by side (see `pack_row`). images, counted: see `encode_document`.
        texts: sources of texts that are mixed in, one before every `text_every` documents (see `Turns`); of each text a
        single sample is taken, another one when it comes again. workers: processes that read documents ahead.
        Raises UserError for sizes below 1, no documents, or a tokenizer without bos and eos.
        """
        sizes = {"batch_tokens": batch_tokens, "sequence_length": sequence_length, "interleave": interleave}
        _check_at_least_one(**sizes, text_every=text_every)
        if epochs is not None:
            _check_at_least_one(epochs=epochs)
        if seed < 0:
            raise UserError(f"seed = {seed} is negative: take 0 or more")
        _check_material(documents, tokenizer)
        self._turns = Turns(documents, seed, texts, text_every)
        self._read = _Reader(self._turns, tokenizer, images, counted, sequence_length)
        self._batch_tokens = batch_tokens
        self._epochs = epochs
        self._layout = {"sequence_length": sequence_length, "interleave": interleave}
        self._position = Position()
        self._open: dict[tuple[int, int], Encoded] = {}
        self._workers = workers
        self._ahead: tuple[tuple[int, int], Iterator[Encoded]] | None = None  # the turn that comes next, and all after
        self._identity = {
            "documents": len(documents),
            "corpus": corpus_fingerprint(documents),
            "tokenizer": tokenizer.fingerprint,
            "seed": seed,
            **self._layout,
        }
        # Only where it is so, because the first runs, of text alone, knew nothing of it.
        if images is not None:
            self._identity["images"] = images_identity(images)
        if counted != "all":
            self._identity["counted"] = counted
        if texts:
            self._identity |= {"texts": [corpus_fingerprint(source) for source in texts], "text_every": text_every}

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
        batch, self._position = pack_row(self._encoded, self._position, batch_tokens=size, **self._layout)
        still_open = {(self._position.epoch, document) for document, _ in self._position.open}
        self._open = {place: encoded for place, encoded in self._open.items() if place in still_open}
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
        check_identity(identity, self._identity)
        self._position, self._open, self._ahead = position, {}, None

    def _encoded(self, epoch: int, turn: int) -> Encoded | None:
        """The document whose turn it is; None past the end of an epoch, or of the last one."""
        if turn >= len(self._turns) or (self._epochs is not None and epoch >= self._epochs):
            return None
        if (epoch, turn) not in self._open:
            is_begun = epoch == self._position.epoch and turn < self._position.following
            self._open[epoch, turn] = self._read((epoch, turn)) if is_begun else self._next_read((epoch, turn))
        return self._open[epoch, turn]

    def _next_read(self, place: tuple[int, int]) -> Encoded:
        """The document of a turn that was never asked for before; the turns come in their order."""
        if self._ahead is None or self._ahead[0] != place:
            self._ahead = None  # its processes end before others begin, which are copies of this one
            self._ahead = place, ahead(self._read, _places(place, len(self._turns), self._epochs), self._workers)
        _, reading = self._ahead
        encoded, (epoch, turn) = next(reading), place
        self._ahead = ((epoch, turn + 1) if turn + 1 < len(self._turns) else (epoch + 1, 0)), reading
        return encoded


@dataclass(frozen=True, eq=False)
class _Reader:
    """Documents by the places of their turns, as the model reads them, of mixed-in text a sample; no part of the loader
    (see `ahead`).
    """

    turns: Turns
    tokenizer: Tokenizer
    images: ImageProcessor | None
    counted: Counted
    sequence_length: int

    def __call__(self, place: tuple[int, int]) -> Encoded:
        document, number = self.turns.document(*place)
        encoded = encode_document(self.tokenizer, document, images=self.images, counted=self.counted)
        if number is None:
            return encoded
        start = number % -(-len(encoded) // self.sequence_length) * self.sequence_length
        return encoded.part(start, min(start + self.sequence_length, len(encoded)))


def _places(place: tuple[int, int], turns: int, epochs: int | None) -> Iterator[tuple[int, int]]:
    """From a place on the turns of all epochs, of `turns` each; `epochs`: None is endless."""
    epoch, first = place
    while epochs is None or epoch < epochs:
        yield from ((epoch, turn) for turn in range(first, turns))
        epoch, first = epoch + 1, 0


def images_identity(images: ImageProcessor) -> list[Any]:
    """What decides how many positions an image takes, as JSON."""
    return [images.crop_size, images.patch_size, images.dynamic]


def check_identity(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError, naming what differs, unless a snapshot's data is the data that is there now."""
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            raise UserError(
                f"the data is not that of the snapshot: {key} was {before.get(key)!r} and is {now.get(key)!r}; "
                "restore it, or start a new run"
            )


def held_out_batches(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    batch_tokens: int,
    sequence_length: int,
    max_tokens: int,
    images: ImageProcessor | None = None,
    counted: Counted = "all",
) -> list[Batch]:
    """One fixed pass over the documents, or over a part of max_tokens tokens that is spread over them and within them.

    The last row may be short. images, counted: see `encode_document`.
    Raises UserError for sizes below 1, no documents, or a tokenizer without bos and eos.
    """
    _check_at_least_one(batch_tokens=batch_tokens, sequence_length=sequence_length, max_tokens=max_tokens)
    _check_material(documents, tokenizer)
    encoded = (
        encode_document(tokenizer, documents[int(number)], images=images, counted=counted)
        for number in spread(len(documents))
    )
    pieces = list(_take(_pieces_in_turn(encoded, sequence_length), max_tokens))

    def stream(epoch: int, number: int) -> Encoded | None:
        return pieces[number] if epoch == 0 and number < len(pieces) else None

    batches = []
    batch, position = pack_row(stream, Position(), batch_tokens=batch_tokens, sequence_length=sequence_length)
    while batch is not None:
        batches.append(batch)
        batch, position = pack_row(stream, position, batch_tokens=batch_tokens, sequence_length=sequence_length)
    return batches


def corpus_fingerprint(documents: Sequence[Document]) -> str:
    """A hash over origins and texts of the documents, or of some thousands of them spread over a larger corpus."""
    digest = hashlib.blake2b(digest_size=16)
    count = min(len(documents), FINGERPRINT_DOCUMENTS)
    for number in range(count):
        document = documents[number * len(documents) // count]
        for part in (document.origin, document.text):
            digest.update(hashlib.blake2b(part.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()


def _pieces_in_turn(documents: Iterable[Encoded], sequence_length: int) -> Iterator[Encoded]:
    """All documents cut into pieces of at most sequence_length inputs: one piece of each, then another of each, ..."""
    begun = []
    for turn, encoded in enumerate(documents):
        cuts = range(0, len(encoded), sequence_length)
        # Each document begins with another of its pieces, or a short pass would see only how files begin.
        order = spread(len(cuts))
        order = (order + order[turn % len(cuts)]) % len(cuts)
        starts = [cuts[place] for place in order]
        pieces = iter([encoded.part(start, min(start + sequence_length, len(encoded))) for start in starts])
        yield next(pieces)
        begun.append(pieces)
    for one_of_each in zip_longest(*begun):
        yield from (piece for piece in one_of_each if piece is not None)


def _take(pieces: Iterator[Encoded], max_tokens: int) -> Iterator[Encoded]:
    """The first pieces, with max_tokens inputs in all, the last one cut to fit."""
    room = max_tokens
    while room > 0 and (piece := next(pieces, None)) is not None:
        yield piece.part(0, min(room, len(piece)))
        room -= len(piece)


def _check_at_least_one(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{name} = {value} is too small: take 1 or more")


def _check_material(documents: Sequence[Document], tokenizer: Tokenizer) -> None:
    if not len(documents):
        raise UserError("there are no documents to make batches of: add sources, or hold fewer out")
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise UserError(f"the tokenizer lacks {BOS} or {EOS}, which mark documents: train one with fulmen")
