"""The rows of choices: each token's numbers copied to where its choices' rows lie, and rows summed back per token.

A token has k choices; row_of [T, k] says where each one's row lies, -1 for a dropped choice, and tokens [R] which token
each row is of. Letters: T tokens, R rows, D hidden.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops import gpu


def permute(x: Tensor, tokens: Tensor) -> Tensor:
    """Each row's token: [T, D] to [R, D]; on a GPU -1 in `tokens` gives zeros."""
    return gpu.experts.permute(x, tokens) if gpu.serves(x) else x.index_select(0, tokens)


def sum_per_token(rows_RD: Tensor, row_of: Tensor, residual: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """Sum the rows of each token's kept choices: [R, D] to [T, D]; on a GPU alpha * residual [T, D] as well."""
    if gpu.serves(rows_RD):
        return gpu.experts.unpermute(rows_RD, row_of, residual=residual, alpha=alpha)
    if len(rows_RD) == 0:
        return rows_RD.new_zeros(len(row_of), rows_RD.shape[1])
    # A dropped choice reads some row and counts it as zero.
    dropped = row_of < 0
    some_dropped, rows, total = bool(dropped.any()), row_of.clamp(min=0), None
    for slot in range(rows.shape[1]):
        part = rows_RD.index_select(0, rows[:, slot])
        if some_dropped:
            part.masked_fill_(dropped[:, slot, None], 0)
        total = part if total is None else total.add_(part)
    return total


class Places(NamedTuple):
    """Where the choices' rows lie and whose they are; may be given to an autograd function as it is."""

    row_of: Tensor  # [T, k] int64
    tokens: Tensor  # [R] int64


class RowsOfTokens(torch.autograd.Function):
    """`permute` with its gradient: x [T, D], Places to rows [R, D].

    Neither this nor its inverse counts its places as saved: for what is, a checkpointed layer is computed again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, places: Places):
        ctx.places = places
        return permute(x, places.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rows: Tensor):
        return sum_per_token(d_rows.contiguous(), ctx.places.row_of), None


class SumsOfRows(torch.autograd.Function):
    """`sum_per_token` with its gradient: rows [R, D], Places to [T, D]."""

    @staticmethod
    def forward(ctx, rows: Tensor, places: Places):
        ctx.places = places
        return sum_per_token(rows, places.row_of)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        return permute(d_out, ctx.places.tokens), None
