"""Bar charts drawn with matplotlib, without its axes: those take longer than all the rest of the picture."""

from functools import partial
from random import Random

import numpy as np
from PIL import Image

from fulmen.data.pictures.drawing import INKS, PAPERS, Colour, other
from fulmen.data.pictures.picture import Picture, Question
from fulmen.data.pictures.words import WORDS

COUNT = 4096
BARS = (3, 6)
VALUES = range(1, 16)
LABELS = tuple(word for word in WORDS if len(word) <= 4)
SIZE = (224, 112)
DOTS_PER_INCH = 100


class ChartPictures:
    """Charts of three to six labelled bars of different values, each value written above its bar."""

    def __len__(self) -> int:
        return COUNT

    def name_of(self, number: int) -> str:
        return f"charts/{number}"

    def example(self, number: int, variant: int) -> Picture:
        content = Random(self.name_of(number))
        count = content.randint(*BARS)
        bars = dict(zip(content.sample(LABELS, count), content.sample(VALUES, count), strict=True))
        rng = Random(f"{self.name_of(number)}#{variant}")
        ink, paper = rng.choice(list(INKS)), rng.choice(list(PAPERS))
        listed = ", ".join(f"{label} {value}" for label, value in bars.items())
        refined = f"A bar chart with {count} bars: {listed}."
        draw = partial(_draw, bars, INKS[ink], PAPERS[paper], rng.random())
        return Picture(self.name_of(number), f"bar chart, {listed}", refined, _questions(bars, rng), draw)


def _questions(bars: dict[str, int], rng: Random) -> tuple[Question, ...]:
    largest, smallest = max(bars, key=bars.__getitem__), min(bars, key=bars.__getitem__)
    count, most = str(len(bars)), str(bars[largest])
    which = rng.choice(("Which bar is the largest?", "Which bar is the highest?", "Name the largest bar."))
    value = rng.choice(("What is the value of the largest bar?", "How much is the largest bar?"))
    return (
        Question(which, largest, other(rng, list(bars), largest)),
        Question(value, most, other(rng, [str(each) for each in bars.values()], most)),
        Question("How many bars are there?", count, other(rng, "3456", count)),
        Question("Which bar is the smallest?", smallest, other(rng, list(bars), smallest)),
    )


def _draw(bars: dict[str, int], ink: Colour, paper: Colour, seed: float) -> Image.Image:
    # Imported only here, because it takes half a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rng = Random(seed)
    shown = tuple(channel / 255 for channel in paper)
    inches = SIZE[0] / DOTS_PER_INCH, SIZE[1] / DOTS_PER_INCH
    figure = Figure(figsize=inches, dpi=DOTS_PER_INCH, facecolor=shown)
    canvas = FigureCanvasAgg(figure)
    size, floor, room = rng.uniform(8, 9.5), rng.uniform(0.17, 0.21), rng.uniform(0.58, 0.62)
    step = 0.98 / len(bars)
    width = step * rng.uniform(0.5, 0.85)
    figure.add_artist(Rectangle((0.01, floor - 0.01), 0.98, 0.01, color="black", linewidth=0))
    for place, (label, value) in enumerate(bars.items()):
        middle, height = 0.01 + step * (place + 0.5), room * value / max(bars.values())
        colour = tuple(channel / 255 for channel in ink)
        figure.add_artist(Rectangle((middle - width / 2, floor), width, height, color=colour, linewidth=0))
        figure.text(middle, floor - 0.02, label, size=size, ha="center", va="top")
        figure.text(middle, floor + height + 0.01, str(value), size=size, ha="center", va="bottom")
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
