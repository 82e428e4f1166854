"""Preference pairs as packed batches: shuffled and resumable for training, a fixed part for evaluation."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fulmen.config import UserError
from fulmen.data import Batch, ImageProcessor, Tokenizer
from fulmen.data.ahead import ahead
from fulmen.data.documents import PreferencePair, spread
from fulmen.data.encoding import IGNORE, Encoded, encode_messages, read_images
from fulmen.data.loader import check_identity, corpus_fingerprint, images_identity
from fulmen.data.packing import lay_end_to_end
from fulmen.data.turns import Order


@dataclass(frozen=True, kw_only=True)
class PairEncoder:
    """Makes of each pair two samples, the conversation with either answer, of which the answer alone counts.

    sequence_length: the longest sample; the end of a longer one is left out. images: None refuses pairs with images.
    """

    tokenizer: Tokenizer
    sequence_length: int
    images: ImageProcessor | None = None

    def batch(self, pairs: Sequence[PreferencePair]) -> Batch:
        """One row of 2 N samples: the chosen and the rejected answer of the first pair, of the second, ..."""
        return lay_end_to_end([sample for pair in pairs for sample in self.samples(pair)])

    def samples(self, pair: PreferencePair) -> list[Encoded]:
        """The conversation with the chosen answer, and with the rejected one. Raises UserError, naming the pair."""
        try:
            images = read_images(pair.messages, self.images)
            return [self._sample(pair, answer, images) for answer in (pair.chosen, pair.rejected)]
        except UserError as error:
            raise UserError(f"{pair.origin}: {error}") from None

    def _sample(self, pair: PreferencePair, answer: str, images: Sequence) -> Encoded:
        messages = [*pair.messages, {"role": "assistant", "content": answer}]
        encoded = encode_messages(self.tokenizer, messages, images, counted="last answer")
        cut = encoded.part(0, min(len(encoded), self.sequence_length))
        if (cut.labels == IGNORE).all():
            raise UserError(
                f"the conversation fills data.sequence_length = {self.sequence_length} and leaves no room for an "
                "answer: raise it, or leave the pair out"
            )
        return cut


class PairLoader:
    """An endless stream of batches of pairs; every epoch takes all pairs once, in an order of its own.

    `state_dict` is a place between two batches, as of `PackedLoader`.
    """

    def __init__(self, pairs: Sequence[PreferencePair], encoder: PairEncoder, *, seed: int, workers: int = 0):
        """workers: processes that read pairs ahead. Raises UserError for no pairs."""
        if not len(pairs):
            raise UserError("there are no preference pairs to train on: add sources, or hold fewer out")
        self._pairs, self._workers = pairs, workers
        self._read = _Reader(pairs, encoder, Order(len(pairs), seed))
        self._reading: Iterator[list[Encoded]] | None = None  # the pairs to come
        self._drawn = 0
        self._identity = {
            "pairs": len(pairs),
            "corpus": corpus_fingerprint(pairs),
            "tokenizer": encoder.tokenizer.fingerprint,
            "seed": seed,
            "sequence_length": encoder.sequence_length,
            "images": None if encoder.images is None else images_identity(encoder.images),
        }

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the last pair drawn."""
        return max(0, self._drawn - 1) // len(self._pairs)

    def next_batch(self, count: int) -> Batch:
        """The next `count` pairs (see `PairEncoder.batch`)."""
        if self._reading is None:
            self._reading = ahead(self._read, itertools.count(self._drawn), self._workers)
        self._drawn += count
        return lay_end_to_end([sample for pair in itertools.islice(self._reading, count) for sample in pair])

    def state_dict(self) -> dict[str, Any]:
        """How many pairs have been drawn, and of what, as plain JSON."""
        return {"drawn": self._drawn, "identity": dict(self._identity)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`. Raises UserError if it was taken with other pairs, settings or tokenizer."""
        try:
            drawn, identity = int(state["drawn"]), dict(state["identity"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"this is not the state of a loader of pairs ({error!r}): start a new run") from None
        check_identity(identity, self._identity)
        self._drawn, self._reading = drawn, None


@dataclass(frozen=True, eq=False)
class _Reader:
    """The samples of the pair whose turn it is, of all epochs; no part of the loader (see `ahead`)."""

    pairs: Sequence[PreferencePair]
    encoder: PairEncoder
    order: Order

    def __call__(self, turn: int) -> list[Encoded]:
        return self.encoder.samples(self.pairs[self.order.pick(*divmod(turn, len(self.pairs)))])


def held_out_pairs(pairs: Sequence[PreferencePair], encoder: PairEncoder, *, count: int, batch: int) -> list[Batch]:
    """At most `count` pairs, spread over all of them, in batches of `batch`; the last may be smaller."""
    chosen = [pairs[int(number)] for number in spread(len(pairs))[:count]]
    return [encoder.batch(chosen[start : start + batch]) for start in range(0, len(chosen), batch)]
