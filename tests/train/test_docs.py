"""docs/train.md says what the code does: every key with its default, every metric, the example."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from fulmen.config import load_recipe
from fulmen.train import TrainRecipe
from fulmen.train.recipe import ModelSection, fixed_keys

PAGE = (Path(__file__).parents[2] / "docs" / "train.md").read_text()
SECTIONS = {field.name: field.type for field in dataclasses.fields(TrainRecipe) if field.name != "task"}


def table(heading):
    """The rows of the table below a heading, as lists of cells."""
    below = PAGE.split(f"\n{heading}\n", 1)[1].split("\n#", 1)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in below.splitlines() if line.startswith("|")
    ]
    return rows[2:]


@pytest.mark.parametrize("name", SECTIONS)
def test_keys_and_defaults(name):
    documented = {key.strip("`"): default.strip("`") for key, default, _ in table(f"### `[{name}]`")}
    fields = {field.name: field for field in dataclasses.fields(SECTIONS[name])}
    if SECTIONS[name] is ModelSection:
        fields = {key: fields[key] for key in ("preset", "init_from")}
    assert list(documented) == list(fields)
    for key, field in fields.items():
        if field.default is dataclasses.MISSING:
            assert documented[key] == "required"
        elif field.default is None:
            assert documented[key] == "none"
        else:
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            assert json.loads(documented[key]) == default, key


def test_metrics(trainer):
    make = trainer("train.routing_every=2")
    plain, step = set(make.train_step()), set(make.train_step())
    batches = [make.objective.loader.next_batch()]
    make.objective.held_out = {"held_out": batches, "held_out_text": batches}
    evaluation = set(make.evaluate())
    documented = {key.strip("`"): where for key, where, _ in table("## The metrics")}
    of_ranks = {key for key, where in documented.items() if "several ranks" in where}
    assert of_ranks == {"expert_wait"}  # tests/parallel/test_runs.py
    assert set(documented) - of_ranks == {"step", "tokens_per_second"} | step | evaluation
    assert {key for key, where in documented.items() if where == "steps"} == plain | {"tokens_per_second"}
    assert {key for key, where in documented.items() if where.startswith("evaluations")} == evaluation


def test_fixed_keys():
    said = PAGE.split("What decides which numbers come out is fixed", 1)[1].split(";", 1)[0]
    assert set(re.findall(r"`(\w+)`", said)) == set(fixed_keys(TrainRecipe)["train"])
    assert set(re.findall(r"`\[(\w+)\]`", said)) == set(fixed_keys(TrainRecipe))


def test_recipes_on_the_page_load(tmp_path):
    small, *seeing, report = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    for number, text in enumerate(seeing):
        (tmp_path / f"{number}.toml").write_text(text)
        assert load_recipe(tmp_path / f"{number}.toml", TrainRecipe).data.train_on == "answers"
    assert len(seeing) == 2
    (tmp_path / "small.toml").write_text(small)
    assert load_recipe(tmp_path / "small.toml", TrainRecipe).schedule.steps == 1000
    (tmp_path / "report.toml").write_text(report)
    assert [tokens for _, tokens in load_recipe(tmp_path / "report.toml", TrainRecipe).schedule.ramp] == [
        2**25,
        2**26,
        2**27,
    ]


def test_example(folder, monkeypatch, capsys):
    example = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    monkeypatch.setattr("fulmen.config.find_recipe", lambda name: folder / "recipe.toml")
    settings = '"schedule.steps=3", "schedule.warmup=1", "schedule.decay=1"'
    exec(example.replace('"schedule.steps=2000"', settings), {})
    assert capsys.readouterr().out.splitlines()[-1].startswith("runs/longer/checkpoint [(0, ")
