"""The lightning attention layer: packed projection, SiLU, decaying linear attention, norm over all heads, gate."""

import torch
from torch import Tensor, nn

from fulmen.model.cache import LayerCache
from fulmen.model.config import ModelConfig
from fulmen.model.fp32 import KeepsFp32
from fulmen.model.linear import Linear
from fulmen.model.norm import RMSNorm
from fulmen.ops.lightning import decay_rates, silu_lightning_attention
from fulmen.ops.linear import product_dtype


class LightningAttention(KeepsFp32):
    """y = W_out (RMSNorm(attention(SiLU(W_qkv x))) * sigmoid(W_gate x)) (MiniMax-01, section 2.2; released code).

    The rows of `qkv_proj` are packed head by head: q, k, v of head 0, then of head 1, and so on.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        inner = config.attention_size
        self.heads_shape = (config.num_heads, 3, config.head_dim)
        self.qkv_proj = Linear(config.hidden_size, 3 * inner)
        self.output_gate = Linear(config.hidden_size, inner)
        self.norm = RMSNorm(inner, config.lightning_norm_eps)
        self.out_proj = Linear(inner, config.hidden_size)
        self.rates = nn.Buffer(decay_rates(config.num_heads, layer, config.num_layers), persistent=False)

    def init_weights(self, gain: float) -> None:
        """Xavier; the DeepNorm `gain` on values and output."""
        qkv = self.qkv_proj.weight.unflatten(0, self.heads_shape)
        for part, part_gain in enumerate((1.0, 1.0, gain)):
            rows = torch.empty_like(qkv[:, part].flatten(0, 1))
            qkv.data[:, part] = nn.init.xavier_normal_(rows, part_gain).view_as(qkv[:, part])
        nn.init.xavier_normal_(self.output_gate.weight)
        nn.init.xavier_normal_(self.out_proj.weight, gain)

    def forward(self, x: Tensor, *, cache: LayerCache | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """x [B, T, hidden] to the same shape; see `LanguageModel` for the rest."""
        x = x.to(product_dtype(x))  # once for both products
        qkv = self.qkv_proj(x).unflatten(-1, self.heads_shape)
        if cache is None:
            out, _ = silu_lightning_attention(qkv, self.rates, cu_seqlens=cu_seqlens)
        else:
            out = cache.attend(qkv, self.rates)
        return self.out_proj(self.norm(out.flatten(2), self.output_gate(x)))
