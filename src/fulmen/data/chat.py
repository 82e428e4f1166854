"""Conversations as text and as token ids (minimax-01.md section 11).

A turn is `<beginning_of_sentence>HEADER\\ntext<end_of_sentence>\\n`. chat_template.jinja is the same layout for other
software, which `Tokenizer.save` exports; the tests hold the two together.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from os import PathLike
from typing import Any, TypeAlias

from PIL import Image

from fulmen.config import UserError
from fulmen.data.tokenizer import BOS, EOS, IMAGE, Tokenizer

Message = Mapping[str, Any]
# What `ImageProcessor.read` takes.
ImageSource: TypeAlias = bytes | str | PathLike | Image.Image

HEADERS = {
    "system": "system ai_setting=assistant",
    "user": "user name=user",
    "assistant": "ai name=assistant",
    "tools": "system function_setting=functions",
    "tool": "system function_response=functions",
}


def render_chat(messages: Sequence[Message], *, generate: bool = True) -> str:
    """The conversation as text; with `generate` it ends where the assistant is to go on.

    messages: `{"role": ..., "content": ...}` each. Roles: system, user, assistant, tools (the functions on offer) and
    tool (what a function returned). Content: a string, or a list of `{"type": "text", "text": ...}` and
    `{"type": "image"}`, which may also hold the image itself (see `images_of`).
    Raises UserError for an unknown role or part and for a message without content.
    """
    return "".join(text for _, text in _segments(messages, generate))


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], *, generate: bool = True) -> list[int]:
    """The token ids of `render_chat`, except that only the layout itself and images give special ids.

    A content that spells out `<end_of_sentence>` is encoded as ordinary text and so cannot end its turn. Where contents
    hold no such string, the ids are those of the rendered text. Raises UserError like `render_chat`, and where the
    tokenizer lacks the tokens.
    """
    special_ids = {BOS: tokenizer.bos_id, EOS: tokenizer.eos_id, IMAGE: tokenizer.image_id}
    ids = []
    for is_special, segments in groupby(_segments(messages, generate), key=lambda segment: segment[0]):
        texts = [text for _, text in segments]
        if not is_special:
            ids += tokenizer.encode("".join(texts))
            continue
        missing = [text for text in texts if special_ids[text] is None]
        if missing:
            raise UserError(
                f"a chat needs the token {missing[0]}, which this tokenizer lacks: use one trained by fulmen"
            )
        ids += [special_ids[text] for text in texts]
    return ids


def images_of(messages: Sequence[Message]) -> list[ImageSource]:
    """The images of the conversation's parts, one for each `<image>` id that `encode_chat` gives, in the same order.

    A part is `{"type": "image", "image": SOURCE}`. SOURCE may also be a function without arguments that returns the
    source: it is called here, so a conversation can be passed round before its pictures are drawn or read.
    Raises UserError for a part without an image, and like `render_chat`.
    """
    render_chat(messages)
    sources = []
    for number, message in enumerate(messages, 1):
        content = message.get("content")
        for part in [] if isinstance(content, str) else content:
            if part["type"] == "image":
                sources.append(_image(part, number))
    return sources


def expand_images(ids: Sequence[int], image_id: int, counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """(ids with each `image_id` repeated to the count of its image, where the first of each image lies in them).

    Raises UserError where there are more or fewer of `image_id` than counts.
    """
    marks = ids.count(image_id)
    if marks != len(counts):
        raise UserError(f"the text has {marks} places for an image and {len(counts)} images: give one for each")
    expanded, starts, upcoming = [], [], iter(counts)
    for token in ids:
        if token == image_id:
            starts.append(len(expanded))
            expanded += [image_id] * next(upcoming)
        else:
            expanded.append(token)
    return expanded, starts


def _image(part: Mapping[str, Any], number: int) -> ImageSource:
    source: ImageSource | Callable[[], ImageSource] | None = part.get("image")
    if source is None:
        raise UserError(f"message {number} has an image part without an image: give it one as 'image'")
    return source() if callable(source) else source


def _segments(messages: Sequence[Message], generate: bool) -> Iterator[tuple[bool, str]]:
    """(is a special token, text) in order."""
    if not messages:
        raise UserError("a chat needs at least one message, this one has none")
    for number, message in enumerate(messages, 1):
        yield True, BOS
        yield False, _header(message, number) + "\n"
        yield from _content(message.get("content"), number)
        yield True, EOS
        yield False, "\n"
    if generate:
        yield True, BOS
        yield False, HEADERS["assistant"] + "\n"


def _header(message: Message, number: int) -> str:
    if not isinstance(message, Mapping):
        raise UserError(f"message {number} is {message!r}: a message is a mapping with 'role' and 'content'")
    role = message.get("role")
    if role not in HEADERS:
        raise UserError(f"message {number} has the role {role!r}: the roles are {', '.join(HEADERS)}")
    return HEADERS[role]


def _content(content: Any, number: int) -> Iterator[tuple[bool, str]]:
    if isinstance(content, str):
        yield False, content
        return
    if not isinstance(content, list | tuple):
        raise UserError(f"message {number} has the content {content!r}: it must be a string or a list of parts")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind == "image":
            yield True, IMAGE
        elif kind == "text" and isinstance(part.get("text"), str):
            yield False, part["text"]
        elif kind == "text":
            raise UserError(f"message {number} has a part of type 'text' whose 'text' is not a string: {part!r}")
        else:
            raise UserError(f"message {number} has a part of type {kind!r}: the types are text, image")
