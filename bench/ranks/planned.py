"""What the planner says of the same work: milliseconds, forward and backward."""

import torch

from fulmen.model import ModelConfig
from fulmen.model.config import LIGHTNING, SOFTMAX
from fulmen.parallel import MeshSizes
from fulmen.parallel.plan import MACHINES, Job, Machine, Placement, Plan
from fulmen.parallel.plan.job import Piece, groups
from fulmen.parallel.plan.timing import LIGHT, OF_EXPERTS, PRODUCTS, SOFT, layer_span
from fulmen.parallel.plan.traffic import BACKWARD, CONTEXT, EXPERTS, FORWARD, ROUTING


def machine() -> Machine:
    """The one that this runs on."""
    name = torch.cuda.get_device_name()
    return next(MACHINES[known] for known in ("H200", "H100", "H800", "H20", "A100") if known in name)


def lightning_layer(config: ModelConfig, length: int, samples: int, ranks: int) -> float:
    """Projections, attention, and what is waited for; norm and gate are left out."""
    return _milliseconds(_row(config, length, samples, ranks), LIGHTNING, {PRODUCTS, LIGHT, CONTEXT})


def ring(config: ModelConfig, length: int, samples: int, ranks: int) -> float:
    """Attention alone."""
    return _milliseconds(_row(config, length, samples, ranks), SOFTMAX, {SOFT, CONTEXT})


def expert_layer(config: ModelConfig, tokens: int, ep: int, etp: int, token_groups: int) -> float:
    """Products and what is waited for; putting rows in order is left out."""
    piece = Piece(config=config, context=tokens, ep=ep, etp=etp, groups=token_groups, load=1.0)
    return _milliseconds(piece, LIGHTNING, {OF_EXPERTS, EXPERTS, ROUTING})


def step(config: ModelConfig, sizes: MeshSizes, *, batch: int, context: int, **how) -> dict[str, float]:
    """A training step and a rank's memory."""
    placement = Placement(job=Job(config=config, context=context, batch=batch), sizes=sizes, load=1.0, **how)
    plan = Plan(placement, machine())
    return {"planned ms": 1e3 * plan.estimate.seconds, "planned MB of a rank": plan.needs / 1e6}


def _row(config: ModelConfig, length: int, samples: int, ranks: int) -> Piece:
    return Piece(config=config, context=length // samples, samples=samples, cp=ranks, balanced=ranks > 1)


def _milliseconds(piece: Piece, kind: str, parts: set[str]) -> float:
    sizes = MeshSizes(cp=piece.cp, ep=piece.ep, etp=piece.etp).fitted(max(piece.cp, piece.ep * piece.etp))
    axes = tuple(groups(sizes)[name] for name in ("tp", "cp", "ep", "etp"))
    spans = [layer_span(piece, kind, machine(), axes, which) for which in (FORWARD, BACKWARD)]
    return 1e3 * sum((span.work + span.waits)[part] for span in spans for part in parts)
