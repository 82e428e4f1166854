"""A checkpoint folder that appears, or is replaced, as a whole."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fulmen.checkpoint.config import CONFIG_FILE
from fulmen.config import UserError
from fulmen.run.files import sync, sync_folder

# What a checkpoint consists of; a folder with anything else in it is somebody's, and is not replaced.
CHECKPOINT_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "coca.json",
    "coca.safetensors",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A draft folder beside `path` that takes its name once the block ends well; otherwise it is deleted.

    An existing checkpoint at `path` stays until then. A process that is killed leaves the draft, which the next write
    takes over; killed between the two renames, it leaves the old checkpoint as `.NAME.replaced`, which the next write
    puts back first.

    Raises UserError if `path` is not free, empty or a checkpoint, and if the disk refuses.
    """
    path = path.resolve()
    draft, replaced = (path.with_name(f".{path.name}.{role}") for role in ("draft", "replaced"))
    try:
        _put_back(replaced, path)
        _check_replaceable(path)
        shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            yield draft
            _sync_all(draft)
            if path.exists():
                path.rename(replaced)
            draft.rename(path)
            sync_folder(path.parent)
        except BaseException:
            _put_back(replaced, path)
            shutil.rmtree(draft, ignore_errors=True)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the checkpoint {path}: {reason}; nothing was changed") from error


def write_json(file: Path, content: Any) -> None:
    """A JSON file of a checkpoint's draft, with a line for each key."""
    file.write_text(json.dumps(content, indent=2) + "\n")


def _check_replaceable(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file: name a folder for the checkpoint")
    names = sorted(entry.name for entry in path.iterdir())
    foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in CHECKPOINT_FILES)]
    if foreign:
        raise UserError(f"{path} holds {foreign[0]}, which is no part of a checkpoint: choose another folder")
    if names and CONFIG_FILE not in names:
        raise UserError(f"{path} has files but no {CONFIG_FILE}, so it is no checkpoint: choose another folder")


def _put_back(replaced: Path, path: Path) -> None:
    if replaced.exists() and not path.exists():
        replaced.rename(path)


def _sync_all(folder: Path) -> None:
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            sync(opened)
    sync_folder(folder)
