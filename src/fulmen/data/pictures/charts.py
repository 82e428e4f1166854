"""Bar charts to read: which bar is the largest, and what is written below and above the bars."""

from functools import partial
from random import Random

from PIL import Image, ImageDraw

from fulmen.data.pictures.drawing import INKS, PAPERS, Colour, open_font, other
from fulmen.data.pictures.picture import Picture, Question

COUNT = 4096
BARS = (3, 6)
VALUES = range(1, 16)
# What a chart counts by: its bars are some of one row, in the row's order.
ROWS = (
    ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"),
    ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"),
    tuple("ABCDEFGHJKLM"),
)
SIZE = (224, 112)
FONT, FONT_SIZES = "DejaVuSans", (14, 17)


class ChartPictures:
    """Charts of three to six labelled bars of different values, each value written above its bar."""

    def __len__(self) -> int:
        return COUNT

    def name_of(self, number: int) -> str:
        return f"charts/{number}"

    def example(self, number: int, variant: int) -> Picture:
        content = Random(self.name_of(number))
        count = content.randint(*BARS)
        row = content.choice(ROWS)
        labels = [row[place] for place in sorted(content.sample(range(len(row)), count))]
        bars = dict(zip(labels, content.sample(VALUES, count), strict=True))
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
    rng, (width, height) = Random(seed), SIZE
    font = open_font(FONT, rng.randint(*FONT_SIZES))
    floor, room = height - rng.randint(20, 24), rng.randint(62, 68)
    image = Image.new("RGB", SIZE, paper)
    draw = ImageDraw.Draw(image)
    step = width / len(bars)
    half = step * rng.uniform(0.25, 0.42)
    for place, (label, value) in enumerate(bars.items()):
        middle, top = step * (place + 0.5), floor - room * value / max(bars.values())
        draw.rectangle((middle - half, top, middle + half, floor - 1), fill=ink)
        draw.text((middle, floor + 3), label, "black", font, anchor="ma")
        draw.text((middle, top - 3), str(value), "black", font, anchor="ms")
    draw.rectangle((2, floor, width - 3, floor), fill="black")
    return image
