"""From a recipe to the objects that it describes."""

import functools
import importlib
import importlib.util
import os.path
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import torch

from fulmen.config import UserError
from fulmen.marl.learner import TeamLearner
from fulmen.marl.recipe import MarlRecipe
from fulmen.marl.spec import Environment
from fulmen.marl.team import Team
from fulmen.marl.transfer import make_transfer
from fulmen.marl.transfer.base import Transfer
from fulmen.marl.worlds import ParticleEnvironment, make_task
from fulmen.marl.worlds.errors import describe_error
from fulmen.marl.worlds.pettingzoo import PettingZooEnvironment
from fulmen.marl.worlds.vmas import VmasEnvironment


def build_world(recipe: MarlRecipe, num_worlds: int | None = None) -> Environment:
    """The recipe's environment, of another number of worlds if one is given.

    A name with a colon is somebody else's: `vmas:balance` is a scenario of VMAS; `mpe2.simple_spread_v3:parallel_env`
    and `mine.py:make` are functions that make a PettingZoo parallel environment of the options, less `max_steps`.
    Raises UserError for a name or an option that is not known, and for an environment that breaks PettingZoo's rules.
    """
    world = recipe.world
    ours = {"num_worlds": num_worlds or world.num_worlds, "device": choose_device(recipe.run.device)}
    if ":" not in world.name:
        return ParticleEnvironment(make_task(world.name, world.options), **ours)
    place, _, name = world.name.rpartition(":")
    try:
        if place == "vmas":
            return _make_vmas(name, world.options, ours)
        return _make_pettingzoo(_find_function(place, name), world.options, ours)
    except UserError as error:
        raise UserError(f"world {world.name}: {error}{_line(error.__cause__, place)}") from error


def close_world(world: Environment, report: Callable[[str], None]) -> None:
    """Let a world free what it holds, if it can; as nothing depends on it any more, `report` is told if that fails."""
    try:
        if hasattr(world, "close"):
            world.close()
    except UserError as error:
        report(f"warning: {error}")


def build_agents(recipe: MarlRecipe, world: Environment) -> tuple[TeamLearner, Transfer]:
    """The learner and the transfer of a team in that world, drawn by torch's global generator."""
    learner = TeamLearner(world.spec, recipe.learner, device=world.device)
    return learner, make_transfer(recipe.transfer.name, learner, **recipe.transfer.options)


def build_team(recipe: MarlRecipe, report: Callable[[str], None] = warnings.warn) -> Team:
    """A team at its beginning, all of it drawn from the recipe's seed. `report` is told what a user should know.

    Raises:
        UserError: what the recipe names does not exist, or does not fit together.
    """
    torch.manual_seed(recipe.run.seed)
    with ExitStack() as unless_built:
        world = build_world(recipe)
        unless_built.callback(close_world, world, report)
        count, newcomers = world.spec.num_agents, recipe.run.newcomers
        if unknown := [agent for agent in newcomers if agent >= count]:
            raise UserError(f"newcomer {unknown[0]} does not exist: the team's agents are 0 to {count - 1}")
        team = Team(world, *build_agents(recipe, world), recipe.team, seed=recipe.run.seed, report=report)
        if recipe.run.freeze:
            team.learner.freeze(set(range(count)) - set(newcomers))
        unless_built.pop_all()
    return team


def choose_device(name: str) -> torch.device:
    """The device of that name. UserError if it cannot be used here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def _make_vmas(scenario: str, options: Mapping[str, Any], ours: Mapping[str, Any]) -> VmasEnvironment:
    """Worlds of a scenario; `ours` is num_worlds and device."""
    if taken := sorted({"scenario", *ours} & options.keys()):
        raise UserError(f"{taken[0]} is no option: set it by world.name, world.num_worlds or run.device")
    return VmasEnvironment(scenario, **ours, **options)


def _make_pettingzoo(
    function: Callable[..., Any], options: Mapping[str, Any], ours: Mapping[str, Any]
) -> PettingZooEnvironment:
    """Worlds that the function makes of the options, less max_steps; `ours` is num_worlds and device."""
    options = dict(options)
    max_steps = options.pop("max_steps", None)
    return PettingZooEnvironment(functools.partial(function, **options), max_steps=max_steps, **ours)


def _find_function(place: str, name: str) -> Callable[..., Any]:
    """A function of a module, `package.module`, or of a file, `folder/file.py`."""
    parts = [name] if place.endswith(".py") else [*place.split("."), name]
    if not all(map(str.isidentifier, parts)):
        raise UserError("a name with a colon is module:function, file.py:function or vmas:scenario")
    try:
        module = _run_file(place) if place.endswith(".py") else importlib.import_module(place)
        function = getattr(module, name, None)
    except Exception as error:
        raise UserError(f"{place} cannot be imported: {describe_error(error)}") from error
    if not callable(function):
        raise UserError(f"{place} has no function {name}")
    return function


def _run_file(path: str) -> ModuleType:
    """The module of a file. Its name is its path, which is no other module's; dataclasses look for theirs by name."""
    spec = importlib.util.spec_from_file_location(path, path)
    module = sys.modules[path] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path]
        raise
    return module


def _line(error: BaseException | None, path: str) -> str:
    """Where in the file `path` an error came about, to be put behind its message; empty if it did not."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(path)]
    return f" ({os.path.basename(path)}, line {lines[-1]})" if lines else ""
