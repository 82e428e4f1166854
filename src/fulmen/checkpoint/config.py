"""config.json to `ModelConfig` and back, in either dialect."""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fulmen.checkpoint.dialects import (
    COUNTS,
    DIALECTS,
    FIXED,
    HARMLESS,
    LIGHTNING_NORM_EPS,
    ROPE_THETA,
    ROTARY_DIM,
    ROTARY_FACTOR,
)
from fulmen.checkpoint.keys import agreed, check_fixed, integer, number, read_json, refuse_unknown, values
from fulmen.checkpoint.vision_config import VISION_LANGUAGE, vision_language_from_keys, vision_language_keys
from fulmen.config import UserError
from fulmen.model import ModelConfig, VisionLanguageConfig
from fulmen.run.files import write_atomic

CONFIG_FILE = "config.json"


def load_config(path: str | Path) -> ModelConfig | VisionLanguageConfig:
    """The configuration of the checkpoint folder `path`, in either dialect.

    Raises UserError for a missing or unreadable config.json, a model of another type, a missing or unknown key and a
    value that this model does not compute with.
    """
    file = Path(path) / CONFIG_FILE
    raw = read_json(file)
    try:
        if raw.get("model_type") in VISION_LANGUAGE:
            return vision_language_from_keys(raw, _from_keys)
        return _from_keys(raw)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def save_config(
    config: ModelConfig | VisionLanguageConfig,
    path: str | Path,
    dialect: str = "original",
    *,
    dtype: torch.dtype = torch.float32,
    eos_id: int | None = None,
    bos_id: int | None = None,
) -> None:
    """Write config.json into the folder `path`; raises UserError if the dialect cannot say what `config` is."""
    keys = config_keys(config, dialect, dtype=dtype, eos_id=eos_id, bos_id=bos_id)
    write_atomic(Path(path) / CONFIG_FILE, json.dumps(keys, indent=2) + "\n")


def config_keys(
    config: ModelConfig | VisionLanguageConfig,
    dialect: str,
    *,
    dtype: torch.dtype,
    eos_id: int | None,
    bos_id: int | None,
) -> dict[str, Any]:
    """The content of config.json; raises UserError if the dialect cannot say what `config` is."""
    if dialect not in DIALECTS:
        raise UserError(f"no checkpoint dialect named {dialect!r}; there are {', '.join(DIALECTS)}")
    if isinstance(config, VisionLanguageConfig):
        text = config_keys(config.text, dialect, dtype=dtype, eos_id=eos_id, bos_id=bos_id)
        return vision_language_keys(config, dialect, text)
    _check_expressible(config, dialect)
    names = DIALECTS[dialect]
    common = {
        "architectures": [names.architecture],
        "model_type": names.model_types[0],
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        names.dtype_key: str(dtype).removeprefix("torch."),
        "hidden_act": FIXED["hidden_act"],
        "tie_word_embeddings": FIXED["tie_word_embeddings"],
        names.layers_key: [names.layer_kinds[kind] for kind in config.layers],
        "rms_norm_eps": config.norm_eps,
        # transformers 4 reads it here, 5 in `rope_parameters`.
        "rope_theta": config.rope_theta,
    }
    common |= {key: getattr(config, field) for field, key in (COUNTS | names.scales).items()}
    if dialect == "transformers":
        return common | {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    return common | {
        "rotary_dim": config.rotary_dim,
        "postnorm": FIXED["postnorm"],
        "shared_intermediate_size": FIXED["shared_intermediate_size"],
        "shared_moe_mode": "sigmoid",
    }


def shortest_plan(layers: str) -> str:
    """The shortest string that, repeated and cut to the depth, gives these layers: LLSLLSL has the plan LLS."""
    periods = (n for n in range(1, len(layers) + 1) if all(a == b for a, b in zip(layers, layers[n:], strict=False)))
    return layers[: next(periods, 0)]


def _check_expressible(config: ModelConfig, dialect: str) -> None:
    if config.lightning_norm_eps != LIGHTNING_NORM_EPS:
        raise UserError(
            f"lightning_norm_eps = {config.lightning_norm_eps} cannot be saved: "
            f"published checkpoints have no key for it and compute with {LIGHTNING_NORM_EPS}"
        )
    if dialect == "transformers" and config.rotary_dim != config.head_dim:
        raise UserError(
            f"the transformers dialect cannot hold rotary_dim {config.rotary_dim}: transformers rotates all "
            f"{config.head_dim} dims of a head and would compute something else; save in the original dialect"
        )


def _from_keys(raw: Mapping[str, Any]) -> ModelConfig:
    dialect = _dialect_of(raw)
    raw = _flatten(raw)
    _refuse_unknown(raw)
    _check_fixed(raw, dialect)
    fields = {field: integer(raw, (key,)) for field, key in COUNTS.items() if field != "head_dim"}
    # Both published configuration classes let it be null.
    head_dim = integer(raw, ("head_dim",), fields["hidden_size"] // max(1, fields["num_heads"]))
    # A file may use the other dialect's spelling of a key: some published ones mix them.
    for field in DIALECTS[dialect].scales:
        fields[field] = number(raw, [names.scales[field] for names in DIALECTS.values()])
    layers = _layers(raw)
    if len(layers) != fields["num_layers"]:
        raise UserError(f"num_hidden_layers is {fields['num_layers']}, but the list of layers has {len(layers)}")
    return ModelConfig(
        **fields,
        head_dim=head_dim,
        layer_plan=shortest_plan(layers),
        norm_eps=number(raw, ("rms_norm_eps",)),
        lightning_norm_eps=LIGHTNING_NORM_EPS,
        rope_theta=number(raw, ROPE_THETA),
        rotary_dim=_rotary_dim(raw, head_dim, dialect),
    )


def _dialect_of(raw: Mapping[str, Any]) -> str:
    for dialect, names in DIALECTS.items():
        if raw.get("model_type") in names.model_types:
            return dialect
    known = ", ".join(name for names in DIALECTS.values() for name in names.model_types)
    raise UserError(f"model_type {raw.get('model_type')!r} is not a model that fulmen reads; those are {known}")


def _flatten(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `rope_parameters` beside the others, as `rope_parameters.rope_theta` and so on."""
    flat = dict(raw)
    if isinstance(flat.get("rope_parameters"), dict | None):
        nested = flat.pop("rope_parameters", None) or {}
        flat |= {f"rope_parameters.{key}": value for key, value in nested.items()}
    return flat


def _refuse_unknown(raw: Mapping[str, Any]) -> None:
    known = {*COUNTS.values(), "rms_norm_eps", *ROPE_THETA, *ROTARY_DIM, *ROTARY_FACTOR, *FIXED, *HARMLESS}
    for names in DIALECTS.values():
        known |= {names.layers_key, *names.scales.values()}
    refuse_unknown(raw, known)


def _check_fixed(raw: Mapping[str, Any], dialect: str) -> None:
    if dialect == "original" and "postnorm" not in raw:
        raise UserError("postnorm is missing, which in this dialect means false; fulmen computes with true alone")
    check_fixed(raw, FIXED)


def _layers(raw: Mapping[str, Any]) -> str:
    """One letter per layer."""
    found = {}
    for names in DIALECTS.values():
        if (entries := raw.get(names.layers_key)) is None:
            continue
        kinds = list(names.layer_kinds.values())
        if not isinstance(entries, list) or not all(entry in kinds for entry in entries):
            raise UserError(f"{names.layers_key} must be a list of {kinds}, got {reprlib.repr(entries)}")
        letters = list(names.layer_kinds)
        found[names.layers_key] = "".join(letters[kinds.index(entry)] for entry in entries)
    return agreed(found, [names.layers_key for names in DIALECTS.values()])


def _rotary_dim(raw: Mapping[str, Any], head_dim: int, dialect: str) -> int:
    found = values(raw, ROTARY_DIM, int, "an integer")
    factors = values(raw, ROTARY_FACTOR, int | float, "a number")
    found |= {key: int(head_dim * factor) for key, factor in factors.items()}
    # transformers' own code always rotates the whole head.
    return head_dim if not found and dialect == "transformers" else agreed(found, ROTARY_DIM[:1])
