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
        eos_ids = load_generation_config(path).eos_ids
        tokenizer = Tokenizer.load(path)
        return cls(load_model(path, device=device, dtype=dtype), tokenizer, eos_ids)

    def encode(self, text: str) -> list[int]:
        """A prompt's tokens as a document begins in training: the beginning-of-sentence token, then the text."""
        start = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return start + self.tokenizer.encode(text)

    def stream(
        self, prompt: Sequence[int], params: SamplingParams, *, context: Context | None = None
    ) -> Iterator[Generated]:
        """The answer to a prompt of token ids, piece by piece as it is decoded; ends where `params` say.

        context: what earlier calls saw; it is reused if the prompt begins with all of it, and advanced.
        Raises UserError at once for an empty prompt or one that exceeds the model's positions.
        """
        room = self.model.config.max_positions - len(prompt)
        if not prompt:
            raise UserError("the prompt is empty")
        if room < 1:
            raise UserError(
                f"the prompt has {len(prompt)} tokens; the model has {self.model.config.max_positions} positions, "
                "of which the answer needs at least one"
            )
        return self._answer(prompt, params, min(params.max_tokens, room), Context() if context is None else context)

    def generate(self, prompt: str, params: SamplingParams) -> str:
        """The whole answer to a text."""
        return "".join(piece.text for piece in self.stream(self.encode(prompt), params))

    @torch.inference_mode()
    def _answer(
        self, prompt: Sequence[int], params: SamplingParams, limit: int, context: Context
    ) -> Iterator[Generated]:
        """`stream` of `limit` tokens at most."""
        logits = self._begin(prompt, context)
        generator, decoder = params.generator(), self.tokenizer.stream()
        held, tokens = "", []
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
        # A cache that an interruption leaves half advanced is of no use, so the context is without it meanwhile.
        cache, context.cache = context.cache, None
        device = self.model.embed_tokens.weight.device
        hidden, _ = self.model.hidden(torch.tensor([tokens], device=device), cache=cache)
        context.seen.extend(tokens)
        context.cache = cache
        return self.model.logits(hidden[0, -1])


class Conversation:
    """Turns of user and assistant. The cache is carried from turn to turn, so that each turn costs its own tokens."""

    def __init__(self, generator: TextGenerator, *, system: str | None = None):
        self.generator = generator
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self._ids = encode_chat(generator.tokenizer, self.messages, generate=False) if self.messages else []
        self._context = Context()

    def reply(self, text: str, params: SamplingParams) -> Iterator[str]:
        """The assistant's answer to the user's text, streamed. Both are kept once the answer ends or is left.

        Raises UserError at once for a tokenizer without the tokens of a chat and where the positions do not suffice.
        """
        question = {"role": "user", "content": text}
        prompt = self._ids + encode_chat(self.generator.tokenizer, [question])
        return self._answer(question, prompt, self.generator.stream(prompt, params, context=self._context))

    def _answer(self, question: dict[str, str], prompt: list[int], pieces: Iterator[Generated]) -> Iterator[str]:
        answer, tokens = "", []
        try:
            for piece in pieces:
                answer += piece.text
                tokens += piece.tokens
                yield piece.text
        finally:
            if tokens:
                self.messages += [question, {"role": "assistant", "content": answer}]
                self._ids = prompt + self._spoken(answer, tokens)

    def _spoken(self, answer: str, tokens: list[int]) -> list[int]:
        """The ids of an answer and of the end of its turn."""
        tokenizer = self.generator.tokenizer
        # The model saw the tokens that it drew, which need not be those that its text would be cut into. Of an answer
        # that a stop string ended, though, they say more than was given out.
        if tokens[-1] in self.generator.eos_ids:
            tokens = tokens[:-1]
        if tokenizer.decode(tokens) != answer:
            tokens = tokenizer.encode(answer)
        return [*tokens, tokenizer.eos_id, *tokenizer.encode("\n")]


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
    found = [(text.find(stop), stop) for stop in stops]
    # The one that is complete first, so that it does not matter in which pieces the text comes.
    met = [(start + len(stop), start) for start, stop in found if start >= 0]
    if met:
        return text[: min(met)[1]], "", True
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for start in range(max(0, len(text) - longest), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start], text[start:], False
    return text, "", False
