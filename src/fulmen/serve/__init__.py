"""Using a model: an engine for many requests at once, an OpenAI-compatible server, conversation (docs/serve.md)."""

from fulmen.serve.conversation import Conversation
from fulmen.serve.engine import Engine
from fulmen.serve.params import SamplingParams
from fulmen.serve.plan import EngineSettings, MemoryPlan, plan_memory
from fulmen.serve.structure import Structure
from fulmen.serve.types import Answer, Completion, Piece, TokenLogprobs

__all__ = [
    "Answer",
    "Completion",
    "Conversation",
    "Engine",
    "EngineSettings",
    "MemoryPlan",
    "Piece",
    "SamplingParams",
    "Structure",
    "TokenLogprobs",
    "plan_memory",
]
