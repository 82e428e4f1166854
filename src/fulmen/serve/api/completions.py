"""POST /v1/completions: text goes on."""

import codecs
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from fulmen.data import Tokenizer
from fulmen.serve.api.answering import Api, Streams, Used, respond
from fulmen.serve.api.errors import ApiError, blaming
from fulmen.serve.api.limits import JsonRoute
from fulmen.serve.api.protocol import DEFAULT_COMPLETION, MAX_ANSWERS_IN_ALL, CompletionRequest
from fulmen.serve.api.replies import (
    LEAST_LOGPROB,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    envelope,
    given_logprobs,
    token_text,
)
from fulmen.serve.params import SamplingParams
from fulmen.serve.types import Piece, TokenLogprobs

EVENT = {"type": "object", "properties": {"data": {"type": "string", "description": "A chunk as JSON, or [DONE]"}}}
STREAM = {200: {"content": {"text/event-stream": {"schema": EVENT}}}}
"""What the document says of streams: the schema is of each event."""


def completion_routes(api: Api) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/completions", response_model=TextCompletion, responses=STREAM)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Go on from one text or several, or from token ids."""
        api.check(request, body.model)
        params = _params(body)
        prompts = await run_in_threadpool(_encode, api.tokenizer, body.prompts)
        streams = await api.open(prompts, params, param="prompt")
        return await respond(request, _Answering(api, body, prompts, params.n), streams, streamed=body.stream)

    return router


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """A prompt's tokens as a document begins in training: the beginning-of-sentence token, then the text."""
    return [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.encode(text)]


def _encode(tokenizer: Tokenizer, prompts: list[str] | list[list[int]]) -> list[list[int]]:
    return [encode_text(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def _params(body: CompletionRequest) -> SamplingParams:
    """How the answers are drawn. Raises ApiError for fields that do not fit each other."""
    n = body.n or 1
    if n * len(body.prompts) > MAX_ANSWERS_IN_ALL:
        message = f"n: {n} answers to {len(body.prompts)} prompts are more than {MAX_ANSWERS_IN_ALL}"
        raise ApiError(400, message, param="n", code="invalid_value")
    if body.best_of is not None and body.best_of != n:
        message = "best_of must equal n: no answers are drawn that are not given back"
        raise ApiError(400, message, param="best_of", code="unsupported_value")
    with blaming("structured_outputs"):
        structure = body.structure()
    return body.sampling(max_tokens=body.max_tokens or DEFAULT_COMPLETION, logprobs=body.logprobs, structure=structure)


class _Answering:
    """The answers to one request. Choice i of prompt p has the number p * n + i."""

    def __init__(self, api: Api, body: CompletionRequest, prompts: list[list[int]], n: int):
        self._tokenizer, self._n = api.tokenizer, n
        self._used = Used([len(prompt) for prompt in prompts], body.stream_options)
        self._head = envelope("cmpl", "text_completion", api.model_name)
        self._has_logprobs, self._has_top = body.logprobs is not None, bool(body.logprobs)
        self._offsets: dict[int, _Offset] = {}

    async def whole(self, streams: Streams) -> TextCompletion:
        choices: dict[int, TextChoice] = {}
        async for prompt, piece in streams:
            part = self._choice(prompt, piece)
            whole = choices.setdefault(part.index, part)
            if whole is not part:
                whole.text += part.text
                whole.finish_reason = part.finish_reason
                if whole.logprobs is not None:
                    _extend(whole.logprobs, part.logprobs)
        in_order = [choices[number] for number in sorted(choices)]
        return TextCompletion(**self._head, choices=in_order, usage=self._used.usage())

    async def chunks(self, streams: Streams) -> AsyncIterator[TextCompletion]:
        async for prompt, piece in streams:
            yield self._used.tell(TextCompletion(**self._head, choices=[self._choice(prompt, piece)]))
        if self._used.told_at_end:
            yield TextCompletion(**self._head, choices=[], usage=self._used.usage())

    def _choice(self, prompt: int, piece: Piece) -> TextChoice:
        self._used.add(prompt, piece)
        number = prompt * self._n + piece.index
        logprobs = self._logprobs(number, given_logprobs(piece)) if self._has_logprobs else None
        return TextChoice(index=number, text=piece.text, logprobs=logprobs, finish_reason=piece.reason)

    def _logprobs(self, number: int, tokens: tuple[TokenLogprobs, ...]) -> TextLogprobs:
        offset = self._offsets.setdefault(number, _Offset())

        def name(token: int) -> str:
            return token_text(self._tokenizer, token)

        tops = [{name(token): max(value, LEAST_LOGPROB) for token, value in drawn.top} for drawn in tokens]
        return TextLogprobs(
            tokens=[name(drawn.token) for drawn in tokens],
            token_logprobs=[max(drawn.logprob, LEAST_LOGPROB) for drawn in tokens],
            top_logprobs=tops if self._has_top else None,
            text_offset=[offset.push(self._tokenizer.token_bytes(drawn.token)) for drawn in tokens],
        )


class _Offset:
    """Where in the answer's text each token begins, characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._characters = 0

    def push(self, written: bytes) -> int:
        before = self._characters
        self._characters += len(self._decoder.decode(written))
        return before


def _extend(whole: TextLogprobs, more: TextLogprobs) -> None:
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        if getattr(more, name) is not None:
            getattr(whole, name).extend(getattr(more, name))
