"""How long a training step takes: products at a share of the peak rate, collectives by link speeds, what hides what.

Computing and talking of one rank, a layer and a pass (forward or backward) at a time. What a collective can hide under:

    tensor      nothing: the products wait for the tokens
    routing     nothing: how many rows come must be known before any is sent
    context     the attention within the rank, or of the keys at hand
    experts     the experts' products of other groups of tokens
    weights     whole layers, as far as the link that they travel on is free
    pipeline    other micro batches; what fills and drains it is seen
"""

import functools
from collections import Counter
from typing import NamedTuple

import torch

from fulmen.model.config import LIGHTNING, SOFTMAX, ModelConfig
from fulmen.ops.lightning import decay_rates
from fulmen.ops.lightning.parts import FARTHEST
from fulmen.parallel.plan.job import Piece, Placement, Stage, groups, operations, stage_weights
from fulmen.parallel.plan.machines import Group, Machine
from fulmen.parallel.plan.memory import shard_size
from fulmen.parallel.plan.traffic import (
    AGAIN,
    BACKWARD,
    CONTEXT,
    EXPERTS,
    FORWARD,
    ROUTING,
    TENSOR,
    WEIGHTS,
    Collective,
    copied_traffic,
    end_traffic,
    layer_traffic,
    pipeline_traffic,
    weight_traffic,
)

PRODUCTS, OF_EXPERTS, PASSES = "projections and head", "experts' products", "passes over memory"
SOFT, LIGHT = "softmax attention", "lightning attention"
NAMES = {LIGHTNING: LIGHT, SOFTMAX: SOFT}
COMPUTED_AGAIN, BUBBLE, OPTIMIZER = "computed again", "pipeline bubble", "optimizer"
WAITING = "waiting: "

OPTIMIZER_BYTES = 32
"""Of each number of a rank's shard: weight and two moments read and written, its gradient read twice (clipping)."""


class Span(NamedTuple):
    """Seconds of one pass: of each kind of work, of what is waited for, of talking on either kind of link."""

    work: Counter
    waits: Counter
    link: float = 0.0  # of the host
    network: float = 0.0

    @property
    def seconds(self) -> float:
        return self.work.total() + self.waits.total()

    def plus(self, other: "Span", times: float = 1.0) -> "Span":
        """This and another, so many times."""
        work, waits = Counter(self.work), Counter(self.waits)
        for total, more in ((work, other.work), (waits, other.waits)):
            for name, seconds in more.items():
                total[name] += times * seconds
        return Span(work, waits, self.link + times * other.link, self.network + times * other.network)


EMPTY = Span(Counter(), Counter())


class Estimate(NamedTuple):
    """Of a step, in the stage that all wait for."""

    stage: Stage
    parts: dict[str, float]  # seconds; together they are the step
    talking: float  # seconds of all collectives of a rank, hidden or not
    waiting: float  # of them, what nothing hides

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def hidden(self) -> float:
        """Share of the time of all collectives during which the rank computes; 1 where there are none."""
        return 1 - self.waiting / self.talking if self.talking else 1.0


def estimate_step(placement: Placement, machine: Machine) -> Estimate:
    """1F1B: every stage is filled and drained once, and the slowest decides the rest."""
    micro = placement.micro_batches
    passes = [_stage(placement, stage, machine) for stage in placement.stages]
    spans = [forward.plus(backward) for forward, backward in passes]
    slowest = max(range(len(spans)), key=lambda place: spans[place].seconds)
    stage, span = placement.stages[slowest], spans[slowest]
    weights = _weights(placement, stage, machine, *passes[slowest])
    sends = [record.seconds(machine) for record in pipeline_traffic(placement, stage)]
    fill = 2 * (placement.sizes.pp - 1) * max(sends, default=0.0)
    total = EMPTY.plus(span, micro).plus(weights, 1 if placement.keep else micro)
    parts = total.work + Counter({f"{WAITING}{part}": seconds for part, seconds in total.waits.items()})
    parts[BUBBLE] = sum(other.seconds for other in spans) - span.seconds + fill
    parts[OPTIMIZER] = max(_optimizer(placement, each, machine) for each in placement.stages)
    return Estimate(
        stage=stage,
        parts={name: seconds for name, seconds in parts.items() if seconds > 0},
        talking=total.link + total.network + micro * sum(sends),
        waiting=total.waits.total() + fill,
    )


def _stage(placement: Placement, stage: Stage, machine: Machine) -> tuple[Span, Span]:
    """Forward and backward of one micro batch, the pipeline left out, and FSDP too."""
    piece, axes = placement.piece, groups(placement.sizes)
    key = tuple(axes[name] for name in ("tp", "cp", "ep", "etp"))
    forward = backward = EMPTY
    for kind in sorted(set(stage.layers)):
        count = stage.layers.count(kind)
        forward = forward.plus(layer_span(piece, kind, machine, key, FORWARD), count)
        if placement.checkpoint:
            again = layer_span(piece, kind, machine, key, AGAIN)
            backward = backward.plus(Span(Counter({COMPUTED_AGAIN: again.work.total()}), *again[1:]), count)
        backward = backward.plus(layer_span(piece, kind, machine, key, BACKWARD), count)
    ends = end_traffic(piece, stage, axes)
    work = _head(piece, machine) if stage.is_last else Counter()
    # The head's gradients are computed forward, where the logits are.
    return forward.plus(_talk(ends, machine, work, Counter({TENSOR: _seconds(ends, machine)}))), backward


@functools.lru_cache(maxsize=4096)
def layer_span(piece: Piece, kind: str, machine: Machine, axes: tuple[Group, ...], which: str) -> Span:
    """Of one layer's pass."""
    work = layer_work(piece, kind, machine, 2 if which == BACKWARD else 1)
    records = layer_traffic(piece, kind, which, {group.axis: group for group in axes})
    seconds = Counter()
    for record in records:
        seconds[record.part] += record.seconds(machine)
        seconds[record.part, record.group.axis] += record.seconds(machine)
    experts, rows = work[OF_EXPERTS], (seconds[EXPERTS, "ep"], seconds[EXPERTS, "etp"])
    waits = Counter(
        {
            TENSOR: seconds[TENSOR],
            CONTEXT: _context_wait(piece, kind, seconds[CONTEXT], work[NAMES[kind]]),
            ROUTING: seconds[ROUTING],
            EXPERTS: _pipelined(experts, *rows, groups=piece.token_groups) - experts,
        }
    )
    return _talk(records, machine, work, waits)


def layer_work(piece: Piece, kind: str, machine: Machine, passes: int) -> Counter:
    """Seconds of computing of one layer, by what it is; passes: 1 forward, 2 backward."""
    return Counter(
        {
            PRODUCTS: passes * _products(piece, kind, machine),
            OF_EXPERTS: passes * _experts(piece, machine),
            NAMES[kind]: _attention(piece, kind, machine, passes),
            PASSES: passes * _passes(piece, machine),
        }
    )


def _products(piece: Piece, kind: str, machine: Machine) -> float:
    cost = operations(piece.config, piece.context, kind).products
    return piece.tokens * cost / (machine.bf16 * machine.products)


def _experts(piece: Piece, machine: Machine) -> float:
    """Products of the fullest rank's experts; each group of tokens reads their weights anew."""
    config = piece.config
    cost = operations(config, piece.context, LIGHTNING).experts * piece.tokens * piece.load
    weights = config.num_experts / piece.ep * 3 * config.hidden_size * config.expert_size / piece.etp
    read = piece.token_groups * weights * piece.number / (machine.bandwidth * machine.passes)
    return max(cost / (machine.bf16 * machine.products), read)


def _attention(piece: Piece, kind: str, machine: Machine, passes: int) -> float:
    """Without the products with weights, of the rank that has most of it."""
    cost = piece.tokens * operations(piece.config, piece.context, kind).attention
    if kind == SOFTMAX:
        # Backward the scores are computed once more: five products instead of two.
        share = 2.5 if passes == 2 else 1.0
        return share * piece.ring.imbalance * cost / (machine.bf16 * machine.attention)
    # q, k, v and outputs, backward three such scans.
    tensors = 12.0 if passes == 2 else 4.0
    if piece.ring.is_crossed:
        # LASP+ besides: two make the states that leave, and of those that enter three read one, backward three times.
        tensors += (11 if passes == 2 else 5) * _reached(piece.config, piece.wide_tokens // (1 + piece.balanced))
    moved = piece.tokens * tensors * piece.config.attention_size * piece.number
    return max(moved / (machine.bandwidth * machine.passes), passes * cost / (machine.bf16 * machine.products))


@functools.lru_cache
def _reached(config: ModelConfig, tokens: int) -> float:
    """Of so many tokens the share that the state before them counts for, in the mean of all heads."""
    layers = [layer for layer, kind in enumerate(config.layers) if kind == LIGHTNING]
    rates = torch.stack([decay_rates(config.num_heads, layer, config.num_layers) for layer in layers])
    return float((FARTHEST / rates / max(1, tokens)).clamp(max=1).mean())


def _passes(piece: Piece, machine: Machine) -> float:
    """Of a layer, forward: two norms with the residual sum, the gated norm, permuting, SwiGLU, summing up."""
    config, rows = piece.config, piece.config.experts_per_token * piece.load
    moved = 14 * config.hidden_size + 6 * config.attention_size + 6 * rows * (config.expert_size + config.hidden_size)
    return piece.tokens * moved / (machine.bandwidth * machine.passes)


def _head(piece: Piece, machine: Machine) -> Counter:
    """Three products, and the logits written and read five times."""
    logits = piece.config.vocab_size / piece.tp * piece.wide_tokens
    return Counter(
        {
            PRODUCTS: 3 * 2 * logits * piece.config.hidden_size / (machine.bf16 * machine.products),
            PASSES: 5 * logits * piece.number / (machine.bandwidth * machine.passes),
        }
    )


def _context_wait(piece: Piece, kind: str, seconds: float, attention: float) -> float:
    """Of LASP+ what is longer than the attention within the rank; of the ring what is longer than that of its steps."""
    if not seconds:
        return 0.0
    if kind == LIGHTNING:
        return max(0.0, seconds - attention)
    ring = piece.ring
    # Those who send little wait for those who send most.
    return max(0.0, seconds * ring.steps / ring.sends - attention * ring.steps / (ring.steps + 1))


def _pipelined(*seconds: float, groups: int) -> float:
    """Of works that run side by side, each on one group of tokens at a time, group after group."""
    return sum(seconds) / groups + max(seconds) * (groups - 1) / groups


def _weights(placement: Placement, stage: Stage, machine: Machine, forward: Span, backward: Span) -> Span:
    """FSDP under the forward and the backward pass, of each micro batch or, where weights are kept, of a step.

    The first layer to be gathered and the last one to be reduced are always seen.
    """
    first, second = weight_traffic(placement, stage)
    units = len(stage.layers) + 1
    waits = _weight_wait(first, machine, forward, units) + _weight_wait(second, machine, backward, units)
    copied = copied_traffic(placement, stage)
    waits += _seconds(copied, machine)
    return _talk([*first, *second, *copied], machine, Counter(), Counter({WEIGHTS: waits}))


def _weight_wait(records: list[Collective], machine: Machine, under: Span, units: int) -> float:
    talk = _talk(records, machine, Counter(), Counter())
    total = talk.link + talk.network
    # A link that is busy with others' bytes is not free for these.
    late = max(total, talk.link and talk.link + under.link, talk.network and talk.network + under.network)
    return max(total / units, late - under.seconds) if total else 0.0


def _optimizer(placement: Placement, stage: Stage, machine: Machine) -> float:
    weights = stage_weights(placement.job.config, placement.sizes, stage)
    shard = shard_size(placement, weights)
    return shard * OPTIMIZER_BYTES / (machine.bandwidth * machine.passes)


def _seconds(records: list[Collective], machine: Machine) -> float:
    return sum(record.seconds(machine) for record in records)


def _talk(records: list[Collective], machine: Machine, work: Counter, waits: Counter) -> Span:
    """Work and waits with the seconds of talking by the kind of link."""
    far = _seconds([record for record in records if machine.inside(record.group) < record.group.ranks], machine)
    return Span(work, waits, _seconds(records, machine) - far, far)
