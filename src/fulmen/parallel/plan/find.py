"""The fastest mesh that fits: all that divide are tried, under a few rules of sense."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fulmen.config import UserError
from fulmen.parallel.mesh import MeshSizes
from fulmen.parallel.plan.job import Job, Placement
from fulmen.parallel.plan.machines import Machine
from fulmen.parallel.plan.training import SHARE, Plan, mesh_text, size

MOST_STAGES = 40
MOST_UNEVEN = 1.5
LEAST_TOKENS = 1024
MOST_TOKENS = 2**17
"""Rules: stages of a pipeline; layers of the longest stage over the mean; tokens of a rank in a micro batch."""

GROUPS = (1, 2, 4, 8)
"""Of tokens in an expert layer; that many are tried for the mesh that was found."""


@dataclass(frozen=True)
class Found:
    """The fastest plan that fits and why it is that one; where none fits, the one that needs least memory."""

    plan: Plan
    tried: int
    refused: int  # of them, for their memory
    reasons: tuple[str, ...]

    def table(self) -> str:
        """The plan's, with the reasons behind."""
        return "\n".join([self.plan.table(), "", "why this one", *(f"  {reason}" for reason in self.reasons)])

    @property
    def refusal(self) -> str | None:
        """One line, if none fits, with what the least needs most memory for."""
        plan = self.plan
        if plan.fits:
            return None
        return (
            f"none of {self.tried} placements on {plan.placement.world} GPUs fits into {size(plan.room)}: the least "
            f"takes {size(plan.needs)}, {size(plan.memory[plan.largest])} of it {plan.largest}, with "
            f"{mesh_text(plan.placement)}: take more GPUs or larger ones"
        )


def find_plan(job: Job, machine: Machine, ranks: int, *, sizes: MeshSizes | None = None, share: float = SHARE) -> Found:
    """The fastest of all placements on `ranks` GPUs that fits into a share of their memory.

    Of a mesh of some `sizes` what these leave open is chosen: rows, what is kept, groups of tokens. Raises UserError
    where no mesh divides the batch, or the one that was given is none for this model and batch.
    """
    meshes = _meshes(job, machine, ranks) if sizes is None else [sizes.fitted(ranks)]
    plans = [Plan(placement, machine, share) for mesh in meshes for placement in _placements(job, mesh)]
    if not plans and sizes is not None:
        Placement(job=job, sizes=sizes.fitted(ranks))  # says why
    if not plans:
        raise UserError(
            f"no mesh of {ranks} ranks divides a batch of {job.batch} tokens in samples of {job.context}: "
            "take a larger batch or another number of ranks"
        )
    fitting, refused = ([plan for plan in plans if plan.fits == does] for does in (True, False))
    if not fitting:
        least = min(refused, key=lambda plan: plan.needs)
        return Found(least, len(plans), len(plans), _summary(least, len(plans), len(plans)))
    first = min(fitting, key=_seconds)
    cuts = [dataclasses.replace(first, placement=dataclasses.replace(first.placement, groups=n)) for n in GROUPS]
    best = min((plan for plan in cuts if plan.fits), key=_seconds)
    beside = _alternatives(first, fitting, refused) if sizes is None else ()
    return Found(best, len(plans), len(refused), (*_summary(best, len(plans), len(refused)), *beside))


def _seconds(plan: Plan) -> float:
    return plan.estimate.seconds


def _placements(job: Job, sizes: MeshSizes) -> Iterator[Placement]:
    """All on a mesh; a row of several samples is not cut over cp."""
    for samples in _samples(job, sizes):
        for checkpoint in (False, True):
            for keep in (False, True):
                yield Placement(job=job, sizes=sizes, samples=samples, checkpoint=checkpoint, keep=keep)


def _meshes(job: Job, machine: Machine, ranks: int) -> Iterator[MeshSizes]:
    """Both factorings of all ranks: tp and etp within a host, heads and heads of keys divided by tp, experts by ep."""
    config = job.config
    for pp in _divisors(ranks, min(MOST_STAGES, config.num_layers)):
        if -(-config.num_layers // pp) * pp > MOST_UNEVEN * config.num_layers:
            continue
        inside = ranks // pp
        for etp, ep in _pairs(inside, machine.gpus, config.num_experts):
            if (etp > 1 and etp * ep > machine.gpus) or config.num_experts % ep or config.expert_size % (8 * etp):
                continue
            for tp in _divisors(inside, machine.gpus):
                if config.num_heads % tp or config.num_kv_heads % tp:
                    continue
                for cp in _divisors(inside // tp, max(1, job.context // (LEAST_TOKENS * tp))):
                    if job.context % (cp * tp) == 0:
                        yield MeshSizes(pp=pp, cp=cp, tp=tp, etp=etp, ep=ep).fitted(ranks)


def _samples(job: Job, sizes: MeshSizes) -> Iterator[int]:
    """Of a row: powers of two such that each replica's part of the batch is whole rows."""
    samples = 1
    while job.batch % (sizes.dp * samples * job.context) == 0:
        yield samples
        samples *= 2
        if sizes.cp > 1 or samples * job.context > MOST_TOKENS * sizes.tp:
            return


def _divisors(number: int, most: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0]


def _pairs(number: int, most: int, others: int) -> Iterator[tuple[int, int]]:
    """Two factors of a divisor of `number`, the first up to `most`, the second up to `others`."""
    for first in _divisors(number, most):
        for second in _divisors(number // first, others):
            yield first, second


def _summary(plan: Plan, tried: int, refused: int) -> tuple[str, ...]:
    parts, seconds = plan.estimate.parts, plan.estimate.seconds
    return (
        f"{tried} placements divide, {refused} of them need more than {size(plan.room)} a GPU",
        f"most of the memory: {plan.largest}, {plan.memory[plan.largest] / plan.needs:.0%}",
        f"most of the time: {plan.longest}, {parts[plan.longest] / seconds:.0%}; "
        f"lost most: {plan.lost}, {parts[plan.lost] / seconds:.0%}",
    )


def _alternatives(best: Plan, fitting: list[Plan], refused: list[Plan]) -> tuple[str, ...]:
    """For everything that the plan does, what leaving it out would cost."""
    axes = [name for name in ("pp", "cp", "tp", "etp", "ep") if getattr(best.placement.sizes, name) > 1]
    without: dict[str, Callable[[Placement], bool]] = {
        f"without {name}": lambda placement, name=name: getattr(placement.sizes, name) == 1 for name in axes
    }
    if best.placement.checkpoint:
        without["with all activations kept"] = lambda placement: not placement.checkpoint
    sides = (
        (name, [[plan for plan in plans if holds(plan.placement)] for plans in (fitting, refused)])
        for name, holds in without.items()
    )
    return tuple(f"{name}: {_beside(best, *others)}" for name, others in sides)


def _beside(best: Plan, fitting: list[Plan], refused: list[Plan]) -> str:
    if fitting:
        other = min(fitting, key=_seconds)
        slower = other.estimate.seconds / best.estimate.seconds - 1
        return f"{slower:.0%} slower at best, with {mesh_text(other.placement)} (lost most: {other.lost})"
    if refused:
        least = min(refused, key=lambda plan: plan.needs)
        return f"{size(least.needs)} a GPU at least, most of it {least.largest}"
    return "no mesh divides"
