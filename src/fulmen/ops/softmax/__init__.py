"""Softmax attention: causal, grouped-query, packed or against cached keys, over PyTorch's kernels."""

from fulmen.ops.softmax.attention import softmax_attention

__all__ = ["softmax_attention"]
