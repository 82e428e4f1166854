"""What a rank sends in a training step: every collective as a record, so that it can be compared with counted ones."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from fulmen.model.config import LIGHTNING, SOFTMAX
from fulmen.parallel.plan.job import (
    FP32,
    LOGITS_CHUNK,
    Piece,
    Placement,
    Stage,
    end_weights,
    groups,
    layer_weights,
    stage_weights,
)
from fulmen.parallel.plan.machines import Group, Machine, sent

INT64 = 8
"""Bytes of a number: of counts."""

TENSOR, CONTEXT, ROUTING = "tensor", "context", "routing"
EXPERTS, WEIGHTS, PIPELINE = "experts", "weights", "pipeline"
"""What a collective belongs to, and so what it can hide under."""

HIDES_UNDER = {
    TENSOR: "nothing",
    CONTEXT: "attention within the rank",
    ROUTING: "nothing",
    EXPERTS: "experts of other tokens",
    WEIGHTS: "layers before and after",
    PIPELINE: "other micro batches",
}


FORWARD, AGAIN, BACKWARD = "forward", "again", "backward"
"""Passes through a layer; it is computed again where its input alone was kept."""


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind over one group, all alike."""

    what: str
    part: str  # one of `HIDES_UNDER`
    kind: str  # "all_gather", "reduce_scatter", "all_to_all", "all_reduce", "send"
    group: Group
    payload: float  # bytes of the tensor that a rank gives to one of them; a mean where ranks give unlike many
    count: float = 1.0  # of them, in a micro batch or a step as the function says that made the record

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in all of them."""
        return self.count * sent(self.kind, self.payload, self.group.ranks)

    def seconds(self, machine: Machine) -> float:
        """Of all of them, if none waits for anybody."""
        return self.count * machine.seconds(self.kind, self.payload, self.group)

    def times(self, count: float) -> "Collective":
        """So many times as often."""
        return dataclasses.replace(self, count=self.count * count)


def layer_traffic(piece: Piece, kind: str, which: str, axes: dict[str, Group]) -> list[Collective]:
    """Of one layer, micro batch and pass (`FORWARD`, `AGAIN`, `BACKWARD`); FSDP is left out."""
    found = [*_tensor(piece, kind, axes["tp"]), *_experts(piece, axes["ep"], axes["etp"], which)]
    found += _states(piece, axes["cp"]) if kind == LIGHTNING else _keys(piece, axes["cp"], which)
    return [record for record in found if record.group.ranks > 1 and record.count]


def _tensor(piece: Piece, kind: str, tp: Group) -> list[Collective]:
    """Attention by heads between tokens that are split: gathered on the way in and summed on the way out, both ways."""
    width = piece.config.hidden_size * piece.number
    found = [
        Collective("tokens to heads", TENSOR, "all_gather", tp, piece.tokens * width),
        Collective("heads to tokens", TENSOR, "reduce_scatter", tp, piece.wide_tokens * width),
    ]
    if kind == LIGHTNING:
        found.append(Collective("norm over all heads", TENSOR, "all_reduce", tp, piece.wide_tokens * FP32))
    return found


def _states(piece: Piece, cp: Group) -> list[Collective]:
    """LASP+: the states of a rank's segments, or backward their gradients."""
    if not piece.ring.is_crossed:
        return []
    config, segments = piece.config, 1 + piece.balanced
    state = config.num_heads // piece.tp * config.head_dim**2 * FP32
    return [Collective("lightning states", CONTEXT, "all_gather", cp, segments * state)]


def _keys(piece: Piece, cp: Group, which: str) -> list[Collective]:
    """The ring: keys and values to those who need them, backward again, and their gradients sent home."""
    ring, numbers = piece.ring, 2 * piece.kv_heads * piece.config.head_dim
    payload = ring.tokens * numbers * piece.number
    found = [Collective("keys and values", CONTEXT, "send", cp, payload, ring.sends)]
    if which == BACKWARD:
        found.append(Collective("gradients of keys and values", CONTEXT, "send", cp, payload, ring.sends))
    return found


def _experts(piece: Piece, ep: Group, etp: Group, which: str) -> list[Collective]:
    """Out and back, a group of tokens after the other, each row with its weight on the way out.

    Over etp rows go to all that have a part of the expert, and their answers come back to be summed.
    """
    config, groups = piece.config, piece.token_groups
    row = config.experts_per_token * piece.tokens * piece.number / groups
    out, back = row * (config.hidden_size + 1), row * config.hidden_size
    # Computed again is what the backward pass reads: no answer that comes behind the last group's products.
    is_again = which == AGAIN
    late = is_again * (2 if piece.etp > 1 else 1)
    found = [
        Collective("rows to experts", EXPERTS, "all_to_all", ep, out, groups),
        Collective("rows to all parts of a width", EXPERTS, "all_to_all", etp, out * piece.etp, groups),
        Collective("answers of all parts", EXPERTS, "all_to_all", etp, back * piece.etp, groups - is_again),
        Collective("answers to tokens", EXPERTS, "all_to_all", ep, back, max(0, groups - late)),
    ]
    if which != BACKWARD:
        counts = groups * config.num_experts * INT64
        found += [Collective("numbers of rows", ROUTING, "all_gather", group, counts) for group in (ep, etp)]
    return found


def end_traffic(piece: Piece, stage: Stage, axes: dict[str, Group]) -> list[Collective]:
    """Of embedding and head by parts of the vocabulary, forward and backward, of one micro batch."""
    tp, width = axes["tp"], piece.config.hidden_size * piece.number
    gather = Collective("tokens to the vocabulary", TENSOR, "all_gather", tp, piece.tokens * width)
    scatter = Collective("vocabulary to tokens", TENSOR, "reduce_scatter", tp, piece.wide_tokens * width)
    found = [gather, scatter] * (stage.is_first + stage.is_last)
    if stage.is_last:
        # The largest logit and the sum of exponentials, of some tokens at a time.
        chunks = -(-piece.wide_tokens // LOGITS_CHUNK)
        payload = piece.wide_tokens / chunks * FP32
        found.append(Collective("cross-entropy", TENSOR, "all_reduce", tp, payload, 2 * chunks))
    return [record for record in found if tp.ranks > 1]


def weight_traffic(placement: Placement, stage: Stage) -> tuple[list[Collective], list[Collective]]:
    """FSDP, forward and backward: of each micro batch, or where weights are kept of the first and the last of a step.

    A layer's experts are one unit, gathered as products take them, the rest of it another, embedding and head a third
    that stays gathered between the passes, both gathered in fp32. Gradients are reduced and scattered in fp32.
    """
    config, sizes = placement.job.config, placement.sizes
    dense, experts = placement.group("dp x cp"), placement.group("edp")
    units = []
    for kind in (LIGHTNING, SOFTMAX):
        weights, layers = layer_weights(config, sizes, kind), stage.layers.count(kind)
        units += [_Unit(dense, weights.dense, layers), _Unit(experts, weights.experts, layers, placement.number)]
    layers = [unit for unit in units if unit.group.ranks > 1 and unit.count]
    ends = end_weights(config, sizes, stage)
    both = [*layers, _Unit(dense, ends, 1)] if ends and dense.ranks > 1 else layers
    again = [] if placement.keep else [unit.gathered for unit in layers]
    return [unit.gathered for unit in both], [*again, *(unit.reduced for unit in both)]


class _Unit(NamedTuple):
    """Weights that FSDP gathers together, `count` times in a pass."""

    group: Group
    numbers: int
    count: int
    size: int = FP32  # bytes of a number as it is gathered

    @property
    def gathered(self) -> Collective:
        payload = self.numbers * self.size / self.group.ranks
        return Collective("weights", WEIGHTS, "all_gather", self.group, payload, self.count)

    @property
    def reduced(self) -> Collective:
        return Collective("gradients", WEIGHTS, "reduce_scatter", self.group, self.numbers * FP32, self.count)


def copied_traffic(placement: Placement, stage: Stage) -> list[Collective]:
    """Once a step: gradients of all that the ranks of tp hold alike, as FSDP has sharded them."""
    tp, copied = placement.group("tp"), stage_weights(placement.job.config, placement.sizes, stage).copied
    payload = copied * FP32 / placement.group("dp x cp").ranks
    return [Collective("gradients of norms and routers", WEIGHTS, "all_reduce", tp, payload)] * (tp.ranks > 1)


def pipeline_traffic(placement: Placement, stage: Stage) -> list[Collective]:
    """Of one micro batch: activations to the stage behind, gradients to the one before."""
    pp, piece = placement.group("pp"), placement.piece
    payload = piece.tokens * piece.config.hidden_size * piece.number
    found = [] if stage.is_last else [Collective("activations to the next stage", PIPELINE, "send", pp, payload)]
    return found + (
        [] if stage.is_first else [Collective("gradients to the one before", PIPELINE, "send", pp, payload)]
    )


def step_traffic(placement: Placement, stage: Stage) -> list[Collective]:
    """Everything that a rank of a stage takes part in, counted over a whole step; equal records are one."""
    axes, piece, micro = groups(placement.sizes), placement.piece, placement.micro_batches
    found: list[Collective] = []
    for kind in (LIGHTNING, SOFTMAX):
        for which in (FORWARD, *([AGAIN] if placement.checkpoint else []), BACKWARD):
            each = layer_traffic(piece, kind, which, axes)
            found += [record.times(stage.layers.count(kind) * micro) for record in each]
    found += [record.times(micro) for record in end_traffic(piece, stage, axes)]
    for records in weight_traffic(placement, stage):
        found += [record.times(1 if placement.keep else micro) for record in records]
    found += [record.times(micro) for record in pipeline_traffic(placement, stage)]
    return _together([*found, *copied_traffic(placement, stage)])


def _together(records: Iterable[Collective]) -> list[Collective]:
    counts: dict[Collective, float] = {}
    for record in records:
        key = dataclasses.replace(record, count=1.0)
        counts[key] = counts.get(key, 0.0) + record.count
    return [record.times(count) for record, count in counts.items() if count]
