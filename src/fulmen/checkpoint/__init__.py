"""Published checkpoints, read and written in both dialects (docs/checkpoint.md)."""

from fulmen.checkpoint.config import load_config, save_config
from fulmen.checkpoint.dialects import DIALECTS
from fulmen.checkpoint.generation import GenerationConfig, load_generation_config
from fulmen.checkpoint.reader import find_checkpoint, load_model, open_model
from fulmen.checkpoint.tiny import make_tiny
from fulmen.checkpoint.writer import save_model

__all__ = [
    "DIALECTS",
    "GenerationConfig",
    "find_checkpoint",
    "load_config",
    "load_generation_config",
    "load_model",
    "make_tiny",
    "open_model",
    "save_config",
    "save_model",
]
