"""Batches of pictures with captions: drawn, read and tokenised when their turn comes, in other processes if asked for.

Everything about a picture of a batch follows from its epoch and its turn in it, so a run that goes on gets the very
batches that would have come.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fulmen.config import UserError
from fulmen.data.ahead import ahead
from fulmen.data.chat import images_of
from fulmen.data.documents import Corpus, spread
from fulmen.data.encoding import IGNORE
from fulmen.data.image_files import open_image
from fulmen.data.images import ImageProcessor
from fulmen.data.loader import check_identity
from fulmen.data.pictures import SOURCES, UNSEEN_VARIANT, Picture, PictureSource, open_pictures, split_pictures
from fulmen.data.sources import read_documents
from fulmen.data.tokenizer import Tokenizer
from fulmen.data.turns import Order

# As of a corpus of text: enough to notice other data, and cheap.
FINGERPRINT_PICTURES = 4096


@dataclass(frozen=True, eq=False)
class CaptionBatch:
    """N pairs.

    crops: [N, 3, S, S] uint8. tokens: [N, T] int64, bos and the caption's words, padded. targets: [N, T]
    int64, the token after each, at last eos; -100 behind. captions: the N texts.
    """

    crops: Tensor
    tokens: Tensor
    targets: Tensor
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.crops)


class CaptionTable:
    """The rows with `image` and `caption` of a user's tables, as a `PictureSource` whose variants are all the same."""

    def __init__(self, documents: Corpus):
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def name_of(self, number: int) -> str:
        return self._documents.origin(number)

    def example(self, number: int, variant: int) -> Picture:
        """Raises UserError for a row of another kind; the image is opened, and may be refused, when it is drawn."""
        document = self._documents[number]
        images = images_of(document.messages or [{"role": "user", "content": ""}])
        caption = document.messages[-1]["content"] if len(images) == 1 else None
        if not isinstance(caption, str):
            raise UserError(f"{document.origin} is no picture with a caption: give it the fields image and caption")
        return Picture(document.origin, caption, caption, (), lambda: open_image(images[0]))


class Captioned(NamedTuple):
    """Examples of several sources, in one row; `numbers[i]` [n] int64 are those of `sources[i]`."""

    sources: tuple[PictureSource, ...]
    numbers: tuple[np.ndarray, ...]

    @property
    def count(self) -> int:
        return sum(map(len, self.numbers))

    def place(self, index: int) -> tuple[int, int]:
        """(which source, number of the example within it) of one of 0 .. count - 1."""
        for source, numbers in enumerate(self.numbers):
            if index < len(numbers):
                return source, int(numbers[index])
            index -= len(numbers)
        raise IndexError(index)

    def picture(self, index: int, variant: int) -> Picture:
        source, number = self.place(index)
        return self.sources[source].example(number, variant)

    def fingerprint(self) -> str:
        """A hash over names and captions, of some thousands of them spread over more."""
        digest = hashlib.blake2b(digest_size=16)
        for index in spread(self.count)[:FINGERPRINT_PICTURES]:
            picture = self.picture(int(index), 0)
            digest.update(f"{picture.name}\0{picture.caption}\0{picture.refined}\0".encode())
        return digest.hexdigest()


def read_captioned(names: Sequence[str], held_out: float) -> tuple[Captioned, Captioned]:
    """(training, held-out) examples of sources: emoji, digits, words, charts, or tables with `image` and `caption`.

    held_out: the share of each source to hold out. Raises UserError where a source is missing or not of this kind.
    """
    sources = tuple(
        open_pictures(name) if name.partition(":")[0] in SOURCES else CaptionTable(read_documents([name]))
        for name in dict.fromkeys(names)
    )
    if not sources:
        raise UserError(f"no source of captioned pictures is named: take {', '.join(SOURCES)} or a table's path")
    parts = [split_pictures(source, held_out) for source in sources]
    return Captioned(sources, tuple(train for train, _ in parts)), Captioned(sources, tuple(out for _, out in parts))


def caption_texts(pictures: Captioned) -> Iterator[str]:
    """Both captions of every picture once, for a tokenizer to learn from."""
    for index in range(pictures.count):
        picture = pictures.picture(index, 0)
        yield f"{picture.caption}\n{picture.refined}"


def encode_captions(tokenizer: Tokenizer, captions: Sequence[str], max_caption: int) -> tuple[Tensor, Tensor]:
    """(tokens, targets) of a `CaptionBatch`; a caption of more than max_caption tokens, bos among them, is cut off."""
    rows = [
        [tokenizer.bos_id, *ids, tokenizer.eos_id][: max_caption + 1] for ids in tokenizer.encode_batch(list(captions))
    ]
    longest = max(len(row) for row in rows) - 1
    tokens = torch.full((len(rows), longest), tokenizer.eos_id, dtype=torch.int64)
    targets = torch.full((len(rows), longest), IGNORE, dtype=torch.int64)
    for place, row in enumerate(rows):
        tokens[place, : len(row) - 1] = torch.tensor(row[:-1])
        targets[place, : len(row) - 1] = torch.tensor(row[1:])
    return tokens, targets


class CaptionLoader:
    """An endless stream of training batches; every epoch takes all pictures once, each time in another variant.

    The order follows from (seed, epoch), and so does whether a picture comes with its raw caption or the refined one,
    one as likely as the other. `state_dict` is a place between two batches.
    """

    def __init__(
        self,
        pictures: Captioned,
        tokenizer: Tokenizer,
        *,
        seed: int,
        max_caption: int,
        patch_size: int,
        workers: int = 0,
    ):
        """workers: processes that draw pictures ahead; 0 draws those of a batch here, when it is asked for."""
        self._pictures, self._tokenizer, self._seed = pictures, tokenizer, seed
        self._max_caption, self._patch_size, self._workers = max_caption, patch_size, workers
        self._order = Order(pictures.count, seed)
        self._taken = 0
        self._stream: tuple[tuple[int, int], Iterator[_Drawn]] | None = None
        self._identity = {
            "pictures": pictures.count,
            "captions": pictures.fingerprint(),
            "tokenizer": tokenizer.fingerprint,
            "seed": seed,
            "max_caption": max_caption,
        }

    @property
    def epoch(self) -> int:
        """The epoch, from 0, that the last batch ended in."""
        return max(0, self._taken - 1) // len(self._order)

    def next_batch(self, count: int, image_size: int) -> CaptionBatch:
        """The next `count` pairs, the pictures squashed to squares of `image_size` pixels.

        Raises UserError for a picture that cannot be read.
        """
        shape = (count, image_size)
        if self._stream is None or self._stream[0] != shape:
            # Its processes must have ended before new ones begin, which are copies of this one with all that it has.
            self._stream = None
            self._stream = shape, self._open_stream(*shape)
        drawn = next(self._stream[1])
        self._taken += count
        return drawn.batch(self._tokenizer, self._max_caption)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands and what it is a stream of, as plain JSON."""
        return {"taken": self._taken, "identity": dict(self._identity)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`. Raises UserError if it was taken with other pictures, settings or tokenizer."""
        try:
            taken, identity = int(state["taken"]), dict(state["identity"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"this is not the state of a loader of captions ({error!r}): start a new run") from None
        check_identity(identity, self._identity)
        self._taken, self._stream = taken, None

    def _open_stream(self, count: int, image_size: int) -> "Iterator[_Drawn]":
        processor = ImageProcessor(crop_size=image_size, patch_size=self._patch_size, dynamic=False)
        keys = _training_keys(self._order, self._seed, self._taken, count)
        return ahead(_Drawings(self._pictures, processor), keys, self._workers, together=1, depth=2)


def held_out_captions(
    pictures: Captioned,
    tokenizer: Tokenizer,
    processor: ImageProcessor,
    *,
    count: int,
    batch: int,
    max_caption: int,
) -> Iterator[tuple[CaptionBatch, list[int]]]:
    """Up to `count` pairs in fixed batches, spread over the sources and within them, and which source each is from.

    Captions are the refined ones, pictures in a variant that training never shows.
    """
    by_source = np.split(np.arange(pictures.count), np.cumsum([len(numbers) for numbers in pictures.numbers])[:-1])
    in_turn = itertools.zip_longest(*(indices[spread(len(indices))].tolist() for indices in by_source))
    chosen = [index for one_of_each in in_turn for index in one_of_each if index is not None][:count]
    draw = _Drawings(pictures, processor)
    for start in range(0, len(chosen), batch):
        indices = chosen[start : start + batch]
        drawn = draw([_Key(index, UNSEEN_VARIANT, refined=True) for index in indices])
        yield drawn.batch(tokenizer, max_caption), [pictures.place(index)[0] for index in indices]


class _Key(NamedTuple):
    index: int
    variant: int
    refined: bool


def _training_keys(order: Order, seed: int, taken: int, count: int) -> Iterator[list[_Key]]:
    """Batches from the picture number `taken` of all epochs on; no method of the loader (see `ahead`)."""
    for start in itertools.count(taken, count):
        keys = []
        for number in range(start, start + count):
            epoch, turn = divmod(number, len(order))
            index = order.pick(epoch, turn)
            keys.append(_Key(index, epoch, refined=Random(f"caption {seed} {epoch} {index}").random() < 0.5))
        yield keys


class _Drawn(NamedTuple):
    """What processes send each other: crops [N, 3, S, S] uint8, and captions as text."""

    crops: Tensor
    captions: list[str]

    def batch(self, tokenizer: Tokenizer, max_caption: int) -> CaptionBatch:
        tokens, targets = encode_captions(tokenizer, self.captions, max_caption)
        return CaptionBatch(self.crops, tokens, targets, tuple(self.captions))


@dataclass(frozen=True, eq=False)
class _Drawings:
    """Pictures by keys, drawn and squashed, with their captions."""

    pictures: Captioned
    processor: ImageProcessor

    def __call__(self, keys: Sequence[_Key]) -> _Drawn:
        chosen = [self.pictures.picture(key.index, key.variant) for key in keys]
        crops = torch.cat([self.processor.process(picture.image).crops for picture in chosen])
        captions = [
            picture.refined if key.refined else picture.caption for picture, key in zip(chosen, keys, strict=True)
        ]
        return _Drawn(crops, captions)
