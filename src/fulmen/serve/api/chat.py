"""POST /v1/chat/completions: conversations, with functions that the model may call."""

import contextlib
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from fulmen.data import encode_chat
from fulmen.serve.api.answering import Api, Streams, Used, respond, unless_left
from fulmen.serve.api.completions import STREAM
from fulmen.serve.api.errors import ApiError, blaming
from fulmen.serve.api.images import asked_images
from fulmen.serve.api.limits import JsonRoute
from fulmen.serve.api.protocol import (
    AssistantMessage,
    ChatRequest,
    Content,
    ImagePart,
    NamedChoice,
    Tool,
    ToolMessage,
    UserContent,
)
from fulmen.serve.api.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FunctionDelta,
    ToolCallDelta,
    ToolCallReply,
    chat_logprobs,
    envelope,
    given_logprobs,
)
from fulmen.serve.api.tools import CallParser, Part, describe_tools, require_call, write_calls, write_result
from fulmen.serve.params import SamplingParams
from fulmen.serve.prompt import Prompt
from fulmen.serve.types import Piece

ROLES = {"developer": "system"}


def chat_routes(api: Api) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAM)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer the last message of a conversation."""
        api.check(request, body.model)
        params = chat_params(body)
        async with chat_prompt(api, request, body.messages, offered(body), has_answer=True) as prompt:
            streams = await api.open([prompt], params, param="messages")
        answering = _Answering(api, body, len(prompt))
        del prompt  # its images are the engine's, for as long as that needs them
        return await respond(request, answering, streams, streamed=body.stream)

    return router


@contextlib.asynccontextmanager
async def chat_prompt(
    api: Api,
    request: Request,
    messages: Sequence[Any],
    tools: Sequence[Tool],
    *,
    generate: bool = True,
    has_answer: bool = False,
) -> AsyncIterator[Prompt]:
    """What the model reads of a conversation, images included, whose pixels are counted until the block ends.

    has_answer: refuse a prompt that leaves no room for one, as far as sizes tell before any image is decoded.
    Raises ApiError for an image that cannot be had, and where there is no memory for its pixels.
    """
    rendered, asked = model_messages(messages, tools), asked_images(messages)
    if asked and api.images is None:
        param = asked[0].param.removesuffix(".image_url.url")
        raise _unfit(param, f"{param}: this model takes no images")
    tokens = await run_in_threadpool(encode_chat, api.tokenizer, rendered, generate=generate)
    if not asked:
        yield Prompt(tokens)
        return

    def check(positions: int) -> None:
        if has_answer:
            api.check_length(len(tokens) - len(asked) + positions, param="messages")

    with api.images.counting() as count:
        reading = api.images.read(asked, count, check_positions=check, elsewhere=lambda: api.service.pixels)
        images = await unless_left(request, reading)
        yield Prompt.with_images(tokens, images, api.images.image_token)


def offered(body: ChatRequest) -> list[Tool]:
    """The functions that the model is told of: none if it must not call any."""
    return [] if body.tool_choice == "none" else body.tools or []


def chat_params(body: ChatRequest) -> SamplingParams:
    """How the answers are drawn. Raises ApiError or UserError for fields that do not fit each other."""
    field = "response_format" if body.response_format is not None else "structured_outputs"
    with blaming(field):
        wanted = body.structure()
    tools = offered(body)
    required = _required(body, tools)
    if tools and wanted is not None:
        raise _unfit(field, f"{field} would rule out calls of tools: set tool_choice='none'")
    if tools and not required and body.parallel_tool_calls is False:
        raise _unfit("parallel_tool_calls", "parallel_tool_calls=false needs tool_choice='required' or a function")
    if required:
        once = isinstance(body.tool_choice, NamedChoice) or body.parallel_tool_calls is False
        with blaming("tools"):
            wanted = require_call(functions_of(required), once=once)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    more = {"max_tokens": body.max_completion_tokens or body.max_tokens, "logprobs": logprobs, "structure": wanted}
    return body.sampling(**more)


def model_messages(messages: Sequence[Any], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The messages as `encode_chat` takes them; functions on offer come after the system's first messages."""
    names: dict[str, str] = {}
    rendered = [_message(number, message, names) for number, message in enumerate(messages)]
    if tools:
        first = next((place for place, message in enumerate(rendered) if message["role"] != "system"), len(rendered))
        rendered.insert(first, describe_tools(functions_of(tools)))
    return rendered


def functions_of(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """What the model reads of each function; `strict` is for the server."""
    return [tool.function.model_dump(exclude_none=True, exclude={"strict"}) for tool in tools]


def _message(number: int, message: Any, names: dict[str, str]) -> dict[str, Any]:
    """names: of the functions called so far, by the calls' ids."""
    if isinstance(message, ToolMessage):
        name = names.get(message.tool_call_id)
        if name is None:
            raise _unfit(f"messages[{number}].tool_call_id", "tool_call_id names no call of an earlier message")
        return write_result(name, _text(message.content))
    text = _content(message.content)
    if isinstance(message, AssistantMessage) and message.tool_calls:
        names |= {call.id: call.function.name for call in message.tool_calls}
        text += write_calls([(call.function.name, call.function.arguments) for call in message.tool_calls])
    return {"role": ROLES.get(message.role, message.role), "content": text}


def _content(content: UserContent | None) -> str | list[dict[str, str]]:
    """A text or, where there are images, parts."""
    if not isinstance(content, list) or not any(isinstance(part, ImagePart) for part in content):
        return _text(content)
    return [{"type": "image"} if isinstance(part, ImagePart) else part.model_dump() for part in content]


def _text(content: Content | None) -> str:
    if isinstance(content, list):
        return "".join(part.text for part in content)
    return content or ""


def _required(body: ChatRequest, tools: Sequence[Tool]) -> list[Tool]:
    """The functions of which the model must call one; none if it is free."""
    choice = body.tool_choice
    if choice is not None and choice != "none" and not tools:
        raise _unfit("tool_choice", "tool_choice needs tools")
    if not isinstance(choice, NamedChoice):
        return list(tools) if choice == "required" else []
    named = [tool for tool in tools if tool.function.name == choice.function.name]
    if not named:
        raise _unfit("tool_choice.function.name", f"tool_choice names {choice.function.name!r}, which is not in tools")
    return named


def _unfit(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


class _Answer:
    """One answer: from pieces to what a client is told."""

    def __init__(self, api: Api, names: Sequence[str], has_logprobs: bool):
        self._tokenizer, self._has_logprobs = api.tokenizer, has_logprobs
        self._parser = CallParser(names) if names else None
        self._ids: list[str] = []

    def push(self, piece: Piece) -> tuple[list[ChatDelta], ChatLogprobs | None, str | None]:
        """The deltas of a piece, its logprobs, and why the answer ends with it if it does."""
        logprobs = chat_logprobs(self._tokenizer, given_logprobs(piece)) if self._has_logprobs else None
        reason = piece.reason
        parts = self._parts(piece)
        if reason == "stop" and self._ids:
            reason = "tool_calls"
        return [self._delta(part) for part in parts], logprobs, reason

    def _parts(self, piece: Piece) -> list[Part]:
        if self._parser is None:
            return [Part(piece.text)] if piece.text else []
        parts = self._parser.push(piece.text) + (self._parser.finish() if piece.reason is not None else [])
        self._ids += [f"call_{uuid.uuid4().hex[:24]}" for part in parts if part.name]
        return parts

    def _delta(self, part: Part) -> ChatDelta:
        if part.call is None:
            return ChatDelta(content=part.text)
        if not part.name:
            function = FunctionDelta(arguments=part.arguments)
            return ChatDelta(tool_calls=[ToolCallDelta(index=part.call, function=function)])
        function = FunctionDelta(name=part.name, arguments="")
        call = ToolCallDelta(index=part.call, id=self._ids[part.call], type="function", function=function)
        return ChatDelta(tool_calls=[call])


class _Answering:
    """The answers to one request."""

    def __init__(self, api: Api, body: ChatRequest, prompt_tokens: int):
        names = [tool.function.name for tool in offered(body)]
        self._answers = [_Answer(api, names, bool(body.logprobs)) for _ in range(body.n or 1)]
        self._used = Used([prompt_tokens], body.stream_options)
        self._api = api

    async def whole(self, streams: Streams) -> ChatCompletion:
        head = envelope("chatcmpl", "chat.completion", self._api.model_name)
        choices: dict[int, ChatChoice] = {}
        async for _, piece in streams:
            self._used.add(0, piece)
            deltas, logprobs, reason = self._answers[piece.index].push(piece)
            choice = choices.get(piece.index)
            if choice is None:
                message = ChatMessage(role="assistant", content=None, refusal=None)
                choice = ChatChoice(index=piece.index, message=message, logprobs=logprobs, finish_reason="stop")
                choices[piece.index] = choice
            elif logprobs is not None:
                choice.logprobs.content.extend(logprobs.content)
            for delta in deltas:
                _add(choice.message, delta)
            choice.finish_reason = reason or "stop"
        for choice in choices.values():
            if choice.message.content is None and not choice.message.tool_calls:
                choice.message.content = ""
        in_order = [choices[index] for index in sorted(choices)]
        return ChatCompletion(**head, choices=in_order, usage=self._used.usage())

    async def chunks(self, streams: Streams) -> AsyncIterator[ChatChunk]:
        head = envelope("chatcmpl", "chat.completion.chunk", self._api.model_name)
        begun: set[int] = set()
        async for _, piece in streams:
            self._used.add(0, piece)
            for choice in self._choices(piece, begun):
                yield self._used.tell(ChatChunk(**head, choices=[choice]))
        if self._used.told_at_end:
            yield ChatChunk(**head, choices=[], usage=self._used.usage())

    def _choices(self, piece: Piece, begun: set[int]) -> Iterator[ChatChunkChoice]:
        """An answer's first chunk has the role and its last one the reason, and these have no text."""
        rest = {"index": piece.index, "logprobs": None, "finish_reason": None}
        if piece.index not in begun:
            begun.add(piece.index)
            yield ChatChunkChoice(**rest | {"delta": ChatDelta(role="assistant", content="")})
        deltas, logprobs, reason = self._answers[piece.index].push(piece)
        if not deltas and logprobs is not None and logprobs.content:
            deltas = [ChatDelta()]
        for delta in deltas:
            yield ChatChunkChoice(**rest | {"delta": delta, "logprobs": logprobs})
            logprobs = None  # with the first of them
        if reason is not None:
            yield ChatChunkChoice(**rest | {"delta": ChatDelta(), "finish_reason": reason})


def _add(message: ChatMessage, delta: ChatDelta) -> None:
    if delta.content is not None:
        message.content = (message.content or "") + delta.content
    for part in delta.tool_calls:
        if part.function.name:
            function = FunctionDelta(name=part.function.name, arguments="")
            message.tool_calls = [*message.tool_calls, ToolCallReply(id=part.id, type="function", function=function)]
        else:
            message.tool_calls[part.index].function.arguments += part.function.arguments
