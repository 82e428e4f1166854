"""The pictures as conversations to train on; nothing is drawn before `images_of` asks for a conversation's images."""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from random import Random
from typing import Any, Generic, TypeVar

from fulmen.data.chat import Message, render_chat
from fulmen.data.documents import Document, PreferencePair, hash_fraction
from fulmen.data.pictures import SOURCES, open_pictures
from fulmen.data.pictures.picture import Picture, PictureSource

# How many renderings of each example there are to train on: variants 0 .. RENDERINGS - 1; more where examples are few,
# so that no source has much less than so many documents.
RENDERINGS = 4
DOCUMENTS = 15_000
ALL = "pictures"
DESCRIBE = ("Describe the picture.", "What is in the picture?", "Write a sentence about this picture.")
KEYWORDS = ("Give keywords for the picture.", "Which words go with the picture?")

Row = TypeVar("Row", Document, PreferencePair)
Form = Callable[[Picture, Picture, Random, str], Row]


def picture_names(forms: Iterable[str]) -> list[str]:
    """All names of sources that give pictures in one of the forms."""
    return [f"{kind}-{form}" for kind in (*SOURCES, ALL) for form in forms]


def picture_shelves(name: str, forms: Mapping[str, Form]) -> list["PictureShelf"]:
    """The shelves of a name such as emoji-captions, emoji-captions:/path/to/font.ttf or pictures-dialogues (all kinds).

    Empty for any other name. Raises UserError where a font or package is missing.
    """
    name, colon, font = name.partition(":")
    if name not in picture_names(forms):
        return []
    kind, _, form = name.partition("-")
    kinds = SOURCES if kind == ALL and not font else [kind + colon + font]
    return [PictureShelf(open_pictures(each), forms[form]) for each in kinds]


class PictureShelf(Generic[Row]):
    """A document or pair for each rendering of each example. An example's renderings have its name as their file."""

    def __init__(self, source: PictureSource, form: Form):
        self._source, self._form = source, form
        self._renderings = max(RENDERINGS, DOCUMENTS // len(source))

    def __len__(self) -> int:
        return len(self._source) * self._renderings

    def __getitem__(self, row: int) -> Row:
        number, variant = divmod(row, self._renderings)
        origin = self.origin(row)
        rng = Random(f"{origin} as a document")
        partner = self._source.example(self._partner(number, rng), variant)
        return self._form(self._source.example(number, variant), partner, rng, origin)

    def origin(self, row: int) -> str:
        return f"{self._source.name_of(row // self._renderings)}#{row + 1}"

    def _partner(self, number: int, rng: Random) -> int:
        """Another example, of a higher hash: where `number` is not held out, its partner is not either."""
        ranked, ranks = self._ranking
        rank = ranks[number]
        return ranked[rng.randrange(rank + 1, len(ranked)) if rank + 1 < len(ranked) else rank - 1]

    @cached_property
    def _ranking(self) -> tuple[list[int], dict[int, int]]:
        """(the numbers by the hash of their names, the rank of each number)."""
        ranked = sorted(range(len(self._source)), key=lambda number: hash_fraction(self._source.name_of(number)))
        return ranked, {number: rank for rank, number in enumerate(ranked)}


def captions(picture: Picture, partner: Picture, rng: Random, origin: str) -> Document:
    """The refined caption or the raw one, with equal probability."""
    request, caption = _request(picture, rng)
    return _document([_ask(request, picture), _answer(caption)], origin)


def questions(picture: Picture, partner: Picture, rng: Random, origin: str) -> Document:
    """The question that the source is for, and before or behind it another question or a request for a caption."""
    asked = [picture.questions[0][:2], rng.choice((_request(picture, rng), rng.choice(picture.questions[1:])[:2]))]
    rng.shuffle(asked)
    (first, answer), (second, reply) = asked
    return _document([_ask(first, picture), _answer(answer), _ask(second, None), _answer(reply)], origin)


def texts(picture: Picture, partner: Picture, rng: Random, origin: str) -> Document:
    """No picture: a question on its caption, or the one caption made out of the other."""
    chosen = rng.choice((picture.questions[0], rng.choice(picture.questions[1:])))
    described = f"{picture.refined} {chosen.question}", chosen.answer
    named = f"{rng.choice(DESCRIBE)} {picture.caption}", picture.refined
    listed = f"{rng.choice(KEYWORDS)} {picture.refined}", picture.caption
    asked, answer = rng.choice((described, described, named, listed))
    return _document([{"role": "user", "content": asked}, _answer(answer)], origin)


def dialogues(picture: Picture, partner: Picture, rng: Random, origin: str) -> Document:
    """Two or three questions on a picture, and in half of the dialogues another one on a second picture."""
    messages: list[Message] = []
    count = rng.randint(2, min(3, len(picture.questions)))
    for asked, chosen in enumerate(rng.sample(picture.questions, count)):
        messages += [_ask(chosen.question, None if asked else picture), _answer(chosen.answer)]
    if rng.random() < 0.5:
        chosen = rng.choice(partner.questions)
        messages += [_ask(f"Now another picture. {chosen.question}", partner), _answer(chosen.answer)]
    return _document(messages, origin)


def preferences(picture: Picture, partner: Picture, rng: Random, origin: str) -> PreferencePair:
    """A question; its answer is better than a wrong one of the same kind."""
    chosen = rng.choice((picture.questions[0], rng.choice(picture.questions[1:])))
    return PreferencePair((_ask(chosen.question, picture),), chosen.answer, chosen.wrong, origin)


DOCUMENT_FORMS: dict[str, Form] = {
    "captions": captions,
    "texts": texts,
    "questions": questions,
    "dialogues": dialogues,
}
PAIR_FORMS: dict[str, Form] = {"preferences": preferences}


def _request(picture: Picture, rng: Random) -> tuple[str, str]:
    """A request for the refined caption or the raw one, with equal probability, and that caption."""
    requests, caption = rng.choice(((DESCRIBE, picture.refined), (KEYWORDS, picture.caption)))
    return rng.choice(requests), caption


def _ask(question: str, picture: Picture | None) -> dict[str, Any]:
    parts = [] if picture is None else [{"type": "image", "image": picture.draw}]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def _answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _document(messages: list[Message], origin: str) -> Document:
    return Document(render_chat(messages, generate=False), origin, tuple(messages))
