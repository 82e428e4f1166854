"""The linear layer of the text model."""

from torch import Tensor, nn

from fulmen.ops.linear import linear


class Linear(nn.Linear):
    """`fulmen.ops.linear.linear` with its weight [out_features, in_features]; no bias, as in all of MiniMax-01."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)
