"""Worlds by their names: whatever a recipe says about them, a world or one line that tells what is wrong."""

import json
import sys

import pytest

from fulmen.config import UserError
from fulmen.marl import MarlRecipe, PettingZooEnvironment
from fulmen.marl.build import build_team, build_world, close_world
from fulmen.marl.recipe import RunSection, WorldSection

pytest.importorskip("gymnasium")

MINE = """from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
import numpy as np
from gymnasium.spaces import Box
from pettingzoo import ParallelEnv

@dataclass
class Place:
    at: float = 0.0
    origin: ClassVar[float] = 0.0

class Alone(ParallelEnv):
    possible_agents = ["one"]
    closed = []

    def observation_space(self, agent):
        return Box(-9, 9, (1,), np.float32)

    def action_space(self, agent):
        return Box(-1, 1, (1,), np.float32)

    def reset(self, seed=None, options=None):
        self.agents = ["one"]
        return {"one": np.zeros(1, np.float32)}, {"one": {}}

    def close(self):
        self.closed.append(self)

def make(place=0.0):
    Place(at=place)
    return Alone()

def divide():
    return 1 / 0

class Spaceless(Alone):
    def action_space(self, agent):
        return self.nothing
"""
BROKEN = {
    "syntax": "x = 1\ny = (\n",
    "name": "x = 1\ny = x + z\n",
    "import": "import numpyy\n",
    "deep": "import json\n\njson.loads('')\n",
    "lines": "raise ValueError('one\\ntwo')\n",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    for name, text in BROKEN.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def world(name, options):
    return MarlRecipe(world=WorldSection(name=name, num_worlds=2, options=options))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *[
            ("navigation", {option: value}, f"navigation: unknown option {option}")
            for option, value in dict(num_worlds=3, device="cpu", name="x", dtype="x", check=False).items()
        ],
        *[
            ("vmas:balance", {option: 3}, f"world vmas:balance: {option} is no option: set it by world.name, world.num")
            for option in ("num_worlds", "device", "scenario")
        ],
        *[
            (name, {}, f"world {name}: a name with a colon is module:function, file.py:function or vmas:scenario")
            for name in (":make", ".x:make", "a..b:make", "a b:make", "mine.py:", "mine.py:3", "vmas:a:b", ":", "::")
        ],
        ("nowhere:make", {}, "world nowhere:make: nowhere cannot be imported: ModuleNotFoundError: No module named"),
        ("no.py:make", {}, "world no.py:make: no.py cannot be imported: FileNotFoundError"),
        ("mine.py:other", {}, "world mine.py:other: mine.py has no function other"),
        ("mine.py:np", {}, "world mine.py:np: mine.py has no function np"),
        ("syntax.py:make", {}, "SyntaxError: '(' was never closed (syntax.py, line 2)"),
        ("name.py:make", {}, "name.py cannot be imported: NameError: name 'z' is not defined (name.py, line 2)"),
        ("import.py:make", {}, "ModuleNotFoundError: No module named 'numpyy' (import.py, line 1)"),
        ("deep.py:make", {}, "Expecting value: line 1 column 1 (char 0) (deep.py, line 3)"),
        ("lines.py:make", {}, "ValueError: one two (lines.py, line 1)"),
        ("mine.py:divide", {}, "making the environment of world 0 raised ZeroDivisionError: division by zero (mine.py"),
        ("mine.py:Spaceless", {}, "'Spaceless' object has no attribute 'nothing' (mine.py, line 39)"),
        ("mine.py:make", {"far": 1}, "making the environment of world 0 raised TypeError: make() got an unexpected"),
        *[
            ("mine.py:make", {"max_steps": value}, f"max_steps must be an integer of at least 1, got {value!r}")
            for value in ("x", 2.5, True, 0, [5])
        ],
    ],
)
def test_what_names_no_world_is_told_in_one_line(name, options, message):
    with pytest.raises(UserError) as caught:
        build_world(world(name, options))
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_is_a_module_of_its_own(folder):
    """Its dataclasses find it among the modules, and it takes nobody's place there."""
    (folder / "json.py").write_text(MINE)
    for name in ("mine.py", "json.py", f"{folder}/mine.py"):
        built = build_world(world(f"{name}:make", {"place": 1.0, "max_steps": 3}))
        assert type(built) is PettingZooEnvironment
        assert (built.num_worlds, built.spec.max_steps) == (2, 3)
    assert sys.modules["json"] is json
    with pytest.raises(UserError):
        build_world(world("name.py:make", {}))
    assert "mine.py" in sys.modules
    assert "name.py" not in sys.modules


def test_a_world_is_closed_if_no_team_can_live_in_it():
    recipe = MarlRecipe(
        world=WorldSection(name="mine.py:make", num_worlds=2),
        run=RunSection(from_run="other", newcomers=(1,)),
    )
    with pytest.raises(UserError, match="newcomer 1 does not exist"):
        build_team(recipe)
    assert len(sys.modules["mine.py"].Alone.closed) == 2


def test_a_world_that_cannot_be_closed_is_only_told_of():
    told = []

    class Stuck:
        def close(self):
            raise UserError("stuck")

    close_world(Stuck(), told.append)
    close_world(object(), told.append)
    assert told == ["warning: stuck"]
