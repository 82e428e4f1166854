"""What a run trains for. One `Trainer` and one `train` serve every objective; none of them knows what a batch is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from fulmen.parallel import World


class Headline(NamedTuple):
    """The one held-out metric that the progress shows and that `RunResult.held_out` collects."""

    metric: str
    text: str  # a format of its value: "held-out {:.3f} bits per byte"


class Objective(Protocol):
    """A model with its data and its loss: everything of a run that depends on what it trains for.

    model: what the optimizer updates (the parameters that require a gradient) and what snapshots hold.
    dtype: of the model's products. unit: what `size` counts, in the singular: it names the metrics `batch_tokens`,
    `tokens`, `tokens_per_second`.
    """

    model: nn.Module
    dtype: torch.dtype
    unit: str
    headline: Headline

    def next_batches(self, seen: int) -> list[Any]:
        """The micro batches of the next step; `seen`: how many units the steps before it have trained on."""

    def size(self, batches: list[Any]) -> int:
        """How many units these batches hold."""

    def backward(self, batches: list[Any], step: int) -> dict[str, Any]:
        """Add the gradients of the mean loss of all batches; gives metrics, of which "loss" (a float) must be one.

        step: which one it is, from 1, so that some metrics can be measured now and then.
        """

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics of the model, which is in evaluation mode, without gradients; {} if nothing is held out."""

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, as JSON holds it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`. Raises UserError if it was taken with other data."""

    def keep(self, run: Path) -> None:
        """Write what resuming needs beside snapshots (a tokenizer) into the run's folder, once, at its beginning."""

    def export(self, checkpoint: Path) -> None:
        """Write the checkpoint at the end of the run."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an objective is built. torch's generator is seeded; nothing may be written before `Objective.keep`."""

    folder: Path  # of the run
    device: torch.device
    fresh: bool  # False: the run goes on, its weights come from a snapshot and what `keep` wrote is there
    report: Callable[[str], None]  # told, a line at a time, what is prepared
    world: World = field(default_factory=World)  # the ranks that train together


Builder = Callable[[Any, Place], Objective]
"""From a task's recipe and the place to the objective, ready for step 0. Raises UserError for what a user can mend."""


class Task(NamedTuple):
    """One value of a recipe's `task`: the dataclass of its recipe, and what builds its objective."""

    recipe: type
    build: Builder
