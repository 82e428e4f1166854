"""From a recipe to the objects that it describes."""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fulmen.config import UserError
from fulmen.marl.learner import TeamLearner
from fulmen.marl.recipe import MarlRecipe
from fulmen.marl.spec import Environment
from fulmen.marl.team import Team
from fulmen.marl.transfer import make_transfer
from fulmen.marl.transfer.base import Transfer
from fulmen.marl.worlds import make_environment
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
    if world.name.startswith("vmas:"):
        return VmasEnvironment(world.name.removeprefix("vmas:"), **ours, **world.options)
    if ":" in world.name:
        options = dict(world.options)
        ours["max_steps"] = options.pop("max_steps", None)
        return PettingZooEnvironment(functools.partial(_find_function(world.name), **options), **ours)
    return make_environment(world.name, **ours, **world.options)


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
    world = build_world(recipe)
    count, newcomers = world.spec.num_agents, recipe.run.newcomers
    if unknown := [agent for agent in newcomers if agent >= count]:
        raise UserError(f"newcomer {unknown[0]} does not exist: the team's agents are 0 to {count - 1}")
    team = Team(world, *build_agents(recipe, world), recipe.team, seed=recipe.run.seed, report=report)
    if recipe.run.freeze:
        team.learner.freeze(set(range(count)) - set(newcomers))
    return team


def choose_device(name: str) -> torch.device:
    """The device of that name. UserError if it cannot be used here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def _find_function(name: str) -> Callable[..., Any]:
    """The function that `module:name` or `file.py:name` means."""
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except (ImportError, OSError) as error:
        raise UserError(f"world {name}: {place} cannot be imported: {error}") from None
    if not callable(getattr(module, attribute, None)):
        raise UserError(f"world {name}: {place} has no function {attribute}")
    return getattr(module, attribute)
