"""Real pictures that a fresh machine can have without a download site, with captions and questions (docs/data.md)."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from fulmen.config import UserError
from fulmen.data.documents import choose_held_out
from fulmen.data.pictures.charts import ChartPictures
from fulmen.data.pictures.digits import DigitPictures
from fulmen.data.pictures.emoji import EmojiPictures
from fulmen.data.pictures.picture import UNSEEN_VARIANT, Picture, PictureSource, Question
from fulmen.data.pictures.words import WordPictures

__all__ = ["SOURCES", "UNSEEN_VARIANT", "Picture", "PictureSource", "Question", "open_pictures", "split_pictures"]

SOURCES: dict[str, Callable[..., PictureSource]] = {
    "emoji": EmojiPictures,
    "digits": DigitPictures,
    "words": WordPictures,
    "charts": ChartPictures,
}


@lru_cache
def open_pictures(name: str) -> PictureSource:
    """The source of this name: emoji, digits, words or charts; emoji:/path/to/font.ttf takes that font.

    Raises UserError for another name and where the font or package of the source is missing.
    """
    kind, _, path = name.partition(":")
    if kind not in SOURCES or (path and kind != "emoji"):
        raise UserError(f"there are no pictures called {name!r}: take {', '.join(SOURCES)} or emoji:/path/to/font.ttf")
    return SOURCES[kind](path) if path else SOURCES[kind]()


def split_pictures(source: PictureSource, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) numbers of examples, [n] int64 each, held out as `split` holds out the source's documents.

    held_out: the share to hold out, 0 <= held_out < 1.
    """
    names = [source.name_of(number) for number in range(len(source))]
    chosen = choose_held_out(set(names), held_out)
    mask = np.array([name in chosen for name in names], dtype=bool)
    return np.flatnonzero(~mask), np.flatnonzero(mask)
