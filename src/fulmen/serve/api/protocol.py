"""The fields of requests, checked: OpenAI's own, and beyond them those that vLLM's clients know.

Fields of OpenAI's API that cannot change an answer are accepted and have no effect; those that would change it and are
not built are refused by name.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from fulmen.serve.params import LARGEST, MAX_LOGPROBS, MAX_STOP_LENGTH, MAX_STOPS, MAX_TOKENS_NAMED, SamplingParams
from fulmen.serve.structure import Structure

MAX_MESSAGES = 4096
"""Messages of a chat."""
MAX_PARTS = 256
"""Parts of a message's content."""
MAX_TOOLS = 128
"""Functions on offer, and calls of one message."""
MAX_PROMPTS = 64
"""Prompts of one request for completions."""
MAX_ANSWERS = 64
"""Answers to a prompt."""
MAX_ANSWERS_IN_ALL = 256
"""Answers to all prompts of a request."""
DEFAULT_COMPLETION = 16
"""Tokens of a completion unless the request says otherwise, as OpenAI's API has it."""


def refused(reason: str) -> Any:
    """The type of a field that may only be absent or null."""

    def check(value: Any) -> Any:
        if value is not None:
            raise PydanticCustomError("unsupported", "{reason}", {"reason": reason})
        return value

    return Annotated[None, BeforeValidator(check), Field(description=f"refused unless null: {reason}")]


def ignored(kind: Any) -> Any:
    """The type of a field without effect."""
    return Annotated[kind | None, Field(description="accepted, without effect")]


class Strict(BaseModel):
    """No unknown field, no wrong type that happens to convert."""

    model_config = ConfigDict(extra="forbid", strict=True)


def conflict(param: str, reason: str) -> PydanticCustomError:
    """The error of a field that does not fit the others."""
    return PydanticCustomError("conflict", "{reason}", {"reason": reason, "param": param})


Token = Annotated[int, Field(ge=0, le=LARGEST)]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class StreamOptions(Strict):
    include_usage: bool = False  # one more chunk at the end, with the tokens used
    continuous_usage_stats: bool = False  # usage in every chunk; beyond OpenAI
    include_obfuscation: ignored(bool) = None


class JsonSchema(Strict):
    name: FunctionName
    description: ignored(str) = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: ignored(bool) = None  # the schema is kept in any case


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Strict):
    """What the answer must look like: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")  # a schema
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1, max_length=1024)

    @model_validator(mode="after")
    def _exactly_one(self) -> "StructuredOutputs":
        if sum(value is not None for value in (self.json_, self.regex, self.choice)) != 1:
            raise PydanticCustomError("conflict", "needs exactly one of json, regex, choice")
        return self

    def structure(self) -> Structure:
        if self.json_ is not None:
            return Structure("json_schema", self.json_ if isinstance(self.json_, str) else _dump(self.json_))
        if self.regex is not None:
            return Structure("regex", self.regex)
        return Structure("choice", _dump(self.choice))


class Generation(Strict):
    """What both kinds of requests for text have."""

    model: str = Field(max_length=512)
    temperature: float | None = Field(None, ge=0, le=2, description="1 by default")
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_ANSWERS)
    max_tokens: int | None = Field(None, ge=1, le=LARGEST)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[TokenName, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=MAX_TOKENS_NAMED
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: ignored(str) = None
    # Beyond OpenAI:
    top_k: int | None = Field(None, ge=0, le=LARGEST)
    min_p: float | None = Field(None, ge=0, le=1)
    # Smaller ones make logits overflow.
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    stop_token_ids: list[Token] | None = Field(None, max_length=MAX_TOKENS_NAMED)
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise conflict("stream_options", "is for stream=true only")
        return self

    def structure(self) -> Structure | None:
        """What its answers must look like. Raises UserError for what cannot be meant."""
        return None if self.structured_outputs is None else self.structured_outputs.structure()

    def sampling(self, **more: Any) -> SamplingParams:
        """How its answers are drawn. `more` are settings that this class does not know; they come last."""
        same = ("top_p", "n", "max_tokens", "seed", "presence_penalty", "frequency_penalty")
        beyond = ("top_k", "min_p", "repetition_penalty", "ignore_eos")
        given = {name: getattr(self, name) for name in (*same, *beyond) if getattr(self, name) is not None}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            **{"max_tokens": None, "temperature": 1.0 if self.temperature is None else self.temperature}
            | given
            | {"stop": stop, "stop_tokens": tuple(self.stop_token_ids or ())}
            | {"logit_bias": {int(token): bias for token, bias in (self.logit_bias or {}).items()}}
            | more
        )


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=MAX_ANSWERS, description="must equal n: no more are drawn")
    echo: Literal[False] | None = Field(None, description="the prompt is not given back")
    suffix: refused("this model cannot fill in text before a suffix") = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str = Field(description="data:image/...;base64,... or, where the server allows it, an http(s) address")
    detail: Literal["auto", "low", "high"] | None = Field(None, description="low: the image in one crop alone")


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Content = str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)]
Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
UserContent = str | Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS)]


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Content
    name: ignored(str) = None


class UserMessage(Strict):
    role: Literal["user"]
    content: UserContent
    name: ignored(str) = None


class CalledFunction(Strict):
    name: FunctionName
    arguments: str


class ToolCall(Strict):
    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_TOOLS)
    name: ignored(str) = None
    refusal: ignored(str) = None
    annotations: ignored(list[Any]) = None
    audio: refused("this server knows no sound") = None
    function_call: refused("use tool_calls") = None

    @model_validator(mode="after")
    def _says_something(self) -> "AssistantMessage":
        if self.content is None and not self.tool_calls:
            raise conflict("content", "is missing where there are no tool_calls")
        return self


class ToolMessage(Strict):
    role: Literal["tool"]
    content: Content
    tool_call_id: str = Field(max_length=256)


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class Function(Strict):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: ignored(bool) = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


def _different_names(tools: list[Tool]) -> list[Tool]:
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise PydanticCustomError("names", "two functions have the same name")
    return tools


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS), AfterValidator(_different_names)]


class ChosenFunction(Strict):
    name: FunctionName


class NamedChoice(Strict):
    type: Literal["function"]
    function: ChosenFunction


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=LARGEST)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="false needs a tool_choice that makes the model call")
    metadata: ignored(dict[str, str]) = None
    safety_identifier: ignored(str) = None
    prompt_cache_key: ignored(str) = None
    prompt_cache_retention: ignored(str) = None
    store: Literal[False] | None = Field(None, description="nothing is kept")
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = Field(None, max_length=1)
    reasoning_effort: Literal["none"] | None = Field(None, description="this model does not reason apart")
    verbosity: Literal["medium"] | None = None
    audio: refused("this server knows no sound") = None
    prediction: refused("predicted output is not built") = None
    web_search_options: refused("this server searches nothing") = None
    moderation: refused("this server moderates nothing") = None
    prompt_cache_options: refused("the prefix cache has no settings per request") = None
    functions: refused("use tools") = None
    function_call: refused("use tool_choice") = None

    @model_validator(mode="after")
    def _fields_that_exclude_each_other(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise conflict("max_tokens", "means the same as max_completion_tokens: give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise conflict("top_logprobs", "needs logprobs=true")
        if self.response_format is not None and self.structured_outputs is not None:
            raise conflict("structured_outputs", "and response_format exclude each other")
        return self

    def structure(self) -> Structure | None:
        if isinstance(self.response_format, JsonSchemaFormat):
            return Structure("json_schema", _dump(self.response_format.json_schema.schema_))
        if isinstance(self.response_format, JsonObjectFormat):
            return Structure("json_object")
        return super().structure()


class TokenizeRequest(Strict):
    """POST /tokenize: a text as /v1/completions reads it, or messages as /v1/chat/completions does."""

    model: str | None = Field(None, max_length=512)
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool = True  # the beginning-of-sentence token before a text
    add_generation_prompt: bool = True  # the beginning of the assistant's turn after messages

    @model_validator(mode="after")
    def _exactly_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise conflict("prompt", "or messages: one of them, and not both")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = Field(None, max_length=512)
    tokens: list[Token]


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
