"""The linear layer of the text model."""

from torch import Tensor, nn

from fulmen.model.fp32 import KeepsFp32
from fulmen.ops.int8 import Int8
from fulmen.ops.linear import linear


class Linear(KeepsFp32, nn.Linear):
    """`fulmen.ops.linear.linear` with its weight [out_features, in_features]; no bias, as in all of MiniMax-01.

    An int8 weight has `scales` [out_features], see `int8.py`.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.register_buffer("scales", None, persistent=False)

    def reset_parameters(self) -> None:
        """Nothing: `LanguageModel` draws all its weights, and only once."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight if self.scales is None else Int8(self.weight, self.scales))
