"""Mixture of experts: which expert gets which token (`routing.py`), and the experts' products (`grouped.py`)."""

from fulmen.ops.experts.grouped import experts_mlp
from fulmen.ops.experts.routing import Routing, balance_loss, expert_capacity, keep_first, limit, route

__all__ = ["Routing", "balance_loss", "expert_capacity", "experts_mlp", "keep_first", "limit", "route"]
