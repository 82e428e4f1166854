"""A model as a published checkpoint: one shard at a time, under the published names, whole or not at all."""

import functools
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fulmen.checkpoint.config import CONFIG_FILE, config_keys
from fulmen.checkpoint.folder import replaced_folder, write_json
from fulmen.checkpoint.generation import GENERATION_FILE
from fulmen.checkpoint.names import Model, Piece, published_pieces, text_model
from fulmen.checkpoint.processor import write_processor
from fulmen.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from fulmen.config import UserError
from fulmen.data import Tokenizer
from fulmen.model import VisionLanguageConfig

# transformers refuses files without it.
METADATA = {"format": "pt"}


def save_model(
    model: Model,
    path: str | Path,
    dialect: str = "original",
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5 * 2**30,
    eos_id: int | None = None,
    bos_id: int | None = None,
    weights: Callable[[str], Tensor] | None = None,
) -> None:
    """Write the model, in the dtype that it has, as a checkpoint folder `path`.

    Tensors are written from where they lie: without a copy on the CPU, with one shard's copy from another device. An
    existing checkpoint at `path` is replaced, tokenizer included, once the new one is complete and on the disk.

    Args:
        dialect: "original" or "transformers"; they differ in config.json and, for a model that sees, in what
            transformers needs beside it: the files of `write_processor` and a key in generation_config.json.
        tokenizer: saved beside the weights; gives `eos_id` and `bos_id` where these are None.
        max_shard_bytes: bytes of tensors in one file, except where one tensor is larger. A checkpoint that fits in one
            file is a single one without an index.
        weights: where the model itself is on the meta device, gives each parameter by its name, once, in the order of
            `named_parameters`.

    Raises:
        UserError: the dialect cannot say what the model is; `path` holds something else than a checkpoint; the
            tokenizer has more entries than the model; weights are int8; the disk refuses.
    """
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    if tokenizer is not None:
        size = text_model(model).config.vocab_size
        if tokenizer.vocab_size > size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} entries, the model only {size}: "
                "save it with the tokenizer that it was trained with"
            )
        eos_id = tokenizer.eos_id if eos_id is None else eos_id
        bos_id = tokenizer.bos_id if bos_id is None else bos_id
    if int8 := [name for name, parameter in model.named_parameters() if parameter.dtype == torch.int8]:
        raise UserError(f"{int8[0]} is int8, which no checkpoint holds: save the model that it was made from")
    dtype = text_model(model).embed_tokens.weight.dtype
    keys = config_keys(model.config, dialect, dtype=dtype, eos_id=eos_id, bos_id=bos_id)
    llava = dialect == "transformers" and isinstance(model.config, VisionLanguageConfig)
    with replaced_folder(Path(path)) as draft:
        write_json(draft / CONFIG_FILE, keys)
        write_json(draft / GENERATION_FILE, {"bos_token_id": bos_id, "eos_token_id": eos_id})
        _write_shards(model, draft, max_shard_bytes, weights or model.get_parameter)
        if tokenizer is not None:
            tokenizer.save(draft)
        if llava:
            write_processor(model.config, draft, tokenizer)
        # Some libraries give their files to the owner alone.
        for file in draft.iterdir():
            shutil.copymode(draft / CONFIG_FILE, file)


def _write_shards(model: Model, folder: Path, max_shard_bytes: int, weights: Callable[[str], Tensor]) -> None:
    shards = _split(published_pieces(model), max_shard_bytes, text_model(model).embed_tokens.weight.itemsize)
    count = len(shards)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = [SINGLE_FILE]
    else:
        weight_map = {piece.name: name for name, shard in zip(names, shards, strict=True) for piece in shard}
        total = sum(parameter.nbytes for parameter in model.parameters())
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    # One at a time, as a parameter of several pieces may end in another file.
    weight = functools.lru_cache(maxsize=1)(lambda name: weights(name).detach())
    for name, shard in zip(names, shards, strict=True):
        tensors = {piece.name: weight(piece.parameter)[piece.index].contiguous() for piece in shard}
        save_file(tensors, folder / name, METADATA)


def _split(pieces: Sequence[Piece], max_bytes: int, itemsize: int) -> list[list[Piece]]:
    """In order, each shard as full as it may be."""
    shards: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        size = math.prod(piece.shape) * itemsize
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(piece)
        room -= size
    return shards
