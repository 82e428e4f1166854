"""Every guard of a recipe, and every shipped recipe."""

from pathlib import Path

import pytest

from fulmen.config import UserError, dump_recipe, load_recipe
from fulmen.marl.build import build_agents, build_world
from fulmen.marl.recipe import MarlRecipe, RunSection, WorldSection

SHIPPED = sorted((Path(__file__).parents[2] / "recipes" / "marl").glob("*.toml"))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (WorldSection, {"num_worlds": 0}, "num_worlds must be at least 1, got 0"),
        *((RunSection, {key: 0}, f"{key} must be at least 1, got 0") for key in ("frames", "threads", "report_every")),
        *((RunSection, {key: 0}, f"{key} must be at least 1, got 0") for key in ("evaluate_every", "episodes")),
        (RunSection, {"keep_snapshots": 0}, "keep_snapshots must be at least 1, got 0"),
        (RunSection, {"snapshot_every": -1}, "snapshot_every must be at least 0, got -1"),
        (RunSection, {"seed": -1}, "seed must be at least 0 and below 2**63, got -1"),
        (RunSection, {"seed": 2**63}, "seed must be at least 0 and below 2**63"),
        (RunSection, {"newcomers": (1,)}, "newcomers and freeze need from_run"),
        (RunSection, {"freeze": True}, "newcomers and freeze need from_run"),
        (RunSection, {"from_run": "a", "newcomers": (1, 1)}, "newcomers must be different agents"),
        (RunSection, {"from_run": "a", "newcomers": (-1,)}, "counted from 0, got [-1]"),
        (RunSection, {"from_run": "a", "freeze": True}, "freeze leaves nobody to learn"),
    ],
)
def test_guards(section, values, message):
    with pytest.raises(ValueError) as caught:
        section(**values)
    assert message in str(caught.value)


def test_a_mistake_names_its_section(tmp_path):
    (tmp_path / "r.toml").write_text("[learner]\nhidden = [0]\n")
    with pytest.raises(UserError, match=r"r\.toml: learner: hidden must be one or more widths"):
        load_recipe(tmp_path / "r.toml", MarlRecipe)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipe_loads_comes_back_and_can_be_built(path, tmp_path):
    recipe = load_recipe(path, MarlRecipe)
    (tmp_path / "again.toml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.toml", MarlRecipe) == recipe
    world = build_world(recipe, num_worlds=1)
    learner, transfer = build_agents(recipe, world)
    assert learner.num_agents == world.spec.num_agents == recipe.world.options["agents"]
    # What the recipe on memory compares is memories.
    assert type(transfer).__name__ == ("Transfer" if path.stem == "memory" else "PAT")


def test_shipped_recipes_are_found():
    newcomers = {"newcomer", "newcomer-two-tasks"}
    assert {path.stem for path in SHIPPED} == {"sparse", "dense", "spread", "two-tasks", "memory"} | newcomers
