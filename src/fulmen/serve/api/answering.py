"""From HTTP requests to the service and back: streams that end when their client leaves."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from fulmen.data import Tokenizer
from fulmen.serve.api.errors import ApiError, failure, stopping
from fulmen.serve.api.images import ImageReader
from fulmen.serve.api.protocol import StreamOptions
from fulmen.serve.api.replies import PromptDetails, Usage, dump_json
from fulmen.serve.params import SamplingParams
from fulmen.serve.prompt import Prompt
from fulmen.serve.types import Piece

LOG = logging.getLogger(__name__)

T = TypeVar("T")


class Answers(Protocol):
    """The pieces of the answers to one prompt. `aclose` ends it early and frees its memory."""

    def __aiter__(self) -> AsyncIterator[Piece]: ...
    async def __anext__(self) -> Piece: ...
    async def aclose(self) -> None: ...


class Answering(Protocol):
    """What makes replies of the pieces of a request's answers."""

    async def whole(self, streams: "Streams") -> BaseModel: ...
    def chunks(self, streams: "Streams") -> AsyncIterator[BaseModel]: ...


class AnswersPrompts(Protocol):
    """What this API needs of a service."""

    ready: bool

    @property
    def max_context(self) -> int: ...
    @property
    def pixels(self) -> int: ...  # bytes that requests hold
    def stream(self, prompt: Prompt | list[int], params: SamplingParams) -> Answers: ...


@dataclass(kw_only=True)
class Api:
    """What all routes share."""

    service: AnswersPrompts
    tokenizer: Tokenizer
    model_name: str
    aliases: frozenset[str] = frozenset()
    images: ImageReader | None = None  # None: the model takes none
    request_timeout: float | None = None  # seconds

    def check(self, request: Request, model: str | None) -> None:
        """Raise ApiError unless the server takes requests and the model is its own."""
        if request.app.state.stopping or not self.service.ready:
            raise stopping()
        if model is not None:
            self.check_model(model)

    def check_model(self, model: str) -> None:
        """Raise ApiError (404) for another model than the one that is served."""
        if model != self.model_name and model not in self.aliases:
            message = f"there is no model {model!r:.200} here: it is {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_length(self, tokens: int, *, param: str) -> None:
        """Raise ApiError (400) for a prompt of so many tokens, or more, that no answer would fit after it."""
        room = self.service.max_context
        if tokens >= room:
            message = f"{param} has {tokens} tokens; {room} is the longest context here, the answer included"
            raise ApiError(400, message, param=param, code="context_length_exceeded")

    async def open(self, prompts: Sequence[Prompt | list[int]], params: SamplingParams, *, param: str) -> "Streams":
        """Begin to answer. Raises ApiError, UserError, QueueFull, with nothing begun.

        param: the field that the prompts come from.
        """
        if not self.service.ready:  # it may have stopped while the prompts were encoded
            raise stopping()
        self.check_length(max(map(len, prompts)), param=param)
        streams = Streams(self.request_timeout)
        try:
            for prompt in prompts:
                streams.add(self.service.stream(prompt, params))
        except BaseException:
            await streams.aclose()
            raise
        return streams


class Streams:
    """The pieces of the answers to some prompts, each with its prompt's number, as they come."""

    def __init__(self, timeout: float | None):
        self._streams: list[Answers] = []
        self._pumps: list[asyncio.Task] = []
        self._pieces: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()
        self._deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout

    def add(self, stream: Answers) -> None:
        self._streams.append(stream)

    def __aiter__(self) -> "Streams":
        return self

    async def __anext__(self) -> tuple[int, Piece]:
        """Raises ApiError where an answer cannot be completed."""
        try:
            async with asyncio.timeout_at(self._deadline):
                prompt, piece = await self._next()
        except TimeoutError:
            raise ApiError(504, "the answer took longer than this server allows", code="timeout") from None
        if piece.reason == "error":
            raise failure(piece.error or "the engine has failed")
        if piece.reason == "abort":
            raise stopping()
        return prompt, piece

    async def aclose(self) -> None:
        """End whatever is not at its end."""
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        for stream in self._streams:
            await stream.aclose()

    async def _next(self) -> tuple[int, Piece]:
        if len(self._streams) == 1:
            return 0, await anext(self._streams[0])
        if not self._pumps:
            self._pumps = [asyncio.create_task(self._pump(*item)) for item in enumerate(self._streams)]
            self._running = len(self._pumps)
        while self._running:
            prompt, piece = await self._pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            if piece is not None:
                return prompt, piece
            self._running -= 1
        raise StopAsyncIteration

    async def _pump(self, prompt: int, stream: Answers) -> None:
        try:
            async for piece in stream:
                self._pieces.put_nowait((prompt, piece))
            self._pieces.put_nowait((prompt, None))
        except Exception as error:
            self._pieces.put_nowait((prompt, error))


@dataclass
class Used:
    """Counts the tokens of a request, and tells them in the chunks of a stream as its client wishes.

    prompt_tokens: of each prompt. Not the prompts themselves, whose images would stay until the last chunk is read.
    """

    prompt_tokens: Sequence[int]
    options: StreamOptions | None = None
    _cached: dict[int, int] = field(init=False, default_factory=dict)
    _generated: dict[tuple[int, int], int] = field(init=False, default_factory=dict)

    def add(self, prompt: int, piece: Piece) -> None:
        if piece.index == 0:
            self._cached[prompt] = piece.cached_tokens
        self._generated[prompt, piece.index] = piece.generated_tokens

    @property
    def told_at_end(self) -> bool:
        """Whether the stream's last chunk has the count alone."""
        return self.options is not None and self.options.include_usage

    def tell(self, chunk: Any) -> Any:
        """`chunk` with the count so far, with null as long as it will be told at the end, or as it is."""
        if self.options is not None and self.options.continuous_usage_stats:
            chunk.usage = self.usage()
        elif self.told_at_end:
            chunk.usage = None
        return chunk

    def usage(self) -> Usage:
        """A prompt counts once, however many answers it has."""
        prompt, generated = sum(self.prompt_tokens), sum(self._generated.values())
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=generated,
            total_tokens=prompt + generated,
            prompt_tokens_details=PromptDetails(cached_tokens=sum(self._cached.values())),
        )


async def respond(request: Request, answering: Answering, streams: Streams, *, streamed: bool | None) -> Response:
    """The answers as they are drawn, or whole once they are; in any case nothing runs on when it is over."""
    if streamed:
        return EventStream(answering.chunks(streams), streams.aclose)
    try:
        return dump_json(await unless_left(request, answering.whole(streams)))
    finally:
        await streams.aclose()


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises ApiError (499) then, which none will see.

    The request's body must have been read.
    """
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client has left")
    finally:
        await _cancel(task, leaving)


class EventStream(Response):
    """Server-sent events as OpenAI sends them: chunks, an error if one comes up, `[DONE]`.

    The chunks' iterator is closed and `end` is awaited in any case: all was sent, the client left, sending failed.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[BaseModel], end: Callable[[], Awaitable[None]]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._end = chunks, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task, leaving = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            await _cancel(task, leaving)
            await self._chunks.aclose()
            await self._end()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events():
            await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _events(self) -> AsyncIterator[str]:
        try:
            async for chunk in self._chunks:
                yield chunk.model_dump_json(exclude_unset=True)
        except ApiError as error:
            yield json.dumps(error.body())
        except Exception:
            LOG.exception("a stream has failed")
            yield json.dumps(failure().body())


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
