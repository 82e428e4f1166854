"""How an answer is drawn and when it ends, checked when it is said."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fulmen.config import UserError
from fulmen.serve.structure import Structure

MAX_ANSWERS = 128
"""Answers to one prompt."""
MAX_LOGPROBS = 20
"""Alternatives beside a drawn token, as OpenAI's API allows."""
MAX_STOPS = 16
"""Stop strings; their number and length bound what is compared at each token."""
MAX_STOP_LENGTH = 256
"""Characters of a stop string."""
MAX_TOKENS_NAMED = 1024
"""Tokens in `logit_bias` or `stop_tokens`."""

INFINITY = float("inf")
LARGEST = 2**31 - 1
# name, least, most, and what a smaller one is told
WHOLE = (
    ("max_tokens", 1, LARGEST, "at least 1"),
    ("top_k", 0, LARGEST, "0 or more"),
    ("seed", 0, 2**63 - 1, "at least 0 and below 2**63"),
    ("n", 1, MAX_ANSWERS, f"from 1 to {MAX_ANSWERS}"),
    ("logprobs", 0, MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
)
OPTIONAL = frozenset({"max_tokens", "seed", "logprobs"})


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How an answer is drawn and when it ends. Raises UserError for what cannot be meant.

    A token's logit takes these steps in this order, and then one of the tokens left is drawn by its probability:
    `logit_bias`; `repetition_penalty`; `presence_penalty` and `frequency_penalty`; the mask of `structure`;
    `temperature`; `top_k`; `top_p`; `min_p`.
    """

    max_tokens: int | None = 256  # None: as many as the positions hold
    temperature: float = 0.8  # 0 takes the likeliest token each time, the lowest id of equals
    top_k: int = 0  # draw among the k likeliest; 0: all
    top_p: float = 1.0  # draw among the fewest likeliest tokens whose probabilities reach p
    min_p: float = 0.0  # draw among those with at least this part of the likeliest one's probability
    # Of each token in prompt or answer a positive logit is divided by it and a negative one multiplied (CTRL, 4.1).
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # taken once from the logit of each token in the answer (OpenAI's API)
    frequency_penalty: float = 0.0  # taken from it as often as it is there
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # added to these tokens' logits
    stop: tuple[str, ...] = ()  # the answer ends before any of these strings
    stop_tokens: tuple[int, ...] = ()  # the answer ends with any of these tokens, whose text is not given out
    seed: int | None = None  # None draws anew each time
    n: int = 1  # answers to one prompt; answer i of a seed is answer 0 of seed + i
    logprobs: int | None = None  # this many likeliest tokens beside the drawn one, with logarithms; None: none at all
    ignore_eos: bool = False  # an end token ends nothing
    structure: Structure | None = None  # what the answer must look like

    def __post_init__(self) -> None:
        self._check_whole_numbers()
        self._check_numbers()
        self._check_stop()
        if self.structure is not None and not isinstance(self.structure, Structure):
            raise UserError(f"structure must be a Structure, got {type(self.structure).__name__}")
        if self.structure is not None and self.ignore_eos:
            raise UserError("structure and ignore_eos exclude each other: a complete answer ends with an end token")

    def check_vocabulary(self, size: int) -> None:
        """Raise UserError for a named token that a model of this many tokens has not."""
        for name, tokens in (("logit_bias", self.logit_bias), ("stop_tokens", self.stop_tokens)):
            if tokens and max(tokens) >= size:
                raise UserError(f"{name} names token {max(tokens)}; the model's are 0 to {size - 1}")

    def _check_whole_numbers(self) -> None:
        for name, low, high, rule in WHOLE:
            value = getattr(self, name)
            if value is not None or name not in OPTIONAL:
                _check_whole(name, value, low, high, rule)
        for name in ("stop_tokens", "logit_bias"):
            tokens = getattr(self, name)
            if len(tokens) > MAX_TOKENS_NAMED:
                raise UserError(f"{name} must name at most {MAX_TOKENS_NAMED} tokens, got {len(tokens)}")
            for token in tokens:
                _check_whole(f"a token of {name}", token, 0, LARGEST, "0 or more")
        object.__setattr__(self, "stop_tokens", tuple(self.stop_tokens))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    def _check_numbers(self) -> None:
        _check_number("temperature", self.temperature, "0 or more", lambda value: 0 <= value < INFINITY)
        _check_number("top_p", self.top_p, "above 0 and at most 1", lambda value: 0 < value <= 1)
        _check_number("min_p", self.min_p, "from 0 to 1", lambda value: 0 <= value <= 1)
        _check_number("repetition_penalty", self.repetition_penalty, "above 0", lambda value: 0 < value < INFINITY)
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), "from -2 to 2", lambda value: -2 <= value <= 2)
        for token, bias in self.logit_bias.items():
            _check_number(f"logit_bias of token {token}", bias, "from -100 to 100", lambda value: -100 <= value <= 100)

    def _check_stop(self) -> None:
        if isinstance(self.stop, str) or not all(isinstance(stop, str) for stop in self.stop):
            raise UserError(f"stop must be strings in a tuple, got {self.stop!r:.60}")
        if len(self.stop) > MAX_STOPS:
            raise UserError(f"stop must be at most {MAX_STOPS} strings, got {len(self.stop)}")
        if "" in self.stop:
            raise UserError("a stop string must not be empty")
        longest = max(map(len, self.stop), default=0)
        if longest > MAX_STOP_LENGTH:
            raise UserError(f"a stop string must have at most {MAX_STOP_LENGTH} characters, got {longest}")
        object.__setattr__(self, "stop", tuple(self.stop))


def _check_whole(name: str, value: Any, low: int, high: int, rule: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{name} must be a whole number, got {_shown(value)}")
    if value < low:
        raise UserError(f"{name} must be {rule}, got {_shown(value)}")
    if value > high:
        raise UserError(f"{name} must be at most {high}, got {_shown(value)}")


def _check_number(name: str, value: Any, rule: str, holds: Callable[[float], bool]) -> None:
    try:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and holds(float(value))
    except OverflowError:
        fits = False
    if not fits:
        raise UserError(f"{name} must be {rule}, got {_shown(value)}")


def _shown(value: Any) -> str:
    # Python refuses to write out the longest numbers.
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    return f"{value!r:.60}"
