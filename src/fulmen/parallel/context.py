"""Context parallelism: what a model's attentions take in the place of a cache where a rank holds a slice of a row.

cut = Cut.of(cu_seqlens, ranks)                                    # of the whole row, the same on every rank
loss = model.loss(cut.take(tokens, rank), cut.take(targets, rank), cache=SliceContext(model.config, cut, group))
"""

import torch.distributed as dist
from torch import Tensor

from fulmen.config import UserError
from fulmen.model.cache import NextTokens, check_positions
from fulmen.model.config import LIGHTNING, ModelConfig
from fulmen.parallel.cut import Cut
from fulmen.parallel.lasp import lasp_attention
from fulmen.parallel.ring import ring_attention


class SliceContext:
    """A `SequenceCache` of the other ranks' tokens: lightning layers ask by LASP+, softmax layers round the ring.

    For one pass over the row `cut`, forward and backward, of which this rank of `group` holds its slice.
    """

    def __init__(self, config: ModelConfig, cut: Cut, group: dist.ProcessGroup):
        self._cut, self._rank = cut, dist.get_rank(group)
        kinds = {True: _LightningSlice(cut, group), False: _SoftmaxSlice(cut, group)}
        self.layers = [kinds[kind == LIGHTNING] for kind in config.layers]

    def check(self, tokens: Tensor, config: ModelConfig) -> None:
        if tokens.shape != (1, self._cut.length(self._rank)):
            raise UserError(
                f"rank {self._rank} of {self._cut.ranks} holds {self._cut.length(self._rank)} tokens of one row of "
                f"{self._cut.borders[-1]}, got tokens {tuple(tokens.shape)}"
            )
        check_positions(self._cut.longest, config)

    def positions(self, tokens: Tensor) -> Tensor:
        return self._cut.positions(self._rank)[None].to(tokens.device, non_blocking=True)

    def next_tokens(self, x: Tensor) -> NextTokens | None:
        """None: nothing is decoded here."""

    def advance(self, count: int) -> None:
        """Nothing: a slice has its tokens once."""

    def stepped(self) -> None:
        """Never called, as there are no `next_tokens`."""


class _LightningSlice:
    def __init__(self, cut: Cut, group: dist.ProcessGroup):
        self._place = cut, group

    def attend(self, qkv: Tensor, rates: Tensor) -> Tensor:
        return lasp_attention(qkv, rates, *self._place)


class _SoftmaxSlice:
    def __init__(self, cut: Cut, group: dist.ProcessGroup):
        self._place = cut, group

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(q, k, v, *self._place)
