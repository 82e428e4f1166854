"""The examples of docs/run.md run as they stand."""

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from fulmen import config
from fulmen.config import dump_recipe, load_recipe
from fulmen.run import RunDirectory, SnapshotStore, read_metrics, write_atomic

PAGE = Path(__file__).parents[2] / "docs" / "run.md"
LOOP, RECIPE = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


class Trainer:
    """Adds step to sum, so that any step that is lost or done twice shows in the loss."""

    def __init__(self, signal_at=None, crash_at=None):
        self.count, self.sum = 0, torch.zeros((), dtype=torch.int64)
        self.signal_at, self.crash_at = signal_at, crash_at

    def step(self):
        self.count += 1
        self.sum += self.count
        if self.count == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.count == self.crash_at:
            raise ZeroDivisionError
        return float(self.sum)

    def tensors(self):
        return {"sum": self.sum}

    def state(self):
        return {"count": self.count}

    def load(self, tensors, state):
        self.sum, self.count = tensors["sum"], state["count"]


def test_loop_resumes_after_a_signal_and_after_a_crash(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(LOOP, {"trainer": Trainer(signal_at=130), "steps": 250})
    assert SnapshotStore("runs/a/snapshots").steps() == [100, 130]
    with pytest.raises(ZeroDivisionError):
        exec(LOOP, {"trainer": Trainer(crash_at=240), "steps": 250})
    assert SnapshotStore("runs/a/snapshots").steps() == [130, 200]
    exec(LOOP, {"trainer": Trainer(), "steps": 250})
    assert SnapshotStore("runs/a/snapshots").steps() == [200, 250]
    expected = [{"step": step, "loss": step * (step + 1) / 2} for step in range(1, 251)]
    assert read_metrics("runs/a/metrics.jsonl") == expected
    assert "train  250/250 (100%)" in capsys.readouterr().out


def test_recipe(tmp_path, monkeypatch):
    (tmp_path / "quickstart.toml").write_text("steps = 3")
    monkeypatch.setattr(config, "RECIPES", tmp_path)
    names = {"__name__": "example", "dataclass": dataclass, "Literal": Literal, "run": RunDirectory(tmp_path / "run")}
    names |= {"dump_recipe": dump_recipe, "load_recipe": load_recipe, "write_atomic": write_atomic}
    exec(RECIPE, names)
    assert names["recipe"].steps == 3
    assert names["recipe"].optimizer.rate == 2e-3
    assert load_recipe(tmp_path / "run" / "recipe.toml", names["Recipe"]) == names["recipe"]
