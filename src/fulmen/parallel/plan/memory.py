"""What a rank holds in a training step, in bytes, at the moment when it holds most.

Weights are fp32 with AdamW's two moments and gradients, sharded by FSDP; what products take is bf16. Activations are
those that the modules of `fulmen.model` keep for their backward passes on a GPU.
"""

import math

from fulmen.model.config import LIGHTNING, SOFTMAX
from fulmen.ops.lightning.parts import SHARE, SHARES
from fulmen.parallel.plan.job import (
    FP32,
    LOGITS_CHUNK,
    Piece,
    Placement,
    Stage,
    Weights,
    end_weights,
    layer_weights,
    stage_weights,
)
from fulmen.parallel.ring import BACKWARD_TENSORS, steps_ahead


def step_memory(placement: Placement, stage: Stage) -> dict[str, float]:
    """Bytes by what they are for, of a rank of one stage."""
    of_whole, piece, kept = (placement.job.config, placement.sizes, stage), placement.piece, _kept(placement, stage)
    weights, ends = stage_weights(*of_whole), end_weights(*of_whole)
    shard = shard_size(placement, weights) * FP32
    whole, unit = weights.gathered(placement.number), _largest_unit(placement, stage)
    worst = max(set(stage.layers), key=lambda kind: activations(piece, kind))
    at_hand = piece.tokens * (placement.checkpoint * activations(piece, worst) + workspace(piece))
    return {
        "weights": shard,
        # The first micro batch's gradients come as its activations go.
        "gradients": max(0.0, shard - kept) if placement.micro_batches == 1 else shard,
        "AdamW's moments": 2 * shard,
        # While one layer is computed, the next one's are under way; embedding and head stay between the passes.
        "weights gathered": whole if placement.keep else min(whole, 2 * unit.gathered(placement.number) + FP32 * ends),
        "gradients not yet reduced": _unreduced(placement, weights, unit),
        "activations kept": kept,
        "a layer at hand": at_hand,
        "logits and head": _head(placement, stage),
        "states of LASP+": _states(piece) * (LIGHTNING in stage.layers),
        "keys in the ring": _keys(piece) * (SOFTMAX in stage.layers),
        "tokens to and from experts": _dispatch(piece),
    }


def activations(piece: Piece, kind: str) -> float:
    """Bytes that a layer keeps of each of a rank's own tokens for its backward pass."""
    config = piece.config
    hidden, inner, k = config.hidden_size, config.attention_size, config.experts_per_token
    # The input, the normed one, what the attention gives and the second normed one; gathered for the heads besides.
    stream = (4 + (piece.tp if piece.tp > 1 else 0)) * hidden * piece.number
    if kind == LIGHTNING:
        attention = 6 * inner * piece.number  # q, k, v, gate, result, normed result
    else:
        keys = 2 * piece.tp * piece.kv_heads * config.head_dim
        attention = (2 * inner + keys) * piece.number + config.num_heads * FP32
    router = config.num_experts * FP32 + k * 16
    is_sent = piece.ep * piece.etp > 1
    experts = k * piece.load * (2 * config.expert_size + is_sent * piece.etp * hidden) * piece.number
    return stream + attention + router + experts


def workspace(piece: Piece) -> float:
    """Bytes for each of a rank's own tokens that a layer's backward pass takes for itself: of experts or attention."""
    config = piece.config
    hidden, inner = config.hidden_size, config.attention_size
    experts = config.experts_per_token * piece.load * (4 * config.expert_size + 2 * hidden) * piece.number
    attention = (5 * inner + 2 * piece.tp * hidden) * piece.number
    return max(experts, attention) + 2 * hidden * piece.number


def shard_size(placement: Placement, weights: Weights) -> float:
    """Numbers that a rank has of its own, by FSDP over dp x cp and over edp."""
    sizes = placement.sizes
    return weights.dense / (sizes.dp * sizes.cp) + weights.experts / sizes.edp


def _unreduced(placement: Placement, weights: Weights, unit: Weights) -> float:
    """Sums over micro batches in fp32 where weights are kept, else those of a layer as they are made and are sent."""
    if not placement.keep or placement.micro_batches == 1:
        return unit.gathered(placement.number) + FP32 * (unit.dense + unit.experts)
    sizes = placement.sizes
    return FP32 * ((sizes.dp * sizes.cp > 1) * weights.dense + (sizes.edp > 1) * weights.experts)


def _kept(placement: Placement, stage: Stage) -> float:
    """Of all layers and of the micro batches that are under way in this stage: in 1F1B the first has most."""
    piece, under_way = placement.piece, min(placement.micro_batches, placement.sizes.pp - stage.place)
    if placement.checkpoint:
        token = len(stage.layers) * piece.config.hidden_size * piece.number
    else:
        token = sum(activations(piece, kind) for kind in stage.layers)
    return under_way * piece.tokens * token


def _head(placement: Placement, stage: Stage) -> float:
    """A chunk's logits with their copy, the head's gradient in fp32, hidden states and their gradients."""
    piece = placement.piece
    if not stage.is_last:
        return 0.0
    words, hidden = piece.config.vocab_size / piece.tp, piece.config.hidden_size
    logits = 2 * min(LOGITS_CHUNK, piece.wide_tokens) * words * piece.number
    return logits + words * hidden * FP32 + 3 * piece.wide_tokens * hidden * piece.number


def _states(piece: Piece) -> float:
    """Those of all ranks of cp, what enters and leaves this one, and the sums that one of a segment is made of."""
    if not piece.ring.is_crossed:
        return 0.0
    config = piece.config
    state = config.num_heads / piece.tp * config.head_dim**2 * FP32
    segments = 1 + piece.balanced
    sums = min(SHARES, math.ceil(piece.wide_tokens / segments / SHARE))
    return segments * (piece.cp + 2 + sums) * state


def _keys(piece: Piece) -> float:
    """Keys and values that this rank gives, those of the steps under way, with their gradients, and fp32 sums."""
    if not piece.ring.steps:
        return 0.0
    numbers = 2 * piece.wide_tokens * piece.kv_heads * piece.config.head_dim
    step = BACKWARD_TENSORS * numbers * piece.number
    under_way = 1 + min(piece.ring.steps, steps_ahead(step))
    return numbers * (piece.number + FP32) + under_way * step


def _dispatch(piece: Piece) -> float:
    """Two groups of tokens at a time, sent and received, each way."""
    if piece.ep * piece.etp == 1:
        return 0.0
    rows = piece.config.experts_per_token * piece.tokens * piece.load * min(1.0, 2 / piece.token_groups)
    return 2 * (1 + piece.etp) * rows * piece.config.hidden_size * piece.number


def _largest_unit(placement: Placement, stage: Stage) -> Weights:
    each = (layer_weights(placement.job.config, placement.sizes, kind) for kind in set(stage.layers))
    return max(each, key=lambda weights: weights.gathered(placement.number))
