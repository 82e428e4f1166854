"""What config.json says of an encoder and of a vision-language model, in either dialect.

The original is MiniMax-VL-01's own; in that of transformers the same model is a LLaVA-NeXT, whose text model is its
`minimax` and whose encoder is CLIP's vision tower.
"""

from collections.abc import Callable, Mapping
from typing import Any

from fulmen.checkpoint.keys import agreed, check_fixed, integer, number, refuse_unknown, values
from fulmen.config import UserError
from fulmen.data.images import GRIDS
from fulmen.model import ModelConfig, VisionConfig, VisionLanguageConfig

VISION_LANGUAGE = ("minimax_vl_01", "MiniMaxVL01", "llava_next")
"""Types of models that see; the first and the last are written."""

WRITTEN = {
    "original": ("minimax_vl_01", "MiniMaxVL01ForConditionalGeneration"),
    "transformers": ("llava_next", "LlavaNextForConditionalGeneration"),
}

SIZES = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_size": "intermediate_size",
}
ENCODER_FIXED = {"model_type": "clip_vision_model", "hidden_act": "gelu", "num_channels": 3, "attention_dropout": 0.0}
ENCODER_HARMLESS = {
    *("projection_dim", "vocab_size", "initializer_factor", "initializer_range", "dropout", "architectures"),
    *(
        "dtype",
        "torch_dtype",
        "transformers_version",
        "_name_or_path",
        "_attn_implementation",
        "chunk_size_feed_forward",
    ),
    *("output_attentions", "output_hidden_states", "return_dict", "is_encoder_decoder", "id2label", "label2id"),
    *("problem_type", "use_cache", "tie_word_embeddings"),
}

FIXED = {
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "multimodal_projector_bias": True,
    "use_image_newline_parameter": True,
    "process_image_mode": "anyres",
    "tie_word_embeddings": False,
    "quantization_config": None,
}
IMAGE_TOKEN = ("image_token_index", "image_token_id")
HARMLESS = {
    *("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path", "_attn_implementation"),
    *("dtype", "torch_dtype", "ignore_index", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
    *("output_attentions", "output_hidden_states", "return_dict", "initializer_range"),
}


def vision_keys(config: VisionConfig) -> dict[str, Any]:
    """An encoder as `clip_vision_model`."""
    sizes = {key: getattr(config, field) for field, key in SIZES.items()}
    return ENCODER_FIXED | sizes | {"layer_norm_eps": config.norm_eps, "projection_dim": config.hidden_size}


def vision_from_keys(raw: Mapping[str, Any]) -> VisionConfig:
    """The inverse of `vision_keys`; raises UserError for what the encoder does not compute."""
    known = {*SIZES.values(), "layer_norm_eps", *ENCODER_FIXED, *ENCODER_HARMLESS}
    try:
        refuse_unknown(raw, known)
        # Where it is missing, readers of this format take another GELU.
        agreed(values(raw, ("hidden_act",), str, "a string"), ("hidden_act",))
        check_fixed(raw, ENCODER_FIXED)
        eps = number(raw, ("layer_norm_eps",)) if raw.get("layer_norm_eps") is not None else 1e-5
        return VisionConfig(**{field: integer(raw, (key,)) for field, key in SIZES.items()}, norm_eps=eps)
    except UserError as error:
        raise UserError(f"vision_config: {error}") from None


def vision_language_keys(config: VisionLanguageConfig, dialect: str, text: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json around the keys `text` of the text model, in its dialect."""
    model_type, architecture = WRITTEN[dialect]
    dtype_key = "torch_dtype" if "torch_dtype" in text else "dtype"
    fixed = {key: value for key, value in FIXED.items() if value is not None and key != "process_image_mode"}
    return {
        "architectures": [architecture],
        "model_type": model_type,
        dtype_key: text[dtype_key],
        "bos_token_id": text["bos_token_id"],
        "eos_token_id": text["eos_token_id"],
        "image_token_index": config.image_token,
        "image_seq_length": config.vision.side**2,
        "image_grid_pinpoints": pinpoints(config.vision),
        **fixed,
        "text_config": dict(text),
        "vision_config": vision_keys(config.vision),
    }


def vision_language_from_keys(
    raw: Mapping[str, Any], text_from_keys: Callable[[Mapping[str, Any]], ModelConfig]
) -> VisionLanguageConfig:
    """The inverse of `vision_language_keys`; raises UserError for what the model does not compute."""
    parts = ("text_config", "vision_config", "image_grid_pinpoints", "image_seq_length")
    refuse_unknown(raw, {*parts, *IMAGE_TOKEN, *FIXED, *HARMLESS})
    check_fixed(raw, FIXED)
    for key in parts[:2]:
        if not isinstance(raw.get(key), dict):
            raise UserError(f"the key {key} is missing or no object")
    vision = vision_from_keys(raw["vision_config"])
    try:
        text = text_from_keys(raw["text_config"])
    except UserError as error:
        raise UserError(f"text_config: {error}") from None
    _check_grids(raw.get("image_grid_pinpoints"), vision)
    return VisionLanguageConfig(text=text, vision=vision, image_token=integer(raw, IMAGE_TOKEN))


def pinpoints(config: VisionConfig) -> list[list[int]]:
    """The published grids as [height, width] of their canvases, pixels."""
    return [[rows * config.image_size, columns * config.image_size] for rows, columns in GRIDS]


def _check_grids(found: Any, vision: VisionConfig) -> None:
    expected = set(map(tuple, pinpoints(vision)))
    pairs = found if isinstance(found, list) else []
    if found is not None and {tuple(pair) if isinstance(pair, list) else pair for pair in pairs} != expected:
        raise UserError(
            f"image_grid_pinpoints are not the {len(GRIDS)} published grids of crops of {vision.image_size} pixels, "
            "which are all that images are cut into here"
        )
