"""One sequence at a time: the prompt in pieces, then token by token, as a stream of text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fulmen.checkpoint import load_generation_config, load_model
from fulmen.config import UserError
from fulmen.data import Tokenizer, encode_chat
from fulmen.model import Cache, LanguageModel
from fulmen.serve.sampling import SamplingParams, sample

PROMPT_PIECE = 1024
"""Tokens of a prompt that are processed at a time, which bounds the memory of a long one."""


class Generated(NamedTuple):
    """A piece of an answer. The last piece has a reason: "stop" (end of turn or stop string) or "length"."""

    text: str
    tokens: tuple[int, ...]
    reason: str | None = None


@dataclass(kw_only=True)
class Context:
    """A cache and the tokens that it has seen, so that a longer prompt need not start over."""

    cache: Cache | None = None
    seen: list[int] = field(default_factory=list)


class TextGenerator:
    """A model with its tokenizer and the tokens that end an answer."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, eos_ids: Sequence[int] | None = None):
        self.model, self.tokenizer = model.eval(), tokenizer
        own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self.eos_ids = frozenset(own if eos_ids is None else eos_ids)

    @classmethod
    def load(cls, path: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> "TextGenerator":
        """From a checkpoint's folder, or from a training run's, which has one in `checkpoint`."""
        path = find_checkpoint(path)
        tokenizer = Tokenizer.load(path)
        model = load_model(path, device=device, dtype=dtype)
        return cls(model, tokenizer, load_generation_config(path).eos_ids)

    def encode(self, text: str) -> list[int]:
        """A prompt's tokens as a document begins in training: the beginning-of-sentence token, then the text."""
        start = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return start + self.tokenizer.encode(text)

    @torch.inference_mode()
    def stream(
        self, prompt: Sequence[int], params: SamplingParams, *, context: Context | None = None
    ) -> Iterator[Generated]:
        """The answer to a prompt of token ids, piece by piece as it is decoded; ends where `params` say.

        context: what earlier calls saw; it is reused as far as the prompt begins with it, and advanced.
        Raises UserError for an empty prompt or one that exceeds the model's positions.
        """
        room = self.model.config.max_positions - len(prompt)
        if not prompt:
            raise UserError("the prompt is empty")
        if room < 1:
            raise UserError(
                f"the prompt has {len(prompt)} tokens; the model has {self.model.config.max_positions} positions, "
                "of which the answer needs at least one"
            )
        context = Context() if context is None else context
        logits = self._begin(prompt, context)
        generator, decoder = params.generator(), self.tokenizer.stream()
        held, tokens = "", []
        limit = min(params.max_tokens, room)
        for count in range(1, limit + 1):
            token = sample(logits, params, generator)
            ended = token in self.eos_ids
            tokens.append(token)
            last = ended or count == limit
            held += ("" if ended else decoder.push(token)) + (decoder.flush() if last else "")
            ready, held, stopped = _split_at_stop(held, params.stop)
            if last or stopped:
                reason = "stop" if ended or stopped else "length"
                yield Generated(ready if stopped else ready + held, tuple(tokens), reason)
                return
            if ready:
                yield Generated(ready, tuple(tokens))
                tokens = []
            logits = self._advance([token], context)

    def generate(self, prompt: str, params: SamplingParams) -> str:
        """The whole answer to a text."""
        return "".join(piece.text for piece in self.stream(self.encode(prompt), params))

    def _begin(self, prompt: Sequence[int], context: Context) -> Tensor:
        """Logits [V] after the prompt, of which what the context has seen is not computed again."""
        known = len(context.seen)
        if context.cache is None or known >= len(prompt) or list(prompt[:known]) != context.seen:
            context.cache, context.seen, known = self.model.new_cache(1), [], 0
        for start in range(known, len(prompt), PROMPT_PIECE):
            logits = self._advance(list(prompt[start : start + PROMPT_PIECE]), context)
        return logits

    def _advance(self, tokens: list[int], context: Context) -> Tensor:
        """Logits [V] after further tokens."""
        device = self.model.embed_tokens.weight.device
        hidden, _ = self.model.hidden(torch.tensor([tokens], device=device), cache=context.cache)
        context.seen.extend(tokens)
        return self.model.logits(hidden[0, -1])


class Conversation:
    """Turns of user and assistant; the cache is carried from turn to turn."""

    def __init__(self, generator: TextGenerator, *, system: str | None = None):
        self.generator = generator
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self._context = Context()

    def reply(self, text: str, params: SamplingParams) -> Iterator[str]:
        """The assistant's answer to the user's text, streamed. Both are kept once the answer ends or is left."""
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = encode_chat(self.generator.tokenizer, messages)
        answer = ""
        try:
            for piece in self.generator.stream(prompt, params, context=self._context):
                answer += piece.text
                yield piece.text
        finally:
            if answer:
                self.messages = [*messages, {"role": "assistant", "content": answer}]


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or `checkpoint` inside a training run's folder."""
    path = Path(path)
    inside = path / "checkpoint"
    if not (path / "config.json").exists() and inside.is_dir():
        return inside
    if (path / "recipe.toml").exists():
        raise UserError(f"{path} is a training run that has not ended: go on with --resume first")
    return path


def _split_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """(text to give out, text to hold back because a stop string may have begun, whether one was met)."""
    met = [position for position in (text.find(stop) for stop in stops) if position >= 0]
    if met:
        return text[: min(met)], "", True
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for start in range(max(0, len(text) - longest), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start], text[start:], False
    return text, "", False
