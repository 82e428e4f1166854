"""generation_config.json: with which tokens a text begins and ends, and how the publisher samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulmen.checkpoint.config import CONFIG_FILE
from fulmen.checkpoint.keys import read_json
from fulmen.config import UserError
from fulmen.data import Tokenizer

GENERATION_FILE = "generation_config.json"

# The released config.json leaves its tokens null; its tokenizer has 200064 entries (minimax-01.md section 10).
RELEASED_VOCAB_SIZE, RELEASED_EOS_ID = 200_064, 200_020


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Defaults that a checkpoint gives for generation; None where it says nothing."""

    eos_ids: tuple[int, ...] = ()  # any of them ends a text
    bos_id: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


def load_generation_config(path: str | Path) -> GenerationConfig:
    """What the checkpoint folder `path` says about generation.

    A token is looked up in generation_config.json, config.json and the tokenizer, in this order; a checkpoint with the
    release's vocabulary that names no eos has 200020. Raises UserError for a missing config.json and unreadable files.
    """
    folder = Path(path)
    config = read_json(folder / CONFIG_FILE)
    if isinstance(config.get("text_config"), dict):
        config = config["text_config"] | {key: value for key, value in config.items() if value is not None}
    generation = read_json(folder / GENERATION_FILE) if (folder / GENERATION_FILE).exists() else {}
    eos, bos = (_first(generation.get(key), config.get(key)) for key in ("eos_token_id", "bos_token_id"))
    if None in (eos, bos) and (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(folder)
        eos, bos = _first(eos, tokenizer.eos_id), _first(bos, tokenizer.bos_id)
    if eos is None and config.get("vocab_size") == RELEASED_VOCAB_SIZE:
        eos = RELEASED_EOS_ID
    return GenerationConfig(
        eos_ids=_ids(eos, folder),
        bos_id=next(iter(_ids(bos, folder)), None),
        **{name: generation.get(name) for name in ("temperature", "top_k", "top_p")},
    )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _ids(value: Any, folder: Path) -> tuple[int, ...]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    for token in values:
        if type(token) is not int or token < 0:
            raise UserError(f"{folder}: a token id must be an integer >= 0, got {token!r}")
    return tuple(values)
