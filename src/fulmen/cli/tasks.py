"""The tasks that `fulmen train` knows; a recipe's `task` names one."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulmen.config import UserError, load_recipe, recipe_key

if TYPE_CHECKING:
    from fulmen.train.objective import Builder

# Imported when asked for: each brings its own models, and the command line must start at once.
MODULES = {"language": "fulmen.train.language", "coca": "fulmen.train.coca", "preference": "fulmen.align.preference"}


def load_task(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Any, "Builder"]:
    """A recipe of any task, and what builds its objective. Raises UserError as `load_recipe` does."""
    name = recipe_key(path, "task", overrides, default="language")
    if name not in MODULES:
        raise UserError(f"{path}: task = {name!r} is not known: the tasks are {', '.join(MODULES)}")
    task = importlib.import_module(MODULES[name]).TASK
    return load_recipe(path, task.recipe, overrides), task.build
