"""The text model as modules for one device: no rank, no mesh, no file format."""

from fulmen.model.cache import Cache
from fulmen.model.config import PRESETS, ModelConfig
from fulmen.model.decoder import LanguageModel
from fulmen.model.describe import describe
from fulmen.model.device import choose_device, multiplies_bf16

__all__ = ["PRESETS", "Cache", "LanguageModel", "ModelConfig", "choose_device", "describe", "multiplies_bf16"]
