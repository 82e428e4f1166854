"""The language model: embedding, layers (`layer.py`), norm, head.

Module names are those of the published checkpoints, but for the stacked experts.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fulmen.config import UserError
from fulmen.model.cache import Cache, SequenceCache, check_positions
from fulmen.model.config import ModelConfig
from fulmen.model.layer import DecoderLayer
from fulmen.model.lightning import LightningAttention
from fulmen.model.moe import MixtureOfExperts
from fulmen.model.norm import RMSNorm
from fulmen.model.softmax import SoftmaxAttention
from fulmen.model.step import decode_step
from fulmen.model.vocabulary import Embedding, Head, Inserted
from fulmen.ops.experts import Routing, balance_loss
from fulmen.ops.packing import check_borders
from fulmen.ops.rotary import rotary_tables


class TrainingLoss(NamedTuple):
    """What `LanguageModel.loss` gives back; sums, so that micro batches add up."""

    nll: Tensor  # sum over targets of -log p(target), nats, fp32 scalar
    targets: Tensor  # number of targets, int64 scalar
    balance: Tensor  # balance loss, mean over layers; 1 is perfect balance
    routing: list[Routing]  # of each layer


class LanguageModel(nn.Module):
    """A MiniMax-01 text model of any size (arXiv:2501.08313, section 2).

    `model(tokens)` gives logits; `model.loss(...)` the training loss; both take packed samples, `model(...)` also a
    cache. Weights are drawn by Xavier with DeepNorm's gain (8 L)^-0.25, from torch's global generator.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        if not self.lm_head.weight.is_meta:
            self.init_weights()

    def init_weights(self) -> None:
        """Draw all weights anew."""
        for part in self.parts():
            self.init_part(part)

    def parts(self) -> Iterator[nn.Module]:
        """All that has weights, in the order in which they are drawn: embedding, head, layers, last norm."""
        yield from (self.embed_tokens, self.lm_head, *self.layers, self.norm)

    @torch.no_grad()
    def init_part(self, part: nn.Module) -> None:
        """Draw the weights of one of `parts` anew."""
        gain = (8 * self.config.num_layers) ** -0.25
        for module in part.modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, Embedding | Head):
                nn.init.xavier_normal_(module.weight)
            elif isinstance(module, LightningAttention | SoftmaxAttention | MixtureOfExperts):
                module.init_weights(gain)

    def new_cache(self, batch_size: int) -> Cache:
        """An empty cache for `batch_size` sequences that advance together."""
        return Cache(self.config, batch_size)

    def forward(
        self, tokens: Tensor, *, cache: SequenceCache | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Logits [B, T, V] fp32 of tokens [B, T] int64.

        Args:
            cache: from `new_cache`, or a `PoolBatch`; the tokens continue what it holds, and it is advanced in place.
            cu_seqlens: [N+1] int32 borders of N samples packed into one row (B == 1), which do not see each other.

        Raises:
            UserError: the positions exceed `config.max_positions`.
        """
        return self.logits(self.hidden(tokens, cache=cache, cu_seqlens=cu_seqlens)[0])

    def hidden(
        self,
        tokens: Tensor,
        *,
        cache: SequenceCache | None = None,
        cu_seqlens: Tensor | None = None,
        capacity_factor: float | None = None,
        checkpoint_layers: bool = False,
        inserted: Inserted | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """The normed output of the last layer [B, T, hidden], and each layer's routing; arguments as for `forward`.

        `inserted` takes the place of what some tokens would be embedded as. `capacity_factor` turns token-drop on;
        `checkpoint_layers` keeps only each layer's input for the backward pass.
        """
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.cpu()  # its layers look at the borders on the host; here a GPU is waited for once
        self._check(tokens, cache, cu_seqlens)
        x, routings = self.embed_tokens(tokens, inserted), []
        if cache is not None and (decoded := decode_step(self, x, cache)):
            return decoded
        positions = _positions(tokens, cu_seqlens) if cache is None else cache.positions(tokens)
        rotary = rotary_tables(positions, self.config.rotary_dim, self.config.rope_theta)
        caches = [None] * len(self.layers) if cache is None else cache.layers
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            arguments = (x, rotary, layer_cache, cu_seqlens, capacity_factor)
            x, routing = checkpoint(layer, *arguments, use_reentrant=False) if checkpoint_layers else layer(*arguments)
            if routing is not None:  # of a layer that is here (`fulmen.parallel.pipeline`)
                routings.append(routing)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x), routings

    def logits(self, hidden: Tensor) -> Tensor:
        """The head, in fp32 whatever the weights' dtype: [..., hidden] to [..., V]."""
        return self.lm_head(hidden)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        cache: SequenceCache | None = None,
        cu_seqlens: Tensor | None = None,
        capacity_factor: float | None = None,
        checkpoint_layers: bool = False,
        inserted: Inserted | None = None,
    ) -> TrainingLoss:
        """Cross-entropy of targets [B, T] int64 (-100: none) and the balance loss, without holding all logits.

        cache: of the rest of a row of which these tokens are a slice (`fulmen.parallel`).
        """
        hidden, routing = self.hidden(
            tokens,
            cache=cache,
            cu_seqlens=cu_seqlens,
            capacity_factor=capacity_factor,
            checkpoint_layers=checkpoint_layers,
            inserted=inserted,
        )
        nll, count = self.lm_head.nll(hidden, targets)
        balance = torch.stack([balance_loss(r) for r in routing]).mean()
        return TrainingLoss(nll, count, balance, routing)

    def _check(self, tokens: Tensor, cache: SequenceCache | None, cu_seqlens: Tensor | None) -> None:
        if cache is not None:
            if cu_seqlens is not None:
                raise UserError("packed samples (cu_seqlens) cannot continue a cache")
            return cache.check(tokens, self.config)
        longest = tokens.shape[1]
        if cu_seqlens is not None:
            check_borders(cu_seqlens, *tokens.shape)
            longest = int(cu_seqlens.diff().max())
        check_positions(longest, self.config)


def _positions(tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[1, T] int64: each token's place in its sample."""
    if cu_seqlens is None:
        return torch.arange(tokens.shape[1], device=tokens.device)[None]
    places = torch.arange(tokens.shape[1]) - cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    return places[None].to(tokens.device, non_blocking=True)
