"""Rows of tables as conversations, captioned pictures and preference pairs; their images are read when asked for."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fulmen.config import UserError
from fulmen.data.chat import Message, render_chat
from fulmen.data.documents import Document, PreferencePair

MESSAGES = "messages"
IMAGES = "images"
CAPTION = ("image", "caption")
PREFERENCE = (MESSAGES, "chosen", "rejected")
REQUEST = "Describe the picture."

Row = Mapping[str, Any]


def conversation(row: Row, origin: str, folder: Path) -> Document:
    """The row's `messages`. An image part without an image takes the next of the row's `images`.

    folder: where relative paths of images begin. Raises UserError naming the row if messages or images are wrong.
    """
    messages = _messages(row, origin, folder)
    return Document(_rendered(messages, origin, generate=False), origin, messages)


def captioned(row: Row, origin: str, folder: Path) -> Document:
    """The row's `image`, which is to be described, and its `caption`."""
    image, caption = (row[field] for field in CAPTION)
    part = {"type": "image", "image": _image(image, origin, folder)}
    asked = {"role": "user", "content": [part, {"type": "text", "text": REQUEST}]}
    messages = (asked, {"role": "assistant", "content": caption})
    return Document(_rendered(messages, origin, generate=False), origin, messages)


def preference(row: Row, origin: str, folder: Path) -> PreferencePair:
    """The row's `messages`, up to where the assistant is to answer, and the answers `chosen` and `rejected`."""
    answers = [row[field] for field in PREFERENCE[1:]]
    for field, answer in zip(PREFERENCE[1:], answers, strict=True):
        if not isinstance(answer, str):
            raise UserError(f"{origin}: field {field!r} is {answer!r}, not a string: give the text of the answer")
    messages = _messages(row, origin, folder)
    _rendered(messages, origin, generate=True)
    return PreferencePair(messages, *answers, origin)


def _rendered(messages: tuple[Message, ...], origin: str, *, generate: bool) -> str:
    try:
        return render_chat(messages, generate=generate)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def _messages(row: Row, origin: str, folder: Path) -> tuple[Message, ...]:
    messages = row[MESSAGES]
    if not isinstance(messages, list):
        raise UserError(f"{origin}: field {MESSAGES!r} is {messages!r}, not a list of messages")
    images = iter(row.get(IMAGES) or ())
    filled = tuple(_with_images(message, images, origin, folder) for message in messages)
    if unused := len(list(images)):
        raise UserError(f"{origin}: {unused} of the {IMAGES!r} belong to no image part: give each its part")
    return filled


def _with_images(message: Any, images: Iterator[Any], origin: str, folder: Path) -> Any:
    """The message with an image in each image part; one that is not laid out as a message stays as it is."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    parts = [dict(part) if isinstance(part, Mapping) else part for part in content]
    for part in parts:
        if isinstance(part, dict) and part.get("type") == "image":
            # Parts of one table are rows of one struct in Parquet: what one lacks is there as None.
            image = next(images, None) if part.get("image") is None else part["image"]
            part["image"] = _image(image, origin, folder)
    return {**message, "content": parts}


def _image(image: Any, origin: str, folder: Path) -> bytes | str:
    """What `open_image` takes, of a row's path, bytes of a file, or struct of `bytes` or `path`."""
    source = image.get("bytes") or image.get("path") if isinstance(image, Mapping) else image
    if isinstance(source, bytes) and source:
        return source
    if not isinstance(source, str) or not source:
        raise UserError(f"{origin} has an image that is {source!r}: give a path or the bytes of a file")
    if "://" in source:
        raise UserError(f"{origin} has an image at {source}: no address is fetched, give the path of a file")
    # The table is the user's own: a path may lead anywhere that the user may read.
    return str(folder / source)
