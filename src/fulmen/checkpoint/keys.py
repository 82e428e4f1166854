"""Reading the keys of a JSON file, each with one clear error."""

import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fulmen.config import UserError


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises UserError, naming the file, if there is none."""
    if not file.is_file():
        raise UserError(f"there is no {file.name} in {file.parent}: name the folder of a checkpoint")
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): get it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object: get it again")
    return content


def integer(raw: Mapping[str, Any], keys: Sequence[str], default: int | None = None) -> int:
    found = values(raw, keys, int, "an integer")
    return default if default is not None and not found else agreed(found, keys)


def number(raw: Mapping[str, Any], keys: Sequence[str]) -> float:
    return float(agreed(values(raw, keys, int | float, "a number"), keys))


def values(raw: Mapping[str, Any], keys: Sequence[str], kind: Any, description: str) -> dict[str, Any]:
    """The values of those of the keys that are there and not null, of one type."""
    found = {key: uniform(raw[key]) for key in keys if raw.get(key) is not None}
    for key, value in found.items():
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{key} must be {description}, got {reprlib.repr(value)}")
    return found


def uniform(value: Any) -> Any:
    """Some published files repeat a value once for each layer."""
    return value[0] if isinstance(value, list) and value and all(other == value[0] for other in value) else value


def agreed(found: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The value that all spellings of one thing give; `keys` are those that could give it."""
    if not found:
        raise UserError(f"the key {' or '.join(keys)} is missing")
    if len(set(found.values())) > 1:
        raise UserError("contradiction: " + ", ".join(f"{key} says {value}" for key, value in found.items()))
    return next(iter(found.values()))


def check_fixed(raw: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raise UserError if a key that is there has another value than the one that the model computes with."""
    for key, allowed in fixed.items():
        value = uniform(raw.get(key, allowed))
        if value != allowed:
            raise UserError(
                f"{key} = {reprlib.repr(value)} is not supported, the model computes with {allowed!r} alone"
            )


def refuse_unknown(raw: Mapping[str, Any], known: set[str]) -> None:
    """Raise UserError for a key that is not known."""
    for key, value in raw.items():
        if key not in known:
            raise UserError(
                f"unknown key {key} = {reprlib.repr(value)}, which may change what the model computes; "
                "remove it if you know that it does not"
            )
