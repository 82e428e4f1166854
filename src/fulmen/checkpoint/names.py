"""Tensor names: ours and the published ones, mapped by one function that reading and writing share.

Our module names are the published ones without `model.`, except that the experts of a layer are stacked in two tensors,
while files hold each expert's three matrices on their own (minimax-01.md section 10):

    layers.0.block_sparse_moe.experts.w13[e]  [2F, D]  =  ...experts.{e}.w1.weight over ...experts.{e}.w3.weight
    layers.0.block_sparse_moe.experts.w2[e]   [D, F]   =  ...experts.{e}.w2.weight
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from fulmen.model import LanguageModel
from fulmen.model.config import LIGHTNING

# transformers keeps constants of its block form as buffers and saves them.
DECAY_BUFFERS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")


class Piece(NamedTuple):
    """A tensor of a file, and the part of one of our parameters that it holds."""

    name: str  # in the file
    parameter: str  # in our model
    index: tuple[int | slice, ...]  # parameter[index] is the tensor of the file; () is all of it
    shape: tuple[int, ...]  # of the tensor of the file


def published_pieces(model: LanguageModel) -> list[Piece]:
    """What a published checkpoint of this model holds; the model may be on the meta device."""
    return [
        piece for parameter, tensor in model.named_parameters() for piece in _pieces_of_parameter(parameter, tensor)
    ]


def stacked_pieces(model: LanguageModel) -> list[Piece]:
    """The same under the names that transformers uses in memory, for files written without its renaming."""
    renamed = {".experts.w13": ".experts.gate_up_proj", ".experts.w2": ".experts.down_proj"}
    pieces = []
    for parameter, tensor in model.named_parameters():
        name = _published(parameter).replace(".block_sparse_moe.", ".mlp.")
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs) if name.endswith(ours) else name
        pieces.append(Piece(name, parameter, (), tuple(tensor.shape)))
    return pieces


def ignored_names(model: LanguageModel) -> set[str]:
    """What transformers adds and a reader passes over, since it follows from the configuration."""
    lightning = [layer for layer, kind in enumerate(model.config.layers) if kind == LIGHTNING]
    return {f"model.layers.{layer}.self_attn.{buffer}" for layer in lightning for buffer in DECAY_BUFFERS}


def _pieces_of_parameter(parameter: str, tensor: Tensor) -> Iterator[Piece]:
    if not parameter.endswith((".experts.w13", ".experts.w2")):
        yield Piece(_published(parameter), parameter, (), tuple(tensor.shape))
        return
    prefix, _, matrices = _published(parameter).rpartition(".")
    for expert in range(tensor.shape[0]):
        if matrices == "w2":
            yield Piece(f"{prefix}.{expert}.w2.weight", parameter, (expert,), tuple(tensor.shape[1:]))
            continue
        size = tensor.shape[1] // 2
        for matrix, rows in (("w1", slice(0, size)), ("w3", slice(size, 2 * size))):
            yield Piece(f"{prefix}.{expert}.{matrix}.weight", parameter, (expert, rows), (size, tensor.shape[2]))


def _published(parameter: str) -> str:
    return parameter if parameter.startswith("lm_head.") else f"model.{parameter}"
