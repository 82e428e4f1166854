"""Pictures of a run, from its folder alone."""

import json

import pytest
from PIL import Image

from fulmen.config import UserError, load_recipe
from fulmen.marl.build import build_team
from fulmen.marl.checkpoint import save_checkpoint
from fulmen.marl.recipe import MarlRecipe
from fulmen.marl.render import draw_curves, render_episode
from fulmen.run import RunDirectory


@pytest.fixture
def run(tmp_path):
    (tmp_path / "recipe.toml").write_text(
        "[world]\nname = 'navigation'\nnum_worlds = 2\noptions = { agents = 3, max_steps = 4 }\n"
        "[learner]\nhidden = [8]\n"
    )
    recipe = load_recipe(tmp_path / "recipe.toml", MarlRecipe)
    save_checkpoint(build_team(recipe), recipe, tmp_path / "run" / "checkpoint")
    return tmp_path / "run"


def test_an_episode_is_a_film_of_its_steps(run):
    path = render_episode(run)
    assert path == run / "plots" / "episode.gif"
    with Image.open(path) as film:
        assert film.n_frames == 4


def test_the_same_seed_gives_the_same_film_and_another_another(run, tmp_path):
    films = [render_episode(run, seed=seed, out=tmp_path / f"{i}.gif").read_bytes() for i, seed in enumerate((1, 1, 2))]
    assert films[0] == films[1] != films[2]


def test_a_team_trained_on_a_gpu_is_drawn_without_one(run):
    recipe = run / "checkpoint" / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('device = "cpu"', 'device = "cuda:99"'))
    assert "cuda:99" in recipe.read_text()
    assert render_episode(run).exists()


def test_own_policies_attend_to_nobody(run, tmp_path):
    """The film of own policies has no legend of arrows, and is therefore lower."""
    sizes = []
    for own in (False, True):
        with Image.open(render_episode(run, own=own, out=tmp_path / "film.gif")) as film:
            sizes.append(film.size)
    assert sizes[0][1] > sizes[1][1]


def test_refusals(run, tmp_path):
    with pytest.raises(UserError, match=r"an episode is drawn as a GIF: film\.mp4 must end in \.gif"):
        render_episode(run, out="film.mp4")
    for seed in (-1, 2**63):
        with pytest.raises(UserError, match=f"seed must be at least 0 and below .*, got {seed}"):
            render_episode(run, seed=seed)
    with pytest.raises(UserError, match="there is no trained team in"):
        render_episode(tmp_path / "nowhere")


@pytest.fixture
def measured(tmp_path):
    """measured(line, ...) gives the directory of a run with these metrics."""

    def write(*lines):
        directory = RunDirectory(tmp_path / "measured")
        directory.path.mkdir()
        directory.metrics.write_text("".join(json.dumps({"step": line["frames"]} | line) + "\n" for line in lines))
        return directory

    return write


def evaluation(frames):
    return {"frames": frames, "own_return": 1.0, "pat_return": 2.0}


def test_curves_of_a_run_with_teachers(measured, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "fulmen.marl.render.plot_attention", lambda path, weights, **rest: drawn.update(weights=weights)
    )
    reports = [
        {"frames": 10 * i, "returns": [1.0, 2.0], "student_share": [0.0, 0.5], "attention": [[0, i], [i, 0]]}
        for i in range(1, 11)
    ]
    directory = measured(evaluation(0), *reports, evaluation(100))
    names = ["returns.png", "student-share.png", "attention.png", "attention-course.png"]
    assert [path.name for path in draw_curves(directory, ("a", "b"))] == names
    # The mean of the last fifth of the run: reports 9 and 10.
    assert drawn["weights"].tolist() == [[0, 9.5], [9.5, 0]]
    assert all((directory.plots / name).exists() for name in names if name != "attention.png")


def test_curves_of_a_run_without_teachers(measured):
    reports = [{"frames": 10, "returns": [1.0, 2.0], "student_share": [0.0, 0.0]}]
    directory = measured(evaluation(0), *reports)
    assert [path.name for path in draw_curves(directory, ("a", "b"))] == ["returns.png"]
