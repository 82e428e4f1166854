"""The sections of a recipe of the task "coca"; those that it shares with other tasks are in `recipe.py`."""

import dataclasses
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from fulmen.model import VisionConfig
from fulmen.model.coca import CoCaConfig
from fulmen.train.recipe import LoopSection, OptimizerSection, ScheduleSection, at_least


def _changes(name: str, config: type, but: str) -> type:
    """A section with any field of `config` but one, None where it stays as it is."""
    fields = [(f.name, f.type | None, None) for f in dataclasses.fields(config) if f.name != but]
    return dataclasses.make_dataclass(name, fields, frozen=True, kw_only=True)


VisionSection = _changes("VisionSection", VisionConfig, but="image_size")
_CoCaChanges = _changes("_CoCaChanges", CoCaConfig, but="vision")


@dataclass(frozen=True, kw_only=True)
class CoCaModelSection(_CoCaChanges):
    """What is trained: a named size drawn at random, with some fields changed, or a checkpoint to go on from."""

    preset: str | None = None
    init_from: str | None = None
    vision: VisionSection = field(default_factory=VisionSection)  # changes of the encoder
    image_sizes: tuple[tuple[int, int], ...] = ()  # (step, side of the pictures from there on); (): the model's own

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.image_sizes]
        if steps and (steps[0] != 0 or any(a >= b for a, b in pairwise(steps))):
            raise ValueError(f"image_sizes must begin at step 0 and rise, got {[list(p) for p in self.image_sizes]}")

    def changes(self) -> dict[str, int | float]:
        """The fields of `CoCaConfig` that are given, but for the encoder's."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(_CoCaChanges)}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class CaptionDataSection:
    """Where the captioned pictures come from; see `fulmen.data.captions`."""

    sources: tuple[str, ...] = ("emoji", "digits", "words", "charts")
    held_out: float = 0.05  # share of each source that is not trained on
    held_out_pictures: int = 512  # how many of them an evaluation looks at
    tokenizer: str | None = None  # a folder with tokenizer.json; None trains one on the captions

    def __post_init__(self) -> None:
        at_least(self, 2, "held_out_pictures")


@dataclass(frozen=True, kw_only=True)
class CaptionScheduleSection(ScheduleSection):
    """How large the batches are besides. A batch is computed at once: each pair is told from all others of it."""

    batch_pictures: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 2, "batch_pictures")


@dataclass(frozen=True, kw_only=True)
class CoCaTrainSection(LoopSection):
    """The loop over two losses, with the published weights."""

    contrastive: float = 1.0
    caption: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "contrastive", "caption")
        if not self.contrastive + self.caption > 0:
            raise ValueError("contrastive and caption are both 0: nothing would be trained")


@dataclass(frozen=True, kw_only=True)
class CoCaRecipe:
    """A whole recipe of the task "coca": an image encoder learns from captioned pictures."""

    task: Literal["coca"] = "coca"
    model: CoCaModelSection = field(default_factory=CoCaModelSection)
    data: CaptionDataSection = field(default_factory=CaptionDataSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: CaptionScheduleSection
    train: CoCaTrainSection = field(default_factory=CoCaTrainSection)
