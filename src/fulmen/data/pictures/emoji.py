"""The emoji of a colour font, with their names and keywords from Unicode's CLDR: about 3,600 captioned pictures."""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple
from xml.etree import ElementTree

from PIL import Image, ImageFont

from fulmen.config import UserError
from fulmen.data.documents import hash_fraction
from fulmen.data.pictures.drawing import PAPERS, ask_background, other, place, write
from fulmen.data.pictures.picture import Picture, Question

FONTS = (
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),  # Debian, Ubuntu
    Path("/usr/share/fonts/noto/NotoColorEmoji.ttf"),  # Arch
    Path("/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf"),  # Fedora
)
ANNOTATIONS = Path("/usr/share/unicode/cldr/common")
WAY_OUT = (
    "apt-get install fonts-noto-color-emoji unicode-cldr-core libfribidi0, or name a font as in emoji:/path/to.ttf"
)
# The only size, in pixels, that Noto's bitmaps have.
FONT_SIZE = 109
# No font has it, so it looks as whatever a font lacks looks.
NO_CHARACTER = "\U0010ffff"
SIZE = (112, 112)
# How near in that order, where faces stand by faces, the emoji are whose names are taken for wrong answers.
NEAR = 20
SKIN_TONES = range(0x1F3FB, 0x1F400)


class Emoji(NamedTuple):
    sequence: str
    name: str
    keywords: str


class EmojiPictures:
    """A picture of each emoji that the font draws as one glyph, in the CLDR's order; of those that look alike, one."""

    def __init__(self, font: str | os.PathLike | None = None, annotations: Path = ANNOTATIONS):
        """font: the file of a font; None looks where systems keep Noto Color Emoji. annotations: the CLDR's folder.

        Without the CLDR only single characters have names, Python's own. Raises UserError without a usable font.
        """
        self._font = _open_font(font)
        named = list(_annotated(annotations)) or list(_characters())
        self._emoji = list(_drawable(named, self._font))
        self._fractions = [hash_fraction(self.name_of(number)) for number in range(len(self._emoji))]
        if len(self._emoji) < 2:
            raise UserError(f"the font {self._font.path} draws no emoji: {WAY_OUT}")

    def __len__(self) -> int:
        return len(self._emoji)

    def name_of(self, number: int) -> str:
        """The same for all skin tones, so that none is held out whose twin is not."""
        codes = [ord(character) for character in self._emoji[number].sequence]
        return "emoji/" + "-".join(f"{code:x}" for code in codes if code not in SKIN_TONES or len(codes) == 1)

    def example(self, number: int, variant: int) -> Picture:
        emoji = self._emoji[number]
        rng = Random(f"{emoji.sequence}#{variant}")
        paper = rng.choice(list(PAPERS))
        near = self._near(number)
        name = rng.choice(("Which emoji is this?", "What does this emoji show?", "Name this emoji."))
        words = rng.choice(("Which words go with this emoji?", "Give keywords for this emoji."))
        questions = (
            Question(name, emoji.name, other(rng, [each.name for each in near], emoji.name)),
            ask_background(rng, paper),
            Question(words, emoji.keywords, other(rng, [each.keywords for each in near], emoji.keywords)),
        )
        draw = partial(self._draw, emoji.sequence, paper, rng.random())
        return Picture(self.name_of(number), emoji.keywords, _sentence(emoji.name), questions, draw)

    def _near(self, number: int) -> list[Emoji]:
        """Whose names are taken for wrong answers: none that is held out where `number` is not."""
        places = range(max(0, number - NEAR), min(len(self._emoji), number + NEAR))
        near = [self._emoji[place] for place in places if self._fractions[place] >= self._fractions[number]]
        if len({emoji.name for emoji in near}) < 2:
            highest = max(range(len(self._emoji)), key=lambda place: (self._fractions[place], place != number))
            near.append(self._emoji[highest if highest != number else number - 1])
        return near

    def _draw(self, sequence: str, paper: str, seed: float) -> Image.Image:
        figure = write(sequence, self._font, (0, 0, 0))
        return place(figure, SIZE, PAPERS[paper], Random(seed), angle=15, smallest=0.6)


def _open_font(path: str | os.PathLike | None) -> ImageFont.FreeTypeFont:
    found = next((font for font in FONTS if font.is_file()), None) if path is None else path
    if found is None:
        raise UserError(f"no colour emoji font is installed: {WAY_OUT}")
    try:
        return ImageFont.truetype(os.fspath(found), FONT_SIZE)
    except OSError as error:
        raise UserError(f"cannot read the font {found} at {FONT_SIZE} pixels ({error}): {WAY_OUT}") from None


def _annotated(folder: Path) -> Iterator[Emoji]:
    """Every sequence with an English name, in the CLDR's order; none if the CLDR is not there."""
    for part in ("annotations", "annotationsDerived"):
        path = folder / part / "en.xml"
        if not path.is_file():
            return
        keywords: dict[str, list[str]] = {}
        for annotation in ElementTree.parse(path).iter("annotation"):
            sequence, text = annotation.get("cp", ""), annotation.text or ""
            if annotation.get("type") == "tts":
                # Many have one keyword, such as "flag", so the name is always one of them.
                yield Emoji(sequence, text, ", ".join(dict.fromkeys([*keywords.get(sequence, ()), text])))
            else:
                keywords[sequence] = text.split(" | ")


def _characters() -> Iterator[Emoji]:
    """The single symbols of the blocks in which emoji are, with Python's names."""
    for code in (*range(0x2190, 0x3300), *range(0x1F000, 0x1FC00)):
        name = unicodedata.name(chr(code), "").lower()
        if name and unicodedata.category(chr(code)) == "So":
            yield Emoji(chr(code), name, name)


def _drawable(named: Iterable[Emoji], font: ImageFont.FreeTypeFont) -> Iterator[Emoji]:
    """Those that the font has as one glyph each, without text such as #; the shortest name of those that look the same.

    A sequence that the font lacks, or any sequence without libraqm, is drawn as its several characters side by side.
    """
    widest = 1.5 * font.getlength("\N{GRINNING FACE}")
    missing = _look(NO_CHARACTER, font)
    looks: dict[bytes, Emoji] = {}
    for emoji in named:
        is_one_glyph = not emoji.sequence.isascii() and font.getlength(emoji.sequence) <= widest
        if is_one_glyph and (look := _look(emoji.sequence, font)) not in (None, missing):
            looks[look] = min(looks.get(look, emoji), emoji, key=lambda each: len(each.name))
    yield from looks.values()


def _look(sequence: str, font: ImageFont.FreeTypeFont) -> bytes | None:
    """What tells apart how sequences are drawn; None of a blank."""
    figure = write(sequence, font, (0, 0, 0))
    return None if figure.getbbox() is None else hashlib.blake2b(figure.tobytes()).digest()


def _sentence(name: str) -> str:
    """A sentence of names such as 'grinning face', 'clapping hands: dark skin tone' and 'flag: Norway'."""
    kind, _, detail = name.partition(": ")
    if kind == "flag":
        return f"A picture of the flag of {detail}."
    is_plural = kind.endswith("s") and not kind.endswith(("ss", "us", "is", "os"))
    article = "" if is_plural else "an " if kind[0].lower() in "aeiou" else "a "
    return f"A picture of {article}{kind}{' with ' if detail else ''}{detail}."
