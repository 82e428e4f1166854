"""One layer: an attention and a mixture of experts, each with the normed residual.

For input x:  n1 = norm(x);  h = alpha n1 + beta mixer(n1);  n2 = norm(h);  y = alpha n2 + beta experts(n2).
"""

from torch import Tensor, nn

from fulmen.model.cache import LayerCache
from fulmen.model.config import LIGHTNING, ModelConfig
from fulmen.model.lightning import LightningAttention
from fulmen.model.moe import MixtureOfExperts
from fulmen.model.norm import RMSNorm
from fulmen.model.softmax import SoftmaxAttention
from fulmen.ops.experts import Routing


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
        cache: LayerCache | None = None,
        cu_seqlens: Tensor | None = None,
        capacity_factor: float | None = None,
    ) -> tuple[Tensor, Routing]:
        normed = self.input_layernorm(x)
        mixed = self.mix(normed, rotary, cache, cu_seqlens)
        normed = self.post_attention_layernorm(normed, branch=mixed, alpha=self.mixer_alpha, beta=self.mixer_beta)
        return self.block_sparse_moe(normed, capacity_factor, alpha=self.mlp_alpha, beta=self.mlp_beta)

    def mix(
        self, normed: Tensor, rotary: tuple[Tensor, Tensor], cache: LayerCache | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """What the attention makes of its normed input, the same shape: all in a layer that looks at other tokens."""
        position = () if self.is_lightning else (rotary,)
        return self.self_attn(normed, *position, cache=cache, cu_seqlens=cu_seqlens)
