"""Bits per byte of held-out text."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from fulmen.checkpoint import find_checkpoint, load_model
from fulmen.config import UserError
from fulmen.data import Batch, Document, Tokenizer, held_out_batches, read_documents, split
from fulmen.model import LanguageModel, VisionLanguageModel, choose_device


@torch.no_grad()
def bits_per_byte(
    model: LanguageModel | VisionLanguageModel,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    max_tokens: int = 16384,
    sequence_length: int = 512,
) -> float:
    """-log2 of the probability that the model gives to documents without images, over the bytes of their text."""
    device = next(model.parameters()).device
    batches: list[Batch] = held_out_batches(
        documents, tokenizer, batch_tokens=8192, sequence_length=sequence_length, max_tokens=max_tokens
    )
    lengths, nll, size = tokenizer.byte_lengths(), 0.0, 0
    for batch in batches:
        tokens, targets = batch.tokens.to(device), batch.targets.to(device)
        nll += model.loss(tokens, targets, cu_seqlens=batch.cu_seqlens).nll.item()
        size += lengths[batch.targets[batch.targets >= 0]].sum().item()
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
    bits = bits_per_byte(model, tokenizer, documents, max_tokens=max_tokens)
    return [{"text": ", ".join(sources), "bits per byte": bits}]
