"""From tokens to the text that can be given out, up to where an answer ends."""

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

from fulmen.data import Tokenizer
from fulmen.serve.params import SamplingParams
from fulmen.serve.types import Piece, TokenLogprobs


class TextStream:
    """Turns one answer's tokens into pieces of text, in which no part of a stop string and no end token is.

    Held back is text that may be the beginning of a stop string, and bytes of an unfinished character. A token comes
    out with the piece in which the last of its text is; one that writes nothing comes with the next text. So a piece
    has text, or a reason, or nothing at all.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, eos_ids: Iterable[int]):
        self._tokenizer, self._params = tokenizer, params
        self._eos_ids = frozenset() if params.ignore_eos else frozenset(eos_ids)
        self._decoder = tokenizer.stream()
        self._bytes = b""  # the last written
        self._held = ""
        self._decoded = self._given = 0  # characters
        self._waiting: deque[tuple[int, int, TokenLogprobs | None]] = deque()  # the end of its text, token, logprobs
        self.generated = 0
        self.is_finished = False

    def push(self, token: int, logprobs: TokenLogprobs | None = None) -> Piece:
        """Take the next token; the piece has a reason, "stop", if it ends the answer, and nothing may follow then.

        `Piece.stop` is the stop string or the token of `stop_tokens` that was met, None for an end token.
        """
        assert not self.is_finished, "the answer has ended"
        self.generated += 1
        is_stop = token in self._params.stop_tokens
        if is_stop or token in self._eos_ids:
            self._waiting.append((self._decoded, token, logprobs))
            return self._end("stop", token if is_stop else None)
        written = self._tokenizer.token_bytes(token)
        text = self._decoder.push(token)
        self._decoded += len(text)
        self._bytes = (self._bytes + written)[-3:]
        # Bytes that are not decoded yet are the token's text too; they will begin behind what is decoded.
        unfinished = bool(written) and _is_unfinished(self._bytes)
        self._waiting.append((self._decoded + unfinished, token, logprobs))
        self._held += text
        ready, held, is_met = split_at_stop(self._held, self._params.stop)
        if is_met:
            return self._end("stop", None)
        self._held = held
        self._given += len(ready)
        count = 0
        while ready and count < len(self._waiting) and self._waiting[count][0] <= self._given:
            count += 1
        return self._piece(ready, count)

    def finish(self, reason: str, piece: Piece | None = None) -> Piece:
        """The last piece of an answer that ends for another reason; all that was held back is in it.

        piece: what `push` gave just now; the last piece then begins with it.
        What is left of an unfinished character becomes U+FFFD, and if that completes a stop string, it is a "stop".
        """
        assert not self.is_finished, "the answer has ended"
        last = self._end(reason, None)
        if piece is None:
            return last
        whole = {name: getattr(piece, name) + getattr(last, name) for name in ("text", "tokens", "logprobs")}
        return replace(last, **whole)

    def _end(self, reason: str, stop: int | None) -> Piece:
        self.is_finished = True
        text = self._held + self._decoder.flush()
        if met := first_stop(text, self._params.stop):
            text, reason, stop = text[: met[0]], "stop", met[1]
        return self._piece(text, len(self._waiting), reason, stop)

    def _piece(self, text: str, count: int, reason: str | None = None, stop: str | int | None = None) -> Piece:
        """With the first `count` tokens that wait."""
        tokens = [self._waiting.popleft() for _ in range(count)]
        return Piece(
            text=text,
            tokens=tuple(token for _, token, _ in tokens),
            logprobs=tuple(logprobs for _, _, logprobs in tokens if logprobs is not None),
            reason=reason,
            stop=stop,
            generated_tokens=self.generated,
        )


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the first stop string begins, and which it is.

    The one that is complete first, so that it does not matter in which pieces the text comes; of several the longest.
    """
    found = [(text.find(stop), stop) for stop in stops]
    met = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
    return min(met)[1:] if met else None


def split_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """(text to give out, text to hold back because a stop string may have begun, whether one was met)."""
    if not stops:
        return text, "", False
    if met := first_stop(text, stops):
        return text[: met[0]], "", True
    longest = max(len(stop) - 1 for stop in stops)
    for start in range(max(0, len(text) - longest), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start], text[start:], False
    return text, "", False


def _is_unfinished(last: bytes) -> bool:
    """Whether text ends within a character, from its last three bytes."""
    return codecs.utf_8_decode(last, "replace")[1] < len(last)
