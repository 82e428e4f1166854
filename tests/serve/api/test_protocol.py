"""Requests: every field is checked, and an error says which one is wrong."""

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from fulmen.serve.api.chat import chat_params, model_messages
from fulmen.serve.api.errors import MAX_MESSAGE, ApiError, invalid_request
from fulmen.serve.api.protocol import MAX_MESSAGES, ChatRequest, CompletionRequest, TokenizeRequest
from fulmen.serve.params import SamplingParams
from fulmen.serve.structure import Structure

USER = {"role": "user", "content": "Hello"}
CHAT = {"model": "tiny", "messages": [USER]}
TOOL = {"type": "function", "function": {"name": "go", "description": "Goes", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "go", "arguments": '{"a": 1}'}}
ASSISTANT = {"role": "assistant", "tool_calls": [CALL]}


def refusal(kind, body):
    """(param, message) of the error by which a body is refused."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    # As FastAPI does.
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    error = invalid_request(RequestValidationError(errors).errors(), body)
    assert error.status_code == 400
    return error.param, error.detail


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tempurature": 1}, "tempurature", "tempurature is not a field that this server knows"),
        ({"model": None}, "model", "model: Input should be a valid string"),
        ({"temperature": "hot"}, "temperature", "temperature: Input should be a valid number"),
        ({"temperature": True}, "temperature", "temperature: Input should be a valid number"),
        ({"temperature": 2.5}, "temperature", "temperature: Input should be less than or equal to 2"),
        ({"temperature": -1}, "temperature", "temperature: Input should be greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "top_p: Input should be greater than 0"),
        ({"n": 0}, "n", "n: Input should be greater than or equal to 1"),
        ({"n": 65}, "n", "n: Input should be less than or equal to 64"),
        ({"n": 1.5}, "n", "n: Input should be a valid integer"),
        ({"seed": -1}, "seed", "seed: Input should be greater than or equal to 0"),
        ({"seed": 2**63}, "seed", f"seed: Input should be less than {2**63}"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens: Input should be greater than or equal to 1"),
        ({"stop": ["a"] * 17}, "stop", "stop: List should have at most 16 items after validation, not 17"),
        ({"stop": ["a", ""]}, "stop[1]", "stop[1]: String should have at least 1 character"),
        ({"stop": 3}, "stop", "stop: Input should be a valid string; or Input should be a valid list"),
        (
            {"stop_token_ids": [-1]},
            "stop_token_ids[0]",
            "stop_token_ids[0]: Input should be greater than or equal to 0",
        ),
        ({"logit_bias": {"a": 1}}, "logit_bias.a", "logit_bias.a: String should match pattern '^[0-9]{1,9}$'"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "logit_bias.1: Input should be less than or equal to 100"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs: needs logprobs=true"),
        (
            {"logprobs": True, "top_logprobs": 21},
            "top_logprobs",
            "top_logprobs: Input should be less than or equal to 20",
        ),
        ({"stream_options": {}}, "stream_options", "stream_options: is for stream=true only"),
        (
            {"stream": True, "stream_options": {"include": 1}},
            "stream_options.include",
            "stream_options.include is not a field that this server knows",
        ),
        (
            {"max_tokens": 1, "max_completion_tokens": 1},
            "max_tokens",
            "max_tokens: means the same as max_completion_tokens: give one",
        ),
        ({"messages": []}, "messages", "messages: List should have at least 1 item after validation, not 0"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1].content", "messages[1].content: Field required"),
        (
            {"messages": [{"content": "a"}]},
            "messages[0]",
            "messages[0]: Unable to extract tag using discriminator 'role'",
        ),
        ({"messages": [USER | {"id": 1}]}, "messages[0].id", "messages[0].id is not a field that this server knows"),
        (
            {"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "messages[0].content[0].type: Input should be 'text'",
        ),
        (
            {"messages": [USER | {"content": [{"type": "image_url"}]}]},
            "messages[0].content[0].image_url",
            "messages[0].content[0].image_url: Field required",
        ),
        (
            {"messages": [USER | {"content": [{"type": "image_url", "image_url": {"url": "x", "detail": "best"}}]}]},
            "messages[0].content[0].image_url.detail",
            "messages[0].content[0].image_url.detail: Input should be 'auto', 'low' or 'high'",
        ),
        (
            {"messages": [USER | {"content": [{"type": "input_audio"}]}]},
            "messages[0].content[0]",
            "messages[0].content[0]: Input tag 'input_audio' found using 'type' does not match",
        ),
        (
            {"messages": [{"role": "assistant"}]},
            "messages[0].content",
            "messages[0].content: is missing where there are no tool_calls",
        ),
        ({"messages": [USER] * (MAX_MESSAGES + 1)}, "messages", "messages: List should have at most 4096 items"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "tools[0].type: Input should be 'function'"),
        ({"tools": [TOOL, TOOL]}, "tools", "tools: two functions have the same name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
            "tools[0].function.name: String should match pattern",
        ),
        ({"tool_choice": "maybe"}, "tool_choice", "tool_choice: Input should be 'none', 'auto' or 'required'"),
        (
            {"response_format": {"type": "xml"}},
            "response_format",
            "response_format: Input tag 'xml' found using 'type'",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "response_format.json_schema.schema: Field required",
        ),
        (
            {"structured_outputs": {}},
            "structured_outputs",
            "structured_outputs: needs exactly one of json, regex, choice",
        ),
        ({"audio": {"voice": "a"}}, "audio", "audio: this server knows no sound"),
        ({"functions": []}, "functions", "functions: use tools"),
        ({"store": True}, "store", "store: Input should be False"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(fields, param, message):
    found, detail = refusal(ChatRequest, CHAT | fields)
    assert found == param
    assert detail.startswith(message)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "a"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"messages": []}, "messages"),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(fields, param):
    assert refusal(CompletionRequest, {"model": "tiny", "prompt": "a"} | fields)[0] == param


def test_text_or_messages_can_be_tokenized():
    assert refusal(TokenizeRequest, {"prompt": "a", "messages": [USER]})[0] == "prompt"
    assert refusal(TokenizeRequest, {})[0] == "prompt"


def test_what_cannot_change_an_answer_is_accepted():
    fields = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "modalities": ["text"],
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "verbosity": "medium",
        "parallel_tool_calls": True,
        "audio": None,
        "response_format": {"type": "text"},
    }
    plain, full = (ChatRequest.model_validate(CHAT | more) for more in ({}, fields))
    assert chat_params(plain) == chat_params(full) == SamplingParams(max_tokens=None, temperature=1.0)


def test_fields_become_parameters():
    fields = {
        "temperature": 0,
        "top_p": 0.5,
        "n": 2,
        "max_completion_tokens": 7,
        "stop": "a",
        "seed": 3,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "logit_bias": {"5": 2.5},
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "stop_token_ids": [9],
        "ignore_eos": True,
        "logprobs": True,
    }
    assert chat_params(ChatRequest.model_validate(CHAT | fields)) == SamplingParams(
        temperature=0,
        top_p=0.5,
        n=2,
        max_tokens=7,
        stop=("a",),
        seed=3,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={5: 2.5},
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.1,
        stop_tokens=(9,),
        ignore_eos=True,
        logprobs=0,
    )
    top = ChatRequest.model_validate(CHAT | {"logprobs": True, "top_logprobs": 3})
    assert chat_params(top).logprobs == 3


@pytest.mark.parametrize(
    ("fields", "structure"),
    [
        ({"response_format": {"type": "json_object"}}, Structure("json_object")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}},
            Structure("json_schema", '{"type": "object"}'),
        ),
        ({"structured_outputs": {"json": {"type": "object"}}}, Structure("json_schema", '{"type": "object"}')),
        ({"structured_outputs": {"json": '{"type":"object"}'}}, Structure("json_schema", '{"type":"object"}')),
        ({"structured_outputs": {"regex": "a+"}}, Structure("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "ä"]}}, Structure("choice", '["a", "ä"]')),
        # Of no use to a model that may not call.
        (
            {"response_format": {"type": "json_object"}, "tools": [TOOL], "tool_choice": "none"},
            Structure("json_object"),
        ),
    ],
)
def test_structures(fields, structure):
    assert chat_params(ChatRequest.model_validate(CHAT | fields)).structure == structure


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name",
        ),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [TOOL], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "a", "parameters": {"x-guidance": {}}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
def test_fields_that_do_not_fit(fields, param):
    with pytest.raises(ApiError) as caught:
        chat_params(ChatRequest.model_validate(CHAT | fields))
    assert (caught.value.status_code, caught.value.param) == (400, param)
    assert param.split(".")[0] in caught.value.detail


@pytest.mark.parametrize(
    ("fields", "once"),
    [
        ({"tool_choice": "required"}, False),
        ({"tool_choice": "required", "parallel_tool_calls": False}, True),
        ({"tool_choice": {"type": "function", "function": {"name": "go"}}}, True),
    ],
)
def test_a_call_can_be_required(fields, once):
    other = {"type": "function", "function": {"name": "other"}}
    grammar = chat_params(ChatRequest.model_validate(CHAT | {"tools": [TOOL, other]} | fields)).structure.value
    assert ("call+" in grammar) != once
    assert ("other(" in grammar) == (fields["tool_choice"] == "required")


def rendered(messages, tools=()):
    body = ChatRequest.model_validate(CHAT | {"messages": messages, "tools": list(tools)})
    return model_messages(body.messages, body.tools)


def test_messages_become_the_models_own():
    system, developer = {"role": "system", "content": "A"}, {"role": "developer", "content": "B"}
    said = {"role": "assistant", "content": [{"type": "text", "text": "Let me "}, {"type": "text", "text": "go. "}]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "done"}
    messages = [system, developer, USER, said | {"tool_calls": [CALL]}, result]
    assert rendered(messages, [TOOL]) == [
        {"role": "system", "content": "A"},
        {"role": "system", "content": "B"},
        {"role": "tools", "content": '{"name": "go", "description": "Goes", "parameters": {"type": "object"}}'},
        {"role": "user", "content": "Hello"},
        {
            "role": "assistant",
            "content": 'Let me go. <function_call>```typescript\nfunctions.go({"a": 1})\n```',
        },
        {"role": "tool", "content": '{"name": "go", "response": "done"}'},
    ]
    assert rendered([system], [TOOL])[-1]["role"] == "tools"


def test_a_result_needs_its_call():
    result = {"role": "tool", "tool_call_id": "call_2", "content": "done"}
    with pytest.raises(ApiError) as caught:
        rendered([USER, ASSISTANT, result])
    assert caught.value.param == "messages[2].tool_call_id"


def test_answers_of_the_api_can_be_sent_back():
    """As clients do that append the whole message."""
    sent = {"role": "assistant", "content": "Hi", "refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    assert rendered([USER, sent, USER])[1] == {"role": "assistant", "content": "Hi"}


def test_messages_of_errors_are_short_and_can_be_written():
    assert refusal(ChatRequest, CHAT | {"a\ud800": 1})[0] is None
    param, message = refusal(ChatRequest, CHAT | {"x" * 10_000: 1})
    assert (len(param), len(message)) == (MAX_MESSAGE, MAX_MESSAGE)
    error = ApiError(400, "x" * 10_000 + "\ud800")
    assert len(error.detail) == MAX_MESSAGE
    assert error.response().status_code == 400
