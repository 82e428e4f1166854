"""Worlds that a team acts in: particle worlds of our own, and adapters to those of others."""

import difflib
from collections.abc import Mapping
from typing import Any

import torch

from fulmen.config import UserError
from fulmen.marl.worlds.particles import ParticleEnvironment, Scene
from fulmen.marl.worlds.tasks import TASKS, Task

__all__ = ["TASKS", "ParticleEnvironment", "Scene", "make_environment", "make_task"]


def make_environment(
    name: str,
    *,
    num_worlds: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    check: bool = True,
    **options: Any,
) -> ParticleEnvironment:
    """Make `num_worlds` worlds of the task that `make_task` makes of the name and the options; UserError as there."""
    return ParticleEnvironment(make_task(name, options), num_worlds=num_worlds, device=device, dtype=dtype, check=check)


def make_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task `name` (a key of `TASKS`), whose fields are the `options`.

    Raises UserError for an unknown task or option, with the nearest that exists, and for a value that is not allowed.
    """
    if name not in TASKS:
        raise UserError(f"there is no world {name!r}{_hint(name, TASKS)}; there are {', '.join(TASKS)}")
    known = TASKS[name].options()
    for option in options:
        if option not in known:
            raise UserError(f"{name}: unknown option {option}{_hint(option, known)}; it knows {', '.join(known)}")
    return TASKS[name](**options)


def _hint(name: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]}?" if close else ""
