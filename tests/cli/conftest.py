"""A small recipe with its text, and a run of it that has ended."""

import contextlib
import io

import pytest
from tests.cli.commands import RECIPE, TEXT

from fulmen.cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a small recipe and its text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run that has ended; tests only read it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text(TEXT)
    (folder / "recipe.toml").write_text(RECIPE.replace("text.txt", str(folder / "text.txt")))
    with pytest.raises(SystemExit) as end, contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
        main(["train", str(folder / "recipe.toml"), "--dir", str(folder / "run")])
    assert not end.value.code
    return folder / "run"


@pytest.fixture
def stdin(monkeypatch):
    """stdin(b"...") is what the command then reads."""
    return lambda content: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
