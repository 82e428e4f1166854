"""The softmax attention layer: grouped queries, partial rotary positions."""

from torch import Tensor, nn

from fulmen.model.cache import LayerCache
from fulmen.model.config import ModelConfig
from fulmen.model.linear import Linear
from fulmen.ops.linear import product_dtype
from fulmen.ops.rotary import apply_rotary
from fulmen.ops.softmax import softmax_attention


class SoftmaxAttention(nn.Module):
    """Causal grouped-query attention, rotary on the first `rotary_dim` dims of q and k (MiniMax-01, section 2.1)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.attention_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(config.attention_size, config.hidden_size)

    def init_weights(self, gain: float) -> None:
        """Xavier; the DeepNorm `gain` on values and output."""
        for projection, its_gain in ((self.q_proj, 1.0), (self.k_proj, 1.0), (self.v_proj, gain), (self.o_proj, gain)):
            nn.init.xavier_normal_(projection.weight, its_gain)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        *,
        cache: LayerCache | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, hidden] to the same shape; `rotary` is cos and sin of its positions, `cache` see `cache.py`."""
        x = x.to(product_dtype(x))  # once for all three products
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        out = softmax_attention(q, k, v, cu_seqlens) if cache is None else cache.attend(q, k, v)
        return self.o_proj(out.flatten(2))
