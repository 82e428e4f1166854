"""The small recipe, text and trainer of `small.py` as fixtures."""

import pytest
from tests.train.small import RECIPE, make_text, make_trainer

from fulmen.config import load_recipe
from fulmen.data import Tokenizer
from fulmen.train import TrainRecipe


@pytest.fixture(scope="session")
def text():
    return make_text()


@pytest.fixture
def folder(tmp_path, monkeypatch, text):
    """The working directory, with `recipe.toml` and the text that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def recipe(folder):
    """recipe("schedule.steps=3", ...) gives the small recipe with some keys changed."""
    return lambda *overrides: load_recipe(folder / "recipe.toml", TrainRecipe, overrides)


@pytest.fixture(scope="session")
def tokenizer(text):
    return Tokenizer.train([text], 300)


@pytest.fixture
def trainer(folder, text, tokenizer):
    """trainer("optimizer.clip=2") gives a trainer of the small recipe with some keys changed."""
    return lambda *overrides: make_trainer(folder, text, tokenizer, overrides)
