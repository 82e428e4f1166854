"""Projections and experts in int8 for inference; router, head, embeddings and norms stay as they are."""

import torch
from torch import Tensor, nn

from fulmen.model.decoder import LanguageModel
from fulmen.model.vision_language import VisionLanguageModel
from fulmen.ops.int8 import quantize_rows

NAMES = {"weight": "scales", "w13": "s13", "w2": "s2"}
"""What a matrix is called in its module, and its rows' scales."""


def rest_dtype(device: torch.device | str) -> torch.dtype:
    """What the rest of an int8 model is in: a CPU's kernels compute in fp32, a GPU's products in bf16."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def int8_matrices(model: LanguageModel | VisionLanguageModel) -> dict[str, tuple[nn.Module, str]]:
    """By the names of parameters that may be int8: their modules, and what they are called there.

    Of a vision-language model it is those of its text model.
    """
    if isinstance(model, VisionLanguageModel):
        return {f"language_model.{name}": place for name, place in int8_matrices(model.language_model).items()}
    found = {}
    for index, layer in enumerate(model.layers):
        parts = {f"self_attn.{name}": child for name, child in layer.self_attn.named_children() if name != "norm"}
        parts["block_sparse_moe.experts"] = layer.block_sparse_moe.experts
        for name, module in parts.items():
            matrices = [matrix for matrix in NAMES if matrix in module._parameters]
            found |= {f"layers.{index}.{name}.{matrix}": (module, matrix) for matrix in matrices}
    return found


def allocate_int8(module: nn.Module, matrix: str, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Put an int8 parameter and its scales, of undefined content, in the place of a module's parameter."""
    shape = getattr(module, matrix).shape
    numbers = torch.empty(shape, dtype=torch.int8, device=device)
    scales = torch.empty(shape[:-1], dtype=torch.float32, device=device)
    setattr(module, matrix, nn.Parameter(numbers, requires_grad=False))
    setattr(module, NAMES[matrix], scales)
    return numbers, scales


@torch.no_grad()
def quantize_(model: LanguageModel | VisionLanguageModel) -> None:
    """Round a model's projections and experts to int8 in place; it takes no gradients from then on.

    Raises ValueError if a weight is not finite.
    """
    for module, matrix in int8_matrices(model).values():
        weight = getattr(module, matrix)
        rounded = quantize_rows(weight)
        numbers, scales = allocate_int8(module, matrix, weight.device)
        numbers.copy_(rounded.numbers)
        scales.copy_(rounded.scales)
    model.requires_grad_(False)
