"""The language model: embedding, post-norm layers with the normed residual, norm, head.

A layer, for input x:  n1 = norm(x);  h = alpha n1 + beta mixer(n1);  n2 = norm(h);  y = alpha n2 + beta experts(n2).
Module names are those of the published checkpoints, but for the stacked experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fulmen.config import UserError
from fulmen.model.cache import Cache, KeyValues, LightningState
from fulmen.model.config import LIGHTNING, ModelConfig
from fulmen.model.lightning import LightningAttention
from fulmen.model.linear import Linear
from fulmen.model.moe import MixtureOfExperts
from fulmen.model.norm import RMSNorm
from fulmen.model.softmax import SoftmaxAttention
from fulmen.ops.experts import Routing, balance_loss
from fulmen.ops.linear import linear_f32
from fulmen.ops.loss import IGNORE, linear_cross_entropy
from fulmen.ops.packing import check_borders
from fulmen.ops.rotary import rotary_tables


class TrainingLoss(NamedTuple):
    """What `LanguageModel.loss` gives back; sums, so that micro batches add up."""

    nll: Tensor  # sum over targets of -log p(target), nats, fp32 scalar
    targets: Tensor  # number of targets, int64 scalar
    balance: Tensor  # balance loss, mean over layers; 1 is perfect balance
    routing: list[Routing]  # of each layer


class DecoderLayer(nn.Module):
    """One lightning or softmax attention and one mixture of experts."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.is_lightning = config.layers[layer] == LIGHTNING
        self.self_attn = LightningAttention(config, layer) if self.is_lightning else SoftmaxAttention(config)
        self.block_sparse_moe = MixtureOfExperts(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer_alpha = config.lightning_alpha if self.is_lightning else config.softmax_alpha
        self.mixer_beta = config.lightning_beta if self.is_lightning else config.softmax_beta
        self.mlp_alpha, self.mlp_beta = config.mlp_alpha, config.mlp_beta

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: LightningState | KeyValues | None = None,
        cu_seqlens: Tensor | None = None,
        capacity_factor: float | None = None,
    ) -> tuple[Tensor, Routing]:
        normed = self.input_layernorm(x)
        position = () if self.is_lightning else (rotary,)
        mixed = self.self_attn(normed, *position, cache=cache, cu_seqlens=cu_seqlens)
        normed = self.post_attention_layernorm(_residual(normed, self.mixer_alpha, mixed, self.mixer_beta))
        answer, routing = self.block_sparse_moe(normed, capacity_factor)
        return _residual(normed, self.mlp_alpha, answer, self.mlp_beta), routing


def _residual(normed: Tensor, alpha: float, branch: Tensor, beta: float) -> Tensor:
    return torch.add(branch if beta == 1 else beta * branch, normed, alpha=alpha)


class LanguageModel(nn.Module):
    """A MiniMax-01 text model of any size (arXiv:2501.08313, section 2).

    `model(tokens)` gives logits; `model.loss(...)` the training loss; both take packed samples, `model(...)` also a
    cache. Weights are drawn by Xavier with DeepNorm's gain (8 L)^-0.25, from torch's global generator.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if not self.lm_head.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights anew."""
        gain = (8 * self.config.num_layers) ** -0.25
        nn.init.xavier_normal_(self.embed_tokens.weight)
        nn.init.xavier_normal_(self.lm_head.weight)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, LightningAttention | SoftmaxAttention | MixtureOfExperts):
                module.init_weights(gain)

    def new_cache(self, batch_size: int) -> Cache:
        """An empty cache for `batch_size` sequences that advance together."""
        return Cache(self.config, batch_size)

    def forward(self, tokens: Tensor, *, cache: Cache | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] fp32 of tokens [B, T] int64.

        Args:
            cache: from `new_cache`; the tokens continue what it holds, and it is advanced in place.
            cu_seqlens: [N+1] int32 borders of N samples packed into one row (B == 1), which do not see each other.

        Raises:
            UserError: the positions exceed `config.max_positions`.
        """
        return self.logits(self.hidden(tokens, cache=cache, cu_seqlens=cu_seqlens)[0])

    def hidden(
        self,
        tokens: Tensor,
        *,
        cache: Cache | None = None,
        cu_seqlens: Tensor | None = None,
        capacity_factor: float | None = None,
        checkpoint_layers: bool = False,
    ) -> tuple[Tensor, list[Routing]]:
        """The normed output of the last layer [B, T, hidden], and each layer's routing; arguments as for `forward`.

        `capacity_factor` turns token-drop on; `checkpoint_layers` keeps only each layer's input for the backward pass.
        """
        rotary = rotary_tables(
            self._positions(tokens, cache, cu_seqlens), self.config.rotary_dim, self.config.rope_theta
        )
        caches = [None] * len(self.layers) if cache is None else cache.layers
        x, routings = self.embed_tokens(tokens), []
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            arguments = (x, rotary, layer_cache, cu_seqlens, capacity_factor)
            x, routing = checkpoint(layer, *arguments, use_reentrant=False) if checkpoint_layers else layer(*arguments)
            routings.append(routing)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x), routings

    def logits(self, hidden: Tensor) -> Tensor:
        """The head, in fp32 whatever the weights' dtype: [..., hidden] to [..., V]."""
        return linear_f32(hidden, self.lm_head.weight)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        capacity_factor: float | None = None,
        checkpoint_layers: bool = False,
    ) -> TrainingLoss:
        """Cross-entropy of targets [B, T] int64 (-100: none) and the balance loss, without holding all logits."""
        hidden, routing = self.hidden(
            tokens, cu_seqlens=cu_seqlens, capacity_factor=capacity_factor, checkpoint_layers=checkpoint_layers
        )
        nll = linear_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())
        balance = torch.stack([balance_loss(r) for r in routing]).mean()
        return TrainingLoss(nll, (targets != IGNORE).sum(), balance, routing)

    def _positions(self, tokens: Tensor, cache: Cache | None, cu_seqlens: Tensor | None) -> Tensor:
        """[1, T] int64: each token's place in its sample."""
        start = 0 if cache is None else cache.length
        if cache is not None and cache.batch_size != tokens.shape[0]:
            raise UserError(f"the cache is for {cache.batch_size} sequences, got tokens {tuple(tokens.shape)}")
        places = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        longest = start + tokens.shape[1]
        if cu_seqlens is not None:
            if cache is not None:
                raise UserError("packed samples (cu_seqlens) cannot continue a cache")
            check_borders(cu_seqlens, *tokens.shape)
            lengths = cu_seqlens.diff()
            places = places - cu_seqlens[:-1].repeat_interleave(lengths)
            longest = int(lengths.max())
        if longest > self.config.max_positions:
            raise UserError(f"{longest} positions exceed the model's max_positions {self.config.max_positions}")
        return places[None]
