"""A service that says what a test tells it to, and a server around it."""

import asyncio
import contextlib
import threading
from dataclasses import replace

import uvicorn

from fulmen.serve.prompt import Prompt
from fulmen.serve.text import TextStream
from fulmen.serve.types import Piece, TokenLogprobs

MODEL = "tiny"


class FakeService:
    """Answers each prompt with `text`, cut into tokens, as far as the parameters let it.

    After `hold` pieces of an answer it waits until the client has left (`hold = None`: never). `asked` are the prompts'
    tokens and parameters so far, `shown` the prompts' images, `left` is set when an answer is closed before its end,
    `error` is raised for a request.
    """

    max_context = 400
    pixels = 0

    def __init__(self, tokenizer, text="Lightning keeps a state."):
        self.tokenizer, self.text = tokenizer, text
        self.ready, self.hold, self.error, self.pause = True, None, None, 0
        self.asked, self.shown, self.open, self.left = [], [], 0, threading.Event()
        self.pieces = self.say  # (prompt, params, index) to pieces

    def say(self, prompt, params, index):
        """The pieces of one answer."""
        stream = TextStream(self.tokenizer, params, [self.tokenizer.eos_id])
        text = self.text[index] if isinstance(self.text, list) else self.text
        for token in [*self.tokenizer.encode(text), self.tokenizer.eos_id]:
            others = [(token, -0.5), *((other, -2.0 - other) for other in range(1, 20))]
            top = tuple(others[: params.logprobs or 0])
            logprobs = None if params.logprobs is None else TokenLogprobs(token, -0.5, top)
            piece = stream.push(token, logprobs)
            if piece.reason is None and stream.generated == params.max_tokens:
                piece = stream.finish("length", piece)
            if piece.text or piece.reason:
                yield piece
            if piece.reason:
                return

    def stream(self, prompt, params):
        if self.error is not None:
            raise self.error
        prompt = Prompt.of(prompt)
        self.asked.append((prompt.tokens, params))
        self.shown.append([placed.image for placed in prompt.images])
        self.open += 1
        return FakeAnswers(self, prompt, params)


class FakeAnswers:
    def __init__(self, service, prompt, params):
        self._service, self._is_open = service, True
        answers = [
            [_of(piece, index, len(prompt)) for piece in pieces]
            for index in range(params.n)
            for pieces in [list(service.pieces(prompt, params, index))]
        ]
        # The answers' pieces alternate.
        longest = max(map(len, answers))
        self._pieces = [pieces[step] for step in range(longest) for pieces in answers if step < len(pieces)]
        self._given = 0

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self._given == len(self._pieces):
            self._close()
            raise StopAsyncIteration
        if self._given == self._service.hold:
            await asyncio.Event().wait()
        await asyncio.sleep(self._service.pause)
        self._given += 1
        piece = self._pieces[self._given - 1]
        if isinstance(piece, BaseException):
            raise piece
        return piece

    async def aclose(self):
        if self._is_open and self._given < len(self._pieces):
            self._service.left.set()
        self._close()

    def _close(self):
        self._service.open -= self._is_open
        self._is_open = False


def _of(piece, index, prompt_tokens):
    if isinstance(piece, BaseException):
        return piece
    return replace(piece, index=index, prompt_tokens=prompt_tokens, cached_tokens=2)


def failed(reason, error=None):
    """The pieces of an answer that begins and then breaks off."""
    return lambda prompt, params, index: [Piece(text="Light", tokens=(1,)), Piece(text="", reason=reason, error=error)]


@contextlib.contextmanager
def live(app):
    """The address of a server that answers in a thread until the end of the block."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    started = threading.Event()
    startup = server.startup

    async def tell(sockets=None):
        await startup(sockets)
        started.set()

    server.startup = tell
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(30), "the server has not started"
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
