"""Bits per byte of held-out text."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fulmen.checkpoint import find_checkpoint, load_model
from fulmen.config import UserError
from fulmen.data import Batch, Tokenizer, held_out_batches, read_documents, split
from fulmen.model import LanguageModel, VisionLanguageModel, choose_device

SEQUENCE_LENGTH = 512
"""Tokens that a document is cut into, as by the default of a recipe."""


@torch.no_grad()
def bits_per_byte(model: LanguageModel | VisionLanguageModel, batches: Sequence[Batch], byte_lengths: Tensor) -> float:
    """-log2 of the probability that the model gives to batches without images, over the bytes of their targets.

    byte_lengths: [V] int64, of `Tokenizer.byte_lengths`.
    """
    device = next(model.parameters()).device
    nll, size = 0.0, 0
    for batch in batches:
        tokens, targets = batch.tokens.to(device), batch.targets.to(device)
        nll += model.loss(tokens, targets, cu_seqlens=batch.cu_seqlens).nll.item()
        size += byte_lengths[batch.targets[batch.targets >= 0]].sum().item()
    return nll / math.log(2) / size


def text_table(
    path: str | Path, sources: Sequence[str], *, held_out: float, max_tokens: int, device: str = "auto"
) -> list[dict]:
    """Of the documents that training on these sources with this share held out."""
    path = find_checkpoint(path)
    model, tokenizer = load_model(path, device=choose_device(device)), Tokenizer.load(path)
    documents = split(read_documents(sources), held_out)[1]
    if not len(documents):
        raise UserError("nothing is held out: give a share above 0")
    shape = {"batch_tokens": 8192, "sequence_length": SEQUENCE_LENGTH, "max_tokens": max_tokens}
    batches = held_out_batches(documents, tokenizer, **shape)
    return [{"text": ", ".join(sources), "bits per byte": bits_per_byte(model, batches, tokenizer.byte_lengths())}]
