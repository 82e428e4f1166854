"""What a built-in source of pictures gives: drawn when asked for, with captions and questions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

from PIL import Image

# The first variant that no document shows: evaluation that asks for this one or a later one sees a rendering that
# training has not seen.
UNSEEN_VARIANT = 2**20


class Question(NamedTuple):
    """A question on a picture, its answer, and a wrong answer of the same kind."""

    question: str
    answer: str
    wrong: str


@dataclass(frozen=True, eq=False)
class Picture:
    """One rendering of one example.

    name: the example's stable name, the same for all its renderings. caption: as found, often just keywords.
    refined: a clean sentence. questions: the one that the source is for comes first. draw: a new RGB image.
    """

    name: str
    caption: str
    refined: str
    questions: tuple[Question, ...]
    draw: Callable[[], Image.Image]

    @cached_property
    def image(self) -> Image.Image:
        """The drawn picture, RGB."""
        return self.draw()


class PictureSource(Protocol):
    """Examples by number. The same number and variant give the same picture, on every machine with the same fonts."""

    def __len__(self) -> int: ...

    def name_of(self, number: int) -> str:
        """A stable name such as emoji/1f600, by whose hash an example is held out or not."""

    def example(self, number: int, variant: int) -> Picture:
        """variant: seeds position, scale, rotation, colours, and how the questions are put."""
