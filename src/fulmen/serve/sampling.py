"""From logits to the next token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fulmen.config import UserError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How an answer is drawn and when it ends."""

    max_tokens: int = 256
    temperature: float = 0.8  # 0 takes the likeliest token each time
    top_k: int = 0  # draw among the k likeliest; 0: all
    top_p: float = 1.0  # draw among the fewest likeliest tokens whose probabilities reach p
    stop: tuple[str, ...] = ()  # the answer ends before any of these strings
    seed: int | None = None  # None draws anew each time

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if "" in self.stop:
            raise UserError("a stop string must not be empty")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be at least 0 and below 2**63, got {self.seed}")

    def generator(self) -> torch.Generator:
        """The source of randomness of one answer, on the CPU."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Draw a token from logits [V] fp32: temperature, then top-k, then top-p. UserError if they are not finite."""
    logits = logits.cpu()
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite: its weights are damaged, or its dtype is too narrow")
    if params.temperature == 0:
        return int(logits.argmax())
    if params.top_k and params.top_k < len(logits):
        likeliest, tokens = logits.topk(params.top_k)
    else:
        likeliest, tokens = logits.sort(descending=True)
    # In double precision any temperature above 0 divides; in single the smallest ones would be 0.
    probs = ((likeliest - likeliest[0]).double() / params.temperature).softmax(dim=-1)
    if params.top_p < 1:
        # A token is out when those before it reach p by themselves; the first is never out.
        probs = probs.masked_fill(probs.cumsum(0) - probs >= params.top_p, 0)
    return int(tokens[torch.multinomial(probs, 1, generator=generator)])
