"""From logits to choices: functions of tensors whose answer for a row does not depend on the rows beside it.

M rows, V tokens, K candidates. A token's weight is its probability times a power of two, rounded. Sums of such whole
numbers are exact in float64, so that the order of adding, which libraries choose by the shape and the threads, changes
nothing. The power makes a row's sum at most 2**52; for V = 200000 a token counts from 3e-11 of the likeliest one on.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Settings(NamedTuple):
    """What rows are drawn by, each [M, 1] float64."""

    temperature: Tensor  # above 0
    top_k: Tensor  # 0: all
    top_p: Tensor
    min_p: Tensor
    number: Tensor  # uniform in [0, 1)


def likeliest(logits_MV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest logits [M, K] fp32 of each row in falling order, and their tokens; of equals the lowest."""
    vocab = logits_MV.shape[1]
    # topk leaves open which of equals it takes, so that it gets keys that are all different: an integer that has the
    # order of the floats (-0 made 0), and the token.
    bits = (logits_MV + 0.0).view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    keys += torch.arange(vocab - 1, -1, -1, device=logits_MV.device)
    tokens = vocab - 1 - (keys.topk(count).values & 0xFFFFFFFF)
    return logits_MV.gather(1, tokens), tokens


def choose_any(logits_MV: Tensor, best_M1: Tensor, settings: Settings) -> Tensor:
    """Draw a token [M, 1] among all; neither top-k nor top-p is looked at."""
    vocab = logits_MV.shape[1]
    weights = _weights(logits_MV, best_M1, settings.temperature, vocab)
    return _invert(weights.masked_fill_(weights < settings.min_p * _scale(vocab), 0), settings.number)


def choose_likely(logits_MV: Tensor, best_M1: Tensor, settings: Settings, count: int) -> tuple[Tensor, Tensor]:
    """Draw a token [M, 1] among the `count` likeliest, and say whether these were enough, [M, 1] bool.

    Rows with a top-k must have one of at most `count`, which is then enough.
    """
    vocab = logits_MV.shape[1]
    values, tokens = likeliest(logits_MV, count)
    weights = _weights(values, best_M1, settings.temperature, vocab)
    top_k = torch.where(settings.top_k > 0, settings.top_k, count)
    weights.masked_fill_(torch.arange(count, device=values.device) >= top_k, 0)
    total = weights.sum(-1, keepdim=True)
    if count < vocab:
        whole = _weights(logits_MV, best_M1, settings.temperature, vocab).sum(-1, keepdim=True)
        total = torch.where(settings.top_k > 0, total, whole)
    # A token is out when those before it reach p by themselves; the first is never out.
    reached = weights.cumsum(-1)
    enough = reached[:, -1:] >= settings.top_p * total
    weights.masked_fill_(reached - weights >= settings.top_p * total, 0)
    weights.masked_fill_(weights < settings.min_p * _scale(vocab), 0)
    return tokens.gather(1, _invert(weights, settings.number)), enough


def log_total(logits_MV: Tensor, best_M1: Tensor) -> Tensor:
    """What to subtract from a logit to have the logarithm of its probability, [M, 1] float64."""
    vocab = logits_MV.shape[1]
    temperature = torch.ones_like(best_M1, dtype=torch.float64)
    total = _weights(logits_MV, best_M1, temperature, vocab).sum(-1, keepdim=True)
    return best_M1.double() + (total / _scale(vocab)).log()


def _scale(vocab: int) -> float:
    return 2.0 ** (52 - vocab.bit_length())


def _weights(logits_MK: Tensor, best_M1: Tensor, temperature_M1: Tensor, vocab: int) -> Tensor:
    """[M, K] float64, the likeliest one's being `_scale(vocab)`."""
    # In double precision any temperature above 0 divides; in single the smallest ones would be 0.
    relative = logits_MK.double().sub_(best_M1).div_(temperature_M1)
    return relative.exp_().mul_(_scale(vocab)).round_()


def _invert(weights_MK: Tensor, number_M1: Tensor) -> Tensor:
    """The place [M, 1] where the distribution function of these weights passes a number in [0, 1)."""
    function = weights_MK.cumsum(-1)
    # A number below 1 times a whole one is less than this, after rounding too. Rows of NaN end behind the last place.
    place = torch.searchsorted(function, (number_M1 * function[:, -1:]).floor(), right=True)
    return place.clamp_(max=weights_MK.shape[1] - 1)
