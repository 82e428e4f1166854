"""Pictures of a particle world: discs, goals, who is a student and whom it listens to; strips and films of them.

Drawn at three times the size with Pillow and scaled down, which smooths every edge; no display is needed.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fulmen.config import UserError
from fulmen.marl.worlds.particles import Scene
from fulmen.run import write_atomic

Colour = tuple[int, int, int]
Point = tuple[float, float]

SMALLEST = 100
"""Fewer pixels than this show nothing."""
_SCALE = 3
_WHITE, _PAPER = (255, 255, 255), (250, 250, 252)
_GRID, _EDGE = (235, 237, 242), (209, 213, 219)
_INK, _SOFT = (31, 41, 55), (107, 114, 128)
_STUDENT = (230, 159, 0)
# Okabe and Ito's colours, which people with any colour vision tell apart: for red, green and blue.
_SAFE = ((213, 94, 0), (0, 158, 115), (0, 114, 178))
_LEAST_WEIGHT = 0.02
"""Less attention than this is no arrow."""


class Overlay(NamedTuple):
    """What the transfer did in one world and step, drawn on top of its N agents."""

    student: Tensor  # [N] bool: a ring around who acts by what others know
    attention: Tensor | None = None  # [N, N] weight of teacher j for student i: an arrow from j to i


def draw(
    scene: Scene, size: int = 400, *, title: str = "", overlay: Overlay | None = None, extent: float = 1.2
) -> Image.Image:
    """A picture `size` pixels wide of the plane from -extent to extent; a title, or an overlay's legend, adds a bar.

    Agents have a label and are drawn solid, landmarks have none and are drawn pale; an agent outside stands at the rim,
    hollow. Raises UserError for a position that is not finite, a picture too small, or an overlay of another team.
    """
    _check(scene, size, overlay, extent)
    canvas = _Canvas(size * _SCALE, extent)
    discs = [canvas.find(scene, i) for i in range(len(scene.labels))]
    agents = [disc for disc in discs if disc.label]
    for landmark in (disc for disc in discs if not disc.label):
        canvas.circle(landmark.at, landmark.radius, (*landmark.colour, 60), (*landmark.colour, 170), 0.0025)
    for agent, landmark in scene.goals:
        canvas.dashes(discs[agent], discs[landmark])
    if overlay:
        canvas.attention(agents, overlay)
    for i, agent in enumerate(agents):
        canvas.agent(agent, student=bool(overlay and overlay.student[i]))
    return _frame(canvas.image, size, title, overlay)


def fit(scenes: Sequence[Scene], most: float = 2.0) -> float:
    """The `extent` at which all discs of all scenes are in the picture, from 1.1 up to `most`."""
    reach = [(scene.positions.abs() + scene.radii[:, None]).max().item() for scene in scenes]
    return min(max([1.1, *reach]), most)


def save_gif(frames: Sequence[Image.Image], path: str | Path, fps: float = 10) -> None:
    """Write a film that repeats, its last frame held for a second, replacing `path` in one step.

    Raises UserError for no frames, frames of several sizes, and for a speed that GIF does not know (0.01 to 50).
    """
    _check_frames(frames)
    if not 0.01 <= fps <= 50:
        raise UserError(f"fps must be from 0.01 to 50, got {fps}")
    delay = round(1000 / fps)
    # One palette for all frames: else the same colour flickers from frame to frame.
    palette = _tile(frames[:: max(1, len(frames) // 16)], 0, 4).quantize(256, Image.Quantize.MEDIANCUT)
    first, *others = [frame.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    delays = [delay] * len(others) + [max(delay, 1000)]
    data = io.BytesIO()
    first.save(data, "GIF", save_all=True, append_images=others, duration=delays, loop=0)
    write_atomic(path, data.getvalue())


def save_png(frames: Sequence[Image.Image], path: str | Path, columns: int | None = None) -> None:
    """Write the frames as a strip, or in rows of `columns`, replacing `path` in one step.

    Raises UserError for no frames and frames of several sizes.
    """
    _check_frames(frames)
    if columns is not None and columns < 1:
        raise UserError(f"columns must be at least 1, got {columns}")
    data = io.BytesIO()
    _tile(frames, 12, columns or len(frames)).save(data, "PNG", optimize=True)
    write_atomic(path, data.getvalue())


class _Disc(NamedTuple):
    """A disc in pixels of the canvas."""

    at: Point
    radius: float
    colour: Colour
    label: str
    inside: bool


class _Canvas:
    """The plane at three times the size of the picture. Places and radii are in pixels, strokes in parts of it."""

    def __init__(self, pixels: int, extent: float) -> None:
        self.image = Image.new("RGB", (pixels, pixels), _PAPER)
        self._pen = ImageDraw.Draw(self.image, "RGBA")
        self._pixels, self._extent = pixels, extent
        for line in range(math.ceil(-2 * extent), math.floor(2 * extent) + 1):
            at = (line / 2 + extent) * self._unit
            for ends in ((at, 0, at, pixels), (0, at, pixels, at)):
                self._pen.line(ends, _GRID, self._stroke(0.002))

    def find(self, scene: Scene, index: int) -> _Disc:
        """An agent outside comes to the rim; a landmark stays where it is."""
        radius, label = scene.radii[index].item(), scene.labels[index]
        x, y = scene.positions[index].tolist()
        inside = max(abs(x), abs(y)) <= self._extent
        if label:
            rim = max(self._extent - radius, 0)
            x, y = (min(max(value, -rim), rim) for value in (x, y))
        at = (x + self._extent) * self._unit, (self._extent - y) * self._unit
        return _Disc(at, radius * self._unit, _safe(scene.colours[index]), label, inside)

    def circle(
        self, at: Point, radius: float, fill: tuple[int, ...] | None, edge: tuple[int, ...], width: float
    ) -> None:
        box = (at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius)
        self._pen.ellipse(box, fill, edge, self._stroke(width))

    def dashes(self, agent: _Disc, landmark: _Disc) -> None:
        distance, dash = math.dist(agent.at, landmark.at), self._stroke(0.01)
        for step in range(0, int(distance), 2 * dash):
            points = [_between(agent.at, landmark.at, part / distance) for part in (step, min(step + dash, distance))]
            self._pen.line(points, (*agent.colour, 110), self._stroke(0.003))

    def agent(self, disc: _Disc, *, student: bool) -> None:
        """Solid, or hollow where it stands outside; its label in it if that fits, else above it."""
        if student:
            self.circle(disc.at, disc.radius + self._stroke(0.015), None, _STUDENT, 0.0055)
        fill, edge = (disc.colour, _WHITE) if disc.inside else (_WHITE, disc.colour)
        self.circle(disc.at, disc.radius, fill, edge, 0.003)
        font = _font(max(disc.radius * 1.15, self._stroke(0.024)))
        if font.getlength(disc.label) <= 1.5 * disc.radius:
            self._pen.text(disc.at, disc.label, edge, font, anchor="mm")
            return
        above = disc.at[0], max(disc.at[1] - disc.radius - self._stroke(0.022), self._stroke(0.05))
        halo = dict(stroke_width=self._stroke(0.005), stroke_fill=_PAPER)
        self._pen.text(above, disc.label, _INK, _font(self._stroke(0.035)), anchor="mb", **halo)

    def attention(self, agents: list[_Disc], overlay: Overlay) -> None:
        """An arrow from each teacher to each student, the wider and the darker the more it is listened to."""
        if overlay.attention is None:
            return
        weights = overlay.attention.tolist()
        arrows = [
            (weights[i][j], agents[j], agents[i])
            for i in range(len(agents))
            for j in range(len(agents))
            if i != j and overlay.student[i] and weights[i][j] > _LEAST_WEIGHT
        ]
        # All on one layer of opacities, the strongest last: where arrows cross, it hides the others.
        layer = Image.new("L", self.image.size)
        pen = ImageDraw.Draw(layer)
        for weight, teacher, student in sorted(arrows, key=lambda arrow: arrow[0]):
            self._arrow(pen, min(weight, 1.0), teacher, student)
        self.image.paste(_STUDENT, mask=layer)

    def _arrow(self, pen: ImageDraw.ImageDraw, weight: float, teacher: _Disc, student: _Disc) -> None:
        start, end = teacher.at, student.at
        distance = math.dist(start, end)
        if distance < teacher.radius + student.radius:
            return
        opacity, width = round(50 + 205 * weight), self._stroke(0.001 + 0.011 * weight)
        # Bent to the left of its way, so that the arrows of two agents that listen to each other lie apart.
        middle, bend = _between(start, end, 0.5), 0.14
        middle = middle[0] + bend * (end[1] - start[1]), middle[1] - bend * (end[0] - start[0])
        head = 1.5 * width + self._stroke(0.006)
        tip = max(1 - (student.radius + self._stroke(0.022)) / distance, 0.1)
        neck = max(tip - head / distance, 0.05)
        curve = [_bend(start, middle, end, neck * step / 24) for step in range(25)]
        pen.line(curve, opacity, width, joint="curve")
        base, point = curve[-1], _bend(start, middle, end, tip)
        across = 0.6 * (point[1] - base[1]), 0.6 * (base[0] - point[0])
        corners = [(base[0] + side * across[0], base[1] + side * across[1]) for side in (1, -1)]
        pen.polygon([point, *corners], opacity)

    @property
    def _unit(self) -> float:
        """Pixels of a unit of the plane."""
        return self._pixels / (2 * self._extent)

    def _stroke(self, share: float) -> int:
        return max(1, round(share * self._pixels))


def _frame(plane: Image.Image, size: int, title: str, overlay: Overlay | None) -> Image.Image:
    """The plane with a border, a title above and an overlay's legend below."""
    bar = _SCALE * (20 + size // 28)
    top, bottom = bar if title else 0, bar * 3 // 4 if overlay else 0
    image = Image.new("RGB", (plane.width, plane.height + top + bottom), _WHITE)
    image.paste(plane, (0, top))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, top, plane.width - 1, top + plane.height - 1), outline=_EDGE, width=_SCALE)
    if title:
        font = _font(bar * 0.46)
        widest = plane.width * 0.96
        if font.getlength(title) > widest:
            font = _font(bar * 0.46 * widest / font.getlength(title))
        pen.text((plane.width * 0.02, bar * 0.48), title, _INK, font, anchor="lm")
    if overlay:
        _legend(pen, plane.width, top + plane.height, bottom, arrows=overlay.attention is not None)
    return image.resize((size, round(image.height / _SCALE)), Image.Resampling.BOX)


def _legend(pen: ImageDraw.ImageDraw, width: int, top: int, height: int, *, arrows: bool) -> None:
    font, x, y, mark = _font(height * 0.46), width * 0.02, top + height * 0.52, height * 0.22
    pen.ellipse((x, y - mark, x + 2 * mark, y + mark), outline=_STUDENT, width=round(mark * 0.4))
    pen.text((x + 3 * mark, y), "student", _SOFT, font, anchor="lm")
    if arrows:
        x += 5 * mark + font.getlength("student")
        pen.line((x, y, x + 3 * mark, y), _STUDENT, round(mark * 0.5))
        pen.polygon([(x + 4.2 * mark, y), (x + 3 * mark, y - mark * 0.7), (x + 3 * mark, y + mark * 0.7)], _STUDENT)
        pen.text((x + 5.2 * mark, y), "attention: from teacher to student", _SOFT, font, anchor="lm")


def _tile(frames: Sequence[Image.Image], gap: int, columns: int) -> Image.Image:
    width, height = frames[0].size
    columns = min(columns, len(frames))
    rows = math.ceil(len(frames) / columns)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    sheet = Image.new("RGB", size, _WHITE)
    for i, frame in enumerate(frames):
        row, column = divmod(i, columns)
        sheet.paste(frame, (column * (width + gap), row * (height + gap)))
    return sheet


def _check(scene: Scene, size: int, overlay: Overlay | None, extent: float) -> None:
    if size < SMALLEST:
        raise UserError(f"a picture needs at least {SMALLEST} pixels, got {size}")
    if not 0.01 <= extent <= 100:
        raise UserError(f"extent must be from 0.01 to 100, got {extent}")
    for i, position in enumerate(scene.positions.tolist()):
        if not all(map(math.isfinite, position)):
            raise UserError(f"disc {scene.labels[i] or i} is at {position}: a world must stay finite to be drawn")
    if overlay:
        agents = sum(map(bool, scene.labels))
        shapes = [tuple(overlay.student.shape)]
        shapes += [] if overlay.attention is None else [tuple(overlay.attention.shape)]
        if shapes != [(agents,), (agents, agents)][: len(shapes)]:
            raise UserError(f"an overlay of {agents} agents needs student [N] and attention [N, N], got {shapes}")


def _check_frames(frames: Sequence[Image.Image]) -> None:
    if not frames:
        raise UserError("there are no frames to save: run at least one step")
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        raise UserError(f"frames must be of one size, got {sizes}: give all of them a title and an overlay, or none")


def _safe(colour: Colour) -> Colour:
    """A plain red, green or blue becomes one that everybody can tell apart; every other colour stays."""
    low, middle, high = sorted(colour)
    if high - middle > 40 and middle - low < 40:
        return _SAFE[colour.index(high)]
    return colour


def _font(pixels: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(4, round(pixels)))


def _between(start: Point, end: Point, part: float) -> Point:
    return start[0] + part * (end[0] - start[0]), start[1] + part * (end[1] - start[1])


def _bend(start: Point, middle: Point, end: Point, part: float) -> Point:
    """A point of the quadratic Bezier curve through a control point `middle`."""
    return _between(_between(start, middle, part), _between(middle, end, part), part)
