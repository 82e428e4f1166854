"""The HTTP API: routes, streams, limits, keys, errors in one shape.

`python -m tests.serve.api.test_app http://127.0.0.1:8000 1000` lets schemathesis send that many requests of each kind
to each route of a server that runs.
"""

import asyncio
import contextlib
import json
import logging
import socket
import subprocess
import sys
from collections import Counter

import httpx
import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import just
from tests.serve.api.fakes import MODEL, FakeService, failed, live

from fulmen.config import UserError
from fulmen.data import ImageProcessor
from fulmen.serve.api.app import create_app
from fulmen.serve.api.images import ImageReader
from fulmen.serve.types import Piece, QueueFull

HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
GO_ON = {"model": MODEL, "prompt": "Lightning", "max_tokens": 100}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "go", "parameters": {"type": "object"}}}
NEEDED, USER = ("model", "messages", "prompt", "tokens"), HELLO["messages"]


@pytest.fixture
def service(tokenizer):
    return FakeService(tokenizer)


@pytest.fixture
def new_app(service, tokenizer):
    return lambda **settings: create_app(service, model_name=MODEL, tokenizer=tokenizer, **settings)


@pytest.fixture
def app(new_app):
    return new_app()


@pytest.fixture
def client(app):
    return TestClient(app)


def error_of(response):
    """(status, message, param), of an answer in the shape of OpenAI's errors."""
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["message"], error["param"]


def events_of(response):
    """The chunks of a stream."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, end = response.text.removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# Answers


def test_chat(client, service, tokenizer):
    reply = client.post(CHAT, json=HELLO).json()
    assert reply["id"].startswith("chatcmpl-")
    assert reply["object"] == "chat.completion"
    assert reply["model"] == MODEL
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Lightning keeps a state.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt, params = service.asked[0]
    text = "<beginning_of_sentence>user name=user\nHello<end_of_sentence>\n<beginning_of_sentence>ai name=assistant\n"
    assert tokenizer.decode(prompt, skip_special=False) == text
    assert params.max_tokens is None
    assert reply["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 10,
        "total_tokens": len(prompt) + 10,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert service.open == 0


def test_chat_streams_what_it_answers(client, service):
    body = HELLO | {"logprobs": True, "top_logprobs": 2}
    whole = client.post(CHAT, json=body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events_of(client.post(CHAT, json=body | options))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    *chunks, last = chunks
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(chunk["usage"] is None for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == whole["choices"][0]["message"]["content"]
    tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert tokens == whole["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == text
    assert [len(token["top_logprobs"]) for token in tokens] == [2] * 9
    assert service.open == 0


def test_no_usage_unless_asked_for(client):
    assert all("usage" not in chunk for chunk in events_of(client.post(CHAT, json=HELLO | {"stream": True})))


def test_usage_can_come_with_every_chunk(client):
    options = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    chunks = events_of(client.post(CHAT, json=HELLO | options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[1], counts[-1]) == (1, 10)


def test_several_answers(client, service):
    service.text = ["One.", "Another one.", "The third."]
    reply = client.post(CHAT, json=HELLO | {"n": 3}).json()
    assert [choice["message"]["content"] for choice in reply["choices"]] == service.text
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    chunks = events_of(client.post(CHAT, json=HELLO | {"n": 3, "stream": True}))
    texts = ["", "", ""]
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == service.text


def test_an_empty_answer_is_an_empty_string(client, service):
    service.text = ""
    assert client.post(CHAT, json=HELLO).json()["choices"][0]["message"]["content"] == ""


def test_limits_of_an_answer(client):
    choice = client.post(CHAT, json=HELLO | {"max_tokens": 3}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Lightning", "length")
    choice = client.post(CHAT, json=HELLO | {"stop": [" a"]}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Lightning keeps", "stop")


def test_completions(client, service, tokenizer):
    reply = client.post(TEXT, json=GO_ON).json()
    assert reply["object"] == "text_completion"
    assert reply["choices"] == [
        {"index": 0, "text": "Lightning keeps a state.", "logprobs": None, "finish_reason": "stop"}
    ]
    prompt, _ = service.asked[0]
    assert prompt == [tokenizer.bos_id, *tokenizer.encode("Lightning")]
    client.post(TEXT, json={"model": MODEL, "prompt": "a"})
    assert service.asked[1][1].max_tokens == 16


@pytest.mark.parametrize("prompt", ["<end_of_sentence>", ["a", "b"], [1, 2], [[1, 2], [3]]])
def test_kinds_of_prompts(client, service, tokenizer, prompt):
    body = {"model": MODEL, "prompt": prompt, "n": 2, "max_tokens": 2, "logprobs": 1}
    reply = client.post(TEXT, json=body).json()
    many = prompt if isinstance(prompt[0], list) or prompt == ["a", "b"] else [prompt]
    ids = [[tokenizer.bos_id, *tokenizer.encode(one)] if isinstance(one, str) else one for one in many]
    assert [asked for asked, _ in service.asked] == ids
    assert [choice["index"] for choice in reply["choices"]] == list(range(2 * len(many)))
    assert reply["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert reply["usage"]["completion_tokens"] == 2 * 2 * len(many)
    chunks = events_of(client.post(TEXT, json=body | {"stream": True, "stream_options": {"include_usage": True}}))
    assert chunks[-1]["usage"] == reply["usage"]
    for whole in reply["choices"]:
        parts = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == whole["index"]]
        assert "".join(part["text"] for part in parts) == whole["text"]
        assert [part["finish_reason"] for part in parts] == [None, "length"]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [value for part in parts for value in part["logprobs"][name]] == whole["logprobs"][name]
    assert service.open == 0


def test_logprobs_of_parts_of_characters(client, service, tokenizer):
    service.text = "a🎵b"
    logprobs = client.post(TEXT, json=GO_ON | {"logprobs": 0}).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"][0] == "a"
    assert logprobs["tokens"][1].startswith("bytes:\\xf0")
    assert (logprobs["text_offset"][0], logprobs["text_offset"][-1]) == (0, 2)
    assert logprobs["top_logprobs"] is None
    content = client.post(CHAT, json=HELLO | {"logprobs": True}).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == service.text


def test_a_probability_of_0_can_be_written(client, service):
    from fulmen.serve.types import TokenLogprobs

    least = TokenLogprobs(1, float("-inf"), ((2, float("-inf")),))
    service.pieces = lambda *_: [Piece(text="a", tokens=(1,), logprobs=(least,)), Piece(text="", reason="length")]
    token = client.post(CHAT, json=HELLO | {"logprobs": True, "top_logprobs": 1}).json()["choices"][0]["logprobs"]
    assert token["content"][0]["logprob"] == token["content"][0]["top_logprobs"][0]["logprob"] == -9999.0


# Functions


def test_calls(client, service, tokenizer):
    service.text = 'Well. <function_call>```typescript\nfunctions.go({"a": 1})\nfunctions.go({})\n```'
    reply = client.post(CHAT, json=HELLO | {"tools": [TOOL]}).json()["choices"][0]
    assert reply["finish_reason"] == "tool_calls"
    assert reply["message"]["content"] == "Well. "
    calls = reply["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"name": "go", "arguments": '{"a": 1}'},
        {"name": "go", "arguments": "{}"},
    ]
    assert len({call["id"] for call in calls}) == 2
    assert "system function_setting=functions" in tokenizer.decode(service.asked[0][0])
    # The same in a stream.
    choices = [
        chunk["choices"][0] for chunk in events_of(client.post(CHAT, json=HELLO | {"tools": [TOOL], "stream": True}))
    ]
    deltas = [delta for choice in choices for delta in choice["delta"].get("tool_calls", [])]
    assert deltas[0] == {
        "index": 0,
        "id": deltas[0]["id"],
        "type": "function",
        "function": {"name": "go", "arguments": ""},
    }
    for index, call in enumerate(calls):
        parts = [delta for delta in deltas if delta["index"] == index]
        assert "".join(part["function"]["arguments"] for part in parts) == call["function"]["arguments"]
        assert ["id" in part for part in parts] == [True] + [False] * (len(parts) - 1)
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_a_call_without_text_has_no_content(client, service):
    service.text = "```typescript\nfunctions.go({})\n```"
    assert client.post(CHAT, json=HELLO | {"tools": [TOOL]}).json()["choices"][0]["message"]["content"] is None
    # Who offers no functions gets no calls.
    for body in (HELLO, HELLO | {"tools": [TOOL], "tool_choice": "none"}):
        reply = client.post(CHAT, json=body).json()["choices"][0]
        assert (reply["message"]["content"], reply["finish_reason"]) == (service.text, "stop")


def test_logprobs_are_all_there_beside_calls(client, service, tokenizer):
    service.text = "Well. ```typescript\nfunctions.go({})\n```"
    body = HELLO | {"tools": [TOOL], "logprobs": True}
    whole = client.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in whole) == service.text
    choices = [chunk["choices"][0] for chunk in events_of(client.post(CHAT, json=body | {"stream": True}))]
    assert [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]] == whole


# Errors


def test_names_of_models(new_app):
    client = TestClient(new_app(aliases=["gpt"]))
    assert client.post(CHAT, json=HELLO | {"model": "gpt"}).json()["model"] == MODEL
    for path, body in ((CHAT, HELLO), (TEXT, GO_ON), ("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        status, message, param = error_of(client.post(path, json=body | {"model": "other"}))
        assert (status, message, param) == (404, "there is no model 'other' here: it is 'tiny'", "model")
    assert client.get("/v1/models/gpt").json() == client.get("/v1/models").json()["data"][0]
    assert error_of(client.get("/v1/models/a/b"))[0] == 404


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (UserError("no"), 400, {}),
        (QueueFull(7), 429, {"retry-after": "7"}),
        (RuntimeError("secret"), 500, {}),
    ],
)
def test_what_the_service_refuses(client, service, stream, error, status, headers, caplog):
    service.error = error
    for path, body in ((CHAT, HELLO), (TEXT, GO_ON)):
        response = client.post(path, json=body | {"stream": stream})
        found, message, _ = error_of(response)
        assert found == status
        assert headers.items() <= response.headers.items()
        assert "secret" not in message
    assert ("secret" in caplog.text) == (status == 500)


def test_one_of_several_prompts_is_refused(client, service, monkeypatch):
    accept = service.stream

    def stream(prompt, params):
        if len(service.asked) == 2:
            raise QueueFull(1)
        return accept(prompt, params)

    monkeypatch.setattr(service, "stream", stream)
    assert client.post(TEXT, json=GO_ON | {"prompt": ["a", "b", "c"]}).status_code == 429
    assert service.open == 0


@pytest.mark.parametrize(
    ("pieces", "status", "message"),
    [
        (failed("error", "not finite"), 500, "not finite"),
        (failed("error"), 500, "the engine has failed"),
        (failed("abort"), 503, "starting or stopping"),
        (lambda *_: [Piece(text="Light"), RuntimeError("secret")], 500, "its log says why"),
    ],
)
def test_answers_that_break_off(client, service, caplog, pieces, status, message):
    service.pieces = pieces
    for path, body in ((CHAT, HELLO), (TEXT, GO_ON), (TEXT, GO_ON | {"prompt": ["a", "b"]})):
        found, said, _ = error_of(client.post(path, json=body))
        assert (found, message in said) == (status, True)
        *before, last = events_of(client.post(path, json=body | {"stream": True}))
        assert message in last["error"]["message"]
        assert before
        assert not any(choice["finish_reason"] for chunk in before for choice in chunk["choices"])
        assert service.open == 0
    assert ("secret" in caplog.text) == ("log" in message)


def test_prompts_that_do_not_fit(client, service):
    status, message, param = error_of(client.post(TEXT, json=GO_ON | {"prompt": [1] * 400}))
    assert (status, param) == (400, "prompt")
    assert message == "prompt has 400 tokens; 400 is the longest context here, the answer included"
    messages = [{"role": "user", "content": "\x00" * 400}]
    response = client.post(CHAT, json=HELLO | {"messages": messages})
    assert error_of(response)[::2] == (400, "messages")
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert not service.asked


def test_answers_in_all_are_bounded(client):
    assert error_of(client.post(TEXT, json=GO_ON | {"prompt": ["a"] * 64, "n": 5}))[::2] == (400, "n")
    assert error_of(client.post(TEXT, json=GO_ON | {"n": 2, "best_of": 3}))[::2] == (400, "best_of")


def test_other_paths_and_methods(client):
    assert error_of(client.get("/nothing"))[0] == 404
    response = client.get(CHAT)
    assert error_of(response)[0] == 405
    assert response.headers["allow"] == "POST"
    assert client.get("/docs").status_code == 404


DEEP = b'{"model": "tiny", "messages": ' + b"[" * 101 + b"]" * 101 + b"}"
VERY_DEEP = b"[" * 200_000


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body must be a JSON object"),
        (b"[]", "the body must be a JSON object"),
        (b"{", "the body is not JSON: Expecting property name"),
        (b'{"model": "\xff"}', "the body is not UTF-8 (byte 11)"),
        (b'{"temperature": NaN}', "the body holds NaN, which is not JSON"),
        (b'{"temperature": -Infinity}', "the body holds -Infinity, which is not JSON"),
        (b'{"temperature": 1e999}', "the body holds a number that is too large"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "the body holds a number of 5000 digits"),
        (DEEP, "the body is nested too deeply: at most 100 levels"),
        (VERY_DEEP, "the body is nested too deeply: at most 100 levels"),
        (b'{"a":' * 50_000, "the body is nested too deeply: at most 100 levels"),
    ],
)
def test_bodies_that_are_no_requests(client, body, message):
    status, said, _ = error_of(client.post(CHAT, content=body, headers={"content-type": "application/json"}))
    assert status == 400
    assert said.startswith(message)


def test_only_json_is_read(client):
    """Pages of other origins can send other types without asking first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = client.post(CHAT, content=json.dumps(HELLO), headers={"content-type": kind})
        assert error_of(response)[0] == 400


def test_text_that_utf8_cannot_hold(client):
    def send(client, body):
        return client.post(CHAT, content=json.dumps(body), headers={"content-type": "application/json"})

    for body in (HELLO | {"messages": [{"role": "user", "content": "\ud800"}]}, HELLO | {"\ud800": 1}):
        assert error_of(send(client, body))[0] == 400
    body = HELLO | {"tools": [{"type": "function", "function": {"name": "go", "parameters": {"a": "\ud800"}}}]}
    for choice in ("auto", "required"):
        assert error_of(send(client, body | {"tool_choice": choice}))[0] == 400


# Size, keys, origins


def test_bodies_that_are_too_large(new_app, service):
    client = TestClient(new_app(max_body=1000))
    status, message, _ = error_of(client.post(CHAT, json=HELLO | {"user": "x" * 1000}))
    assert (status, message) == (413, "the body has more than the 1000 bytes that this server takes")
    fits = json.dumps(HELLO).encode().ljust(1000)
    headers = {"content-type": "application/json"}
    assert client.post(CHAT, content=fits, headers=headers).status_code == 200
    read = []

    def pieces():
        for _ in range(100):
            read.append(1)
            yield b" " * 100

    assert client.post(CHAT, content=pieces(), headers=headers).status_code == 413
    assert client.post(CHAT, content=b"{}", headers=headers | {"content-length": "9" * 5000}).status_code == 413


@pytest.mark.parametrize("chunked", [False, True])
def test_the_rest_of_a_large_body_is_not_read(new_app, chunked):
    """100 MB are announced, or come without end; the answer is there before they are."""
    length = "Transfer-Encoding: chunked" if chunked else "Content-Length: 100000000"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{length}\r\n\r\n".encode()
    with live(new_app(max_body=1000)) as address, socket.create_connection(address.split("/")[2].split(":")) as peer:
        peer.settimeout(20)
        peer.sendall(head + (b"400\r\n" + b" " * 1024 + b"\r\n" if chunked else b" "))
        answer = b""
        while part := peer.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"that this server takes" in answer


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", "secret", "Basic secret", "Bearer secret\xe9"])
def test_a_key_is_needed(new_app, header):
    client = TestClient(new_app(api_key="secret"))
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    for method, path in (
        ("POST", CHAT),
        ("POST", "/tokenize"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/x"),
    ):
        response = client.request(method, path, headers=headers)
        assert error_of(response)[0] == 401
        assert response.headers["www-authenticate"] == "Bearer"
    assert client.get("/openapi.json", headers=headers).status_code == 401
    assert client.get("/health", headers=headers).status_code == 200
    assert client.get("/", headers=headers).status_code == 200


def test_the_right_key(new_app):
    client = TestClient(new_app(api_key="sécret"), headers={"authorization": "bearer sécret".encode()})
    assert client.post(CHAT, json=HELLO).status_code == 200
    twice = [("authorization", b"Bearer a"), ("authorization", "Bearer sécret".encode())]
    assert TestClient(client.app).get("/v1/models", headers=twice).status_code == 401


def test_other_origins(new_app):
    preflight = {"origin": "http://a.example", "access-control-request-method": "POST"}
    closed, opened = TestClient(new_app()), TestClient(new_app(cors_origins=["http://a.example"], api_key="k"))
    assert closed.options(CHAT, headers=preflight).status_code == 405
    assert "access-control-allow-origin" not in closed.post(CHAT, json=HELLO, headers=preflight).headers
    allowed = opened.options(CHAT, headers=preflight)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "http://a.example")
    assert opened.options(CHAT, headers=preflight | {"origin": "http://b.example"}).status_code == 400
    # Without it a page could not read why it was refused.
    assert opened.post(CHAT, json=HELLO, headers=preflight).headers["access-control-allow-origin"] == "http://a.example"


# Clients that leave, servers that stop


async def call(app, body, path=CHAT, leave_after=None):
    """The messages of an answer over plain ASGI. The client leaves after so many of them; None: it stays."""
    sent, left = [], asyncio.Event()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    incoming = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive():
        if incoming:
            return incoming.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)
        if len(sent) == leave_after:
            left.set()

    if leave_after == 0:
        left.set()
    await asyncio.wait_for(app(scope, receive, send), 10)
    return sent


@pytest.mark.parametrize(("path", "body"), [(CHAT, HELLO), (TEXT, GO_ON), (TEXT, GO_ON | {"prompt": ["a", "b"]})])
@pytest.mark.parametrize("leave_after", [0, 1, 2, 4])
def test_who_leaves_a_stream_ends_its_request(app, service, path, body, leave_after):
    service.hold = 5
    asyncio.run(call(app, body | {"stream": True}, path, leave_after))
    assert service.left.is_set()
    assert service.open == 0


@pytest.mark.parametrize(("path", "body"), [(CHAT, HELLO), (TEXT, GO_ON), (TEXT, GO_ON | {"prompt": ["a", "b"]})])
def test_who_leaves_before_a_whole_answer_ends_its_request(app, service, path, body):
    service.hold = 2
    (start, _) = asyncio.run(call(app, body, path, leave_after=0))
    assert start["status"] == 499
    assert service.left.is_set()
    assert service.open == 0


def test_a_stream_whose_sending_fails_ends_its_request(app, service):
    service.hold = 5

    async def go():
        with pytest.raises(OSError, match="gone"):
            await call_failing(app)

    async def call_failing(app):
        async def send(message):
            if message["type"] == "http.response.body":
                raise OSError("gone")

        incoming = [{"type": "http.request", "body": json.dumps(HELLO | {"stream": True}).encode()}]

        async def receive():
            return incoming.pop() if incoming else await asyncio.Event().wait()

        scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "http_version": "1.1"}
        await app(scope | {"headers": [(b"content-type", b"application/json")]}, receive, send)

    asyncio.run(go())
    assert service.open == 0


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_a_live_server(app, service, stream):
    service.hold = 3
    with live(app) as address, httpx.Client(base_url=address) as http:
        with http.stream("POST", CHAT, json=HELLO | {"stream": True}) as response:
            lines = response.iter_lines()  # kept: the connection would be closed with it
            assert next(lines).startswith("data: ")
            if not stream:
                service.left.clear()
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(address + CHAT, json=HELLO, timeout=0.5)
                assert service.left.wait(10)
                service.left.clear()
        assert service.left.wait(10)


def test_time_runs_out(new_app, service):
    service.hold = 3
    client = TestClient(new_app(request_timeout=0.05))
    for path, body in ((CHAT, HELLO), (TEXT, GO_ON | {"prompt": ["a", "b"]})):
        assert error_of(client.post(path, json=body))[0] == 504
        *_, last = events_of(client.post(path, json=body | {"stream": True}))
        assert last["error"]["code"] == "timeout"
    assert service.open == 0


@pytest.mark.parametrize("why", ["stopping", "not ready"])
def test_not_ready(app, client, service, why):
    assert client.get("/health").json() == {"status": "ok"}
    if why == "stopping":
        app.state.stopping = True
    else:
        service.ready = False
    for response in (
        client.get("/health"),
        client.post(CHAT, json=HELLO),
        client.post(TEXT, json=GO_ON),
        client.post("/tokenize", json={"prompt": "a"}),
    ):
        assert error_of(response)[0] == 503
        assert response.headers["retry-after"] == "5"
    assert client.get("/metrics").status_code == 200
    assert not service.asked


@pytest.mark.parametrize(
    ("path", "body", "encode"), [(CHAT, HELLO, "chat.encode_chat"), (TEXT, GO_ON, "completions._encode")]
)
def test_a_stop_while_a_prompt_is_encoded(client, service, monkeypatch, path, body, encode):
    def stopping(*_, **__):
        service.ready = False
        return [5] if path == CHAT else [[5]]

    monkeypatch.setattr(f"fulmen.serve.api.{encode}", stopping)
    response = client.post(path, json=body)
    assert error_of(response)[0] == 503
    assert response.headers["retry-after"] == "5"
    assert not service.asked


# The other routes


def test_models(client):
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == (MODEL, "model", 400)
    assert client.get(f"/v1/models/{MODEL}").json() == card


def test_tokens_there_and_back(client, service, tokenizer):
    reply = client.post("/tokenize", json={"prompt": "Grüße 🎉"}).json()
    assert reply == {"tokens": reply["tokens"], "count": len(reply["tokens"]), "max_model_len": 400}
    assert client.post("/detokenize", json=reply["tokens"] and {"tokens": reply["tokens"]}).json() == {
        "prompt": "<beginning_of_sentence>Grüße 🎉"
    }
    bare = client.post("/tokenize", json={"prompt": "Grüße 🎉", "add_special_tokens": False}).json()
    assert bare["tokens"] == reply["tokens"][1:]
    body = {"messages": HELLO["messages"], "tools": [TOOL]}
    tokens = client.post("/tokenize", json=body).json()["tokens"]
    client.post(CHAT, json=HELLO | {"tools": [TOOL]})
    assert service.asked[0][0] == tokens
    whole = client.post("/tokenize", json=body | {"add_generation_prompt": False}).json()["tokens"]
    assert tokens[: len(whole)] == whole != tokens
    assert error_of(client.post("/detokenize", json={"tokens": [1, 320]}))[::2] == (400, "tokens")


def test_metrics(new_app, service):
    client = TestClient(new_app(render_metrics=lambda: b"fulmen_own 1\n"))
    client.post(CHAT, json=HELLO)
    client.get("/made/up")
    client.request("BREW", CHAT)
    text = client.get("/metrics").text
    assert text.endswith("fulmen_own 1\n")
    assert 'fulmen_http_requests_total{method="POST",route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'fulmen_http_requests_total{method="GET",route="other",status="404"} 1.0' in text
    assert 'method="other"' in text
    assert "fulmen_http_requests_in_flight 1.0" in text
    assert "BREW" not in text
    assert "made" not in text


def test_the_page_may_do_little(client):
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "connect-src 'self'" in policy
    assert "innerHTML" not in response.text
    assert "//" not in response.text.replace("http://www.w3.org/2000/svg", "").replace("// ", "")


def test_serving_is_imported_where_it_is_used():
    code = (
        "import sys, fulmen.serve; print([name for name in ('fastapi', 'uvicorn', 'pydantic') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# The document


def test_the_document_has_the_errors(new_app):
    document = new_app(api_key="k").openapi()
    responses = document["paths"][CHAT]["post"]["responses"]
    assert set(responses) == {"200", "400", "401", "404", "408", "413", "429", "500", "503", "504"}
    assert "text/event-stream" in responses["200"]["content"]
    assert document["paths"][CHAT]["post"]["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/health"]["get"]
    assert "422" not in json.dumps(document)


def attack(schema, examples, model=MODEL):
    """Let schemathesis send what the document allows and what it does not; raises where an answer is not in it.

    Returns the statuses of the answers for each operation.
    """
    limits = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    statuses = {}

    def check(case, mode):
        is_good = mode == schemathesis.GenerationMode.POSITIVE and isinstance(case.body, dict)
        if is_good and "model" in case.body:
            case.body["model"] = model
        send(case)
        if is_good:
            # All fields together seldom fit each other; those that are needed mostly do.
            case.body = {name: value for name, value in case.body.items() if name in NEEDED}
            if case.body.get("messages"):
                case.body["messages"] = [item for item in case.body["messages"] if item["role"] == "user"] or USER
            send(case)

    def send(case):
        # Whether fields fit each other, and whether a prompt is short enough, is not in the document.
        response = case.call_and_validate(excluded_checks=[schemathesis.checks.positive_data_acceptance])
        statuses.setdefault(f"{case.method} {case.path}", Counter())[response.status_code] += 1

    for operation in schema.get_all_operations():
        for mode in schemathesis.GenerationMode:
            cases = operation.ok().as_strategy(generation_mode=mode)
            with contextlib.suppress(Unsatisfiable):  # an operation without parameters has no wrong ones
                limits(given(case=cases, mode=just(mode))(check))()
    return statuses


@pytest.mark.parametrize("sees", [False, True])
def test_the_document_is_true(new_app, tokenizer, caplog, sees):
    app = new_app(images=ImageReader(ImageProcessor(crop_size=56), tokenizer.image_id) if sees else None)
    with caplog.at_level(logging.ERROR):
        statuses = attack(schemathesis.openapi.from_asgi("/openapi.json", app), examples=20)
    assert not caplog.records
    assert len(statuses) == 9
    for path in (CHAT, TEXT, "/tokenize", "/detokenize"):
        assert statuses[f"POST {path}"][200] > 0
        assert statuses[f"POST {path}"][400] > 0


if __name__ == "__main__":
    served = schemathesis.openapi.from_url(sys.argv[1] + "/openapi.json")
    name = httpx.get(sys.argv[1] + "/v1/models").json()["data"][0]["id"]
    print(attack(served, int(sys.argv[2]), name))
