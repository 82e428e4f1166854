"""Documents as the model reads them: ids, which of them the loss counts, and where the images lie."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from fulmen.config import UserError
from fulmen.data.chat import HEADERS, encode_chat, expand_images, images_of
from fulmen.data.documents import Document
from fulmen.data.images import ImageProcessor, PlacedImage, ProcessedImage
from fulmen.data.tokenizer import Tokenizer

IGNORE = -100
"""In place of a target: the loss leaves it out."""

Counted = Literal["all", "answers", "last answer"]
"""Which tokens of a conversation count in the loss: all, those of the assistant's contents and ends, or of its last."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A document, or a part of one, with n inputs ids[:-1] and n targets labels[1:].

    ids: [n + 1] int64. labels: [n + 1] int64, the ids again, or IGNORE. images: what lies where in the inputs.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    images: tuple[PlacedImage, ...] = ()

    def __len__(self) -> int:
        """The number of inputs."""
        return len(self.ids) - 1

    def part(self, start: int, stop: int) -> "Encoded":
        """The inputs start .. stop - 1 with their targets; an image that a border cuts is there with the rest of it."""
        images = (_overlap(placed, start, stop) for placed in self.images)
        chosen = tuple(placed for placed in images if placed.count > 0)
        return Encoded(self.ids[start : stop + 1], self.labels[start : stop + 1], chosen)


def encode_document(
    tokenizer: Tokenizer, document: Document, *, images: ImageProcessor | None = None, counted: Counted = "all"
) -> Encoded:
    """bos, the text, eos; of a conversation its turns, from the first one's bos to the last one's eos.

    images: what makes positions of its images; None refuses a document that has one. counted: of a conversation; text
    without turns counts as a whole, and a position of an image never does.
    Raises UserError, naming the document, for images that cannot be read or may not be there.
    """
    if document.messages is None:
        ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id])
        return Encoded(ids, ids)
    try:
        return encode_messages(tokenizer, document.messages, read_images(document.messages, images), counted=counted)
    except UserError as error:
        raise UserError(f"{document.origin}: {error}") from None


def read_images(messages: Sequence[Mapping[str, Any]], images: ImageProcessor | None) -> list[ProcessedImage]:
    """The images of a conversation, processed. Raises UserError for one that cannot be read, or any if None may be."""
    if images is not None:
        return [images.read(source) for source in images_of(messages)]
    contents = (message["content"] for message in messages)
    if any(part["type"] == "image" for content in contents if not isinstance(content, str) for part in content):
        raise UserError("it has an image, and the model sees none: leave it out, or train a vision-language model")
    return []


def encode_messages(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[ProcessedImage] = (),
    *,
    counted: Counted = "all",
) -> Encoded:
    """A conversation up to the last turn's end, each `<image>` repeated to the positions of its image."""
    ids = encode_chat(tokenizer, messages, generate=False)
    ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_id)]
    ids, starts = expand_images(ids, tokenizer.image_id, [image.positions for image in images])
    placed = tuple(PlacedImage(image, start, 0, image.positions) for image, start in zip(images, starts, strict=True))
    labels = [IGNORE] * len(ids)
    for place in range(len(ids)) if counted == "all" else _answers(tokenizer, messages, ids, counted):
        if ids[place] != tokenizer.image_id:
            labels[place] = ids[place]
    return Encoded(torch.tensor(ids), torch.tensor(labels), placed)


def _answers(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], ids: list[int], counted: Counted
) -> Iterator[int]:
    """The places of the assistant's contents in `ids`, and of the eos after each; or of the last one alone.

    No content can hold a bos, so the turns lie from one to the next.
    """
    turns = [place for place, token in enumerate(ids) if token == tokenizer.bos_id]
    answers = [start for start, message in zip(turns, messages, strict=True) if message["role"] == "assistant"]
    header = len(f"{HEADERS['assistant']}\n".encode())
    for start in answers if counted == "answers" else answers[-1:]:
        written, place = 0, start
        while ids[place] != tokenizer.eos_id:
            place += 1
            # A token that joins the header's end and the content's beginning is the content's.
            written += len(tokenizer.token_bytes(ids[place]))
            if written > header or ids[place] == tokenizer.eos_id:
                yield place


def _overlap(placed: PlacedImage, start: int, stop: int) -> PlacedImage:
    """What of an image lies from start to stop, placed from start on; its count is below 1 if nothing does."""
    begin, end = max(placed.start, start), min(placed.start + placed.count, stop)
    return replace(placed, start=begin - start, first=placed.first + begin - placed.start, count=end - begin)
