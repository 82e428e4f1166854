"""The text model as modules for one device: no rank, no mesh, no file format."""

from fulmen.model.cache import Cache
from fulmen.model.config import PRESETS, ModelConfig
from fulmen.model.decoder import LanguageModel

__all__ = ["PRESETS", "Cache", "LanguageModel", "ModelConfig"]
