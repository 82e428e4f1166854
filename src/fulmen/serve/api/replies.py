"""The bodies of answers, in OpenAI's shapes. What is not set is not written."""

import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import Response
from pydantic import BaseModel

from fulmen.data import Tokenizer
from fulmen.serve.types import Piece, TokenLogprobs

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say; as in OpenAI's API."""


class PromptDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class FunctionDelta(BaseModel):
    name: str = ""
    arguments: str = ""


class ToolCallReply(BaseModel):
    id: str
    type: Literal["function"]
    function: FunctionDelta


class ToolCallDelta(BaseModel):
    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionDelta


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCallReply] = []


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None = None
    tool_calls: list[ToolCallDelta] = []


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class TextCompletion(BaseModel):
    """Whole, or a chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int  # tokens of a prompt and its answer
    max_images: int  # of a request; 0: the model takes none


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class Text(BaseModel):
    prompt: str


class Health(BaseModel):
    status: Literal["ok"]


def envelope(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """What is the same in all chunks of an answer."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprobs]) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            TokenLogprob(
                **_spelled(tokenizer, drawn.token, drawn.logprob),
                top_logprobs=[TopLogprob(**_spelled(tokenizer, token, value)) for token, value in drawn.top],
            )
            for drawn in tokens
        ]
    )


def _spelled(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    written = tokenizer.token_bytes(token)
    return {"token": token_text(tokenizer, token), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(written)}


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """What a token is called: its text; of a part of a character its bytes; of a special token its name."""
    written = tokenizer.token_bytes(token)
    if not written:
        return tokenizer.decode([token], skip_special=False)
    try:
        return written.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)


def given_logprobs(piece: Piece) -> tuple[TokenLogprobs, ...]:
    """Those of a piece's tokens but the one that ended the answer, which is no part of it."""
    is_ended_by_token = piece.reason == "stop" and not isinstance(piece.stop, str)
    return piece.logprobs[:-1] if is_ended_by_token else piece.logprobs


def dump_json(reply: BaseModel) -> Response:
    """An answer with what is set in this reply."""
    return Response(reply.model_dump_json(exclude_unset=True), media_type="application/json")
