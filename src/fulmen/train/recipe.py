"""The sections of a training recipe. Every key, its default and its check is here and nowhere else."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from fulmen.model import ModelConfig

# `preset` names a size or, with `init_from`, is left out; any field of ModelConfig beside it changes that field.
ModelSection = dataclasses.make_dataclass(
    "ModelSection",
    [
        ("preset", str | None, None),
        ("init_from", str | None, None),
        *((f.name, f.type | None, None) for f in dataclasses.fields(ModelConfig)),
    ],
    frozen=True,
    kw_only=True,
    namespace={"__doc__": "What is trained: a named size drawn at random, or a checkpoint to go on from."},
)


def _check(section: object, rule: str, holds: Callable[[Any], bool], *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        # TOML has nan, which no comparison holds for, and inf.
        if value == math.inf or not holds(value):
            raise ValueError(f"{name} must be {rule}, got {value}")


def _at_least(section: object, least: int, *names: str) -> None:
    _check(section, f"at least {least}", lambda value: value >= least, *names)


def _above_zero(section: object, *names: str) -> None:
    _check(section, "above 0", lambda value: value > 0, *names)


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Where the text comes from and how it is cut; see `fulmen.data`."""

    sources: tuple[str, ...] = ("stdlib",)
    text_field: str = "text"
    held_out: float = 0.05  # share of the files that is not trained on
    held_out_tokens: int = 32768  # how much of them an evaluation reads
    sequence_length: int = 512  # longest sample; a longer document becomes several
    tokenizer: str | None = None  # a folder with tokenizer.json; None trains one on the sources
    tokenizer_sample_bytes: int = 4_000_000

    def __post_init__(self) -> None:
        _at_least(self, 1, "held_out_tokens", "sequence_length", "tokenizer_sample_bytes")


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """AdamW as in the report's section 4.2; decay on matrices only."""

    learning_rate: float = 2e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # largest norm of the gradient of all parameters

    def __post_init__(self) -> None:
        _above_zero(self, "learning_rate", "eps", "clip")
        _at_least(self, 0, "weight_decay")
        _check(self, "at least 0 and below 1", lambda value: 0 <= value < 1, "beta1", "beta2")


@dataclass(frozen=True, kw_only=True)
class ScheduleSection:
    """How long, how large the batches, and the learning rate: warm-up, constant, decay (see `schedule.py`)."""

    steps: int
    warmup: int = 500
    decay: int = 0  # steps of decay at the end
    decay_shape: Literal["exponential", "linear"] = "exponential"
    final: float = 0.15  # last learning rate over the highest
    batch_tokens: int = 16384
    ramp: tuple[tuple[int, int], ...] = ()  # (tokens seen, batch_tokens from there on)
    micro_batch_tokens: int | None = None  # None: the whole batch at once

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "batch_tokens")
        _at_least(self, 0, "warmup", "decay")
        if self.warmup + self.decay > self.steps:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} exceed steps {self.steps}")
        if not 0 < self.final <= 1:
            raise ValueError(f"final must be above 0 and at most 1, got {self.final}")
        if any(a >= b for (a, _), (b, _) in pairwise(self.ramp)):
            raise ValueError(f"ramp must rise in tokens seen, got {[list(pair) for pair in self.ramp]}")
        if any(seen < 0 or tokens < 1 for seen, tokens in self.ramp):
            raise ValueError(f"ramp takes pairs of tokens seen and batch_tokens, got {[list(p) for p in self.ramp]}")
        if self.micro_batch_tokens is not None:
            _at_least(self, 1, "micro_batch_tokens")


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """The loop itself."""

    seed: int = 0
    device: str = "auto"  # "auto" takes CUDA where there is one
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of products; weights and states stay in float32
    capacity_factor: float = 2.0  # an expert's room over its fair share; 0: nothing is ever dropped
    balance: float = 0.01  # weight of the balance loss
    checkpoint_layers: bool = False  # keep only each layer's input for the backward pass
    compile: bool = False
    routing_every: int = 10  # steps between log lines with the experts' load
    evaluate_every: int = 0  # steps between held-out evaluations; 0: first and last only
    snapshot_every: int = 100
    keep_snapshots: int = 2

    def __post_init__(self) -> None:
        _check(self, "at least 0 and below 2**63", lambda value: 0 <= value < 2**63, "seed")
        _at_least(self, 0, "capacity_factor", "balance", "evaluate_every")
        _at_least(self, 1, "routing_every", "snapshot_every", "keep_snapshots")


@dataclass(frozen=True, kw_only=True)
class ExportSection:
    """The checkpoint at the end."""

    dialect: Literal["original", "transformers"] = "original"


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """A whole recipe: what to train, on what, for how long."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection
    train: TrainSection = field(default_factory=TrainSection)
    export: ExportSection = field(default_factory=ExportSection)
