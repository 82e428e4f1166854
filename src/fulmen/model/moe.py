"""The mixture-of-experts layer: router and stacked experts."""

import torch
from torch import Tensor, nn

from fulmen.model.config import ModelConfig
from fulmen.model.fp32 import KeepsFp32
from fulmen.model.linear import Linear
from fulmen.ops.experts import Routing, experts_mlp, limit, route
from fulmen.ops.int8 import Int8
from fulmen.ops.linear import linear_f32


class Experts(KeepsFp32):
    """All experts' matrices stacked: w13 [E, 2F, D] holds each w1 (gate) over its w3 (up), w2 is [E, D, F].

    Of int8 matrices the scales of rows are s13 [E, 2F] and s2 [E, D], see `int8.py`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        shape = (config.num_experts, config.hidden_size, config.expert_size)
        self.w13 = nn.Parameter(torch.empty(shape[0], 2 * shape[2], shape[1]))
        self.w2 = nn.Parameter(torch.empty(shape))
        self.register_buffer("s13", None, persistent=False)
        self.register_buffer("s2", None, persistent=False)

    @property
    def matrices(self) -> tuple[Tensor, Tensor] | tuple[Int8, Int8]:
        """As the products take them."""
        if self.s13 is None:
            return self.w13, self.w2
        return Int8(self.w13, self.s13), Int8(self.w2, self.s2)

    def limit(self, routing: Routing, factor: float) -> Routing:
        """Let each expert take its capacity of the tokens' choices, see `fulmen.ops.experts.limit`."""
        return limit(routing, factor)

    def forward(self, x: Tensor, routing: Routing, *, alpha: float = 0.0, beta: float = 1.0) -> Tensor:
        """alpha * x + beta * experts(x) of x [T, hidden], see `fulmen.ops.experts.experts_mlp`."""
        return experts_mlp(x, *self.matrices, routing, alpha=alpha, beta=beta)


class MixtureOfExperts(nn.Module):
    """Top-k of E experts a token, the router in fp32 (MiniMax-01, section 2)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.experts_per_token = config.experts_per_token
        self.gate = Linear(config.hidden_size, config.num_experts)
        self.experts = Experts(config)

    def init_weights(self, gain: float) -> None:
        """Xavier per matrix; the DeepNorm `gain` on the experts."""
        nn.init.xavier_normal_(self.gate.weight)
        for matrix in (*self.experts.w13.unflatten(1, (2, -1)).flatten(0, 1), *self.experts.w2):
            nn.init.xavier_normal_(matrix, gain)

    def forward(
        self, x: Tensor, capacity_factor: float | None = None, *, alpha: float = 0.0, beta: float = 1.0
    ) -> tuple[Tensor, Routing]:
        """alpha * x + beta * experts(x) of x [B, T, hidden], and where its tokens went.

        With a capacity factor an expert takes ceil(factor * k * tokens / E) choices and the rest is dropped
        (training); without, nothing is.
        """
        flat = x.flatten(0, 1)
        routing = route(linear_f32(flat, self.gate.weight), self.experts_per_token)
        if capacity_factor is not None:
            routing = self.experts.limit(routing, capacity_factor)
        return self.experts(flat, routing, alpha=alpha, beta=beta).view_as(x), routing
