"""docs/marl.md says what the code does: every key with its default, every metric, the examples."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest

from fulmen.config import load_recipe
from fulmen.marl import MarlRecipe, MemorySettings, load_team, train
from fulmen.marl.run import FIXED_KEYS, FIXED_SECTIONS
from fulmen.marl.transfer import TRANSFERS
from fulmen.marl.worlds import TASKS
from fulmen.run import read_metrics

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "marl.md").read_text()
SECTIONS = {field.name: field.type for field in dataclasses.fields(MarlRecipe)} | {"learner.memory": MemorySettings}
TINY = [
    *("world.num_worlds=2", "learner.hidden=[8]", "learner.batch=8", "team.warmup=8", "team.capacity=100"),
    *("run.frames=24", "run.report_every=12", "run.evaluate_every=12", "run.episodes=2", "world.options.max_steps=4"),
]


def table(heading):
    """The rows of the table below a heading, as lists of cells."""
    below = PAGE.split(f"\n{heading}\n", 1)[1].split("\n#", 1)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in below.splitlines() if line.startswith("|")
    ]
    return rows[2:]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", SECTIONS)
def test_keys_and_defaults(name):
    documented = {key.strip("`"): default.strip("`") for key, default, _ in table(f"### `[{name}]`")}
    fields = {field.name: field for field in dataclasses.fields(SECTIONS[name]) if field.name != "memory"}
    assert list(documented) == list(fields)
    for key, field in fields.items():
        if field.default is dataclasses.MISSING:
            assert json.loads(documented[key]) == field.default_factory()
        elif field.default is None:
            assert documented[key] == "none"
        else:
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            assert json.loads(documented[key]) == default, key


def test_names():
    (world,) = (meaning for key, _, meaning in table("### `[world]`") if key == "`name`")
    assert set(re.findall(r"`(\w+)`", world)) == set(TASKS)
    (transfer,) = (meaning for key, _, meaning in table("### `[transfer]`") if key == "`name`")
    assert {"pat", *re.findall(r"`(\w+)`", transfer)} == set(TRANSFERS)
    recipes = {f"marl/{path.stem}" for path in (ROOT / "recipes" / "marl").glob("*.toml")}
    assert {name.strip("`") for name, _ in table("## The shipped recipes")} == recipes


def test_fixed_keys():
    said = PAGE.split("Fixed for a run are", 1)[1].split(".", 1)[0]
    assert set(re.findall(r"`(\w+)`", said)) == set(FIXED_KEYS)
    assert set(re.findall(r"`\[(\w+)\]`", said)) == {*FIXED_SECTIONS, "run"}


def test_metrics(tmp_path):
    train(load_recipe("marl/sparse", MarlRecipe, TINY), tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    documented = {key.strip("`"): where for key, where, _ in table("## The metrics")}
    assert set(documented) == {key for line in lines for key in line}
    evaluations = {key for line in lines if "own_return" in line for key in line}
    assert {key for key, where in documented.items() if where in ("all", "evaluations")} == evaluations
    assert "attention" in {key for line in lines if "returns" in line for key in line} - evaluations


def test_somebody_elses_worlds(tmp_path):
    """The module's environment of the page, then the reader's own file."""
    tiny = [override for override in TINY if not override.startswith("world.options")]
    theirs, mine = (block for block in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL) if ":" in block)
    (tmp_path / "theirs.toml").write_text(theirs)
    train(load_recipe("theirs.toml", MarlRecipe, tiny), tmp_path / "theirs")
    assert load_team("theirs").world.spec.num_agents == 2
    (tmp_path / "mine.py").write_text(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0])
    (tmp_path / "mine.toml").write_text(mine)
    train(load_recipe("mine.toml", MarlRecipe, tiny), tmp_path / "own")
    assert load_team("own").world.spec.agents == ("left", "right")


def test_example(capsys):
    example = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    exec(example.replace('"run.frames=9600"', ", ".join(map(repr, TINY))), {})
    assert "runs/short/checkpoint" in capsys.readouterr().out
    assert Path("episode.gif").exists()


def test_the_page_of_results_is_what_the_results_say():
    spec = importlib.util.spec_from_file_location("teams", ROOT / "bench" / "teams.py")
    teams = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(teams)
    assert teams.PAGE.read_text(encoding="utf-8") == teams.page()
    assert teams.README.read_text(encoding="utf-8") == teams.readme()
    assert {path.stem for path in teams.RESULTS.glob("*.json")} <= set(teams.COMPARISONS)
