"""The model and the tokenizer of a recipe: drawn, from a checkpoint, or joined from a text model and an encoder.

Every recipe with the sections [model], [vision], [data], [train] and [export] is served.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from fulmen.checkpoint import find_checkpoint, load_config, load_model, open_model
from fulmen.checkpoint.config import config_keys
from fulmen.checkpoint.names import Model, text_model
from fulmen.checkpoint.vision import load_encoder, load_encoder_config
from fulmen.config import UserError
from fulmen.data import Document, Tokenizer, sample_texts
from fulmen.model import (
    VISION_LANGUAGE_PRESETS,
    LanguageModel,
    ModelConfig,
    VisionLanguageConfig,
    VisionLanguageModel,
)
from fulmen.train.freezing import describe_parts, freeze
from fulmen.train.objective import Place

TOKENIZER = "tokenizer"
"""The folder, within a run's, of the tokenizer that it trains with."""

Config = ModelConfig | VisionLanguageConfig


def choose_config(recipe: Any) -> Config:
    """The sizes of the model that the recipe trains; `with_image_token` completes one that sees.

    Raises UserError for sections that contradict each other or the export's dialect.
    """
    config = _base_config(recipe.model)
    if recipe.vision.init_from is not None:
        if isinstance(config, VisionLanguageConfig):
            raise UserError(
                "vision.init_from joins an encoder to a text model, and [model] names one that sees already"
            )
        encoder = load_encoder_config(find_checkpoint(recipe.vision.init_from))
        config = VisionLanguageConfig(text=config, vision=encoder, image_token=0)
    if recipe.data.sequence_length > config.max_positions:
        raise UserError(
            f"data.sequence_length {recipe.data.sequence_length} exceeds model.max_positions {config.max_positions}"
        )
    # What the export's dialect cannot say is better known before the training than after it.
    config_keys(config, recipe.export.dialect, dtype=torch.float32, eos_id=None, bos_id=None)
    return config


def choose_tokenizer(recipe: Any, config: Config, documents: Sequence[Document], place: Place) -> Tokenizer:
    """The run's own tokenizer, the one that the recipe or the checkpoint brings, or one trained on the documents."""
    if not place.fresh:
        return Tokenizer.load(place.folder / TOKENIZER)
    source = recipe.data.tokenizer
    if source is None and recipe.model.init_from is not None:
        source = find_checkpoint(recipe.model.init_from)
    if source is None:
        place.report(f"tokenizer: training {config.vocab_size} tokens")
        return Tokenizer.train(sample_texts(documents, recipe.data.tokenizer_sample_bytes), config.vocab_size)
    tokenizer = Tokenizer.load(source)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"tokenizer {source} has {tokenizer.vocab_size} tokens, more than model.vocab_size {config.vocab_size}"
        )
    return tokenizer


def with_image_token(recipe: Any, config: Config, tokenizer: Tokenizer) -> Config:
    """The sizes with the tokenizer's `<image>`, if the model sees. Raises UserError if it cannot be that token."""
    if isinstance(config, ModelConfig):
        return config
    if tokenizer.image_id is None:
        raise UserError("the tokenizer has no <image>, in whose places a model sees: take one trained by fulmen")
    trained = recipe.model.init_from is not None and recipe.vision.init_from is None
    if trained and tokenizer.image_id != config.image_token:
        raise UserError(
            f"<image> is token {tokenizer.image_id} of the tokenizer and {config.image_token} of the model "
            f"{recipe.model.init_from}: leave data.tokenizer out"
        )
    return dataclasses.replace(config, image_token=tokenizer.image_id)


def make_model(recipe: Any, config: Config, place: Place) -> Model:
    """The model with its first weights, those of `train.freeze` frozen.

    A run that goes on takes its weights from the snapshot, wherever they once came from. On several ranks a text model
    stays on the meta device: `World.shard` draws or reads it part by part. One that is joined to an encoder here is
    read whole, as what joins them asks for its embeddings.
    """
    text_from, vision_from = (recipe.model.init_from, recipe.vision.init_from) if place.fresh else (None, None)
    if text_from is not None and vision_from is None:
        checkpoint = find_checkpoint(text_from)
        model = load_model(checkpoint, device=place.device) if place.world.is_alone else open_model(checkpoint)
    elif isinstance(config, ModelConfig):
        model = _text_model(config, place)
    else:
        model = VisionLanguageModel(config)
    if vision_from is not None:
        model.vision_tower.vision_model = load_encoder(find_checkpoint(vision_from))
        if text_from is not None:
            model.language_model = load_model(find_checkpoint(text_from))
        # What joins them is as wide as the embeddings of the text model that is there now.
        model.init_connection()
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(place.device))
    freeze(model, recipe.train.freeze)
    return model


def _text_model(config: ModelConfig, place: Place) -> LanguageModel:
    with contextlib.nullcontext() if place.world.is_alone else torch.device("meta"):
        return LanguageModel(config)


def report_model(model: Model, dtype: torch.dtype, place: Place) -> None:
    """Say how large it is and, where it has parts, which of them train."""
    sees = isinstance(model.config, VisionLanguageConfig)
    text = model.config.text if sees else model.config
    count = text.count_parameters()
    total = count.total + (model.config.count_vision_parameters() if sees else 0)
    place.report(
        f"model: {total:,} parameters, {count.active:,} of {'its text model' if sees else 'them'} active for a token, "
        f"{text.num_layers} layers {text.layer_plan}, on {place.device.type} in {str(dtype).removeprefix('torch.')}"
    )
    if sees or not all(parameter.requires_grad for parameter in model.parameters()):
        place.report(describe_parts(model))


def compile_layers(model: Model) -> None:
    """Let `torch.compile` have each layer of the text model, but for its experts."""
    for layer in text_model(model).layers:
        # The shapes of the experts' products change with every batch, and the compiler takes them in bf16 alone.
        layer.block_sparse_moe.forward = torch.compiler.disable(layer.block_sparse_moe.forward)
        layer.compile()


def _base_config(section: Any) -> Config:
    """The sizes that [model] names."""
    changes = {f.name: getattr(section, f.name) for f in dataclasses.fields(ModelConfig)}
    changes = {name: value for name, value in changes.items() if value is not None}
    if section.init_from is not None:
        if section.preset is not None or changes:
            raise UserError("model.init_from brings its own sizes: leave out the other keys of [model]")
        return load_config(find_checkpoint(section.init_from))
    if section.preset is None:
        raise UserError("the recipe's [model] needs a preset, or init_from with a checkpoint")
    if section.preset not in VISION_LANGUAGE_PRESETS:
        return ModelConfig.preset(section.preset, **changes)
    config = VISION_LANGUAGE_PRESETS[section.preset]
    # Another vocabulary has another <image>, which the tokenizer will tell.
    return dataclasses.replace(config, text=dataclasses.replace(config.text, **changes), image_token=0)
