"""Which checkpoint a path means."""

import pytest

from fulmen.checkpoint import find_checkpoint
from fulmen.config import UserError


def test_a_checkpoint_is_itself(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoint").mkdir()
    assert find_checkpoint(tmp_path) == tmp_path


def test_a_run_has_one_inside(tmp_path):
    (tmp_path / "recipe.toml").write_text("")
    (tmp_path / "checkpoint").mkdir()
    assert find_checkpoint(str(tmp_path)) == tmp_path / "checkpoint"


def test_a_run_that_goes_on_has_none(tmp_path):
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(UserError, match="is a training run that has not ended: go on with --resume first"):
        find_checkpoint(tmp_path)
