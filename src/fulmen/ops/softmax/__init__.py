"""Softmax attention: causal, grouped-query, packed or against cached keys, over PyTorch's kernels."""

from fulmen.ops.softmax.attention import softmax_attention
from fulmen.ops.softmax.paged import Pages, paged_attention_

__all__ = ["Pages", "paged_attention_", "softmax_attention"]
