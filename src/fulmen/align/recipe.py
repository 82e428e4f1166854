"""The sections of a recipe of the task "preference"; those that it shares with others are in `fulmen.train.recipe`."""

from dataclasses import dataclass, field
from typing import Literal

from fulmen.train.recipe import (
    ExportSection,
    ModelSection,
    OptimizerSection,
    ScheduleSection,
    TrainSection,
    VisionSection,
    above_zero,
    at_least,
)


@dataclass(frozen=True, kw_only=True)
class PreferenceDataSection:
    """Where the pairs come from; see `fulmen.data.preferences`."""

    sources: tuple[str, ...]
    held_out: float = 0.05  # share of the pairs that is not trained on
    held_out_pairs: int = 128  # how many of them an evaluation looks at
    sequence_length: int = 1024  # positions of a conversation with its answer; what is longer loses its end
    tokenizer: str | None = None  # a folder with tokenizer.json; None takes the checkpoint's

    def __post_init__(self) -> None:
        at_least(self, 1, "held_out_pairs", "sequence_length")


@dataclass(frozen=True, kw_only=True)
class PairScheduleSection(ScheduleSection):
    """How large the batches are besides, in pairs."""

    batch_pairs: int = 64
    micro_batch_pairs: int | None = None  # None: the whole batch at once

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "batch_pairs")
        if self.micro_batch_pairs is not None:
            at_least(self, 1, "micro_batch_pairs")


@dataclass(frozen=True, kw_only=True)
class PreferenceSection:
    """Direct preference optimisation."""

    beta: float = 0.1  # how dear it is to leave the reference
    reference: Literal["float32", "bfloat16"] = "float32"  # how the reference's weights are kept
    stop_before_epoch_ends: bool = True  # as the report does: a run of a whole epoch or more is refused

    def __post_init__(self) -> None:
        above_zero(self, "beta")


@dataclass(frozen=True, kw_only=True)
class PreferenceRecipe:
    """A whole recipe of the task "preference": which model learns from which pairs of answers, for how long."""

    task: Literal["preference"] = "preference"
    model: ModelSection = field(default_factory=ModelSection)
    vision: VisionSection = field(default_factory=VisionSection)
    data: PreferenceDataSection
    preference: PreferenceSection = field(default_factory=PreferenceSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: PairScheduleSection
    train: TrainSection = field(default_factory=TrainSection)
    export: ExportSection = field(default_factory=ExportSection)
