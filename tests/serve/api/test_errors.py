"""What is wrong with a request is said in one shape, and nothing of it is asked."""

import json

import pytest
from fastapi.testclient import TestClient
from tests.serve.api.fakes import MODEL, failed
from tests.serve.api.requests import CHAT, GO_ON, HELLO, TEXT, error_of, events_of

from fulmen.config import UserError
from fulmen.serve.types import Piece, QueueFull


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
