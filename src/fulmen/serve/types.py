"""What the rooms of the engine hand each other: pieces of answers, and the errors of a queue."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

REASONS = ("stop", "length", "abort", "error")
"""Why an answer ends: an end token or a stop; tokens or positions ran out; somebody left; the model is damaged."""


class TokenLogprobs(NamedTuple):
    """The natural logarithm of a token's probability, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(kw_only=True, slots=True)
class Piece:
    """A part of one answer. The last piece of each answer has a reason, one of `REASONS`."""

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    reason: str | None = None
    stop: str | int | None = None  # the stop string or token that ended it
    error: str | None = None  # what went wrong, where the reason is "error"
    index: int = 0  # which of the n answers to one prompt
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, taken from the prefix cache
    generated_tokens: int = 0  # so far


@dataclass(kw_only=True, slots=True)
class Answer:
    """One whole answer."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    reason: str | None = None
    stop: str | int | None = None
    error: str | None = None

    def add(self, piece: Piece) -> None:
        """The next piece of it."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.reason, self.stop, self.error = piece.reason, piece.stop, piece.error


@dataclass(kw_only=True, slots=True)
class Completion:
    """The n answers to one prompt, as they become whole."""

    prompt: list[int]
    answers: list[Answer]
    cached_tokens: int = 0  # of the prompt, taken from the prefix cache for the first answer

    @classmethod
    def of(cls, prompt: Sequence[int], count: int) -> Self:
        return cls(prompt=list(prompt), answers=[Answer() for _ in range(count)])

    @property
    def text(self) -> str:
        """Of the first answer."""
        return self.answers[0].text

    @property
    def is_whole(self) -> bool:
        return all(answer.reason is not None for answer in self.answers)

    def add(self, piece: Piece) -> None:
        """The next piece of one of them."""
        self.answers[piece.index].add(piece)
        if piece.index == 0:
            self.cached_tokens = piece.cached_tokens


class QueueFull(Exception):  # noqa: N818 as `queue.Full`
    """No more requests may wait; `retry_after` is a guess in whole seconds."""

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after
