"""A plan of training: what a mesh needs of each GPU, what its ranks say to each other, and how long a step takes."""

from dataclasses import dataclass
from functools import cached_property

from fulmen.parallel.mesh import DENSE, EXPERTS
from fulmen.parallel.plan.job import Placement, needed_operations
from fulmen.parallel.plan.machines import Machine
from fulmen.parallel.plan.memory import step_memory
from fulmen.parallel.plan.timing import LIGHT, OF_EXPERTS, PASSES, PRODUCTS, SOFT, Estimate, estimate_step
from fulmen.parallel.plan.traffic import HIDES_UNDER, Collective, step_traffic

SHARE = 0.9
"""Of a GPU's memory that is used: the rest is for the driver, NCCL and what the allocator cannot join."""

NEEDED = (PRODUCTS, OF_EXPERTS, SOFT, LIGHT, PASSES)
"""Parts of a step that no mesh saves."""


@dataclass(frozen=True)
class Plan:
    """One placement on one machine."""

    placement: Placement
    machine: Machine
    share: float = SHARE

    @cached_property
    def memory(self) -> dict[str, float]:
        """Bytes of a rank of the fullest stage, by what they are for."""
        each = (step_memory(self.placement, stage) for stage in self.placement.stages)
        return max(each, key=lambda parts: sum(parts.values()))

    @property
    def needs(self) -> float:
        """Bytes of the fullest rank."""
        return sum(self.memory.values())

    @property
    def room(self) -> float:
        """Bytes of a GPU."""
        return self.machine.memory * self.share

    @property
    def fits(self) -> bool:
        return self.needs <= self.room

    @cached_property
    def traffic(self) -> list[Collective]:
        """Of a rank of the stage that all wait for, in a step."""
        return step_traffic(self.placement, self.estimate.stage)

    @cached_property
    def estimate(self) -> Estimate:
        return estimate_step(self.placement, self.machine)

    @property
    def tokens_per_second(self) -> float:
        return self.placement.job.batch / self.estimate.seconds

    @property
    def mfu(self) -> float:
        """Operations that the model needs over those that all GPUs could do in the time, at their peak rate."""
        job = self.placement.job
        rate = self.tokens_per_second * needed_operations(job.config, job.context)
        return rate / (self.placement.world * self.machine.bf16)

    @property
    def largest(self) -> str:
        """What takes most of the memory."""
        return max(self.memory, key=self.memory.__getitem__)

    @property
    def longest(self) -> str:
        """What takes most of the time."""
        return max(self.estimate.parts, key=self.estimate.parts.__getitem__)

    @property
    def lost(self) -> str:
        """What takes most of the time beside that which every mesh takes."""
        others = {name: seconds for name, seconds in self.estimate.parts.items() if name not in NEEDED}
        return max(others, key=others.__getitem__)

    def table(self) -> str:
        """For a person to read."""
        parts = [self._head(), *([] if self.fits else [self._refusal()]), self._memory_table()]
        return "\n\n".join([*parts, self._traffic_table(), self._time_table()])

    def _head(self) -> str:
        placement, job, machine = self.placement, self.placement.job, self.machine
        count = job.config.count_parameters()
        rows = [
            ("model", f"{_count(count.total)} parameters, {_count(count.active)} active"),
            ("machine", f"{placement.world} x {machine.name} of {size(machine.memory)}, of which {self.share:.0%}"),
            ("step", f"{job.batch} tokens in samples of {job.context}"),
            ("micro batch", f"samples of a row: {placement.samples}; rows of a replica: {placement.micro_batches}"),
            ("token groups", f"{placement.piece.token_groups} in an expert layer"),
            ("mesh", mesh_text(placement)),
            ("of experts", _product(placement, EXPERTS)),
            ("layers", ", ".join(str(len(stage.layers)) for stage in placement.stages)),
            ("activations", "each layer's input alone" if placement.checkpoint else "all that the backward pass reads"),
            ("weights", _gathering(placement)),
        ]
        return columns(rows)

    def _refusal(self) -> str:
        return f"does not fit: {size(self.needs)} a GPU, and there are {size(self.room)}"

    def _memory_table(self) -> str:
        head = "memory of a rank" + ", in the fullest stage" * (self.placement.sizes.pp > 1)
        rows = [(f"  {name}", size(number)) for name, number in self.memory.items() if number]
        rows.append(("  together", f"{size(self.needs)} of {size(self.room)}"))
        return f"{head}\n{columns(rows, right=(1,))}"

    def _traffic_table(self) -> str:
        if not self.traffic:
            return "traffic: none"
        rows = [("  of a rank in a step", "axis", "ranks", "times", "bytes of one", "sent", "seconds", "hides under")]
        rows += [
            (
                f"  {record.what}",
                record.group.axis,
                str(record.group.ranks),
                f"{record.count:.6g}",
                size(record.payload),
                size(record.sent),
                f"{record.seconds(self.machine):.3g}",
                HIDES_UNDER[record.part],
            )
            for record in self.traffic
        ]
        head = "traffic" + ", in the slowest stage" * (self.placement.sizes.pp > 1)
        return f"{head}\n{columns(rows, right=(2, 3, 4, 5, 6))}"

    def _time_table(self) -> str:
        total = self.estimate.seconds
        parts = sorted(self.estimate.parts.items(), key=lambda pair: -pair[1])
        rows = [(f"  {name}", f"{seconds:.3g} s", f"{seconds / total:.1%}") for name, seconds in parts]
        rows.append(("  together", f"{total:.3g} s", ""))
        speed = self.tokens_per_second
        lines = [
            ("tokens a second", f"{speed:,.0f}, {speed / self.placement.world:,.0f} a GPU"),
            ("share of the peak rate (MFU)", f"{self.mfu:.1%}"),
            ("of the time of talking hidden", f"{self.estimate.hidden:.0%}"),
        ]
        return f"time of a step, an estimate\n{columns(rows, right=(1, 2))}\n\n{columns(lines)}"


def mesh_text(placement: Placement) -> str:
    """The mesh of all but the experts: pp 2 x dp 4 x ..."""
    return _product(placement, DENSE)


def _product(placement: Placement, names: tuple[str, ...]) -> str:
    return " x ".join(f"{name} {getattr(placement.sizes, name)}" for name in names)


def columns(rows: list[tuple[str, ...]], right: tuple[int, ...] = ()) -> str:
    """Rows of text one below the other, some columns aligned on the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = (
        "  ".join(
            f"{cell:>{w}}" if n in right else f"{cell:<{w}}"
            for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _count(number: int) -> str:
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def size(number: float) -> str:
    """Bytes, with one decimal."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number / 1e3:.1f} kB"


def _gathering(placement: Placement) -> str:
    return (
        "gathered once a step, with mesh.keep_weights" if placement.keep else "gathered for each pass of a micro batch"
    )
