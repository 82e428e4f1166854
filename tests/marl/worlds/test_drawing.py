"""Pictures are looked at pixel by pixel: what is where, in which colour, and what files hold."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from fulmen.config import UserError
from fulmen.marl.worlds import make_environment
from fulmen.marl.worlds.drawing import Overlay, draw, fit, save_gif, save_png
from fulmen.marl.worlds.particles import Scene

BLUE, RED, GREY = (89, 89, 217), (217, 89, 89), (166, 166, 166)
SAFE_BLUE, SAFE_RED, AMBER = (0, 114, 178), (213, 94, 0), (230, 159, 0)
SIZE, EXTENT = 240, 1.2


def scene(*positions, goals=()):
    """Two agents, blue and red, and landmarks behind them."""
    places = positions or ((-0.6, 0.0), (0.6, 0.0), (0.0, -0.8))
    count = len(places)
    return Scene(
        positions=torch.tensor(places),
        radii=torch.full((count,), 0.1),
        colours=[BLUE, RED, *[GREY] * (count - 2)],
        labels=["0", "1", *[""] * (count - 2)],
        goals=list(goals),
    )


def at(image, x, y, *, top=0):
    scale = SIZE / (2 * EXTENT)
    return image.getpixel((int((x + EXTENT) * scale), top + int((EXTENT - y) * scale)))


def near(pixel, colour, tolerance=30):
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, colour, strict=True))


def pixels(image):
    return np.asarray(image).reshape(-1, *np.asarray(image).shape[2:]).tolist()


def count(image, colour, tolerance=30):
    return sum(near(pixel, colour, tolerance) for pixel in pixels(image))


def amber_between(image):
    """How strong the strongest amber is in a band between the two agents: 0 where there is none."""
    scale = SIZE / (2 * EXTENT)
    band = image.crop((int((EXTENT - 0.2) * scale), int((EXTENT - 0.4) * scale), int((EXTENT + 0.2) * scale), 160))
    return max(red - blue for red, _, blue in pixels(band))


def test_discs_are_where_they_should_be_up_is_up():
    image = draw(scene((-0.6, 0.5), (0.6, -0.5), (0.0, 0.9)), SIZE)
    assert image.size == (SIZE, SIZE)
    assert near(at(image, -0.53, 0.5), SAFE_BLUE)
    assert near(at(image, 0.67, -0.5), SAFE_RED)
    landmark = at(image, 0.0, 0.9)
    assert 200 < min(landmark) < 245, "pale"
    assert not near(at(image, -0.53, -0.5), SAFE_BLUE)


def test_edges_are_smooth():
    assert len(draw(scene(), SIZE).crop((40, 100, 80, 140)).getcolors()) > 30


def test_a_landmark_shows_its_colour_and_the_goal_line_leads_to_it():
    plain = draw(scene((-0.6, 0.0), (0.6, 0.0), (0.0, 0.8)), SIZE)
    lined = draw(scene((-0.6, 0.0), (0.6, 0.0), (0.0, 0.8), goals=[(0, 2)]), SIZE)
    changed = ImageChops.difference(plain, lined).getbbox()
    assert changed is not None
    left, top, right, bottom = changed
    assert 55 <= left <= 75
    assert right <= 125
    assert 35 <= top <= 50
    assert bottom <= 125
    line = [pixel for pixel, before in zip(pixels(lined), pixels(plain), strict=True) if pixel != before]
    assert max(blue - red for red, _, blue in line) > 40, "in the agent's colour"


def test_an_agent_outside_stands_hollow_at_the_rim():
    image = draw(scene((-5.0, 0.0), (0.6, 0.0)), SIZE)
    inside, edge = at(image, -1.05, 0.05), at(image, -1.005, 0.0)
    assert near(inside, (255, 255, 255))
    assert not near(edge, (250, 250, 252))


def test_students_wear_a_ring():
    for student in (0, 1):
        flags = torch.tensor([student == 0, student == 1])
        image = draw(scene(), SIZE, overlay=Overlay(flags))
        rings = [near(at(image, place, 0.133), AMBER, 60) for place in (-0.6, 0.6)]
        assert rings == flags.tolist()


def test_attention_is_drawn_for_students_only_and_the_stronger_the_darker():
    strengths = []
    for weight in (0.0, 0.3, 1.0):
        attention = torch.tensor([[0.0, weight], [weight, 0.0]])
        strengths.append(amber_between(draw(scene(), SIZE, overlay=Overlay(torch.tensor([True, False]), attention))))
    nobody = draw(scene(), SIZE, overlay=Overlay(torch.tensor([False, False]), attention))
    assert amber_between(nobody) == strengths[0] < 20
    assert strengths[0] + 20 < strengths[1] < strengths[2] - 50


@pytest.mark.parametrize("student", [0, 1])
def test_the_arrow_points_at_the_student(student):
    flags = torch.tensor([student == 0, student == 1])
    ring = draw(scene(), SIZE, overlay=Overlay(flags))
    arrow = draw(scene(), SIZE, overlay=Overlay(flags, torch.tensor([[0.0, 1.0], [1.0, 0.0]])))
    difference = ImageChops.difference(ring, arrow).convert("L")
    # Beside the left disc and beside the right one: the head is wider than the tail.
    inks = [sum(value > 60 for value in pixels(difference.crop((x, 90, x + 24, 150)))) for x in (73, 143)]
    assert inks[student] > inks[1 - student], inks


def test_a_title_and_a_legend_add_bars():
    plain, titled = draw(scene(), SIZE), draw(scene(), SIZE, title="step 12")
    legend = draw(scene(), SIZE, title="step 12", overlay=Overlay(torch.tensor([True, False])))
    assert plain.height < titled.height < legend.height
    assert titled.width == legend.width == SIZE
    top = titled.height - SIZE
    assert count(titled.crop((0, 0, SIZE, top)), (31, 41, 55), 60) > 10
    assert near(at(titled, -0.53, 0.0, top=top), SAFE_BLUE)


def test_a_long_title_is_made_to_fit():
    image = draw(scene(), SIZE, title="a title that is much too long for a picture of so few pixels in width")
    top = image.height - SIZE
    assert count(image.crop((SIZE - 3, 0, SIZE, top - 1)), (255, 255, 255), 5) == 3 * (top - 1)


def test_long_labels_stand_above_the_disc():
    short = scene()
    image = draw(short._replace(labels=["0: AB", "1", ""]), SIZE)
    assert count(image.crop((56, 116, 64, 124)), SAFE_BLUE) == 64
    assert count(image.crop((40, 85, 80, 108)), (31, 41, 55), 60) > 5


def test_colours_of_ones_own_are_kept():
    own = (240, 228, 66)
    image = draw(scene()._replace(colours=[own, BLUE, GREY]), SIZE)
    assert near(at(image, -0.53, 0.0), own, 5)


def test_fit_holds_all_discs_up_to_a_limit():
    assert fit([scene()]) == pytest.approx(1.1)
    assert fit([scene(), scene((0.0, -1.5), (0.0, 0.0))]) == pytest.approx(1.6)
    assert fit([scene((9.0, 0.0), (0.0, 0.0))]) == 2.0


def test_a_world_of_ours_can_be_drawn():
    environment = make_environment("reference", num_worlds=2)
    environment.reset(seed=0)
    image = draw(environment.scene(1), SIZE, title="reference")
    assert len(image.getcolors(100000)) > 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(size=50), "a picture needs at least 100 pixels, got 50"),
        (dict(extent=0), "extent must be from 0.01 to 100, got 0"),
        (dict(extent=float("inf")), "extent must be from 0.01 to 100, got inf"),
        (dict(overlay=Overlay(torch.tensor([True]))), "an overlay of 2 agents needs"),
        (dict(overlay=Overlay(torch.tensor([True, False]), torch.zeros(3, 3))), "an overlay of 2 agents needs"),
    ],
)
def test_what_cannot_be_drawn_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        draw(scene(), **settings)


def test_a_world_that_left_the_numbers_is_refused():
    with pytest.raises(UserError, match=r"disc 1 is at \[nan, 0.0\]"):
        draw(scene((0.0, 0.0), (float("nan"), 0.0)), SIZE)


def frames(number=3):
    return [draw(scene((-0.6 + 0.2 * i, 0.0), (0.6, 0.0)), SIZE, title=f"step {i}") for i in range(number)]


def test_a_film_has_all_frames_its_speed_and_repeats(tmp_path):
    path = tmp_path / "pictures" / "team.gif"
    save_gif(frames(), path, fps=5)
    with Image.open(path) as film:
        assert (film.n_frames, film.size, film.info["loop"]) == (3, frames()[0].size, 0)
        durations = []
        for index in range(3):
            film.seek(index)
            durations.append(film.info["duration"])
            top = film.height - SIZE
            assert near(at(film.convert("RGB"), -0.53 + 0.2 * index, 0.0, top=top), SAFE_BLUE)
    assert durations == [200, 200, 1000]
    assert [entry.name for entry in path.parent.iterdir()] == ["team.gif"]


def test_a_strip_lies_side_by_side_or_in_rows(tmp_path):
    pictures = frames()
    width, height = pictures[0].size
    save_png(pictures, tmp_path / "strip.png")
    save_png(pictures, tmp_path / "rows.png", columns=2)
    with Image.open(tmp_path / "strip.png") as strip, Image.open(tmp_path / "rows.png") as rows:
        assert strip.size == (3 * width + 24, height)
        assert rows.size == (2 * width + 12, 2 * height + 12)
        last = strip.crop((2 * (width + 12), 0, strip.width, height))
        assert ImageChops.difference(last, pictures[2]).getbbox() is None
        below = rows.crop((0, height + 12, width, rows.height))
        assert ImageChops.difference(below, pictures[2]).getbbox() is None


@pytest.mark.parametrize("save", [save_gif, save_png])
def test_frames_must_be_there_and_of_one_size(save, tmp_path):
    with pytest.raises(UserError, match="no frames"):
        save([], tmp_path / "a")
    with pytest.raises(UserError, match="frames must be of one size"):
        save([draw(scene(), SIZE), draw(scene(), SIZE, title="a")], tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_settings_of_files_are_checked(tmp_path):
    for fps in (0, 60):
        with pytest.raises(UserError, match=f"fps must be from 0.01 to 50, got {fps}"):
            save_gif(frames(1), tmp_path / "a.gif", fps=fps)
    with pytest.raises(UserError, match="columns must be at least 1, got 0"):
        save_png(frames(1), tmp_path / "a.png", columns=0)


@pytest.mark.parametrize("save", [save_gif, save_png])
def test_a_write_that_fails_leaves_the_old_picture(save, tmp_path, monkeypatch):
    path = tmp_path / "team"
    path.write_bytes(b"old")

    def refuse(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr("fulmen.run.files.os.replace", refuse)
    with pytest.raises(UserError, match="cannot write"):
        save(frames(1), path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["team"]
