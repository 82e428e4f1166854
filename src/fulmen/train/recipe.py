"""The sections of a training recipe. Every key, its default and its check is here and nowhere else."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from fulmen.model import ModelConfig
from fulmen.parallel import MeshSizes

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


def check(section: object, rule: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Raise ValueError for the first of these fields that is infinite or for which `holds` is false."""
    for name in names:
        value = getattr(section, name)
        # TOML has nan, which no comparison holds for, and inf.
        if value == math.inf or not holds(value):
            raise ValueError(f"{name} must be {rule}, got {value}")


def at_least(section: object, least: int, *names: str) -> None:
    """`check` for fields with a smallest value."""
    check(section, f"at least {least}", lambda value: value >= least, *names)


def above_zero(section: object, *names: str) -> None:
    """`check` for fields that are positive."""
    check(section, "above 0", lambda value: value > 0, *names)


@dataclass(frozen=True, kw_only=True)
class VisionSection:
    """How the model sees, if it does: a checkpoint or a preset that sees, or an encoder joined to a text model."""

    init_from: str | None = None  # an encoder's checkpoint: the [model] is of text then, what joins the two is drawn
    dynamic: bool = True  # cut images into crops at their own resolution; False: see the thumbnail alone


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
    train_on: Literal["all", "answers"] = "all"  # of conversations; "answers": what the assistant says, alone
    text_sources: tuple[str, ...] = ()  # text that is mixed in, a sample before every `text_every` documents
    text_every: int = 20

    def __post_init__(self) -> None:
        at_least(self, 1, "held_out_tokens", "sequence_length", "tokenizer_sample_bytes", "text_every")


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
        above_zero(self, "learning_rate", "eps", "clip")
        at_least(self, 0, "weight_decay")
        check(self, "at least 0 and below 1", lambda value: 0 <= value < 1, "beta1", "beta2")


@dataclass(frozen=True, kw_only=True)
class ScheduleSection:
    """How long, and the learning rate: warm-up, constant, decay (see `schedule.py`)."""

    steps: int
    warmup: int = 500
    decay: int = 0  # steps of decay at the end
    decay_shape: Literal["exponential", "linear"] = "exponential"
    final: float = 0.15  # last learning rate over the highest

    def __post_init__(self) -> None:
        at_least(self, 1, "steps")
        at_least(self, 0, "warmup", "decay")
        if self.warmup + self.decay > self.steps:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} exceed steps {self.steps}")
        if not 0 < self.final <= 1:
            raise ValueError(f"final must be above 0 and at most 1, got {self.final}")


@dataclass(frozen=True, kw_only=True)
class TokenScheduleSection(ScheduleSection):
    """How large the batches are besides, in tokens."""

    batch_tokens: int = 16384
    ramp: tuple[tuple[int, int], ...] = ()  # (tokens seen, batch_tokens from there on)
    micro_batch_tokens: int | None = None  # None: the whole batch at once

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "batch_tokens")
        if any(a >= b for (a, _), (b, _) in pairwise(self.ramp)):
            raise ValueError(f"ramp must rise in tokens seen, got {[list(pair) for pair in self.ramp]}")
        if any(seen < 0 or tokens < 1 for seen, tokens in self.ramp):
            raise ValueError(f"ramp takes pairs of tokens seen and batch_tokens, got {[list(p) for p in self.ramp]}")
        if self.micro_batch_tokens is not None:
            at_least(self, 1, "micro_batch_tokens")


@dataclass(frozen=True, kw_only=True)
class LoopSection:
    """The loop itself, whatever it trains."""

    seed: int = 0
    device: str = "auto"  # "auto" takes CUDA where there is one
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of products; weights and states stay in float32
    compile: bool = False
    workers: int = 0  # processes that read what is trained on, and draw pictures, ahead of the steps
    evaluate_every: int = 0  # steps between held-out evaluations; 0: first and last only
    snapshot_every: int = 100
    keep_snapshots: int = 2

    def __post_init__(self) -> None:
        check(self, "at least 0 and below 2**63", lambda value: 0 <= value < 2**63, "seed")
        at_least(self, 0, "workers", "evaluate_every")
        at_least(self, 1, "snapshot_every", "keep_snapshots")


@dataclass(frozen=True, kw_only=True)
class TrainSection(LoopSection):
    """The loop over a mixture of experts."""

    capacity_factor: float = 2.0  # an expert's room over its fair share; 0: nothing is ever dropped
    balance: float = 0.01  # weight of the balance loss
    freeze: tuple[str, ...] = ()  # beginnings of the names of parameters that stay as they are
    checkpoint_layers: bool = False  # keep only each layer's input for the backward pass
    routing_every: int = 10  # steps between log lines with the experts' load

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "capacity_factor", "balance")
        at_least(self, 1, "routing_every")


@dataclass(frozen=True, kw_only=True)
class MeshSection(MeshSizes):
    """How many ranks train together, and how experts are reached over them."""

    global_router: bool = True  # one capacity for all tokens that are computed at a time; False: for each rank's
    token_groups: int = 1  # in which tokens travel to experts, one while another is computed
    keep_weights: bool = False  # gathered once a step, after which gradients are summed; False: for each pass of a row

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "token_groups")


@dataclass(frozen=True, kw_only=True)
class ExportSection:
    """The checkpoint at the end."""

    dialect: Literal["original", "transformers"] = "original"


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """A whole recipe of the task "language": what to train, on what, for how long."""

    task: Literal["language"] = "language"
    model: ModelSection = field(default_factory=ModelSection)
    vision: VisionSection = field(default_factory=VisionSection)
    data: DataSection = field(default_factory=DataSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: TokenScheduleSection
    train: TrainSection = field(default_factory=TrainSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    export: ExportSection = field(default_factory=ExportSection)


FREE = (
    "device",
    "compile",
    "workers",
    "checkpoint_layers",
    "routing_every",
    "evaluate_every",
    "snapshot_every",
    "keep_snapshots",
)
"""Keys of [train] that may change within a run: where and how it is computed, and how often it is looked at."""


def fixed_keys(recipe: type) -> dict[str, tuple[str, ...]]:
    """Keys that a run keeps from its beginning to its end, by section: what decides which numbers come out.

    How long it goes on ([schedule]), on how many ranks ([mesh]) and what its checkpoint looks like ([export]) may
    change, and of [train] `FREE`.
    """
    sections = {f.name: f.type for f in dataclasses.fields(recipe) if dataclasses.is_dataclass(f.type)}
    return {
        name: tuple(f.name for f in dataclasses.fields(section) if (name, f.name) not in {("train", k) for k in FREE})
        for name, section in sections.items()
        if name not in ("schedule", "mesh", "export")
    }
