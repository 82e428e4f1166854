"""Turns of user and assistant."""

from collections.abc import Iterator, Sequence
from typing import Any

from fulmen.data import encode_chat
from fulmen.serve.engine import Engine
from fulmen.serve.params import SamplingParams
from fulmen.serve.prompt import Prompt
from fulmen.serve.types import Piece


class Conversation:
    """A chat with one engine. What was said stays in its prefix cache, so that each turn costs its own tokens."""

    def __init__(self, engine: Engine, *, system: str | None = None):
        self.engine = engine
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self._said = Prompt(encode_chat(engine.tokenizer, self.messages, generate=False) if self.messages else [])

    def reply(self, text: str, params: SamplingParams, images: Sequence[Any] = ()) -> Iterator[str]:
        """The assistant's answer to the user's text, streamed. Both are kept once the answer ends or is left.

        images: shown before the text, each as `fulmen.data.images_of` takes it.
        Raises UserError at once for a tokenizer without the tokens of a chat, where the positions do not suffice, for
        what is no image, and for images where the model takes none.
        """
        question = user_turn(text, images)
        prompt = self._said + self.engine.encode_chat([question])
        return self._answer(question, prompt, self.engine.stream(prompt, params))

    def _answer(self, question: dict[str, Any], prompt: Prompt, pieces: Iterator[Piece]) -> Iterator[str]:
        answer, tokens = "", []
        try:
            for piece in pieces:
                answer += piece.text
                tokens += piece.tokens
                yield piece.text
        finally:
            pieces.close()
            if tokens:
                self.messages += [question, {"role": "assistant", "content": answer}]
                self._said = prompt + Prompt(self._spoken(answer, tokens))

    def _spoken(self, answer: str, tokens: list[int]) -> list[int]:
        """The ids of an answer and of the end of its turn."""
        tokenizer = self.engine.tokenizer
        # The model saw the tokens that it drew, which need not be those that its text would be cut into. Of an answer
        # that a stop string ended, though, they say more than was given out.
        if tokens[-1] in self.engine.eos_ids:
            tokens = tokens[:-1]
        if tokenizer.decode(tokens) != answer:
            tokens = tokenizer.encode(answer)
        return [*tokens, tokenizer.eos_id, *tokenizer.encode("\n")]


def user_turn(text: str, images: Sequence[Any] = ()) -> dict[str, Any]:
    """A user's message with images, which come first, as the model was trained."""
    if not images:
        return {"role": "user", "content": text}
    return {
        "role": "user",
        "content": [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}],
    }
