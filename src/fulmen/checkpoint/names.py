"""Tensor names: ours and the published ones, mapped by one function that reading and writing share.

Our module names are the published ones without `model.`, except that the experts of a layer are stacked in two tensors,
while files hold each expert's three matrices on their own (minimax-01.md section 10):

    layers.0.block_sparse_moe.experts.w13[e]  [2F, D]  =  ...experts.{e}.w1.weight over ...experts.{e}.w3.weight
    layers.0.block_sparse_moe.experts.w2[e]   [D, F]   =  ...experts.{e}.w2.weight
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from fulmen.model import LanguageModel, VisionLanguageModel
from fulmen.model.config import LIGHTNING

Model = LanguageModel | VisionLanguageModel

TEXT = "language_model."
"""What the names of a vision-language model's text model begin with, in files as in ours."""

UNUSED = ("post_layernorm.weight", "post_layernorm.bias", "embeddings.position_ids")
"""What CLIP's tower has behind the last layer, or counts, and other writers keep."""

# transformers keeps constants of its block form as buffers and saves them.
DECAY_BUFFERS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")


class Piece(NamedTuple):
    """A tensor of a file, and the part of one of our parameters that it holds."""

    name: str  # in the file
    parameter: str  # in our model
    index: tuple[int | slice, ...]  # parameter[index] is the tensor of the file; () is all of it
    shape: tuple[int, ...]  # of the tensor of the file


def published_pieces(model: Model) -> list[Piece]:
    """What a published checkpoint of this model holds; the model may be on the meta device."""
    return [
        piece for parameter, tensor in model.named_parameters() for piece in _pieces_of_parameter(parameter, tensor)
    ]


def stacked_pieces(model: Model) -> list[Piece]:
    """The same under the names that transformers uses in memory, for files written without its renaming."""
    renamed = {".experts.w13": ".experts.gate_up_proj", ".experts.w2": ".experts.down_proj"}
    pieces = []
    for parameter, tensor in model.named_parameters():
        name = _published(parameter).replace(".block_sparse_moe.", ".mlp.")
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs) if name.endswith(ours) else name
        pieces.append(Piece(name, parameter, (), tuple(tensor.shape)))
    return pieces


def ignored_names(model: Model) -> set[str]:
    """What transformers adds and a reader passes over, since it follows from the configuration."""
    prefix, text = ("", model) if isinstance(model, LanguageModel) else (TEXT, model.language_model)
    lightning = [layer for layer, kind in enumerate(text.config.layers) if kind == LIGHTNING]
    names = {f"{prefix}model.layers.{layer}.self_attn.{buffer}" for layer in lightning for buffer in DECAY_BUFFERS}
    return names | {f"vision_tower.vision_model.{name}" for name in UNUSED if text is not model}


def text_model(model: Model) -> LanguageModel:
    """Itself, or that of a vision-language model."""
    return model if isinstance(model, LanguageModel) else model.language_model


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
    """Of a parameter whose model is `LanguageModel` or has one as `language_model`."""
    if parameter.startswith(TEXT):
        return TEXT + _published(parameter.removeprefix(TEXT))
    if parameter.startswith(("lm_head.", "vision_tower.", "multi_modal_projector.", "image_newline")):
        return parameter
    return f"model.{parameter}"
