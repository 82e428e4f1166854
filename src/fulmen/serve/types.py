"""What the rooms of the engine hand each other: pieces of answers, and the errors of a queue."""

from dataclasses import dataclass
from typing import NamedTuple

REASONS = ("stop", "length", "abort", "error")
"""Why an answer ends: an end token or a stop; tokens or positions ran out; somebody left; the model is damaged."""


class TokenLogprobs(NamedTuple):
    """The natural logarithm of a token's probability, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of one answer. The last piece of each answer has a reason, one of `REASONS`."""

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    reason: str | None = None
    stop: str | int | None = None  # the stop string or token that ended it
    index: int = 0  # which of the n answers to one prompt
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, taken from the prefix cache
    generated_tokens: int = 0  # so far


class QueueFull(Exception):  # noqa: N818 as `queue.Full`
    """No more requests may wait; `retry_after` is a guess in whole seconds."""

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after
