"""What is trained and how it is spread: the tokens, layers and weights that fall to one rank.

Letters: T tokens of a row, t those of a rank between the attentions, h hidden, F expert width, k experts of a token.
"""

import functools
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from fulmen.config import UserError
from fulmen.model import ModelConfig
from fulmen.model.config import LIGHTNING, SOFTMAX
from fulmen.parallel.cut import Cut
from fulmen.parallel.mesh import MeshSizes
from fulmen.parallel.plan.machines import Group

FP32 = 4
"""Bytes of a number: of states, sums, and weights and their gradients."""

BLOCK, LOGITS_CHUNK = 64, 4096
"""Tokens: of a block of lightning attention; whose logits a GPU holds at a time (`fulmen.ops.loss`)."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Training steps of `batch` tokens in samples of `context` tokens each."""

    config: ModelConfig
    context: int
    batch: int

    def __post_init__(self) -> None:
        if not 1 <= self.context <= self.config.max_positions:
            raise UserError(
                f"context must be 1 to the model's {self.config.max_positions} positions, got {self.context}"
            )
        if self.batch < 1 or self.batch % self.context:
            raise UserError(f"a batch is whole samples: {self.batch} tokens are no multiple of {self.context}")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a rank computes of one micro batch, a row of `samples`, whatever the pipeline and the replicas are."""

    config: ModelConfig
    context: int
    samples: int = 1
    cp: int = 1
    tp: int = 1
    etp: int = 1
    ep: int = 1
    balanced: bool = True  # whether the row is cut so that all have as much causal attention to compute
    groups: int = 4  # of tokens in an expert layer: one travels while another is computed
    load: float = 1.2  # rows of the fullest rank's experts over the mean
    number: int = 2  # bytes of what products take and what goes from layer to layer, 4 in fp32

    @property
    def row(self) -> int:
        return self.samples * self.context

    @property
    def wide_tokens(self) -> int:
        """Of the row in a rank's attentions, by its share of the heads."""
        return self.row // self.cp

    @property
    def tokens(self) -> int:
        """Between the attentions, where the row is split over tp as well."""
        return self.wide_tokens // self.tp

    @property
    def kv_heads(self) -> int:
        """Of a rank; ranks that are more than there are heads hold copies."""
        return max(1, self.config.num_kv_heads // self.tp)

    @property
    def token_groups(self) -> int:
        return self.groups if self.ep * self.etp > 1 else 1

    @cached_property
    def ring(self) -> "Ring":
        return _ring(self.context, self.samples, self.cp, self.balanced)


class Ring(NamedTuple):
    """How keys go to the ranks of a row that compute with them; means over the ranks and what they send."""

    is_crossed: bool  # whether any sample lies on several ranks; else nothing is sent
    sends: float  # how often a rank gives its keys to another, and gets their gradients back
    tokens: float  # whose keys these are
    steps: int  # in which some rank does
    imbalance: float  # causal attention of the rank with most of it over the mean


@functools.lru_cache
def _ring(context: int, samples: int, cp: int, balanced: bool) -> Ring:
    cut = Cut(tuple(context * place for place in range(samples + 1)), cp, balanced and cp > 1)
    holders = torch.tensor([cut.holder(number) for number in range(len(cut.segments))])
    later, earlier = (cut.distances(later=range(len(cut.segments))) >= 0).nonzero().T
    # [owner, step]: whether the rank so many further on needs an owner's keys; at none they are its own.
    needed = torch.zeros(cp, cp, dtype=torch.bool)
    needed[holders[earlier], (holders[later] - holders[earlier]) % cp] = True
    needed[:, 0] = False
    tails = [[cut.tail(number) for number in cut.held(rank)] for rank in range(cp)]
    given = torch.tensor([sum(tail.end - tail.start for tail in each if tail is not None) for each in tails])
    pairs = [
        sum(_causal(segment.end, context) - _causal(segment.start, context) for segment in segments)
        for segments in ([cut.segments[number] for number in cut.held(rank)] for rank in range(cp))
    ]
    sends = needed.sum(dim=1)
    return Ring(
        is_crossed=cut.is_crossed,
        sends=int(sends.sum()) / cp,
        tokens=int((given * sends).sum()) / max(1, int(sends.sum())),
        steps=int(needed.any(dim=0).sum()),
        imbalance=max(pairs) * cp / sum(pairs),
    )


def _causal(tokens: int, context: int) -> int:
    """Pairs of a query and a key that the first tokens of a row have among them."""
    whole, rest = divmod(tokens, context)
    return whole * context * (context + 1) // 2 + rest * (rest + 1) // 2


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A job on a mesh, in the way a rank of any stage of the pipeline sees it."""

    job: Job
    sizes: MeshSizes  # with dp and edp filled in
    samples: int = 1  # of a micro batch's row
    checkpoint: bool = True  # keep each layer's input alone and compute the layer again in the backward pass
    keep: bool = False  # weights stay gathered until the last micro batch of a step, which reduces all gradients
    balanced: bool = True
    groups: int = 4
    load: float = 1.2
    number: int = 2

    def __post_init__(self) -> None:
        config, sizes, piece = self.job.config, self.sizes, self.piece
        rules = [
            (config.num_heads % sizes.tp == 0, f"{config.num_heads} heads cannot be split over tp {sizes.tp}"),
            (config.num_experts % sizes.ep == 0, f"{config.num_experts} experts cannot be split over ep {sizes.ep}"),
            (
                config.expert_size % (8 * sizes.etp) == 0,
                f"width {config.expert_size} cannot be split into multiples of 8 over etp {sizes.etp}",
            ),
            (sizes.pp <= config.num_layers, f"{config.num_layers} layers cannot be split over pp {sizes.pp}"),
            (
                piece.row % (sizes.cp * sizes.tp) == 0,
                f"a row of {piece.row} tokens cannot be split evenly over cp {sizes.cp} x tp {sizes.tp}",
            ),
            (
                self.job.batch % (sizes.dp * piece.row) == 0,
                f"{self.job.batch} tokens are no whole rows of {piece.row} for each of dp {sizes.dp}",
            ),
        ]
        for holds, text in rules:
            if not holds:
                raise UserError(f"{text}: change the mesh or the batch")

    @cached_property
    def piece(self) -> Piece:
        sizes = self.sizes
        return Piece(
            config=self.job.config,
            context=self.job.context,
            samples=self.samples,
            cp=sizes.cp,
            tp=sizes.tp,
            etp=sizes.etp,
            ep=sizes.ep,
            balanced=self.balanced,
            groups=self.groups,
            load=self.load,
            number=self.number,
        )

    @property
    def world(self) -> int:
        return self.sizes.pp * self.sizes.dp * self.sizes.cp * self.sizes.tp

    @property
    def micro_batches(self) -> int:
        return self.job.batch // (self.sizes.dp * self.piece.row)

    @cached_property
    def stages(self) -> tuple["Stage", ...]:
        return cut_stages(self.job.config, self.job.context, self.sizes.pp)

    def group(self, axis: str) -> Group:
        """Who talks along an axis; "dp x cp" are those over whom the dense weights are sharded."""
        return groups(self.sizes)[axis]


def groups(sizes: MeshSizes) -> dict[str, Group]:
    """By axis of either mesh (`parallel/mesh.py`): the last dim of each runs over neighbouring ranks."""
    s = sizes
    found = [
        Group("tp", s.tp, 1),
        Group("cp", s.cp, s.tp),
        Group("dp x cp", s.dp * s.cp, s.tp),
        Group("pp", s.pp, s.dp * s.cp * s.tp),
        Group("ep", s.ep, 1),
        Group("etp", s.etp, s.ep),
        Group("edp", s.edp, s.ep * s.etp),
    ]
    return {group.axis: group for group in found}


class Stage(NamedTuple):
    """The layers of one stage of the pipeline."""

    place: int
    layers: str  # one letter each
    is_first: bool  # with the embedding
    is_last: bool  # with the last norm and the head


@functools.lru_cache
def cut_stages(config: ModelConfig, context: int, pp: int) -> tuple[Stage, ...]:
    """Runs of layers such that the stage with most to compute has as little as can be; the last has the head too."""
    costs = [_forward_cost(config, context, kind) for kind in config.layers]
    costs[-1] += 2 * config.vocab_size * config.hidden_size
    borders = _even_borders(costs, pp)
    return tuple(
        Stage(place, config.layers[borders[place] : borders[place + 1]], place == 0, place == pp - 1)
        for place in range(pp)
    )


def _even_borders(costs: list[float], parts: int) -> list[int]:
    """Where to cut `costs` into runs, none empty, so that the largest sum is as small as can be."""
    count, sums = len(costs), [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[end] and where the last of `part` runs that cover the first `end` costs begins
    best, begins = list(sums), []
    for part in range(2, parts + 1):
        choices = [
            min(((max(best[start], sums[end] - sums[start]), start) for start in range(part - 1, end)), default=(0, 0))
            for end in range(count + 1)
        ]
        best, begins = [cost for cost, _ in choices], [*begins, [start for _, start in choices]]
    borders = [count]
    for row in reversed(begins):
        borders.append(row[borders[-1]])
    return [*borders, 0][::-1]


class Operations(NamedTuple):
    """Of a token's forward pass through a layer, multiplications and additions counted apart."""

    products: float  # with the weights that are not experts'
    experts: float
    attention: float  # without the products with weights


def operations(config: ModelConfig, context: int, kind: str) -> Operations:
    """Softmax attention over half of the sample, lightning in blocks: scores, values, state, read-out."""
    hidden, inner = config.hidden_size, config.attention_size
    if kind == LIGHTNING:
        products, attention = 5 * hidden * inner, (4 * BLOCK + 4 * config.head_dim) * inner
    else:
        products = 2 * hidden * inner + 2 * hidden * config.num_kv_heads * config.head_dim
        attention = 4 * (context / 2) * inner
    experts = config.experts_per_token * 3 * hidden * config.expert_size
    return Operations(2 * (products + hidden * config.num_experts), 2 * experts, attention)


def needed_operations(config: ModelConfig, context: int) -> float:
    """Of a token's training, forward and backward, none counted twice: what a share of the peak rate (MFU) is of."""
    layers = sum(sum(operations(config, context, kind)) for kind in config.layers)
    return 3 * (layers + 2 * config.vocab_size * config.hidden_size)


def _forward_cost(config: ModelConfig, context: int, kind: str) -> float:
    return sum(operations(config, context, kind))


class Weights(NamedTuple):
    """Numbers of a rank when nothing is sharded by FSDP."""

    dense: int
    experts: int
    copied: int  # of the dense ones, those that all ranks of tp hold alike

    def gathered(self, number: int) -> int:
        """Bytes as FSDP gathers them: experts as products take them, in numbers of so many bytes, the rest in fp32."""
        return self.dense * FP32 + self.experts * number


@functools.lru_cache(maxsize=4096)
def layer_weights(config: ModelConfig, sizes: MeshSizes, kind: str) -> Weights:
    """Of one layer."""
    hidden, inner = config.hidden_size, config.attention_size
    copied = 2 * hidden + hidden * config.num_experts  # two norms and the router
    if kind == LIGHTNING:
        split = (5 * hidden * inner + inner) // sizes.tp
    else:
        split, keys = 2 * hidden * inner // sizes.tp, 2 * hidden * config.num_kv_heads * config.head_dim
        # With fewer heads of keys than ranks each holds all of them.
        if config.num_kv_heads % sizes.tp:
            copied += keys
        else:
            split += keys // sizes.tp
    experts = config.num_experts // sizes.ep * 3 * hidden * config.expert_size // sizes.etp
    return Weights(copied + split, experts, copied)


def end_weights(config: ModelConfig, sizes: MeshSizes, stage: Stage) -> int:
    """Of a stage beside its layers: embedding, head with the last norm, or both."""
    words = -(-config.vocab_size // sizes.tp) * config.hidden_size
    return stage.is_first * words + stage.is_last * (words + config.hidden_size)


@functools.lru_cache(maxsize=4096)
def stage_weights(config: ModelConfig, sizes: MeshSizes, stage: Stage) -> Weights:
    """Of all layers of a stage, embedding and head."""
    each = {kind: layer_weights(config, sizes, kind) for kind in (LIGHTNING, SOFTMAX)}
    dense, experts, copied = (sum(each[kind][part] for kind in stage.layers) for part in range(3))
    ends = end_weights(config, sizes, stage)
    return Weights(dense + ends, experts, copied + stage.is_last * config.hidden_size)
