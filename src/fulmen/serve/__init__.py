"""Using a model: sampling, streaming generation, conversation."""

from fulmen.serve.generate import Conversation, Generated, TextGenerator, find_checkpoint
from fulmen.serve.sampling import SamplingParams, sample

__all__ = ["Conversation", "Generated", "SamplingParams", "TextGenerator", "find_checkpoint", "sample"]
