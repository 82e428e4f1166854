"""From logits to the next token of each answer, and what an answer carries from token to token for it."""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fulmen.serve.choice import Settings, choose_any, choose_likely, likeliest, log_total
from fulmen.serve.params import SamplingParams
from fulmen.serve.structure import Matcher
from fulmen.serve.types import TokenLogprobs

__all__ = ["Draw", "Drawn", "SamplingParams", "sample"]

NUCLEUS = 4096
"""Tokens that are looked through for top-p. Where a row needs more, they are all sorted in a second pass."""
PIECE = {"cpu": 2**18, "cuda": 2**24}
"""Logits that are worked on at a time: on a CPU what the cache holds, else what memory can be spared."""
NOT_FINITE = "the model's logits are not finite: its weights are damaged, or its dtype is too narrow"
NOTHING_LEFT = "no token is left to draw after logit_bias, penalties and structure"


class Drawn(NamedTuple):
    """The next token of an answer; None and an error where there is none, which ends this answer alone."""

    token: int | None
    logprobs: TokenLogprobs | None = None
    error: str | None = None


class Draw:
    """One answer's part in drawing: its settings, its own random numbers, its counts of tokens, its grammar.

    It depends on no other answer and on no batch, so that an answer can be set aside and go on with what comes next.
    """

    def __init__(
        self, params: SamplingParams, prompt_tokens: Sequence[int], *, index: int = 0, matcher: Matcher | None = None
    ):
        """index: which of the n answers; matcher: of `params.structure`, from `Grammars.matcher`, for it alone."""
        assert (params.structure is None) == (matcher is None), "a structure needs a matcher"
        self.params, self.index, self.matcher = params, index, matcher
        self._random = random.Random(None if params.seed is None else params.seed + index)
        self._counts = None
        if params.repetition_penalty != 1:
            self._counts = _Counts(prompt_tokens)
        elif params.presence_penalty or params.frequency_penalty:
            self._counts = _Counts(())

    @property
    def is_done(self) -> bool:
        """Whether the structure is complete, so that nothing but an end token can follow."""
        return self.matcher is not None and self.matcher.is_done

    @property
    def is_plain(self) -> bool:
        """Whether the logits are taken as they are, up to the temperature."""
        return self.matcher is None and self._counts is None and not self.params.logit_bias

    def next_number(self) -> float:
        """The next random number in [0, 1) of this answer; with temperature 0 none is used up."""
        return self._random.random() if self.params.temperature else 0.0

    def advance(self, token: int) -> None:
        """Count a token that was drawn."""
        if self._counts is not None:
            self._counts.add(token)
        if self.matcher is not None:
            self.matcher.advance(token)

    def penalties(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The tokens [E] that penalties apply to, and [2, E] what divides each logit and what is taken from it."""
        if self._counts is None:
            return None
        tokens, counts = self._counts.seen()
        taken = self.params.presence_penalty * (counts > 0) + self.params.frequency_penalty * counts
        return tokens, np.stack([np.full(len(tokens), self.params.repetition_penalty), taken])


class _Counts:
    """How often each token is in the answer; 0 for those that are in the prompt only."""

    def __init__(self, prompt: Sequence[int]):
        tokens = np.unique(np.asarray(prompt, dtype=np.int64))
        self._size = len(tokens)
        self._tokens = np.zeros(max(16, 2 * self._size), np.int64)
        self._tokens[: self._size] = tokens
        self._counts = np.zeros(len(self._tokens))
        self._places = {token: place for place, token in enumerate(tokens.tolist())}

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, self._size)
        if place == self._size:
            if self._size == len(self._tokens):
                self._tokens = np.concatenate([self._tokens, self._tokens])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._tokens[place] = token
            self._size += 1
        self._counts[place] += 1

    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        return self._tokens[: self._size], self._counts[: self._size]


@torch.inference_mode()
def sample(logits: Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """Draw the next token of each answer from logits [N, V] fp32 on any device, and advance the draws.

    A row's token depends on its logits and its draw only. Logprobs are those of the model itself, before any of the
    steps that `SamplingParams` names. Everything is copied to the host at once, but for a row whose top-p reaches
    beyond the `NUCLEUS` likeliest tokens, which is drawn again from all.
    """
    if not draws:
        return []
    final = _processed(logits, draws)
    numbers = [draw.next_number() for draw in draws]
    rows = _decide(logits, final, draws, numbers, NUCLEUS)
    short = [place for place, row in enumerate(rows) if not row.is_enough]
    if short:
        chosen = torch.tensor(short, device=logits.device)
        few, numbers = [draws[place] for place in short], [numbers[place] for place in short]
        again = _decide(logits[chosen], final[chosen], few, numbers, logits.shape[1])
        for place, row in zip(short, again, strict=True):
            rows[place] = row
    return [_drawn(draw, row) for draw, row in zip(draws, rows, strict=True)]


class _Row(NamedTuple):
    """What comes to the host of a row."""

    token: float
    best: float  # of the model's logits
    best_left: float  # of those that are left to draw from
    is_enough: float
    logprobs: Sequence[float]  # the token's, then the likeliest tokens, then theirs


def _drawn(draw: Draw, row: _Row) -> Drawn:
    # The largest of a row is not finite if any is NaN or infinite, or if all are -inf.
    if not math.isfinite(row.best):
        return Drawn(None, error=NOT_FINITE)
    if draw.matcher is not None and draw.matcher.error is not None:
        return Drawn(None, error=f"the structure cannot go on: {draw.matcher.error}")
    if not math.isfinite(row.best_left):
        return Drawn(None, error=NOTHING_LEFT)
    token = int(row.token)
    draw.advance(token)
    wanted = draw.params.logprobs
    if wanted is None:
        return Drawn(token)
    half = (len(row.logprobs) - 1) // 2
    tokens, values = row.logprobs[1 : 1 + half], row.logprobs[1 + half :]
    pairs = list(zip(map(int, tokens), values, strict=True))[:wanted]
    # What the model itself rules out is no alternative.
    return Drawn(token, TokenLogprobs(token, row.logprobs[0], tuple(pair for pair in pairs if pair[1] > -math.inf)))


def _processed(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The logits after bias, penalties and masks; the same tensor where there are none."""
    if all(draw.is_plain for draw in draws):
        return logits
    vocab = logits.shape[1]
    final = logits.clone()
    flat = final.view(-1)
    biases = [(draw.params.logit_bias, place) for place, draw in enumerate(draws) if draw.params.logit_bias]
    entries = [(np.fromiter(bias, np.int64), [[*bias.values()]], place) for bias, place in biases]
    if entries:
        places, (values,) = _gathered(entries, vocab, logits.device)
        flat[places] += values.float()
    found = [(draw.penalties(), place) for place, draw in enumerate(draws)]
    entries = [(*penalties, place) for penalties, place in found if penalties is not None]
    if entries:
        places, (repetition, taken) = _gathered(entries, vocab, logits.device)
        before = flat[places].double()
        flat[places] = (torch.where(before > 0, before / repetition, before * repetition) - taken).float()
    masked = [place for place, draw in enumerate(draws) if draw.matcher is not None]
    if masked:
        rows = np.zeros((len(masked), (vocab + 31) // 32), np.int32)
        for row, place in zip(rows, masked, strict=True):
            draws[place].matcher.mask(row)
        bits = _send(rows, logits.device)[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)
        allowed = (bits & 1).bool().view(len(masked), -1)[:, :vocab]
        places = _send(np.array(masked), logits.device)
        final[places] = final[places].masked_fill_(~allowed, -math.inf)
    return final


def _gathered(entries: list[tuple], vocab: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places [E] in the flattened logits and their values [C, E] from (tokens, values, row) of each row."""
    places = np.concatenate([tokens + row * vocab for tokens, _, row in entries])
    values = np.concatenate([np.asarray(values, np.float64) for _, values, _ in entries], axis=1)
    # Users hear of a token that the model has not from `SamplingParams.check_vocabulary`; here it must not hit a
    # neighbour's row.
    known = np.concatenate([tokens < vocab for tokens, _, _ in entries])
    return _send(places[known], device), _send(values[:, known], device)


def _decide(logits: Tensor, final: Tensor, draws: Sequence[Draw], numbers: Sequence[float], width: int) -> list[_Row]:
    """A token for each row, the likeliest `width` tokens being looked through for top-p."""
    vocab = logits.shape[1]
    best_left, tokens = final.max(-1, keepdim=True)
    best = best_left if final is logits else logits.amax(-1, keepdim=True)
    enough = torch.ones_like(tokens, dtype=torch.bool)
    for count, places in _groups([draw.params for draw in draws], vocab, width):
        for start in range(0, len(places), size := max(1, PIECE.get(logits.device.type, 2**18) // vocab)):
            piece = places[start : start + size]
            rows = _send(np.array(piece), logits.device)
            settings = _settings([draws[place].params for place in piece], [numbers[place] for place in piece])
            settings = Settings(*_send(settings, logits.device).unbind())
            if count is None:
                tokens[rows] = choose_any(final[rows], best_left[rows], settings)
            else:
                tokens[rows], enough[rows] = choose_likely(final[rows], best_left[rows], settings, count)
    columns = [tokens, best, best_left, enough]
    most = max((draw.params.logprobs for draw in draws if draw.params.logprobs is not None), default=None)
    if most is not None:
        columns.append(_logprobs(logits, best, tokens, draws, min(most, vocab)))
    rows = torch.cat([column.double() for column in columns], dim=1).tolist()
    return [_Row(*row[:4], row[4:]) for row in rows]


def _groups(params: Sequence[SamplingParams], vocab: int, width: int) -> list[tuple[int | None, list[int]]]:
    """Rows that are drawn in the same way, with the number of candidates, None for all; not those of temperature 0."""
    warm = [place for place, row in enumerate(params) if row.temperature]
    limited = [place for place in warm if 0 < params[place].top_k < vocab]
    nucleus = [place for place in warm if not 0 < params[place].top_k < vocab and params[place].top_p < 1]
    rest = sorted({*warm} - {*limited} - {*nucleus})
    deepest = max((params[place].top_k for place in limited), default=0)
    return [(deepest, limited), (min(width, vocab), nucleus), (None, rest)]


def _settings(params: Sequence[SamplingParams], numbers: Sequence[float]) -> np.ndarray:
    columns = [(row.temperature, row.top_k, row.top_p, row.min_p) for row in params]
    return np.array([*zip(*columns, strict=True), numbers], np.float64)[:, :, None]


def _logprobs(logits: Tensor, best: Tensor, tokens: Tensor, draws: Sequence[Draw], most: int) -> Tensor:
    """[N, 1 + 2 most]: the drawn token's logarithm, the likeliest tokens, and theirs; 0 for rows that want none."""
    columns = torch.zeros(len(draws), 1 + 2 * most, dtype=torch.float64, device=logits.device)
    wanted = [place for place, draw in enumerate(draws) if draw.params.logprobs is not None]
    for start in range(0, len(wanted), size := max(1, PIECE.get(logits.device.type, 2**18) // logits.shape[1])):
        rows = _send(np.array(wanted[start : start + size]), logits.device)
        some = logits[rows]
        subtracted = log_total(some, best[rows])
        values, likely = likeliest(some, most)
        own = some.gather(1, tokens[rows])
        columns[rows] = torch.cat([own.double() - subtracted, likely.double(), values.double() - subtracted], dim=1)
    return columns


def _send(array: np.ndarray, device: torch.device) -> Tensor:
    """To the device, without waiting for what it still computes."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
