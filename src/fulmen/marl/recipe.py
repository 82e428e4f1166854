"""The sections of a team's recipe: every key, its default and its check, or where they are."""

from dataclasses import dataclass, field

from fulmen.marl.learner import LearnerSettings
from fulmen.marl.team import TeamSettings


def _at_least(section: object, least: int, *names: str) -> None:
    for name in names:
        if getattr(section, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(section, name)}")


@dataclass(frozen=True, kw_only=True)
class WorldSection:
    """Where the team lives: one of our worlds or somebody else's, as `build_world` reads it."""

    name: str = "navigation"
    num_worlds: int = 16  # worlds that advance together, a team in each
    options: dict = field(default_factory=dict)  # the task's own: agents, reward, max_steps, ...

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_worlds")


@dataclass(frozen=True, kw_only=True)
class TransferSection:
    """How knowledge moves between the agents; `make_transfer` checks the name and the options."""

    name: str = "pat"
    options: dict = field(default_factory=dict)  # the method's own


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """How long, from what, and what is measured on the way. A frame is one step of the whole team in one world."""

    frames: int = 96_000
    seed: int = 0
    device: str = "cpu"  # small networks are fastest there
    threads: int = 1  # of a CPU; for small networks waiting for each other takes longer than the work
    from_run: str | None = None  # begin with the weights of this run's team; {seed} in its name stands for run.seed
    newcomers: tuple[int, ...] = ()  # agents that begin from scratch all the same, counted from 0
    freeze: bool = False  # the others learn no more
    selector_from: str | None = None  # begin with the attention teacher selector of this run, of a team of any size
    report_every: int = 1600  # frames between lines of metrics
    evaluate_every: int = 4800  # frames between evaluations
    episodes: int = 32  # of an evaluation, for each way of acting
    snapshot_every: int = 24_000  # frames between snapshots; 0: none, and no resuming
    keep_snapshots: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2**63, got {self.seed}")
        _at_least(self, 1, "frames", "threads", "report_every", "evaluate_every", "episodes", "keep_snapshots")
        _at_least(self, 0, "snapshot_every")
        if self.from_run is None and (self.newcomers or self.freeze):
            raise ValueError("newcomers and freeze need from_run, the folder of the run whose team they join")
        if len(set(self.newcomers)) != len(self.newcomers) or any(agent < 0 for agent in self.newcomers):
            raise ValueError(f"newcomers must be different agents counted from 0, got {list(self.newcomers)}")
        if self.freeze and not self.newcomers:
            raise ValueError("freeze leaves nobody to learn: name newcomers, or leave it out")


@dataclass(frozen=True, kw_only=True)
class MarlRecipe:
    """A whole recipe: who learns, how, from whom, where and for how long."""

    world: WorldSection = field(default_factory=WorldSection)
    learner: LearnerSettings = field(default_factory=LearnerSettings)  # with [learner.memory]
    transfer: TransferSection = field(default_factory=TransferSection)
    team: TeamSettings = field(default_factory=TeamSettings)
    run: RunSection = field(default_factory=RunSection)
