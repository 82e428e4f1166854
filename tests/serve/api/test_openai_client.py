"""The `openai` package works with a live server as it is: with scripted answers, and with a model of random weights."""

import asyncio
import contextlib
import json

import openai
import pydantic
import pytest
from tests.serve.api.fakes import MODEL, FakeService, failed, live
from tests.serve.api.pictures import asking, png

from fulmen.config import UserError
from fulmen.serve.api.app import create_app
from fulmen.serve.api.images import ImageReader
from fulmen.serve.service import Service
from fulmen.serve.types import QueueFull

HELLO = [{"role": "user", "content": "Hello"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 10}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Of a city", "parameters": CITY}}


class City(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=10)


def connect(address, key="none"):
    return openai.OpenAI(base_url=address + "/v1", api_key=key, max_retries=0)


@pytest.fixture
def service(tokenizer):
    return FakeService(tokenizer)


@pytest.fixture
def client(service, tokenizer):
    with live(create_app(service, model_name=MODEL, tokenizer=tokenizer)) as address, connect(address) as client:
        yield client


@contextlib.contextmanager
def client_of(engine, images=None):
    service = Service(engine)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        async with service:
            yield

    app = create_app(service, model_name=MODEL, tokenizer=engine.tokenizer, images=images, lifespan=lifespan)
    with live(app) as address, connect(address) as client:
        yield client


@pytest.fixture
def model_client(new_engine, tokenizer):
    """Of a real engine, whose model says what its random weights make it."""
    with client_of(new_engine(eos_ids=[tokenizer.eos_id])) as client:
        yield client


@pytest.fixture
def seeing_client(seeing_engine):
    images = ImageReader(seeing_engine.image_processor, seeing_engine.image_token)
    with client_of(seeing_engine, images) as client:
        yield client


def test_chat(client, service):
    reply = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0.5, seed=1, max_tokens=20)
    assert reply.choices[0].message.content == service.text
    assert reply.choices[0].finish_reason == "stop"
    assert (reply.usage.completion_tokens, reply.usage.prompt_tokens_details.cached_tokens) == (10, 2)
    assert service.asked[0][1].seed == 1


def test_stream(client, service):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == service.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == 10


def test_a_stream_can_be_left(client, service):
    service.hold = 3
    with client.chat.completions.create(model=MODEL, messages=HELLO, stream=True) as stream:
        assert next(stream).choices[0].delta.role == "assistant"
    assert service.left.wait(10)


def test_the_clients_own_stream_of_events(client, service):
    service.text = 'Well. <function_call>```typescript\nfunctions.get_weather({"city": "Bonn"})\n```'
    with client.chat.completions.stream(model=MODEL, messages=HELLO, tools=[TOOL]) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert {"content.delta", "tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert message.content == "Well. "
    assert message.tool_calls[0].function.arguments == '{"city": "Bonn"}'


def test_a_conversation_with_a_function(client, service, tokenizer):
    service.text = '<function_call>```typescript\nfunctions.get_weather({"city": "Bonn"})\n```'
    reply = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[TOOL])
    (call,) = reply.choices[0].message.tool_calls
    assert reply.choices[0].finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Bonn"})
    called = service.text
    service.text = "It rains."
    messages = [
        *HELLO,
        reply.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": '{"rain": true}'},
    ]
    reply = client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL])
    assert reply.choices[0].message.content == "It rains."
    prompt = tokenizer.decode(service.asked[1][0], skip_special=False)
    assert f"ai name=assistant\n{called}<end_of_sentence>" in prompt
    assert '{"name": "get_weather", "response": {"rain": true}}' in prompt


def test_logprobs(client, service):
    reply = client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=3)
    content = reply.choices[0].logprobs.content
    assert "".join(token.token for token in content) == service.text
    assert b"".join(bytes(token.bytes) for token in content).decode() == service.text
    assert [len(token.top_logprobs) for token in content] == [3] * 9
    legacy = client.completions.create(model=MODEL, prompt="a", logprobs=2).choices[0].logprobs
    assert "".join(legacy.tokens) == service.text
    for start, token in zip(legacy.text_offset, legacy.tokens, strict=True):
        assert service.text[start:].startswith(token)
    assert len(legacy.top_logprobs[0]) == 2


def test_completions(client, service):
    reply = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=3)
    assert [choice.text for choice in reply.choices] == ["Lightning", "Lightning"]
    text = "".join(
        chunk.choices[0].text for chunk in client.completions.create(model=MODEL, prompt=[1, 2], stream=True)
    )
    assert text == service.text


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_fields_beyond_openai(client, service):
    more = {"top_k": 3, "min_p": 0.1, "structured_outputs": {"choice": ["a", "b"]}}
    client.chat.completions.create(model=MODEL, messages=HELLO, extra_body=more)
    params = service.asked[0][1]
    assert (params.top_k, params.min_p, params.structure.kind) == (3, 0.1, "choice")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("no"), openai.BadRequestError),
        (QueueFull(1), openai.RateLimitError),
        (RuntimeError("broken"), openai.InternalServerError),
    ],
)
def test_errors(client, service, error, kind):
    service.error = error
    with pytest.raises(kind) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO)
    assert caught.value.body["message"]


def test_errors_of_requests(client, service):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, extra_body={"foo": 1})
    assert (caught.value.param, caught.value.code) == ("foo", "unknown_parameter")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a", temperature=9)
    assert caught.value.param == "temperature"
    service.pieces = failed("error", "not finite")
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True))


def test_keys(service, tokenizer):
    with live(create_app(service, model_name=MODEL, tokenizer=tokenizer, api_key="secret")) as address:
        with pytest.raises(openai.AuthenticationError):
            connect(address, "other").models.list()
        assert connect(address, "secret").models.list().data[0].id == MODEL


# With a model


def test_a_model_repeats_itself_by_its_seed(model_client):
    settings = {"model": MODEL, "messages": HELLO, "seed": 3, "max_tokens": 12}
    whole = model_client.chat.completions.create(**settings, logprobs=True, top_logprobs=2).choices[0]
    chunks = model_client.chat.completions.create(**settings, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert all(token.logprob <= 0 for token in whole.logprobs.content)


def test_a_model_keeps_to_a_schema(model_client):
    settings = {"model": MODEL, "messages": HELLO, "seed": 1, "max_tokens": 100}
    reply = model_client.chat.completions.parse(**settings, response_format=City)
    assert len(reply.choices[0].message.parsed.city) <= 10
    chosen = {"structured_outputs": {"choice": ["yes", "no"]}}
    reply = model_client.chat.completions.create(**settings, extra_body=chosen)
    assert reply.choices[0].message.content in ("yes", "no")
    with pytest.raises(openai.BadRequestError):
        model_client.chat.completions.create(**settings, extra_body={"structured_outputs": {"regex": "("}})


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_model_calls_what_it_must(model_client, choice):
    settings = {"messages": HELLO, "tools": [TOOL], "tool_choice": choice, "seed": 1, "max_tokens": 200}
    reply = model_client.chat.completions.create(model=MODEL, parallel_tool_calls=False, **settings).choices[0]
    (call,) = reply.message.tool_calls
    assert reply.finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city"}


def test_the_prefix_cache_shows_in_the_usage(model_client):
    messages = [{"role": "user", "content": "Lightning keeps a state, softmax keeps keys and values. " * 4}]
    cached = []
    for _ in range(2):
        reply = model_client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1)
        cached.append(reply.usage.prompt_tokens_details.cached_tokens)
    assert cached[0] == 0 < cached[1] < reply.usage.prompt_tokens


def test_a_model_is_shown_images(seeing_client, seeing_engine):
    """Two ways to ask give the same answer; another image gives another, and one that was seen before costs nothing."""
    layout = seeing_engine.image_processor.layout

    def ask(*images, **settings):
        settings = {"model": MODEL, "messages": asking(*images, "Which?"), "temperature": 0, "max_tokens": 8} | settings
        return seeing_client.chat.completions.create(**settings, logprobs=True, extra_body={"ignore_eos": True})

    def numbers(reply):
        return [token.logprob for token in reply.choices[0].logprobs.content]

    red, blue = png(200, 120, "red"), png(200, 120, "blue")
    reply, other, again = ask(red), ask(blue), ask(red)
    chunks = [chunk.choices[0].delta.content or "" for chunk in ask(red, stream=True)]
    assert "".join(chunks) == reply.choices[0].message.content
    assert numbers(reply) != numbers(other)
    assert numbers(again) == pytest.approx(numbers(reply), abs=1e-4)
    two = ask(red, blue)
    assert two.usage.prompt_tokens - reply.usage.prompt_tokens == layout(200, 120).positions
    assert other.usage.prompt_tokens_details.cached_tokens < layout(200, 120).positions
    assert again.usage.prompt_tokens_details.cached_tokens > layout(200, 120).positions


def test_a_model_that_sees_answers_without_images_too(seeing_client):
    reply = seeing_client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3)
    assert reply.usage.completion_tokens <= 3
    with pytest.raises(openai.BadRequestError) as caught:
        seeing_client.chat.completions.create(model=MODEL, messages=asking("Which?", png(1, 9000)))
    assert caught.value.param == "messages[0].content[1].image_url.url"


def test_the_asynchronous_client(client, service):
    async def go():
        async with openai.AsyncOpenAI(base_url=str(client.base_url), api_key="none", max_retries=0) as own:
            texts = await asyncio.gather(*(one(own) for _ in range(8)))
        assert texts == [service.text] * 8

    async def one(own):
        stream = await own.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    asyncio.run(go())
