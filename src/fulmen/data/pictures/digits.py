"""Handwritten digits: the 1,797 scans of 8 x 8 that scikit-learn carries (Alpaydin and Kaynak, UCI, 1998)."""

from functools import partial
from random import Random

import numpy as np
from PIL import Image

from fulmen.config import UserError
from fulmen.data.pictures.drawing import INKS, PAPERS, ask_background, other, place
from fulmen.data.pictures.picture import Picture, Question

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = (112, 112)
FIGURE_SIDE = 96


class DigitPictures:
    """A picture of each scan, in ink on paper."""

    def __init__(self) -> None:
        """Raises UserError without scikit-learn."""
        try:
            # Imported only here, because it is an extra and slow to import.
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError(
                "the digits come with scikit-learn, which is not installed: pip install 'fulmen[vision]'"
            ) from None
        scans = load_digits()
        self._masks = np.rint(scans.images * (255 / 16)).astype(np.uint8)
        self._digits = [int(digit) for digit in scans.target]

    def __len__(self) -> int:
        return len(self._digits)

    def name_of(self, number: int) -> str:
        return f"digits/{number}"

    def example(self, number: int, variant: int) -> Picture:
        digit = self._digits[number]
        rng = Random(f"{self.name_of(number)}#{variant}")
        ink, paper = rng.choice(list(INKS)), rng.choice(list(PAPERS))
        which = rng.choice(("Which digit is this?", "Read the digit.", "What number is written here?"))
        parity = rng.choice(("Is the digit even or odd?", "Is this number odd or even?"))
        questions = (
            Question(which, str(digit), other(rng, [str(each) for each in range(10)], str(digit))),
            ask_background(rng, paper),
            Question(parity, ("even", "odd")[digit % 2], ("odd", "even")[digit % 2]),
        )
        caption = f"digit, {digit}, {WORDS[digit]}, handwriting"
        draw = partial(self._draw, number, ink, paper, rng.random())
        return Picture(self.name_of(number), caption, f"A handwritten {WORDS[digit]}.", questions, draw)

    def _draw(self, number: int, ink: str, paper: str, seed: float) -> Image.Image:
        mask = Image.fromarray(self._masks[number]).resize((FIGURE_SIDE, FIGURE_SIDE), Image.Resampling.BICUBIC)
        figure = Image.new("RGBA", mask.size, INKS[ink])
        figure.putalpha(mask)
        return place(figure, SIZE, PAPERS[paper], Random(seed), angle=15, smallest=0.6)
