"""Text and vision-language models as modules for one device: no rank, no mesh, no file format."""

from fulmen.model.cache import Cache
from fulmen.model.config import PRESETS, VISION_LANGUAGE_PRESETS, ModelConfig, VisionConfig, VisionLanguageConfig
from fulmen.model.decoder import LanguageModel
from fulmen.model.describe import describe
from fulmen.model.device import choose_device, multiplies_bf16
from fulmen.model.vision import VisionEncoder
from fulmen.model.vision_language import VisionLanguageModel

__all__ = [
    "PRESETS",
    "VISION_LANGUAGE_PRESETS",
    "Cache",
    "LanguageModel",
    "ModelConfig",
    "VisionConfig",
    "VisionEncoder",
    "VisionLanguageConfig",
    "VisionLanguageModel",
    "choose_device",
    "describe",
    "multiplies_bf16",
]
