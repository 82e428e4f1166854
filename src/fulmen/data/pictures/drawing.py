"""What the sources draw with: named colours, figures turned and placed on a background, and questions about it."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

from fulmen.data.pictures.picture import Question

Colour: TypeAlias = tuple[int, int, int]

# Every ink can be read on every paper.
PAPERS: dict[str, Colour] = {
    "white": (250, 250, 248),
    "grey": (200, 200, 200),
    "yellow": (255, 236, 120),
    "orange": (255, 190, 110),
    "pink": (255, 185, 205),
    "purple": (205, 180, 245),
    "blue": (155, 205, 250),
    "green": (165, 225, 155),
}
INKS: dict[str, Colour] = {
    "black": (20, 20, 20),
    "red": (185, 20, 30),
    "brown": (110, 60, 20),
    "purple": (100, 20, 130),
    "blue": (20, 40, 170),
    "green": (0, 95, 40),
}


def place(
    figure: Image.Image, size: tuple[int, int], paper: Colour, rng: Random, *, angle: float, smallest: float
) -> Image.Image:
    """The RGBA figure turned by up to `angle` degrees and put somewhere on paper, RGB of `size` (width, height) pixels.

    smallest: the least size of the figure, as a share of the largest at which it fits.
    """
    turned = figure.rotate(rng.uniform(-angle, angle), Image.Resampling.BICUBIC, expand=True)
    scale = rng.uniform(smallest, 1) * min(size[0] / turned.width, size[1] / turned.height)
    width, height = max(1, int(turned.width * scale)), max(1, int(turned.height * scale))
    scaled = turned.resize((width, height), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", size, paper)
    canvas.paste(scaled, (rng.randint(0, size[0] - width), rng.randint(0, size[1] - height)), scaled)
    return canvas


@lru_cache
def open_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of the text fonts that matplotlib ships, such as DejaVuSans, at a size in pixels."""
    # Imported only here, because it takes a quarter of a second.
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"), size)


def write(text: str, font: ImageFont.FreeTypeFont, ink: Colour) -> Image.Image:
    """The text alone, RGBA and just as large as it is; an empty image of 1 x 1 if nothing is drawn."""
    left, top, right, bottom = font.getbbox(text)
    figure = Image.new("RGBA", (max(1, int(right - left)), max(1, int(bottom - top))), (*ink, 0))
    ImageDraw.Draw(figure).text((-left, -top), text, font=font, fill=ink, embedded_color=True)
    return figure


def other(rng: Random, options: Sequence[str], answer: str) -> str:
    """One of the options that is not the answer."""
    return rng.choice([option for option in options if option != answer])


def ask_background(rng: Random, paper: str) -> Question:
    question = rng.choice(
        ("What colour is the background?", "Which colour is behind it?", "Name the background colour.")
    )
    return Question(question, paper, other(rng, list(PAPERS), paper))
