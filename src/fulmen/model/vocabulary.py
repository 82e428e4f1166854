"""What has a row for each token of the vocabulary: the embedding and the head."""

from typing import NamedTuple

from torch import Tensor, nn

from fulmen.model.linear import Linear
from fulmen.ops.linear import linear_f32, product_dtype
from fulmen.ops.loss import IGNORE, linear_cross_entropy


class Inserted(NamedTuple):
    """Vectors that stand in place of some tokens' embeddings."""

    places: Tensor  # [N] int64, in the tokens [B, T] laid end to end
    vectors: Tensor  # [N, hidden]


class Embedding(nn.Embedding):
    """Tokens as vectors, with its weight [V, hidden]."""

    def reset_parameters(self) -> None:
        """Nothing, as of `Linear`."""

    def forward(self, tokens: Tensor, inserted: Inserted | None = None) -> Tensor:
        """[B, T, hidden]; a GPU keeps what goes from layer to layer in autocast's dtype, and each sum of it in fp32."""
        x = self.rows(tokens)
        if inserted is not None:
            vectors = inserted.vectors.to(x.dtype)
            x = x.flatten(0, 1).index_copy(0, inserted.places, vectors).view_as(x)
        return x.to(product_dtype(x)) if x.is_cuda else x

    def rows(self, tokens: Tensor) -> Tensor:
        """The tokens' rows of the weight, [B, T, hidden]."""
        return super().forward(tokens)


class Head(Linear):
    """Logits, with its weight [V, hidden]; in fp32 whatever the weight's dtype."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to [..., V] fp32."""
        return linear_f32(hidden, self.weight)

    def nll(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """-log p(target) summed over the targets [B, T] int64 (-100: none) of hidden [B, T, hidden], and their number.

        Without holding all logits: `fulmen.ops.loss`.
        """
        return linear_cross_entropy(hidden.flatten(0, 1), self.weight, targets.flatten()), (targets != IGNORE).sum()
