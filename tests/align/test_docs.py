"""docs/align.md says what the code does."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from fulmen.align import PreferenceRecipe, dpo_loss
from fulmen.config import load_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "align.md").read_text()
SECTIONS = {field.name: field.type for field in dataclasses.fields(PreferenceRecipe)}


def table(heading):
    """The rows of the table below a heading, as lists of cells without their quotes."""
    below = PAGE.split(f"\n{heading}\n", 1)[1].split("\n#", 1)[0]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in below.splitlines() if line[:1] == "|"]
    return rows[2:]


@pytest.mark.parametrize("name", ["data", "preference", "schedule"])
def test_keys_and_defaults(name):
    fields = dataclasses.fields(SECTIONS[name])
    documented = {key: default for key, default, _ in table(f"### `[{name}]`")}
    assert list(documented) == [field.name for field in fields]
    for field in fields:
        if field.default in (dataclasses.MISSING, None):
            assert documented[field.name] == ("none" if field.default is None else "required")
        else:
            assert json.loads(documented[field.name]) == field.default


def test_metrics():
    found = dpo_loss(*torch.randn(4, 3), 0.1).metrics()
    assert [key for key, _ in table("## The metrics")] == ["loss", *found]


def test_the_recipe_loads(tmp_path):
    (recipe,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "prefer.toml").write_text(recipe)
    assert load_recipe(tmp_path / "prefer.toml", PreferenceRecipe).schedule.batch_pairs == 16
